"""`prunus.accelerate`: which layer takes which form, and why not."""

import copy
import json
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import prunus
from prunus.cli import main as cli
from prunus.execution.inference import Sparse, choice, restore, stopwatch, targets
from prunus.execution.inference.modules import SparseLinear, become_sparse, matrix_of
from prunus.execution.inference.stopwatch import Timing, winner
from prunus.execution.inference.stored import Stored

from tests.execution.inference.test_forms import bits, blocky, nm, same, spec


def mlp(side=1, sparsity=0.8):
    model = nn.Sequential(
        nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)
    )
    with torch.no_grad():
        model[0].weight.copy_(blocky(64, 48, side, sparsity))
        model[2].weight.copy_(blocky(48, 64, side, sparsity))
    return model


@pytest.fixture
def clock(monkeypatch):
    """Sets what the stopwatch says of each form in ms; remembers what was measured."""
    said, asked = {}, []

    def fake(calls, device):
        asked.append(tuple(calls))
        for call in calls.values():
            call()
        return {name: Timing((said.get(name, 1.0),) * 5) for name in calls}

    monkeypatch.setattr(choice, "timings", fake)

    def set_to(**ms):
        said.clear()
        said.update({name.replace("_", " "): value for name, value in ms.items()})
        return asked

    return set_to


def kinds(model):
    return [type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear)]


def test_a_layer_takes_the_fastest_form(clock):
    clock(dense=1.0, csr=0.5, bsr_4x4=0.4, bsr_8x8=0.6)
    model = mlp(side=8)
    dense, x = copy.deepcopy(model), torch.randn(5, 48)
    result = prunus.accelerate(model, x)
    assert result.forms == {"bsr 4x4": 2}
    assert kinds(model) == ["SparseLinear", "SparseLinear", "Linear"]
    assert [row.rows for row in result.rows] == [5, 5]
    assert result.rows[0].ms["csr"] == 500
    assert result.rows[0].measured == ["bsr 4x4", "csr", "bsr 8x8"]
    assert result.rows[0].pattern == "8x8"
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=0, atol=1e-5)
    assert same(model.state_dict(), dense.state_dict())


rounds = st.lists(st.floats(0.01, 2), min_size=8, max_size=8).map(tuple)


@given(rounds, st.dictionaries(st.sampled_from(["csr", "bsr"]), rounds))
def test_only_a_gain_beyond_the_noise_wins(dense, others):
    times = {"dense": Timing(dense), **{name: Timing(t) for name, t in others.items()}}
    best = winner(times, "dense")
    assert best == "dense" or times[best].median == min(t.median for t in times.values())
    wins = sum(b < 0.95 * d for b, d in zip(times[best].rounds, dense, strict=True))
    assert best == "dense" or wins >= 6


def test_noise_on_both_sides_hides_no_gain():
    slow = (1.0, 9.0, 1.1, 5.0, 1.0, 7.0, 3.0, 1.0)
    assert (
        winner({"dense": Timing(slow), "csr": Timing(tuple(0.8 * t for t in slow))}, "dense")
        == "csr"
    )
    uneven = (0.5, 9.5, 1.0, 5.2, 0.5, 7.0, 0.5, 1.2)
    assert winner({"dense": Timing(slow), "csr": Timing(uneven)}, "dense") == "dense"


@pytest.mark.parametrize("csr", [0.96, 1.0, 1.5])
def test_nothing_accelerates_this_here(clock, csr):
    clock(dense=1.0, csr=csr)
    model = mlp()
    before = dict(model.named_parameters())
    result = prunus.accelerate(model)
    assert kinds(model) == ["Linear"] * 3
    assert all(p is before[name] for name, p in model.named_parameters())
    text = " ".join(str(result).split())
    assert "nothing accelerates this here" in text
    assert "dense: 0, 2: measured, and not faster by more than the noise: csr" in text
    assert result.rows[0].why.startswith("measured, and not faster")


def test_a_model_without_zeros_is_told_to_be_pruned_first():
    result = prunus.accelerate(nn.Linear(4, 4))
    assert result.rows == []
    assert "no layer has zeros; prune the model first" in str(result)


def test_layers_that_are_alike_are_measured_once(clock):
    asked = clock(dense=1.0, csr=0.5)
    model = nn.ModuleList([nn.Linear(48, 48) for _ in range(4)])
    with torch.no_grad():
        for i, layer in enumerate(model):
            layer.weight.copy_(blocky(48, 48, 1).abs())
            layer.weight.view(-1)[: 48 * (40 if i < 3 else 46)] = 0
            layer.weight.view(-1)[-48 * (8 if i < 3 else 2) :] = 1
    result = prunus.accelerate(model)
    assert result.forms == {"csr": 4}
    assert len(asked) == 2


def test_a_kernel_that_computes_something_else_is_not_taken(clock, monkeypatch):
    clock(dense=1.0, csr=0.1)
    monkeypatch.setattr(
        "prunus.execution.inference.forms.Compressed.linear",
        lambda self, x, b: x.new_zeros(len(x), self.shape[0]),
    )
    result = prunus.accelerate(mlp())
    assert result.forms == {"dense": 2}
    assert "it is off by" in result.rows[0].why


def test_a_kernel_that_torch_lacks_gives_torchs_reason(clock, monkeypatch):
    def fails(self, x, b):
        raise RuntimeError("no such kernel\nmore lines")

    clock(dense=1.0, csr=0.1)
    monkeypatch.setattr("prunus.execution.inference.forms.Compressed.linear", fails)
    assert "csr: no such kernel" in prunus.accelerate(mlp()).rows[0].why


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 32), nn.Linear(32, 16, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight.copy_(blocky(16, 32, 1))


class Reads(nn.Module):
    """As BEiT's attention in timm."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = mlp()[0], mlp()[0]
        nn.init.zeros_(self.proj.weight)

    def forward(self, x):
        return self.scores(x)

    def scores(self, x):
        return nn.functional.linear(x, self.qkv.weight) + self.proj(x)


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def with_zeros(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(p * (torch.rand_like(p) > 0.9))
    return model


def parametrized():
    layer = with_zeros(nn.Linear(32, 32))
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Hardshrink())
    return nn.Sequential(layer)


def patched():
    layer = with_zeros(nn.Linear(32, 32))
    layer.forward = lambda x: x
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Tied, "tied to embed.weight"),
        (lambda: with_zeros(nn.Conv2d(8, 8, 3)), "no sparse kernel for convolutions"),
        (lambda: with_zeros(nn.MultiheadAttention(32, 4)), "without calling the layer"),
        (lambda: with_zeros(nn.TransformerEncoderLayer(32, 4, 64)), "without calling the layer"),
        (lambda: with_zeros(Own(32, 32)), "not that of a linear layer"),
        (parametrized, "computed, not stored"),
        (patched, "not that of a linear layer"),
    ],
)
def test_layers_that_cannot_change_say_why(clock, make, reason):
    clock(dense=1.0, csr=0.1)
    model = make()
    result = prunus.accelerate(model)
    assert set(result.forms) == {"dense"}
    assert all(reason in row.why for row in result.rows)
    assert not any(isinstance(m, Sparse) for m in model.modules())


@pytest.mark.parametrize("example", [None, torch.randn(3, 48)])
def test_a_layer_whose_weight_its_parent_reads_stays_dense(clock, example):
    clock(dense=1.0, csr=0.5)
    model = nn.Sequential(Reads())
    result = prunus.accelerate(model, example)
    assert kinds(model) == ["Linear", "SparseLinear"]
    assert result.rows[0].why == "Reads reads the weight itself in its forward pass"


def test_a_subclass_that_only_adds_is_taken(clock):
    class Named(nn.Linear):
        """Carries more, and computes the same."""

    clock(dense=1.0, csr=0.1)
    model = nn.Sequential(with_zeros(Named(32, 32)))
    assert prunus.accelerate(model).forms == {"csr": 1}
    assert isinstance(model[0], Named)
    restore(model)
    assert type(model[0]) is Named


def test_a_module_under_two_names_is_taken_once(clock):
    clock(dense=1.0, csr=0.1)
    layer = with_zeros(nn.Linear(32, 32))
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x, want = torch.randn(3, 32), None
    with torch.no_grad():
        want = model(x)
        assert prunus.accelerate(model, x).forms == {"csr": 1}
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)


def test_the_example_tells_the_rows_of_each_layer(clock):
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.never = (with_zeros(nn.Linear(32, 32)) for _ in range(3))

        def forward(self, x, scale=1):
            y = self.first(x)  # (batch, height, width, channels), as Swin has it
            return self.second(y.mean((1, 2))) + self.second(y[:, 0, 0]) * scale

    clock(dense=1.0, csr=0.1)
    x = torch.randn(2, 4, 4, 32)
    for example in (x, (x, torch.zeros(2)), {"x": x, "scale": 2}):
        model = Windows().train()
        result = prunus.accelerate(model, example)
        assert {row.name: row.rows for row in result.rows} == {"first": 32, "second": 2, "never": 0}
        assert result.rows[2].why == "the example does not reach it"
        assert model.training
    assert [row.rows for row in prunus.accelerate(Windows(), rows=7).rows] == [7, 7, 7]


def test_measuring_leaves_modes_and_random_states():
    model = nn.Sequential(mlp(), nn.Dropout())
    model[0].eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    want = torch.randn(4)
    torch.manual_seed(3)
    prunus.accelerate(model, torch.ones(2, 48))
    assert torch.equal(torch.randn(4), want)
    assert [m.training for m in model.modules()] == modes


def test_a_second_call_measures_anew(clock):
    clock(dense=1.0, csr=0.5)
    model = mlp()
    state = copy.deepcopy(model.state_dict())
    parameter = model[0].weight
    assert prunus.accelerate(model).forms == {"csr": 2}
    clock(dense=1.0, csr=2.0)
    assert prunus.accelerate(model).forms == {"dense": 2}
    assert model[0].weight is parameter
    assert same(model.state_dict(), state)


def test_a_failure_leaves_the_model_as_it_was(clock, monkeypatch):
    clock(dense=1.0, csr=0.5)
    model = mlp()
    parameters, state = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    real, calls = become_sparse, []

    def fails_on_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        real(*args)

    monkeypatch.setattr("prunus.api.accelerate.become_sparse", fails_on_the_second)
    with pytest.raises(MemoryError):
        prunus.accelerate(model)
    assert dict(model.named_parameters()) == parameters
    assert same(model.state_dict(), state)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        prunus.accelerate(model, torch.ones(2, 5))
    assert kinds(model) == ["Linear"] * 3
    monkeypatch.undo()


def test_a_failure_leaves_an_accelerated_model_accelerated(clock):
    clock(dense=1.0, csr=0.5)
    model = mlp()
    prunus.accelerate(model)
    held = model[0]._held.stored
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        prunus.accelerate(model, torch.ones(2, 5))
    assert model[0]._held.stored is held
    with pytest.raises(ValueError, match="rows=0"):
        prunus.accelerate(model, rows=0)
    assert model[2]._held.rows == 128


def test_saving_an_accelerated_model_saves_the_dense_one(clock, tmp_path):
    clock(dense=1.0, csr=0.5)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48))
    pruned = prunus.prune(model, "magnitude", sparsity=0.8, layers=["0", "2"])
    with torch.no_grad():
        model[0].weight[:5] = 0  # some of which the mask keeps
    prunus.save(model, tmp_path / "dense", pruning=pruned, compact=True)
    assert prunus.accelerate(model).forms == {"csr": 2}
    prunus.save(model, tmp_path / "sparse", pruning=pruned, compact=True)
    one, other = prunus.load(tmp_path / "dense"), prunus.load(tmp_path / "sparse")
    assert same(one.state_dict, other.state_dict)
    assert one.masks.keys() == other.masks.keys() == {"0.weight", "2.weight"}
    assert all(torch.equal(mask, other.masks[name]) for name, mask in one.masks.items())
    fresh = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48))
    prunus.load(tmp_path / "sparse", fresh)
    assert same(fresh.state_dict(), model.state_dict())
    prunus.load(tmp_path / "dense", model)
    assert kinds(model) == ["SparseLinear"] * 2
    assert prunus.sparsity(model).total == prunus.sparsity(fresh).total


def test_a_model_that_gathers_runs_sparse(clock):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(32, (2, 6)), "use_cache": False}
    permute = prunus.Permute("lsa", "gather")
    prunus.prune(
        model, "magnitude", pattern="2:4", permute=permute, calibration=prunus.Calibration([batch])
    )
    state = copy.deepcopy(model.state_dict())
    assert any(key.endswith("input_permutation") for key in state)
    # at 50 % compressed rows are no smaller, so float64, which leaves indices the smaller part
    model.double()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        want = model(**batch).logits
    clock(dense=1.0, csr=0.5)
    result = prunus.accelerate(model, batch)
    assert result.forms == {"csr": 7}
    assert {row.pattern for row in result.rows} == {"2:4"}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-10)
    assert same(model.state_dict(), state)
    result.restore()
    assert same(model.state_dict(), state)


def test_a_timm_transformer_runs_sparse(clock):
    from timm.models import VisionTransformer

    model = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5
    )
    model.eval()
    prunus.prune(model, "magnitude", sparsity=0.8)
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        want = model(x)
        clock(dense=1.0, csr=0.5)
        result = prunus.accelerate(model, x)
        assert result.forms["csr"] == 8
        assert {row.rows for row in result.rows} == {15}
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-5)


def test_accelerating_within_inference_mode_leaves_usable_weights():
    model = mlp()
    with torch.inference_mode():
        result = prunus.accelerate(model)
    result.restore()
    model(torch.randn(2, 48)).sum().backward()
    assert model[0].weight.grad is not None


def test_zeros_alone_make_a_target():
    found = list(targets(mlp()))
    assert [t.layer.name for t in found] == ["0", "2"]
    assert all(0.7 < t.sparsity < 0.9 for t in found)


def test_the_stopwatch_calls_each_in_turn(monkeypatch):
    now, order = [0.0], []

    def call(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    for clock in ("perf_counter", "thread_time"):
        monkeypatch.setattr(stopwatch.time, clock, lambda: now[0])
    calls = {"a": call("a", 0.25), "b": call("b", 0.125)}
    times = stopwatch.timings(calls, torch.device("cpu"))
    assert {name: t.median for name, t in times.items()} == {"a": 0.25, "b": 0.125}
    assert order == ["a", "b"] * (len(order) // 2)
    short = stopwatch.timings({"c": call("c", 2e-5)}, torch.device("cpu"))["c"]
    assert short.median == pytest.approx(2e-5)
    assert order.count("c") > 15 * 50  # the clock is read once for many of them


def test_the_report_shows_what_was_measured(clock, tmp_path):
    model = mlp()
    clock(dense=1.0, csr=0.5)
    pruned = prunus.prune(model, "magnitude", sparsity=0.9)
    pruned.report(tmp_path)
    result = prunus.accelerate(model)
    result.report(tmp_path)
    events = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "execution"
    assert events[-1]["layers"][0]["form"] == "csr"
    assert len(events) > 1
    page = (tmp_path / "report.html").read_text()
    assert "How it runs" in page
    assert "2 of 2 pruned layers run sparse" in page
    assert "magnitude" in page


def test_a_report_of_an_accelerated_model_alone(clock, tmp_path):
    clock(dense=1.0, csr=2.0)
    prunus.accelerate(mlp()).report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "nothing accelerates this here" in page
    assert "not faster by more than the noise: csr" in page
    assert "No weights were pruned" not in page


MODULE = """
import torch
from prunus import Calibration
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.Linear(64, 4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(torch.rand_like(layer.weight) > 0.95)
    return model

def plain():
    return nn.Linear(4, 4)

def batch():
    return torch.randn(32, 64)

def listed():
    return [(torch.randn(16, 64), torch.zeros(16)), (torch.randn(8, 64), torch.ones(8))]

def loader():
    return torch.utils.data.DataLoader(torch.randn(40, 64), batch_size=16)

def generated():
    yield from listed()

def pair():
    return listed()[0]

def mapping():
    return {"input": torch.randn(16, 64)}

def none():
    return []

def number():
    return 3

def data():
    return Calibration([(torch.randn(16, 64), torch.zeros(16)), (torch.randn(8, 64), torch.ones(8))])
"""


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """Run `prunus bench` in a folder of its own; returns (exit code, screen, errors)."""
    (tmp_path / "bench_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cli.out, "_width", 100)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["prunus", "bench", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
            raise SystemExit(0)
        screen = capsys.readouterr()
        return stop.value.code or 0, " ".join(screen.out.split()), screen.err

    yield call
    sys.modules.pop("bench_module", None)


def test_bench_prints_layers_machine_and_the_whole_model(bench, clock):
    clock(dense=1.0, csr=0.25)
    code, screen, errors = bench("bench_module:build", "--batch", "bench_module:batch")
    assert (code, errors) == (0, "")
    for text in ("unstructured", "1000.000", "250.000", "csr", "64 KiB", "2 of 2 pruned layers"):
        assert text in screen, screen
    assert f"torch {torch.__version__}" in screen
    assert "whole model" in screen
    assert "times as fast" in screen
    assert screen.count(" 32 ") == 2


def test_bench_reads_a_checkpoint_and_a_calibration(bench, clock, tmp_path):
    clock(dense=1.0, csr=2.0)
    import bench_module

    model = bench_module.build()
    with torch.no_grad():
        model[0].weight.normal_()
    prunus.save(model, "other.safetensors")
    arguments = ("--checkpoint", "other.safetensors", "--batch", "bench_module:data")
    code, screen, _ = bench("bench_module:build", *arguments)
    assert code == 0
    assert screen.count(" 16 ") == 1  # of one layer only
    assert "nothing accelerates this here" in screen
    assert "times as fast" not in screen


@pytest.mark.parametrize("name", ["listed", "loader", "generated", "pair", "mapping", "data"])
def test_bench_takes_the_first_of_any_batches(bench, clock, name):
    clock(dense=1.0, csr=2.0)
    code, screen, _ = bench("bench_module:build", "--batch", f"bench_module:{name}")
    assert code == 0
    assert screen.count(" 16 ") == 2
    assert "whole model" in screen


def test_bench_without_a_batch_takes_rows(bench, clock):
    clock(dense=1.0, csr=2.0)
    code, screen, _ = bench("bench_module:build", "--rows", "77")
    assert code == 0
    assert screen.count(" 77 ") == 2
    assert "whole model" not in screen
    assert "prune the model first" in bench("bench_module:plain")[1]


def test_bench_says_what_is_wrong(bench):
    wrong = {
        ("--rows", "0"): "rows=0",
        ("--device", "xyz"): "device='xyz' is not known here; use --device cpu or cuda",
        ("--device", "meta"): "device='meta' is not known here",
        ("--device", "cuda:99"): "device='cuda:99': torch sees",
        ("--batch", "bench_module:none"): "'bench_module:none' returned no batches",
        ("--batch", "bench_module:number"): "gives int, not a batch, nor batches",
    }
    if not torch.cuda.is_available():
        wrong["--device", "cuda"] = "torch sees no GPU here"
    for arguments, message in wrong.items():
        code, _, errors = bench("bench_module:build", *arguments)
        assert code == 2
        assert message in errors
        assert len(errors.splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_model_runs_2_of_4(clock):
    clock(dense=1.0, cutlass=0.5, cusparselt=0.6)
    model = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64)).half().cuda()
    with torch.no_grad():
        model[0].weight.copy_(nm(128, 256))
    state, x = copy.deepcopy(model.state_dict()), torch.randn(40, 256, device="cuda").half()
    with torch.no_grad():
        want = model(x)
        result = prunus.accelerate(model, x)
        assert result.rows[0].form in ("cutlass", "cusparselt"), result
        torch.testing.assert_close(model(x), want, rtol=2e-2, atol=2e-2)
    assert same(model.state_dict(), state)
    result.restore()
    assert same(model.state_dict(), state)


def test_a_sparse_model_takes_less_memory():
    layer = nn.Linear(256, 256)
    with torch.no_grad():
        layer.weight.copy_(blocky(256, 256, 1, 0.9).abs())
    stored = Stored.of(matrix_of(layer), spec(1))
    become_sparse(layer, stored, 1)
    held = sum(t.untyped_storage().nbytes() for t in stored.form.parts)
    assert held == stored.nbytes < 0.25 * 4 * 256 * 256
    assert layer._held.parameter.untyped_storage().nbytes() == 0
    assert isinstance(layer, SparseLinear)
    assert bits(layer.weight).shape == (256, 256)
