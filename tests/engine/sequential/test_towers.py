"""Models of several lists of blocks: all are walked in their order, and the rest comes last."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import prunus
from prunus import Permute, Sequential
from prunus.allocators import OWL
from prunus.core.blocks import find_block_lists, find_blocks
from prunus.core.layers import all_layers
from prunus.engine import step as engine
from prunus.engine.allocator_signals import with_signals
from prunus.engine.sequential import walk as block_walk

from tests.helpers import towers
from tests.helpers.blocks import Block, Toy, bert, data, family, forwards, meta, saved
from tests.helpers.towers import (
    LENGTH,
    TEXT,
    TRANSLATOR,
    Attention,
    SelfBlock,
    Translator,
    embedded,
    sentences,
    slowly,
)
from tests.helpers.training import same, snapshot

# transformers' progress bars
pytestmark = pytest.mark.filterwarnings("ignore:IProgress not found")


def check_as_the_slow_way(model, blocks, outside, calibration, how=True, **arguments):
    arguments = {"sparsity": 0.5, **arguments}
    slow, exclude = copy.deepcopy(model), arguments.pop("exclude", [])
    result = prunus.prune(
        model, "sparsegpt", calibration=calibration, sequential=how, exclude=exclude, **arguments
    )
    arguments.pop("layers", None)
    rows = slowly(slow, blocks, outside, "sparsegpt", calibration, exclude=exclude, **arguments)
    assert result.rows == rows
    assert result.outside_blocks == outside
    assert same(model, snapshot(slow))
    assert forwards(model) == []
    return result


def numbered(*lists, count=2):
    return [f"{name}.{i}" for name in lists for i in range(count)]


OPT_OUTSIDE = ["model.decoder.project_out", "model.decoder.project_in"]
VILT_STEM = "embeddings.patch_embeddings.projection"

MODELS = {
    towers.t5: (towers.translations, numbered("encoder.block", "decoder.block"), []),
    towers.bart: (
        towers.translations,
        numbered("model.encoder.layers", "model.decoder.layers"),
        [],
    ),
    towers.marian: (
        towers.translations,
        numbered("model.encoder.layers", "model.decoder.layers"),
        [],
    ),
    towers.whisper: (
        towers.speech,
        numbered("model.encoder.layers", "model.decoder.layers"),
        ["model.encoder.conv2"],
    ),
    towers.clip: (
        towers.captions,
        numbered("vision_model.encoder.layers", "text_model.encoder.layers"),
        [],
    ),
    towers.vilt: (towers.pictures, numbered("encoder.layer"), []),
    towers.opt_350m: (towers.text, numbered("model.decoder.layers"), OPT_OUTSIDE),
    towers.jamba: (towers.text, numbered("model.layers", count=4), []),
    bert: (towers.text, numbered("bert.encoder.layer", count=3), ["bert.pooler.dense"]),
}


LEFT = [(towers.t5, True), (towers.clip, True), (towers.jamba, True)]


@pytest.mark.parametrize(
    ("make", "left"),
    [*((make, False) for make in MODELS), *LEFT],
    ids=lambda x: x.__name__ if callable(x) else "left" if x else "right",
)
def test_towers_with_padding_are_pruned_as_the_slow_way_does(make, left):
    batches, blocks, outside = MODELS[make]
    exclude = ["*conv1d", "*dt_proj"] if make is towers.jamba else []
    torch.manual_seed(0)
    calibration = prunus.Calibration(batches(left))
    check_as_the_slow_way(family(make), blocks, outside, calibration, exclude=exclude)


def test_a_block_with_shared_weights_is_pruned_at_once_on_all_its_calls(caplog):
    model, calibration = family(towers.albert), prunus.Calibration(towers.text())
    slow = copy.deepcopy(model)
    arguments = {"sparsity": 0.5, "calibration": calibration}
    result = prunus.prune(model, "sparsegpt", sequential=True, **arguments)
    assert result.rows == prunus.prune(slow, "sparsegpt", **arguments).rows
    assert result.outside_blocks == [row.name for row in result.rows]
    assert same(model, snapshot(slow))
    assert "albert_layer_groups.0 is called more than once" in caplog.text
    assert "outside the blocks, pruned after them" in str(result)


# models of our own

OUTSIDE = ["stem", "bridge", "tail.0"]


def pruned(model, how=True, pruner="sparsegpt", **arguments):
    arguments = {"sparsity": 0.5, "calibration": sentences(), **arguments}
    return prunus.prune(model, pruner, sequential=how, **arguments)


@pytest.mark.parametrize("how", [True, Sequential(device="cpu")], ids=["", "device"])
def test_lists_are_walked_in_the_order_in_which_they_are_called(how):
    result = check_as_the_slow_way(Translator(), TRANSLATOR, OUTSIDE, sentences(), how)
    assert result.left_dense == ["tail.3"]
    assert "outside the blocks, pruned after them: stem, bridge, tail.0" in str(result)


def test_with_a_name_the_other_lists_come_last():
    outside = [x.name for x in all_layers(Translator()) if not x.name.startswith("encoder")]
    outside.remove("tail.3")
    check_as_the_slow_way(Translator(), TRANSLATOR[:2], outside, sentences(), "encoder")


def test_layers_outside_are_left_dense_when_excluded():
    model = Translator()
    before = snapshot(model)
    result = pruned(model, exclude=["stem", "bridge", "tail.0"])
    assert result.outside_blocks == []
    assert all(
        torch.equal(model.get_parameter(f"{n}.weight"), before[f"{n}.weight"]) for n in OUTSIDE
    )


def test_a_list_without_layers_to_prune_is_not_walked():
    blocks = TRANSLATOR[:2]
    arguments = {"layers": ["encoder.*", "bridge"]}
    model, slow = Translator(), Translator()
    result = pruned(model, **arguments)
    rows = slowly(slow, blocks, ["bridge"], "sparsegpt", sentences(), sparsity=0.5)
    assert result.rows == rows
    assert same(model, snapshot(slow))


def test_a_failure_outside_the_blocks_takes_all_back(monkeypatch):
    model = Translator()
    before = snapshot(model)

    def step(method, layers, *rest):
        if layers[0].name == "stem":
            raise KeyboardInterrupt
        return engine.prune_step(method, layers, *rest)

    monkeypatch.setattr(block_walk, "prune_step", step)
    with pytest.raises(KeyboardInterrupt):
        pruned(model)
    assert same(model, before)
    assert forwards(model) == []


@pytest.mark.parametrize("pruner", ["wanda", "magnitude"])
def test_owl_sees_all_lists_and_the_rest_in_the_dense_model(pruner):
    model, dense = Translator(), Translator()
    with torch.no_grad():
        for m in (model, dense):
            m.decoder[1].up.weight[:2] *= 20
            m.stem.weight[0] *= 9
    layers = [layer for layer in all_layers(dense) if layer.name != "tail.3"]
    method = prunus.PruningModifier(prunus.Wanda(), 0.5, allocator=OWL()).method
    signals = with_signals(method, layers, dense, sentences()).signals
    assert (
        len({signals[n] for n in ("stem", "encoder.0.mlp.0", "decoder.0.up", "decoder.1.up")}) == 4
    )
    result = pruned(model, pruner=pruner, allocator="owl")
    units = [prunus.allocators.Unit(x.name, x.shape, x.weight.numel(), 0) for x in layers]
    plan = OWL().allocate(prunus.allocators.Problem(units, 0.5, lambda k: [], signals))
    assert {row.name: row.zeros for row in result.rows} == dict(
        zip([x.name for x in layers], plan.drop, strict=True)
    )


class Parallel(Translator):
    """A third list, whose parts are not called one after the other."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x = super().forward(x)
        return self.last(self.heads[0](x) + self.heads[1](2 * x))


def test_a_list_that_cannot_be_walked_comes_last_and_one_line_says_so(caplog):
    outside = ["stem", "bridge", "tail.0", "tail.3", "heads.0.0", "heads.1.0"]
    check_as_the_slow_way(Parallel(), TRANSLATOR, outside, sentences())
    (text,) = [r.message for r in caplog.records if "heads" in r.message and "last" in r.message]
    assert "something is computed between heads.0 and heads.1" in text


class Sharing(Toy):
    """One layer is a part of two blocks."""

    def __init__(self):
        super().__init__()
        self.layers[2].up = self.layers[0].up


def test_layers_of_several_blocks_are_pruned_last_on_all_their_calls(tmp_path):
    torch.manual_seed(0)
    model = Sharing()
    slow, untouched = copy.deepcopy(model), copy.deepcopy(model)
    arguments = {"sparsity": 0.5, "calibration": data()}
    result = prunus.prune(model, "sparsegpt", layers="layers.*", sequential=True, **arguments)
    assert result.outside_blocks == ["layers.0.up"]
    for layers in ("layers.0.down", "layers.1.*", "layers.2.down", "layers.0.up"):
        prunus.prune(slow, "sparsegpt", layers=[layers], **arguments)
    assert same(model, snapshot(slow))
    before, how = snapshot(untouched), Sequential(folder=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"layers.0.up is in several blocks, which a folder"):
        prunus.prune(untouched, "wanda", layers="layers.*", sequential=how, **arguments)
    assert same(untouched, before)
    assert not list((tmp_path / "run").iterdir())


class Captions(nn.Module):
    """Words at fixed places, as many patches, and words that look at patches and patches at words."""

    def __init__(self, fixed):
        super().__init__()
        torch.manual_seed(0)
        self.places = nn.Parameter(torch.randn(LENGTH, 8)) if fixed else 0
        names = ("words", "patches", "across")
        for name in names:
            parts = [nn.ModuleDict({"seen": Attention(), "out": nn.Linear(8, 8)}) for _ in range(2)]
            setattr(self, name, nn.ModuleList(map(CaptionBlock, parts)))

    def forward(self, inputs_embeds, image, attention_mask=None):
        words = inputs_embeds + self.places
        for block in self.words:
            words = block(words, real=attention_mask)
        for block in self.patches:
            image = block(image)
        for block in self.across:
            image = block(image, context=words, real=attention_mask)
        return image


class CaptionBlock(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def forward(self, hidden_states, context=None, real=None):
        context = hidden_states if context is None else context
        return torch.tanh(self.parts["out"](self.parts["seen"](hidden_states, context, real)))


@pytest.mark.parametrize("fixed", [False, True], ids=["any length", "one length"])
def test_towers_that_take_one_length_alone_are_right_too(fixed, caplog):
    model, batches = Captions(fixed), embedded(towers.text(count=6))
    everywhere = copy.deepcopy(model)
    check_as_the_slow_way(
        model, numbered("words", "patches", "across"), [], prunus.Calibration(batches), layers="*"
    )
    assert "padding" not in caplog.text
    whole = prunus.Calibration([{**batch, TEXT: torch.ones_like(batch[TEXT])} for batch in batches])
    prunus.prune(everywhere, "sparsegpt", sparsity=0.5, calibration=whole, sequential=True)
    assert not same(model, snapshot(everywhere))


class Routing(Toy):
    """Each block sends its tokens to one of two experts."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            out = x.clone()
            for expert, sent in zip(self.experts, (x[..., 0] > 0, x[..., 0] <= 0), strict=True):
                out[sent] = expert(x[sent])
            return out

    def __init__(self):
        super().__init__([self.Block() for _ in range(2)])

    def forward(self, inputs_embeds, attention_mask):
        return super().forward(inputs_embeds)


def test_the_log_says_once_where_padding_counts_in_blocks(caplog):
    torch.manual_seed(0)
    batches = [
        {"inputs_embeds": torch.randn(2, LENGTH, 6), TEXT: b[TEXT]} for b in towers.text(count=4)
    ]
    blocks, calibration = numbered("layers"), prunus.Calibration(batches)
    check_as_the_slow_way(Routing(), blocks, ["stem"], calibration, layers=["stem", "layers.*"])
    assert [r.message.split(":")[0] for r in caplog.records if "padding" in r.message] == [
        "padding counts in the statistics of layers.*.experts.*"
    ]


# on disk


def state_of(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return {name: load_file(folder / file)[name] for name, file in index.items()}


PERMUTED = {"pruner": "ria", "sparsity": None, "pattern": "2:4", "permute": "lsa", "layers": "*"}


@pytest.mark.parametrize("arguments", [{}, PERMUTED], ids=["", "permuted"])
@pytest.mark.parametrize("buffers", [False, True], ids=["all on meta", "buffers real"])
def test_several_lists_are_read_from_disk_as_from_memory(tmp_path, arguments, buffers):
    model, folder = Translator(), tmp_path / "run"
    bare = meta(model)
    if buffers:
        for a, b in zip(bare.modules(), copy.deepcopy(model).modules(), strict=True):
            a._buffers.update(b._buffers)
    held = {name: t.clone() for name, t in bare.named_buffers() if not t.is_meta}
    how = Sequential(weights=saved(model, tmp_path / "dense"), folder=str(folder))
    result, expected = pruned(bare, how, **arguments), pruned(model, **arguments)
    assert result.rows == expected.rows
    assert result.outside_blocks == expected.outside_blocks
    assert result.outside_blocks[:3] == OUTSIDE
    assert result.permuted == expected.permuted
    assert "tail.0" in {row.name for row in result.rows}
    state = state_of(folder)
    assert state.keys() == model.state_dict().keys()
    assert same(model, state)
    assert all(p.is_meta for p in bare.parameters())
    assert all(torch.equal(t, held[name]) for name, t in bare.named_buffers() if name in held)
    if arguments:
        assert "tail.3" in " ".join(row.name for row in result.permuted)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("name", ["encoder.1.mlp.0", "decoder.1.cross", "stem"])
def test_a_killed_run_of_several_lists_goes_on(name, on_disk, tmp_path, monkeypatch):
    model, reference, begun = Translator(), Translator(), []
    dense = saved(model, tmp_path / "dense") if on_disk else None
    how = Sequential(weights=dense, folder=str(tmp_path / "run"))
    model = meta(model) if on_disk else model
    before = None if on_disk else snapshot(model)

    def step(method, layers, *rest):
        begun.append(layers[0].name)
        if name in [layer.name for layer in layers] and begun.count(layers[0].name) == 1:
            raise KeyboardInterrupt
        return engine.prune_step(method, layers, *rest)

    monkeypatch.setattr(block_walk, "prune_step", step)
    with pytest.raises(KeyboardInterrupt):
        pruned(model, how)
    assert on_disk or same(model, before)
    result = pruned(model, how)
    assert len(begun) == len(set(begun)) + 1 == 6
    monkeypatch.undo()
    assert result.rows == pruned(reference).rows
    assert same(reference, state_of(tmp_path / "run"))
    assert on_disk or same(model, snapshot(reference))


def test_t5_is_read_from_disk_and_back(tmp_path):
    model = family(towers.t5).eval()
    calibration = prunus.Calibration(towers.translations())
    model.save_pretrained(tmp_path / "dense")
    from accelerate import init_empty_weights

    with init_empty_weights():
        bare = type(model)(model.config).eval()
    how = Sequential(weights=str(tmp_path / "dense"), folder=str(tmp_path / "run"))
    result = prunus.prune(bare, "ria", sparsity=0.5, calibration=calibration, sequential=how)
    expected = prunus.prune(model, "ria", sparsity=0.5, calibration=calibration, sequential=True)
    assert result.rows == expected.rows
    model.config.save_pretrained(tmp_path / "run")
    loaded = type(model).from_pretrained(tmp_path / "run")
    assert same(loaded, snapshot(model))


# blocks of several classes


class PlainLayer(Block):
    def forward(self, hidden_states, bias=None):
        return super().forward(hidden_states if bias is None else hidden_states + bias)


class BiasLayer(Block):
    """Returns something beside the stream, which the next block is given."""

    def forward(self, hidden_states, bias=None):
        x = hidden_states if bias is None else hidden_states + bias
        return super().forward(x), torch.tanh(self.up(x)).mean(-1, keepdim=True)


class Hybrid(Toy):
    keeps = False

    def forward(self, x):
        x, bias = self.stem(x), None
        for layer in self.layers:
            out = layer(x, bias=bias)
            if isinstance(layer, BiasLayer):
                x, bias = out
            else:
                x, bias = out, bias if self.keeps else None
        return self.head(x)


@pytest.mark.parametrize(
    "kinds", [(PlainLayer, BiasLayer) * 2, (BiasLayer, BiasLayer, PlainLayer, PlainLayer)]
)
def test_blocks_of_a_hybrid_stack_may_return_different_things(kinds):
    torch.manual_seed(0)
    model = Hybrid([kind() for kind in kinds])
    calibration = data(count=6)
    check_as_the_slow_way(model, numbered("layers", count=4), [], calibration, exclude=["stem"])


def test_what_an_earlier_block_of_another_class_returned_is_refused():
    model = Hybrid([BiasLayer(), PlainLayer(), PlainLayer()])
    model.keeps = True
    with pytest.raises(ValueError, match=r"layers\.2 is given what an earlier block puts out, too"):
        prunus.prune(model, "wanda", sparsity=0.5, calibration=data(), sequential=True)


# which lists


class AttentionLayer(Block):
    pass


class MambaLayer(Block):
    pass


def hybrid(*kinds):
    model = Toy([kind() for kind in kinds])
    model.mixed = nn.ModuleList([Translator(), Toy()])  # no blocks: things of two kinds
    return model


@pytest.mark.parametrize(
    "kinds",
    [(AttentionLayer, MambaLayer), (SelfBlock, Block, SelfBlock), (MambaLayer,) * 2],
    ids=["called alike", "coming again", "one class"],
)
def test_blocks_may_be_of_several_classes(kinds):
    names = [blocks.name for blocks in find_block_lists(hybrid(*kinds)).lists]
    assert "layers" in names
    assert "mixed" not in names
    assert {"mixed.0.encoder", "mixed.0.decoder", "mixed.1.layers"} <= set(names)


def test_lists_in_blocks_belong_to_their_block():
    inner = [nn.ModuleList([Block() for _ in range(3)]) for _ in range(2)]

    class Outer(nn.Module):
        def __init__(self, experts):
            super().__init__()
            self.experts = experts

    model = Toy([Outer(experts) for experts in inner])
    assert [blocks.name for blocks in find_block_lists(model).lists] == ["layers"]
    bare = Toy(inner)  # lists of lists, which nobody calls
    assert [blocks.name for blocks in find_block_lists(bare).lists] == ["layers.0", "layers.1"]
    assert find_blocks(bare).name == "layers.0"


def test_a_single_block_is_a_list_where_there_is_no_other():
    assert [blocks.name for blocks in find_block_lists(Toy([Block()])).lists] == ["layers"]
    assert find_blocks(Toy([Block()])) is None
    assert find_block_lists(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) is None
    assert find_block_lists(nn.Sequential(Toy())).name == "0.layers"


def test_blocks_of_all_lists_are_numbered_through():
    blocks = find_block_lists(Translator())
    assert blocks.name == "decoder, encoder"
    assert [blocks.name_of(i) for i in range(4)] == TRANSLATOR[2:] + TRANSLATOR[:2]
    assert blocks.number_of("encoder.1.mlp.0.weight") == 3
    assert blocks.number_of("bridge") is None
    assert list(blocks.numbers(blocks.lists[1])) == [2, 3]


def test_gathering_layers_outside_is_refused_with_a_folder(tmp_path):
    how = Sequential(folder=str(tmp_path / "run"))
    arguments = {**PERMUTED, "permute": Permute(shared="gather")}
    with pytest.raises(ValueError, match="loaders of a folder do not know"):
        pruned(Translator(), how, **arguments)
