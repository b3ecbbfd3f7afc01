"""Pruning block by block, beside pruning the blocks one after the other on the whole model."""

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
from prunus.engine import step as engine
from prunus.engine.allocator_signals import with_signals
from prunus.engine.sequential import walk as block_walk

from tests.helpers.training import same, snapshot

# transformers' progress bars
pytestmark = pytest.mark.filterwarnings("ignore:IProgress not found")
BLOCKS = 3


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.5)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.seen = 0

    def forward(self, hidden_states):
        self.seen += 1
        x = torch.tanh(self.up(self.norm(hidden_states)))
        return hidden_states + self.drop(self.down(x))


class Toy(nn.Module):
    """A stem, a list of blocks, and a head."""

    def __init__(self, blocks=None):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.layers = nn.ModuleList([Block() for _ in range(BLOCKS)] if blocks is None else blocks)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ByKeyword(Toy):
    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(hidden_states=x)
        return self.head(x)


class InATuple(Block):
    def forward(self, hidden_states):
        return (super().forward(hidden_states),)


class Tuples(Toy):
    def __init__(self):
        super().__init__([InATuple() for _ in range(BLOCKS)])

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)[0]
        return self.head(x)


class WithResidual(Block):
    def forward(self, hidden_states, residual=None):
        residual = hidden_states if residual is None else residual + hidden_states
        return self.down(torch.tanh(self.up(self.norm(residual)))), residual


class Residual(Toy):
    """The residual stream goes beside the blocks' outputs, and changes on the way."""

    def __init__(self):
        super().__init__([WithResidual() for _ in range(BLOCKS)])

    def forward(self, x):
        x, residual = self.stem(x), None
        for layer in self.layers:
            x, residual = layer(x, residual=residual)
        return self.head(x + residual)


class Named(Toy):
    """Blocks with names instead of numbers, as torchvision's."""

    def __init__(self):
        super().__init__()
        named = {f"layer_{i}": block for i, block in enumerate(self.layers)}
        self.layers = nn.Sequential()
        for name, block in named.items():
            self.layers.add_module(name, block)


class Doubling(Toy):
    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = 2 * layer(x)
        return self.head(x)


class Skipping(Toy):
    def forward(self, x):
        return self.head(self.layers[0](self.stem(x)))


class Dictionary(Block):
    def forward(self, hidden_states):
        return {"hidden": super().forward(hidden_states)}


class Dictionaries(Toy):
    def __init__(self):
        super().__init__([Dictionary() for _ in range(BLOCKS)])

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)["hidden"]
        return self.head(x)


def toy(cls=Toy):
    torch.manual_seed(0)
    return cls()


def data(*shape, count=3):
    generator = torch.Generator().manual_seed(1)
    return prunus.Calibration(
        [torch.randn(shape or (4, 5, 6), generator=generator) for _ in range(count)]
    )


def walk(model, pruner="sparsegpt", how=True, calibration=None, layers="layers.*", **arguments):
    arguments = {"sparsity": 0.5, **arguments}
    calibration = calibration or data()
    return prunus.prune(
        model, pruner, layers=layers, calibration=calibration, sequential=how, **arguments
    )


def slowly(model, pruner, calibration, **arguments):
    """Block after block on the whole model, which runs anew for each."""
    blocks = find_blocks(model)
    rows = []
    table = arguments.pop("table", None)
    for number in range(len(blocks)):
        layers = f"{blocks.name_of(number)}.*"
        if table is not None:
            inside = {n: s for n, s in table.items() if blocks.number_of(n) == number}
            arguments["allocator"] = inside
        result = prunus.prune(model, pruner, layers=layers, calibration=calibration, **arguments)
        rows += result.rows
    return rows


def check_as_the_slow_way(model, pruner, calibration, **arguments):
    slow = copy.deepcopy(model)
    arguments = arguments or {"sparsity": 0.5}
    name = find_blocks(model).name
    result = prunus.prune(
        model,
        pruner,
        layers=f"{name}.*",
        calibration=calibration,
        sequential=True,
        **arguments,
    )
    assert result.rows == slowly(slow, pruner, calibration, **arguments)
    assert same(model, snapshot(slow))
    assert list(result.masks) == [row.name + ".weight" for row in result.rows]
    for row in result.rows:
        assert torch.equal(
            result.masks[f"{row.name}.weight"], model.get_submodule(row.name).weight != 0
        )
    return result


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


# what stays as it was


def forwards(model):
    return [module for module in model.modules() if "forward" in module.__dict__]


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


def fail_at(monkeypatch, number):
    """Interrupt the pruning of one block; returns the names of the blocks that were begun."""
    begun = []

    def step(method, layers, *rest):
        begun.append(layers[0].name.split(".")[-2])
        if begun[-1] == str(number):
            raise KeyboardInterrupt
        return engine.prune_step(method, layers, *rest)

    monkeypatch.setattr(block_walk, "prune_step", step)
    return begun


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


def test_layers_outside_the_blocks_are_refused_by_name():
    refused("sequential: stem is in no block of 'layers'; exclude it", layers=["stem", "layers.*"])


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


def meta(model):
    return copy.deepcopy(model).to("meta")


def saved(model, folder):
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    return str(folder)


def check_from_disk(model, tmp_path, load, **arguments):
    """A model whose weights are read block by block, beside the one in memory."""
    weights, folder = saved(model, tmp_path / "dense"), tmp_path / "pruned"
    bare = meta(model)
    parameters = dict(bare.named_parameters())
    how = Sequential(weights=weights, folder=str(folder))
    result = walk(bare, how=how, **arguments)
    assert result.rows == walk(model, **arguments).rows
    assert all(p.is_meta for p in bare.layers.parameters())
    assert all(parameters[name] is p for name, p in bare.named_parameters())
    load(model, folder)
    return folder


def load_and_compare(model, folder):
    from safetensors.torch import load_file

    state = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    assert same(model, state)


@pytest.mark.parametrize("arguments", [{}, {"allocator": "owl"}, {"pruner": Wanda(refit=True)}])
def test_a_model_on_disk_is_pruned_as_one_in_memory(arguments, tmp_path):
    check_from_disk(toy(), tmp_path, load_and_compare, **arguments)


@pytest.mark.parametrize("number", range(BLOCKS))
def test_a_killed_run_from_disk_goes_on(number, tmp_path, monkeypatch):
    model = toy()
    weights = saved(model, tmp_path / "dense")
    how = Sequential(weights=weights, folder=str(tmp_path / "pruned"))
    fail_at(monkeypatch, number)
    with pytest.raises(KeyboardInterrupt):
        walk(meta(model), how=how)
    begun = fail_at(monkeypatch, None)
    walk(meta(model), how=how)
    assert begun == [str(i) for i in range(number, BLOCKS)]
    walk(model)
    load_and_compare(model, tmp_path / "pruned")


def test_files_that_do_not_fit_are_refused(tmp_path):
    model = toy()
    weights, folder = saved(model, tmp_path / "dense"), str(tmp_path / "out")
    wide, other = meta(model), meta(model)
    wide.stem = nn.Linear(7, 8, device="meta")
    other.extra = nn.Linear(2, 2, device="meta")
    for bad, message in (
        (wide, r"stem.weight is \(8, 7\) in the model, and \(8, 6\) in"),
        (other, "has no tensor 'extra.weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            walk(bad, how=Sequential(weights=weights, folder=folder))
    with pytest.raises(ValueError, match="is no safetensors file, nor a folder with any"):
        walk(meta(model), how=Sequential(weights=str(tmp_path / "none"), folder=folder))


def test_names_with_or_without_a_first_part_are_found(tmp_path):
    from prunus.engine.sequential.lazy_weights import Weights

    model = toy()
    weights = Weights(saved(model, tmp_path / "dense"))
    assert torch.equal(weights.read("model.layers.0.up.weight"), model.layers[0].up.weight)
    outer = Weights(saved(nn.ModuleDict({"model": model}), tmp_path / "outer"))
    assert torch.equal(outer.read("layers.0.up.weight"), model.layers[0].up.weight)


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


# models that people have


VOCABULARY = 40
SIZE = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": BLOCKS}
DECODER = {
    **SIZE,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**DECODER, **settings))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=16,
            n_embd=16,
            n_layer=BLOCKS,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    small = {"ffn_dim": 24, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(**SIZE, **small, max_position_embeddings=32))


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    small = {"num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16}
    return BertForSequenceClassification(BertConfig(**SIZE, **small))


def t5_encoder():
    from transformers import T5Config, T5EncoderModel

    small = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": BLOCKS, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=VOCABULARY, **small))


def gemma3():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**DECODER, head_dim=4, sliding_window=4, layer_types=kinds)
    )


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return Qwen2ForCausalLM(Qwen2Config(**DECODER, **window))


FAMILIES = {
    llama: "model.layers",
    gpt2: "transformer.h",
    opt: "model.decoder.layers",
    bert: "bert.encoder.layer",
    t5_encoder: "encoder.block",
    gemma3: "model.layers",
    qwen2: "model.layers",
}


def tokens(padded=False, count=2):
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        batch = {"input_ids": torch.randint(2, VOCABULARY, (2, 7), generator=generator)}
        if padded:
            batch["attention_mask"] = torch.ones(2, 7, dtype=torch.int64)
            batch["attention_mask"][1, 4:] = 0
        batches.append(batch)
    return prunus.Calibration(batches)


def family(make, **settings):
    transformers = pytest.importorskip("transformers")
    transformers.set_seed(0)
    try:
        return make(**settings)
    except ImportError:
        pytest.skip("this version of transformers has no such model")


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_language_models_are_pruned_as_the_slow_way_does(make, padded):
    model = family(make)
    assert find_blocks(model).name == FAMILIES[make]
    result = check_as_the_slow_way(model, "sparsegpt", tokens(padded))
    assert result.sparsity == 0.5


def test_vision_transformers_are_pruned_as_the_slow_way_does():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=BLOCKS,
        num_heads=2,
        num_classes=4,
        drop_path_rate=0.1,
        init_values=1e-2,
    ).train()
    assert find_blocks(model).name == "blocks"
    check_as_the_slow_way(model, "sparsegpt", data(2, 3, 16, 16))
    assert model.training


def test_padding_does_not_count_in_later_blocks_either():
    model = family(llama)
    padded, real = tokens(padded=True), []
    for batch in padded.batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        real += [{"input_ids": row[m.bool()][None]} for row, m in zip(ids, mask, strict=True)]
    short = copy.deepcopy(model)
    walk(model.double(), layers=None, calibration=padded)
    walk(short.double(), layers=None, calibration=prunus.Calibration(real))
    for a, b in zip(model.parameters(), short.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_language_models_head_and_embeddings_stay_and_the_cache_setting_too():
    model = family(llama)
    before = snapshot(model)
    assert model.config.use_cache
    result = walk(model, layers=None, calibration=tokens())
    assert model.config.use_cache
    assert result.left_dense == ["lm_head"]
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert torch.equal(model.get_parameter(name), before[name])


def test_the_cache_setting_comes_back_after_an_error():
    model = family(llama)
    bad = prunus.Calibration([{"input_ids": torch.tensor([[VOCABULARY + 5]])}])
    with pytest.raises(IndexError):
        walk(model, layers=None, calibration=bad)
    assert model.config.use_cache
    assert forwards(model) == []


def empty(make, **settings):
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        return make(**settings)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_on_disk_becomes_one_that_transformers_loads(tied, tmp_path):
    model = family(llama, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "dense")
    bare, calibration = empty(llama, tie_word_embeddings=tied), tokens()
    how = Sequential(weights=str(tmp_path / "dense"), folder=str(tmp_path / "pruned"))
    result = walk(bare, layers=None, calibration=calibration, how=how)
    assert all(p.is_meta for p in bare.model.layers.parameters())
    assert result.rows == walk(model, layers=None, calibration=calibration).rows
    model.config.save_pretrained(tmp_path / "pruned")
    loaded = type(model).from_pretrained(tmp_path / "pruned", torch_dtype=torch.float32)
    assert same(loaded, snapshot(model))


def test_a_checkpoint_in_several_files_is_read(tmp_path):
    model = family(gpt2)
    model.save_pretrained(tmp_path / "dense", max_shard_size="10KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    how = Sequential(weights=str(tmp_path / "dense"), folder=str(tmp_path / "pruned"))
    result = walk(empty(gpt2), layers=None, calibration=tokens(), how=how)
    assert result.rows == walk(model, layers=None, calibration=tokens()).rows


def test_buffers_on_the_meta_device_that_no_file_has_are_refused(tmp_path):
    model = family(llama)
    model.save_pretrained(tmp_path / "dense")
    with torch.device("meta"):
        bare = family(llama)
    how = Sequential(weights=str(tmp_path / "dense"), folder=str(tmp_path / "pruned"))
    with pytest.raises(ValueError, match="inv_freq is on the meta device and in no file"):
        walk(bare, layers=None, calibration=tokens(), how=how)
