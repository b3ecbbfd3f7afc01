"""The folder of a sequential run: what it refuses, what it remembers, and what ranks see of it."""

import json

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

import prunus
from prunus import Permute, Sequential
from prunus.engine import step as engine
from prunus.engine.sequential import resume as finished_blocks
from prunus.engine.sequential import walk as block_walk
from prunus.engine.sequential.lazy_weights import INDEX, move

from tests.helpers.blocks import (
    BLOCKS,
    Block,
    Toy,
    data,
    meta,
    saved,
    toy,
    walk,
)
from tests.helpers.training import same, snapshot

PERMUTED = {"pruner": "ria", "sparsity": None, "pattern": "2:4", "permute": "lsa"}


def interrupted(monkeypatch, number, model, how, **arguments):
    """A run that ends in the middle of the block of this number."""

    def step(method, layers, *rest):
        if layers[0].name.split(".")[1] == str(number):
            raise KeyboardInterrupt
        return engine.prune_step(method, layers, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(block_walk, "prune_step", step)
        walk(model, how=how, **arguments)


def refused(message, model, how, **arguments):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        walk(model, how=how, **arguments)
    assert same(model, before)


# what a folder may hold


@pytest.mark.parametrize("name", ["model.safetensors", "block-00000.safetensors", INDEX])
def test_a_folder_with_something_else_in_it_is_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    refused(
        f"holds {name} of something else.*empty folder", toy(), Sequential(folder=str(tmp_path))
    )
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    refused("file' is a file; name a folder", toy(), Sequential(folder=str(tmp_path / "file")))


def test_weights_inside_the_folder_are_refused(tmp_path):
    dense = saved(toy(), tmp_path / "dense")
    for weights, folder in ((dense, dense), (dense, str(tmp_path))):
        with pytest.raises(ValueError, match="lies in folder=.*use another folder"):
            walk(meta(toy()), how=Sequential(weights=weights, folder=folder))


def test_the_index_lists_the_files_of_the_run_alone(tmp_path, monkeypatch):
    how = Sequential(folder=str(tmp_path))
    interrupted(monkeypatch, 1, toy(), how)
    save_file({"head.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    walk(toy(), how=how)
    files = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
    assert files == {*(f"block-{i:05d}.safetensors" for i in range(BLOCKS)), "rest.safetensors"}


@pytest.mark.parametrize("number", range(BLOCKS))
def test_a_run_killed_before_its_first_record_goes_on(number, tmp_path, monkeypatch):
    """A block's file is there, and `progress.json` does not name it yet."""
    how, put = Sequential(folder=str(tmp_path)), finished_blocks.write_atomically

    def killed(path, tensors):
        put(path, tensors)
        if path.name == f"block-{number:05d}.safetensors":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finished_blocks, "write_atomically", killed)
        walk(toy(), how=how)
    model, reference = toy(), toy()
    walk(model, how=how)
    walk(reference)
    assert same(model, snapshot(reference))


@pytest.mark.parametrize("on_disk", [False, True])
def test_blocks_of_another_model_with_the_same_stem_are_refused(on_disk, tmp_path, monkeypatch):
    def how(model, name):
        weights = saved(model, tmp_path / name) if on_disk else None
        return Sequential(weights=weights, folder=str(tmp_path / "run"))

    other = toy()
    with torch.no_grad():
        other.layers[1].up.weight.mul_(-1)
    place = meta if on_disk else lambda model: model
    interrupted(monkeypatch, 2, place(toy()), how(toy(), "a"))
    with pytest.raises(ValueError, match=r"other weights \(of layers.1\).*delete it"):
        walk(place(other), how=how(other, "b"))


def test_gathering_is_refused_with_a_folder(tmp_path):
    arguments = {**PERMUTED, "permute": Permute(shared="gather")}
    refused("loaders of a folder do not know", toy(), Sequential(folder=str(tmp_path)), **arguments)


def test_an_unknown_device_is_refused_at_once():
    with pytest.raises(ValueError, match="device='cudaa' is none; use 'cuda'"):
        Sequential(device="cudaa")


def test_a_model_that_is_not_loaded_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="without device_map or offloading, or name its files"):
        walk(meta(toy()))


# what a resumed run gives


class Tied(Block):
    """Both layers are one Parameter."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.down.weight = self.up.weight


class Inner(nn.Module):
    """As torch.compile and activation checkpointing wrap a module."""

    def __init__(self, module):
        super().__init__()
        self._checkpoint_wrapped_module = module

    def forward(self, x):
        return self._checkpoint_wrapped_module(x)


class Wrapped(Block):
    def __init__(self):
        super().__init__()
        self.up = Inner(self.up)


@pytest.mark.parametrize("cls", [Tied, Wrapped])
def test_tied_and_wrapped_layers_are_taken_from_a_folder(cls, tmp_path, monkeypatch):
    def make():
        torch.manual_seed(0)
        return Toy([cls() for _ in range(BLOCKS)])

    how, model, reference = Sequential(folder=str(tmp_path)), make(), make()
    before = snapshot(model)
    interrupted(monkeypatch, 1, model, how)
    interrupted(monkeypatch, 2, model, how)
    assert same(model, before)
    expected, result = walk(reference), walk(model, how=how)
    assert result.rows == expected.rows
    assert same(model, snapshot(reference))


class Scaled(nn.Module):
    """Buffers follow the permutation, so a block is not its Parameters alone."""

    def __init__(self):
        super().__init__()
        up, norm, down = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 8)
        norm.running_mean.normal_()
        self.mlp = nn.Sequential(up, norm, nn.ReLU(), down)

    def forward(self, hidden_states):
        return hidden_states + self.mlp(hidden_states)


def scaled():
    torch.manual_seed(0)
    return Toy([Scaled() for _ in range(BLOCKS)]).eval()


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_resumed_run_knows_what_was_permuted_before(on_disk, tmp_path, monkeypatch):
    arguments = {**PERMUTED, "calibration": data(4, 6)}
    model, reference = scaled(), scaled()
    weights = saved(model, tmp_path / "dense") if on_disk else None
    how = Sequential(weights=weights, folder=str(tmp_path / "run"))
    model = unload(model) if on_disk else model
    before = snapshot(model) if not on_disk else None
    interrupted(monkeypatch, 2, model, how, **arguments)
    assert on_disk or same(model, before)
    result, expected = walk(model, how=how, **arguments), walk(reference, **arguments)
    assert len(expected.permuted) == BLOCKS
    assert result.permuted == expected.permuted
    assert result.not_permuted == expected.not_permuted
    assert result.rows == expected.rows
    state = {}
    for file in (tmp_path / "run").glob("*.safetensors"):
        state |= load_file(file)
    assert same(reference, state)


def unload(model):
    """Parameters on the meta device and buffers real, as accelerate.init_empty_weights does."""
    for module in model.modules():
        for name, p in module._parameters.items():
            module._parameters[name] = None if p is None else nn.Parameter(p.to("meta"))
    return model


@pytest.mark.parametrize("number", [None, 1])
def test_a_model_on_disk_is_afterwards_as_it_was(number, tmp_path, monkeypatch):
    how = Sequential(weights=saved(scaled(), tmp_path / "dense"), folder=str(tmp_path / "run"))
    bare, calibration = unload(scaled()), data(4, 6)
    before = {name: b.clone() for name, b in bare.named_buffers()}
    if number is not None:
        interrupted(monkeypatch, number, bare, how, calibration=calibration, **PERMUTED)
    else:
        walk(bare, how=how, calibration=calibration, **PERMUTED)
    assert all(p.is_meta for p in bare.parameters())
    assert all(torch.equal(b, before[name]) for name, b in bare.named_buffers())


@pytest.mark.parametrize("missing", ["layers.1.down.weight", "head.weight"])
def test_a_tensor_that_is_missing_leaves_nothing_half_filled(missing, tmp_path):
    state = {name: t for name, t in toy().state_dict().items() if name != missing}
    save_file(state, tmp_path / "dense.safetensors")
    bare = meta(toy())
    how = Sequential(weights=str(tmp_path / "dense.safetensors"), folder=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=f"has no tensor '{missing}'"):
        walk(bare, how=how)
    assert all(t.is_meta for t in bare.state_dict().values())


# blocks that differ


class Cloning(nn.Sequential):
    """A block whose buffers are others after each move, as on another device."""

    def to(self, *args, **kwargs):
        for module in self.modules():
            for name, b in module._buffers.items():
                module._buffers[name] = None if b is None else b.clone()
        return self


def test_buffers_stay_the_same_objects_when_a_block_moves():
    block = Cloning(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = dict(block.named_buffers())
    move(block, "cpu")
    assert all(b is before[name] for name, b in block.named_buffers())


def test_blocks_without_parameters_are_passed_through(tmp_path):
    def with_a_gap():
        torch.manual_seed(0)
        return Toy([Block(), nn.Identity(), Block()])

    model, plain = with_a_gap(), with_a_gap()
    del plain.layers[1]
    for _ in range(2):  # the second goes on from the folder
        model = with_a_gap()
        walk(model, how=Sequential("layers", device="cpu", folder=str(tmp_path)))
    walk(plain)
    assert torch.equal(model.layers[2].up.weight, plain.layers[1].up.weight)
    assert torch.equal(model.layers[2].down.weight, plain.layers[1].down.weight)


def test_interrupted_gathers_are_taken_back(monkeypatch):
    model = toy()
    before = snapshot(model)
    interrupted(monkeypatch, 2, model, True, **{**PERMUTED, "permute": Permute(shared="gather")})
    assert same(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert walk(model, **{**PERMUTED, "permute": Permute(shared="gather")}).permuted


class Chain(nn.Module):
    """What a layer reads is written in the block before it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        parts = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(BLOCKS)]
        self.layers = nn.Sequential(*parts)

    def forward(self, x):
        return self.layers(x)


def test_folds_that_write_in_another_block_come_before_all_blocks(tmp_path):
    model, once = Chain(), Chain()
    result = walk(model, calibration=data(4, 8), **PERMUTED)
    at_once = walk(once, calibration=data(4, 8), how=False, **PERMUTED)
    assert [row.name for row in result.permuted] == [row.name for row in at_once.permuted]
    assert result.permuted
    how = Sequential(folder=str(tmp_path))
    refused("reaches over several blocks", Chain(), how, calibration=data(4, 8), **PERMUTED)


# ranks


def mine(*, empty_on=None, seed=0):
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(seed + rank)
    count = 0 if rank == empty_on else 2
    batches = [torch.randn(4, 6, generator=generator) for _ in range(count)]
    return prunus.Calibration(batches)


def _resume(folder):
    torch.manual_seed(0)
    start, how = snapshot(Toy()), Sequential(folder=folder)
    answers = []
    for _ in range(2):
        model = Toy()
        model.load_state_dict(start)
        result = walk(model, how=how, calibration=mine())
        answers.append((snapshot(model), [row.zeros for row in result.rows]))
    return answers


def test_ranks_go_on_from_one_folder(ranks, tmp_path):
    a, b = ranks(_resume, str(tmp_path / "run"))
    states = [state for state, _ in a + b]
    assert all(torch.equal(s[name], states[0][name]) for s in states for name in s)
    assert all(zeros == a[0][1] for _, zeros in a + b)


def _fails(folder, how):
    if how == "full":
        finished_blocks.write_atomically = _full
    try:
        walk(toy(), how=Sequential(folder=folder), calibration=mine(empty_on=how))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        finished_blocks.write_atomically = _WRITE
    return "no error"


_WRITE = finished_blocks.write_atomically


def _full(path, tensors):
    raise OSError(28, "no space left")


def _other_data(folder):
    walk(toy(), how=Sequential(folder=folder), calibration=mine())
    try:
        walk(toy(), how=Sequential(folder=folder), calibration=mine(seed=7))
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("how", "said"), [(0, "is empty"), (1, "is empty"), ("full", "no space left")]
)
def test_what_fails_on_one_rank_fails_on_all(how, said, ranks, tmp_path):
    answers = ranks(_fails, str(tmp_path / "run"), how)
    assert all(said in answer for answer in answers)


def test_all_ranks_refuse_the_folder_of_another_run(ranks, tmp_path):
    for answer in ranks(_other_data, str(tmp_path / "run")):
        assert "a run with other calibration data" in answer
