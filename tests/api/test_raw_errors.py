"""Models that nobody thought of: empty, made for inference, quantized, or to be exported."""

import warnings

import pytest
import torch
from torch import nn

import prunus

from tests.helpers.training import same


def mlp(width=8):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 8), nn.Linear(8, 2))


def inputs():
    return prunus.Calibration([torch.randn(16, 8) for _ in range(2)])


def pairs():
    batches = [(torch.randn(4, 8), torch.randn(4, 2)) for _ in range(8)]
    return prunus.Calibration(batches, nn.functional.mse_loss)


OBS = prunus.OBS(block_size=8, num_grads=8, damp=1e-4)
METHODS = {
    "magnitude": ("magnitude", {"pattern": "2:4"}, lambda: None),
    "wanda": ("wanda", {"sparsity": 0.5}, inputs),
    "sparsegpt": ("sparsegpt", {"sparsity": 0.5}, inputs),
    "obs": (OBS, {"sparsity": 0.5}, pairs),
}
methods = pytest.mark.parametrize("method", METHODS)


class WithEmpty(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.a, self.empty, self.b = nn.Linear(8, 8), nn.Linear(*shape), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.a(x))


shapes = pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])


@pytest.fixture(autouse=True)
def _empty_layers_are_no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")
        yield


@methods
@shapes
def test_layers_without_entries_are_passed_over(method, shape):
    pruner, arguments, data = METHODS[method]
    model = WithEmpty(shape)
    result = prunus.prune(model, pruner, layers="Linear", calibration=data(), **arguments)
    assert [row.name for row in result.rows] == ["a", "b"]


@shapes
def test_whatever_is_done_with_them_works(shape, tmp_path):
    model = WithEmpty(shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = "modifiers: [{nm_training: {layers: [Linear], window: {to: 1step}}}]"
    with prunus.attach(model, optimizer, recipe):
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    assert float(prunus.sparsity(model)) == 0.5
    for compact in (False, True):
        again = WithEmpty(shape)
        prunus.save(model, tmp_path / "m.safetensors", compact=compact)
        prunus.load(tmp_path / "m.safetensors", again)
        assert same(model, again)
    prunus.accelerate(model, torch.randn(2, 8)).restore()
    with pytest.raises(ValueError, match="names empty.weight, which has no entries to prune"):
        prunus.prune(model, "magnitude", sparsity=0.5, layers="empty")


def made_for_inference():
    with torch.inference_mode():
        return mlp()


@methods
def test_models_made_for_inference_are_refused_with_the_reason(method):
    pruner, arguments, data = METHODS[method]
    with pytest.raises(ValueError, match=r"0.weight was made inside torch.inference_mode"):
        prunus.prune(made_for_inference(), pruner, calibration=data(), **arguments)


def test_so_they_are_by_all_that_would_write_to_them(tmp_path):
    model = made_for_inference()
    match = "made inside torch.inference_mode"
    with pytest.raises(ValueError, match=match):
        prunus.sweep(model, "magnitude", [0.5], float)
    with pytest.raises(ValueError, match=match):
        prunus.fisher(model, pairs())
    with pytest.raises(ValueError, match=match):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        prunus.attach(model, optimizer, "modifiers: [{prune: {sparsity: 0.5}}]")
    prunus.save(model, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=match):
        prunus.load(tmp_path / "m.safetensors", model)
    again = mlp()
    prunus.load(tmp_path / "m.safetensors", again)
    assert same(model, again)
    model = mlp()
    with torch.inference_mode():
        model[1] = nn.BatchNorm1d(8)
    with pytest.raises(ValueError, match="BatchNorm statistics were made inside"):
        prunus.prune(
            model, "magnitude", sparsity=0.5, layers="2", calibration=inputs(), recalibrate=True
        )
    assert model[2].weight.count_nonzero() == 64


@methods
def test_pruning_inside_inference_mode_is_pruning_outside(method):
    pruner, arguments, data = METHODS[method]
    models = []
    for inside in (False, True):
        torch.manual_seed(1)
        model, calibration = mlp(), data()
        with torch.inference_mode(inside):
            prunus.prune(model, pruner, calibration=calibration, **arguments)
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize("pruner", [OBS, prunus.OBS(block_size=8, num_grads=8, samples="example")])
def test_gradients_are_taken_of_batches_made_for_inference(pruner):
    with torch.inference_mode():
        data = pairs()
    assert prunus.prune(mlp(), pruner, sparsity=0.5, calibration=data).sparsity == 0.5


class Stored(nn.Module):
    """A weight of another dtype, which the forward pass makes a float."""

    def __init__(self, convert):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.a.weight = nn.Parameter(convert(self.a.weight.detach()), requires_grad=False)

    def forward(self, x):
        w = self.a.weight
        w = w.dequantize() if w.is_quantized else w.float()
        return self.c(self.b(nn.functional.linear(x, w)))


STORED = {
    "quantized": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "int8": lambda w: (10 * w).to(torch.int8),
    "float8": lambda w: w.to(torch.float8_e4m3fn),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("kind", STORED)
def test_quantized_weights_are_counted_and_told_and_not_pruned(kind, tmp_path):
    model = Stored(STORED[kind])
    dense = model.a.weight.dequantize() if kind == "quantized" else model.a.weight.float()
    zeros = 64 - int(dense.count_nonzero())
    assert prunus.sparsity(model)["a"] == zeros / 64
    with pytest.raises(ValueError, match=r"a.weight is torch.*; only floats of 16 bits"):
        prunus.prune(model, "magnitude", sparsity=0.5)
    result = prunus.prune(model, "wanda", sparsity=0.5, layers="b", calibration=inputs())
    assert result.sparsity == 0.5
    prunus.accelerate(model, torch.randn(2, 8)).restore()
    if kind == "quantized":
        with pytest.raises(ValueError, match=r"'a.weight' is torch.qint8, .* with torch.save"):
            prunus.save(model, tmp_path / "m.safetensors")
    else:
        prunus.save(model, tmp_path / "m.safetensors", compact=True)
        assert same(prunus.load(tmp_path / "m.safetensors").state_dict, model.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize:UserWarning")
def test_models_that_torch_has_quantized_are_told_so(tmp_path):
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    model = quantize(mlp(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(
        ValueError, match=r"layers are quantized by torch: prune first, quantize then"
    ):
        prunus.prune(model, "magnitude", sparsity=0.5)
    with pytest.raises(ValueError, match=r"is no tensor but a dtype; .* with torch.save"):
        prunus.save(model, tmp_path / "m.safetensors")
    prunus.save(mlp(), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="safetensors"):
        prunus.load(tmp_path / "m.safetensors", model)
    assert float(prunus.sparsity(model)) == 0
    assert not prunus.accelerate(model, torch.randn(2, 8)).rows
    assert prunus.estimate(model, torch.randn(2, 8)).layers == []
    part = mlp()
    part[0] = quantize(nn.Sequential(part[0]), {nn.Linear}, dtype=torch.qint8)[0]
    assert prunus.prune(part, "wanda", sparsity=0.5, calibration=inputs()).sparsity == 0.5


@pytest.fixture(scope="module")
def accelerated():
    """A model of which some layers surely run sparse here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8)).eval()
    prunus.prune(model, "magnitude", sparsity=0.995)
    how = prunus.accelerate(model, torch.randn(1, 1024))
    if how.forms["dense"] == len(how.rows):
        pytest.skip("dense is faster here")
    return model


EXPORTS = {
    "export": lambda m, x: torch.export.export(m, (x,)),
    "trace": lambda m, x: torch.jit.trace(m, x),
    "script": lambda m, x: torch.jit.script(m),
    "fx": lambda m, x: torch.fx.symbolic_trace(m),
    "onnx": lambda m, x: torch.onnx.export(m, (x,), "never.onnx", dynamo=False),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", EXPORTS)
def test_accelerated_models_are_exported_dense_or_not_at_all(accelerated, name):
    if name == "export" and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("torch before 2.7 exports by its compiler, which raises an error of its own")
    with pytest.raises(ValueError, match="cannot be exported, traced or scripted: call restore"):
        EXPORTS[name](accelerated, torch.randn(1, 1024))


def test_compiled_they_compute_the_same(accelerated):
    x = torch.randn(1, 1024)
    compiled = torch.compile(accelerated, backend="eager")
    torch.testing.assert_close(compiled(x), accelerated(x))
    torch.compiler.reset()
