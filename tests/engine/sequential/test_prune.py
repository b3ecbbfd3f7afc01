"""Blocks pruned one after the other: each on what the pruned ones before it put out."""

import copy
import json

import pytest
import torch
from torch import nn

import prunus
from prunus import Sequential, SparseGPT, Wanda
from prunus.allocators import OWL, Problem, Unit
from prunus.core.blocks import find_blocks
from prunus.core.layers import all_layers
from prunus.engine.allocator_signals import with_signals
from prunus.engine.sequential import walk as block_walk

from tests.helpers.blocks import (
    BLOCKS,
    Block,
    ByKeyword,
    Dictionaries,
    Doubling,
    Named,
    Residual,
    Skipping,
    Toy,
    Tuples,
    check_as_the_slow_way,
    data,
    fail_at,
    forwards,
    slowly,
    toy,
    walk,
)
from tests.helpers.training import same, snapshot

# transformers' progress bars
pytestmark = pytest.mark.filterwarnings("ignore:IProgress not found")

# small models


@pytest.mark.parametrize("cls", [Toy, ByKeyword, Tuples, Residual, Named])
@pytest.mark.parametrize("pruner", ["sparsegpt", "ria", Wanda(swap=True, refit=True), "magnitude"])
def test_blocks_are_pruned_on_the_outputs_of_pruned_blocks(cls, pruner):
    # `magnitude` alone would rank all layers together
    arguments = {"sparsity": 0.5, "allocator": "uniform"}
    check_as_the_slow_way(toy(cls), pruner, data(), **arguments)


@pytest.mark.parametrize("pattern", ["2:4", "row"])
def test_patterns_are_those_of_the_whole_model(pattern):
    arguments = {"pattern": pattern} if ":" in pattern else {"pattern": pattern, "sparsity": 0.5}
    check_as_the_slow_way(toy(), "sparsegpt", data(), **arguments)


def test_walking_is_not_the_same_as_pruning_at_once():
    model, at_once = toy(), toy()
    walk(model)
    walk(at_once, how=False)
    assert torch.equal(model.layers[0].down.weight, at_once.layers[0].down.weight)
    assert not torch.equal(model.layers[2].up.weight, at_once.layers[2].up.weight)


def test_a_name_true_and_an_object_say_the_same():
    models = [toy() for _ in range(4)]
    hows = [True, "layers", Sequential(), Sequential("layers", device="cpu")]
    for model, how in zip(models, hows, strict=True):
        walk(model, how=how)
    assert all(same(model, snapshot(models[0])) for model in models)


def test_inputs_are_on_their_way_through_all_batches_whatever_their_shapes():
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 5, 6), (1, 2, 6), (7, 6)]
    batches = [torch.randn(shape, generator=generator) for shape in shapes]
    check_as_the_slow_way(toy(), "sparsegpt", prunus.Calibration(batches))


def test_each_block_runs_twice_for_each_batch():
    model, batches = toy(), 3
    walk(model, calibration=data(count=batches))
    # the very first batch once more, to see in what form blocks return their outputs; the last
    # block's outputs are for nobody
    assert [block.seen for block in model.layers] == [2 * batches + 1, 2 * batches, batches]


def test_an_allocator_that_looks_at_inputs_runs_each_block_once_more():
    model, batches = toy(), 3
    walk(model, calibration=data(count=batches), allocator="owl")
    assert [block.seen for block in model.layers] == [3 * batches + 2, 3 * batches, 2 * batches]


@pytest.mark.parametrize("pruner", ["wanda", "magnitude"])
def test_owl_looks_at_the_dense_model(pruner):
    model, dense, calibration = toy(), toy(), data()
    with torch.no_grad():
        for m in (model, dense):
            m.layers[1].up.weight[:2] *= 20
    layers = [layer for layer in all_layers(dense) if layer.name.startswith("layers")]
    method = prunus.PruningModifier(Wanda(), 0.5, allocator=OWL()).method
    seen = with_signals(method, layers, dense, calibration).signals
    whole = [Unit(layer.name, layer.shape, layer.weight.numel(), 0) for layer in layers]
    plan = OWL().allocate(Problem(whole, 0.5, lambda k: [], seen))
    result = walk(model, pruner, calibration=calibration, allocator="owl")
    assert [row.zeros for row in result.rows] == list(plan.drop)
    assert len(set(plan.sparsity.values())) > 1
    slowly(dense, pruner, calibration, table=plan.sparsity)
    assert same(model, snapshot(dense))


class Choosy(Block):
    """Two layers of one input, of which the second sees another one in some batches."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(8, 12)

    def forward(self, hidden_states):
        x = self.norm(hidden_states)
        odd = x if len(x) == 4 else x + 1
        return hidden_states + self.down(torch.tanh(self.up(x) + self.other(odd)))


@pytest.mark.parametrize("allocator", ["uniform", OWL()])
def test_blocks_whose_layers_part_ways_are_measured_anew(allocator):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(n, 5, 6, generator=generator) for n in (4, 3)]
    torch.manual_seed(0)
    model, calibration = Toy([Choosy() for _ in range(2)]), prunus.Calibration(batches)
    dense = copy.deepcopy(model)
    result = walk(model, calibration=calibration, allocator=allocator)
    shares = {row.name: row.sparsity for row in result.rows}
    slowly(dense, "sparsegpt", calibration, table=shares)
    assert same(model, snapshot(dense))


@pytest.mark.parametrize("value", ["true", "layers"])
def test_a_recipe_can_ask_for_it(value):
    text = f"""
modifiers:
  - prune: {{pruner: sparsegpt, sparsity: 0.5, layers: ["layers.*"], sequential: {value}}}
"""
    model, called = toy(), toy()
    result = prunus.prune(model, text, calibration=data())
    walk(called)
    assert same(model, snapshot(called))
    assert prunus.Recipe.load(result.recipe.to_yaml()) == result.recipe


def test_a_call_says_more_than_the_recipe():
    text = "modifiers:\n  - prune: {pruner: wanda, sparsity: 0.5, sequential: nowhere, layers: ['layers.*']}\n"
    with pytest.raises(ValueError, match="no list of blocks 'nowhere'"):
        prunus.prune(toy(), text, calibration=data())
    assert prunus.prune(toy(), text, calibration=data(), sequential="layers").sparsity == 0.5


def test_modes_and_forwards_are_as_before():
    model = toy().train()
    model.layers[1].eval()
    before = [(module, module.training) for module in model.modules()]
    walk(model)
    assert all(module.training == mode for module, mode in before)
    assert forwards(model) == []


def test_a_forward_that_someone_else_put_there_stays():
    model, calls = toy(), []
    block = model.layers[0]
    original = block.forward

    def wrapper(x):
        calls.append(1)
        return original(x)

    block.forward = wrapper
    walk(model)
    assert block.__dict__["forward"] is wrapper
    assert len(calls) == 7
    del block.forward
    reference = toy()
    walk(reference)
    assert same(model, snapshot(reference))


@pytest.mark.parametrize("number", range(BLOCKS))
def test_a_failure_in_any_block_takes_all_back(number, monkeypatch):
    model = toy().train()
    before = snapshot(model)
    fail_at(monkeypatch, number)
    with pytest.raises(KeyboardInterrupt):
        walk(model)
    assert same(model, before)
    assert forwards(model) == []
    assert all(module.training for module in model.modules())


def test_a_failure_on_the_way_to_the_next_block_takes_all_back(monkeypatch):
    model = toy()
    before = snapshot(model)
    advance = block_walk.advance

    def failing(block, items, number):
        if number == 1:
            raise RuntimeError("on the way")
        advance(block, items, number)

    monkeypatch.setattr(block_walk, "advance", failing)
    with pytest.raises(RuntimeError, match="on the way"):
        walk(model)
    assert same(model, before)


def test_a_failure_after_all_blocks_takes_all_back():
    def bad(model, batch):
        raise RuntimeError("no norms")

    model = Toy([nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(2)])
    before = snapshot(model)
    norms = prunus.Calibration([torch.ones(2, 6)], forward=bad)
    with pytest.raises(RuntimeError, match="no norms"):
        walk(model, calibration=data(4, 6), recalibrate=norms)
    assert same(model, before)


def test_inputs_that_are_no_numbers_take_all_back():
    model = toy()
    before = snapshot(model)
    with torch.no_grad():
        before["layers.1.norm.weight"][0] = float("inf")
        model.layers[1].norm.weight[0] = float("inf")
    with pytest.raises(ValueError, match=r"layers\.1\.up\.weight has NaN or infinite inputs"):
        walk(model)
    assert same(model, before)


def test_the_head_and_the_stem_stay_by_default():
    model = toy()
    before = snapshot(model)
    result = prunus.prune(
        model, "sparsegpt", sparsity=0.5, exclude="stem", calibration=data(), sequential=True
    )
    assert result.left_dense == ["head"]
    for name in ("stem.weight", "head.weight"):
        assert torch.equal(model.get_parameter(name), before[name])


# what cannot be


def refused(message, model=None, pruner="sparsegpt", **arguments):
    model = toy() if model is None else model
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        walk(model, pruner, **arguments)
    assert same(model, before)
    assert forwards(model) == []


def test_methods_that_need_gradients_are_refused():
    refused("sequential: pruner 'cap' needs gradients of the whole model's loss", pruner="cap")


def test_ranking_all_layers_together_is_refused():
    refused("allocator 'global' ranks all layers before the first is pruned", allocator="global")
    refused("allocator 'global' ranks all layers", pruner="magnitude")


def test_a_model_without_blocks_is_refused():
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    refused("sequential: the model has no list of blocks; name one", plain, layers=["0", "2"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer", "no list of blocks 'layer'; did you mean 'layers'"),
        ("stem", "no list of blocks 'stem'"),
        ("nowhere.at.all", "no list of blocks 'nowhere.at.all'.*layers"),
    ],
)
def test_a_name_that_is_no_list_is_refused(name, message):
    refused(message, how=name)


def test_a_model_that_computes_between_its_blocks_is_refused():
    refused("something is computed between layers.0 and layers.1;", toy(Doubling))


def test_a_model_that_leaves_blocks_out_is_refused():
    refused("the model does not call all of 'layers'", toy(Skipping))


def test_blocks_that_return_no_tensor_are_refused():
    refused("a block returns dict, not a tensor; prune all at once", toy(Dictionaries))


def test_no_data_is_refused():
    refused("the calibration data is empty; nothing was pruned", calibration=data(count=0))
    model = toy()
    with pytest.raises(ValueError, match="sequential: blocks need inputs; pass calibration="):
        prunus.prune(model, "ri", sparsity=0.5, layers="layers.*", sequential=True)


def test_weights_without_a_folder_are_refused():
    with pytest.raises(ValueError, match="say in which folder to write the pruned ones"):
        Sequential(weights="somewhere")


# a folder of finished blocks


@pytest.mark.parametrize("number", range(BLOCKS))
@pytest.mark.parametrize("pruner", ["sparsegpt", "ria"])
def test_a_killed_run_goes_on_where_it_was(number, pruner, tmp_path, monkeypatch):
    reference, how = toy(), Sequential(folder=str(tmp_path / "run"))
    expected = walk(reference, pruner)
    model = toy()
    before = snapshot(model)
    fail_at(monkeypatch, number)
    with pytest.raises(KeyboardInterrupt):
        walk(model, pruner, how=how)
    assert same(model, before)
    begun = fail_at(monkeypatch, None)
    result = walk(model, pruner, how=how)
    assert begun == [str(i) for i in range(number, BLOCKS)]
    assert same(model, snapshot(reference))
    assert result.rows == expected.rows
    assert result.masks.keys() == expected.masks.keys()
    assert all(torch.equal(mask, expected.masks[name]) for name, mask in result.masks.items())
    again = toy()
    walk(again, pruner, how=how)
    assert begun == [str(i) for i in range(number, BLOCKS)]
    assert same(again, snapshot(reference))


def test_a_failure_after_finished_blocks_were_loaded_takes_all_back(tmp_path, monkeypatch):
    how, model = Sequential(folder=str(tmp_path)), toy()
    before = snapshot(model)
    for number in (1, 2):
        fail_at(monkeypatch, number)
        with pytest.raises(KeyboardInterrupt):
            walk(model, how=how)
        assert same(model, before)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"sparsity": 0.6}, "settings"),
        ({"pruner": "wanda"}, "settings"),
        ({"pruner": SparseGPT(damp=0.1)}, "settings"),
        ({"allocator": OWL(outlier=1.5)}, "settings"),
        ({"layers": ["layers.*.up"], "sparsity": 0.5}, "layers|settings"),
        ({"calibration": data(count=2)}, "calibration data"),
        ({"calibration": data(4, 4, 6)}, "calibration data"),
    ],
)
def test_the_folder_of_another_run_is_refused_with_the_reason(arguments, key, tmp_path):
    how = Sequential(folder=str(tmp_path))
    walk(toy(), how=how)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    refused(f"holds the blocks of a run with other ({key}) .*delete it", how=how, **arguments)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_the_folder_is_a_whole_checkpoint(tmp_path):
    from safetensors.torch import load_file

    model = toy()
    walk(model, how=Sequential(folder=str(tmp_path)))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.state_dict().keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], model.state_dict()[name])
    sizes = sum(t.nbytes for t in model.state_dict().values())
    assert index["metadata"]["total_size"] >= sizes
    assert not list(tmp_path.glob(".*"))


# which list


def test_the_list_with_most_weights_is_found():
    model = toy()
    model.small = nn.ModuleList([Block(2), Block(2)])
    model.alike = nn.ModuleList([nn.Linear(90, 90), nn.Linear(90, 90)])  # no blocks
    assert find_blocks(model).name == "layers"
    assert find_blocks(nn.Sequential(model)).name == "0.layers"
    assert find_blocks(model, "small").name_of(1) == "small.1"


def test_layers_know_their_block():
    blocks = find_blocks(toy(Named))
    assert [blocks.name_of(i) for i in range(BLOCKS)] == [f"layers.layer_{i}" for i in range(3)]
    assert blocks.number_of("layers.layer_2.up.weight") == 2
    assert blocks.number_of("head") is None
    numbered = find_blocks(toy())
    assert numbered.number_of("layers.1.up") == 1
    assert numbered.number_of("layers.10.up") is None
    assert numbered.number_of("layers_1.up") is None
