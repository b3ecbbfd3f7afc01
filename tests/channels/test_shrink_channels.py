"""One call that halves a model, keeps its promise, and puts everything back when it cannot."""

import copy

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import prunus
from prunus.channels import channels, drop_blocks, follow, load, save, shrink, unit_masks
from prunus.cli.main import app

from tests.channels.awkward_channel_models import Heads, Residual
from tests.channels.channel_oracles import error, masked_copy, outputs, randomized


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    layers += [nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4))


def images(n=2):
    return torch.randn(n, 3, 8, 8)


def data(n=3):
    torch.manual_seed(1)
    return prunus.Calibration(
        [(images(16), torch.randint(0, 4, (16,))) for _ in range(n)], F.cross_entropy
    )


def state(model):
    attributes = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | tuple)
    }
    return {n: t.clone() for n, t in model.state_dict().items()}, attributes


def same(before, after):
    tensors = before[0].keys() == after[0].keys() and all(
        torch.equal(t, after[0][n]) for n, t in before[0].items()
    )
    return tensors and before[1] == after[1]


@pytest.mark.parametrize("allocator", ["uniform", "global"])
@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_target_is_met_within_one_unit_and_never_overshot(share, kind, allocator):
    model = network()
    result = shrink(model, images(), target={kind: share}, allocator=allocator, measure=False)
    before, after = (getattr(size, kind) for size in (result.before, result.after))
    found = channels(network(), images())
    unit = max(
        before - found.costs.total(kind, mask)
        for g in found.groups
        for mask in [found.costs.nothing_gone().index_fill(0, g.components[:1], True)]
    )
    assert after <= share * before < after + len(found.groups) * unit
    assert found.costs.total(kind) == before
    assert channels(model, images()).costs.total(kind) == after


def test_costs_are_counted_as_by_hand():
    found = channels(network(), images(1))
    assert found.costs.total("macs") == 64 * (3 * 9 * 16 + 16 * 9 * 24) + 24 * 4
    assert found.costs.total("params") == sum(p.numel() for p in network().parameters())


def test_absolute_targets_rounding_layers_and_exclude():
    model = network()
    shrink(model, images(), target={"params": 3000}, round_to=8, measure=False)
    assert sum(p.numel() for p in model.parameters()) <= 3000
    assert model[0].out_channels % 8 == model[3].out_channels % 8 == 0
    model = network()
    shrink(model, images(), target={"params": 0.7}, layers=["3"], measure=False)
    assert (model[0].out_channels, model[3].out_channels < 24) == (16, True)
    model = network()
    shrink(model, images(), target={"params": 0.7}, exclude=["re:3"], measure=False)
    assert (model[0].out_channels < 16, model[3].out_channels) == (True, 24)


def test_a_table_says_it_all():
    model = network()
    result = shrink(model, images(), allocator={"0": 0.25, "3": 0.5}, measure=False)
    assert [(r.name, r.before, r.after) for r in result.rows] == [("0", 16, 12), ("3", 24, 12)]
    assert result.remarks == []
    assert "parameters: 4," in str(result)


def test_latency_is_a_target_and_is_reported():
    model = network()
    result = shrink(model, images(), target={"latency": 1000.0})
    assert not result.rows
    assert result.before.latency > 0
    assert "measured here" in str(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": {"flops": 0.5}}, "use one of params, macs, latency"),
        ({"target": {"macs": 0}}, "use a fraction"),
        ({"target": {"macs": 0.5}, "layers": ["4"]}, "matches no group; did you mean"),
        ({"target": {"macs": 0.5}, "layers": ["nothing"]}, "matches no group"),
        ({"target": {"macs": 1e-6}}, "smallest model costs"),
        ({}, "say what is to remain"),
        ({"target": {"macs": 0.5}, "criterion": "magnitud"}, "did you mean 'magnitude'"),
        ({"target": {"macs": 0.5}, "criterion": "obs"}, "needs data"),
        ({"target": {"macs": 0.5}, "compensate": True}, "needs data"),
        ({"target": {"macs": 0.5}, "compensate": "much"}, "use True, False"),
        ({"target": {"macs": 0.5}, "exclude": ["0", "3"]}, "no group is left"),
    ],
)
def test_bad_arguments_are_one_clear_error_and_change_nothing(arguments, message):
    model = network()
    if arguments.get("layers") == ["4"]:
        message = "matches no group"
    before = state(model)
    with pytest.raises(ValueError, match=message):
        shrink(model, images(), measure=False, **arguments)
    assert same(before, state(model))


class Stubborn(nn.Module):
    """Its code has a size of its own."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.down(self.up(x).reshape(-1, 12).relu())


class Scaled(nn.Module):
    """Computes something else when it is smaller, without an error."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x):
        x = self.up(x)
        return self.down(x / x.shape[-1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Stubborn, "the model cannot be made smaller: shape.*exclude 'up'"),
        (Scaled, "something else"),
    ],
)
def test_what_does_not_compute_the_same_is_put_back(build, message):
    model, x = build(), torch.randn(2, 8)
    shrink_before = state(model)
    with pytest.raises(ValueError, match=message):
        shrink(model, x, target={"params": 0.5}, measure=False)
    assert same(shrink_before, state(model))
    assert outputs(model, x)[0].shape == (2, 3)


def test_an_error_in_the_calibration_puts_everything_back():
    model = network()
    before = state(model)

    def broken(output, target):
        return output

    def batches():
        class Data:
            def __iter__(self):
                yield images()
                raise OSError("the disk is gone")

        return Data()

    with pytest.raises(OSError, match="disk"):
        shrink(
            model,
            images(),
            target={"macs": 0.5},
            compensate=True,
            calibration=prunus.Calibration(batches(), broken),
            measure=False,
        )
    assert same(before, state(model))


def test_zero_units_go_and_nothing_changes():
    model, x = randomized(Residual()), torch.randn(2, 3, 4, 4).double()
    found = channels(model, x)
    for name, mask in unit_masks(model, found, {found.groups[0].name: [1, 4, 6]}).items():
        dict([*model.named_parameters(), *model.named_buffers()])[name].data.mul_(mask)
    dense = copy.deepcopy(model)
    result = shrink(model, x, criterion=None, measure=False)
    assert [(r.before, r.after) for r in result.rows] == [(8, 5)]
    assert error(dense, model, x) < 1e-12
    assert not shrink(model, x, criterion=None, measure=False).rows


def test_shrinking_twice_is_shrinking_further():
    model, x = randomized(Heads()), torch.randn(2, 5, 8).double()
    shrink(model, x, allocator={"*": 0.25}, measure=False)
    assert (model.num_heads, model.qkv.out_features) == (3, 36)
    dense = copy.deepcopy(model)
    found = channels(model, x)
    result = shrink(model, x, allocator={"*": 0.34}, measure=False)
    assert model.num_heads == 2
    assert error(masked_copy(dense, found, result.gone), model, x) < 1e-12


@pytest.mark.parametrize(
    "build", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)]
)
def test_training_goes_on_with_the_state_of_what_stays(build):
    model = network()
    optimizer = build(model.parameters())

    def step():
        F.cross_entropy(model(images(8)), torch.randint(0, 4, (8,))).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    before = {k: t.clone() for k, t in optimizer.state[model[3].weight].items() if t.dim() == 4}
    result = shrink(model, images(), target={"macs": 0.5}, measure=False)
    follow(optimizer, model, result)
    axes = result.kept["3.weight"]
    for key, old in before.items():
        assert torch.equal(optimizer.state[model[3].weight][key], old[axes[0]][:, axes[1]])
    step()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


def test_gradients_that_are_there_are_cut_as_well():
    model = network()
    model(images()).sum().backward()
    shrink(model, images(), target={"macs": 0.5}, measure=False)
    assert all(p.grad.shape == p.shape for p in model.parameters())


def wrapped(kind):
    net = network()
    if kind == "compiled":
        return torch.compile(net)
    if kind == "parametrized":
        nn.utils.parametrizations.weight_norm(net[0])
    if kind == "pruned":
        nn.utils.prune.random_unstructured(net[0], "weight", 0.5)
    if kind == "meta":
        return net.to("meta")
    if kind == "lazy":
        net[8] = nn.LazyLinear(4)
    return net


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("compiled", "compile it again"),
        ("parametrized", "remove_parametrizations"),
        ("pruned", "prune.remove"),
        ("meta", "load weights first"),
        ("lazy", "run a batch"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_remedy(kind, remedy):
    with pytest.raises(ValueError, match=remedy):
        shrink(wrapped(kind), images(), target={"macs": 0.5})


def test_a_masked_model_shrinks_and_keeps_its_zeros():
    model = network()
    prunus.prune(model, "magnitude", sparsity=0.5, layers=["3"])
    shrink(model, images(), target={"macs": 0.5}, measure=False)
    assert 0.2 < float((model[3].weight == 0).float().mean()) < 0.8


def test_a_saved_model_is_loaded_into_a_fresh_one(tmp_path):
    model, x = network().eval(), images()
    shrink(model, x, "random", {"macs": 0.4}, "global", measure=False)
    save(model, tmp_path / "small.safetensors")
    again = network(1).eval()
    load(tmp_path / "small.safetensors", again)
    assert error(model, again, x) == 0
    assert again[0].out_channels == model[0].out_channels
    other = nn.Sequential(nn.Linear(3, 3))
    before = state(other)
    with pytest.raises(ValueError, match="another model"):
        load(tmp_path / "small.safetensors", other)
    assert same(before, state(other))


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))
        for i, block in enumerate(self.blocks):
            block[0].weight.data *= i / 2
        self.wrap = nn.ModuleList([Skip(block) for block in self.blocks])
        del self.blocks

    def forward(self, x):
        for block in self.wrap:
            x = block(x)
        return x


class Skip(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


@pytest.mark.parametrize("by", ["influence", "loss"])
def test_the_blocks_that_change_least_go_first_and_load_follows(by, tmp_path):
    torch.manual_seed(0)
    model = Deep().eval()
    with torch.no_grad():
        model.wrap[1].inner[0].weight.zero_()
        model.wrap[1].inner[0].bias.zero_()
    x = torch.randn(8, 6)
    with torch.no_grad():
        target = model(x)
    calibration = prunus.Calibration([(x, target)], F.mse_loss)
    result = drop_blocks(model, 1, calibration, by)
    assert [name for name, _ in result.removed] == ["wrap.1"]
    assert result.left == len(model.wrap) == 3
    with torch.no_grad():
        assert torch.equal(model(x), target)
    shrink_and_save = tmp_path / "deep.safetensors"
    save(model, shrink_and_save)
    again = Deep().eval()
    load(shrink_and_save, again)
    with torch.no_grad():
        assert torch.equal(again(x), target)
    with pytest.raises(ValueError, match="remove fewer"):
        drop_blocks(model, 3, calibration, by)
    assert len(model.wrap) == 3


def test_the_shell_writes_weights_and_shapes(tmp_path):
    what = [f"{__name__}:network", "--inputs", f"{__name__}:images"]
    to = ["--output", str(tmp_path / "n.safetensors")]
    done = CliRunner().invoke(app, ["shrink", *what, *to, "--target", "params=0.5"])
    assert done.exit_code == 0, done.output
    assert "multiply-accumulates" in done.output
    again = network()
    load(tmp_path / "n.safetensors", again)
    assert again[0].out_channels < 16
    assert "channel" in CliRunner().invoke(app, ["groups", *what]).output
    done = CliRunner().invoke(app, ["shrink", *what, *to, "--target", "half"])
    assert "macs=0.5" in str(done.exception)


def test_a_shrunk_model_exports():
    model, x = network().eval(), images()
    shrink(model, x, target={"macs": 0.5}, measure=False)
    exported = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        assert torch.allclose(exported(x), model(x), atol=1e-6)
