import json
import re
import sys

import pytest
import torch

import prunus
from prunus.cli import main as cli

from tests.helpers.programs import run_module

RECIPE = """
variables: {sparsity: 0.9}
modifiers:
  - prune:
      sparsity: {from: 0.3, to: "${sparsity}", curve: cubic}
      window: {from: 1ep, to: 4ep}
  - learning_rate: {curve: cosine, from: 0.1, to: 0.01}
"""
CHECK = ["check", "r.yaml", "--model", "user_module:build"]
CHECK += ["--steps-per-epoch", "10", "--epochs", "5"]
MODULE = """
import torch
from tests.oracles.pruning import small_mlp

def build():
    torch.manual_seed(0)
    return small_mlp()

def batches():
    return [torch.randn(4, 8)]

class TwoHeads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.body, self.second = (torch.nn.Linear(8, n) for n in (2, 8, 3))

    def forward(self, x):
        h = self.body(x)
        return self.first(h), self.second(h)

def number():
    return 3

def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes))

def tokens():
    return [{"input_ids": torch.randint(32, (2, 12))} for _ in range(2)]

def fused():
    from tests.oracles.nm import Net
    return Net()

def labelled():
    import prunus
    pairs = [(torch.randn(4, 8), torch.randn(4, 4)) for _ in range(5)]
    return prunus.Calibration(pairs, torch.nn.functional.mse_loss)
"""
SECOND = """
modifiers:
  - prune: {pruner: {name: cap, block_size: 8, num_recomputations: 2}, sparsity: 0.5}
"""
TRAINED = """
modifiers:
  - nm_training:
      pattern: 1:4
      layers: ["2"]
      masking: mdgf
      structure: [3:4, 1:4]
      window: {from: 1ep, to: 4ep}
"""
THIRDS = """
modifiers:
  - prune: {layers: ["attn.qkv[q]"], pattern: 2:4}
"""
PERMUTED = """
modifiers:
  - prune:
      pruner: ria
      pattern: 2:4
      layers: ["*.q_proj", "*.o_proj", "*.down_proj"]
      permute: {search: lsa}
      sequential: true
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command line in a folder of its own; returns (exit code, screen, errors)."""
    (tmp_path / "user_module.py").write_text(MODULE)
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "second.yaml").write_text(SECOND)
    (tmp_path / "permuted.yaml").write_text(PERMUTED)
    (tmp_path / "thirds.yaml").write_text(THIRDS)
    (tmp_path / "trained.yaml").write_text(TRAINED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cli.out, "_width", 100)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["prunus", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
            raise SystemExit(0)
        screen = capsys.readouterr()
        return stop.value.code or 0, screen.out, screen.err

    yield call
    sys.modules.pop("user_module", None)


def test_list_names_everything_a_recipe_can(run):
    code, screen, _ = run("list")
    assert code == 0
    patterns = ("2:4", "2:4 along outputs", "4x1")
    for name in (
        "magnitude",
        "global",
        "erk",
        "learning_rate",
        "sr_ste",
        "inverse_cubic",
        *patterns,
    ):
        assert name in screen


@pytest.mark.parametrize("name", ["magnitude", "table", "prune", "learning_rate", "sr_ste"])
def test_show_prints_the_docstring(run, name):
    code, screen, _ = run("show", name)
    assert code == 0
    assert name in screen


def test_show_prints_settings_with_their_meaning(run):
    _, screen, _ = run("show", "learning_rate")
    assert "start the curve anew" in screen
    assert "value at its end" in screen


def test_check_prints_layers_times_and_memory(run):
    code, screen, _ = run(*CHECK)
    assert code == 0
    for text in ("2 layers", "32x8", "0.3000", "0.9000", "40", "left dense: 4", "memory: masks"):
        assert text in screen


def test_check_shows_the_ends_that_a_batch_shows(run):
    model = ("check", "r.yaml", "--model", "user_module:TwoHeads")
    assert "left dense: second (writes the output)" in run(*model)[1]
    _, screen, _ = run(*model, "--calibration", "user_module:batches")
    assert "left dense: first, second (writes the output)" in screen


def test_check_shows_the_plan_and_the_memory_of_nm_training(run):
    lengths = ("--steps-per-epoch", "10", "--epochs", "5")
    code, screen, _ = run("check", "trained.yaml", "--model", "user_module:build", *lengths)
    assert code == 0
    assert "1 layers" in screen
    assert re.search(r"^\s*10\s+1\.00\s+mdgf: train 3:4", screen, re.MULTILINE)
    assert re.search(r"^\s*25\s+2\.50\s+mdgf: train 1:4", screen, re.MULTILINE)
    assert re.search(r"^\s*40\s+4\.00\s+mdgf: freeze the masks, 1:4", screen, re.MULTILINE)
    assert "memory: masks: 512 B; dense weights: 2.0 KiB" in screen


def test_thirds_are_printed_by_name(run):
    model = ("--model", "user_module:fused")
    assert "attn.qkv[q]" in run("check", "thirds.yaml", *model)[1]
    assert "attn.qkv[q]" in run("prune", "thirds.yaml", *model, "--output", "[q].safetensors")[1]
    code, screen, _ = run("check", "thirds.yaml", *model, "--steps-per-epoch", "4", "--epochs", "2")
    assert (code, "attn.qkv[q]" in screen) == (0, True)


def test_check_reads_variables(run):
    _, screen, _ = run(*CHECK, "--set", "sparsity=0.5")
    assert "0.5000" in screen
    assert "0.9000" not in screen


def test_schema_is_json(run):
    _, screen, _ = run("schema")
    assert json.loads(screen)["title"] == "prunus recipe"
    run("schema", "--output", "schema.json")
    with open("schema.json") as file:
        assert json.load(file) == json.loads(screen)


def test_prune_saves_and_reports(run, tmp_path):
    code, screen, _ = run(
        "prune",
        "magnitude",
        "--model",
        "user_module:build",
        "--sparsity",
        "0.8",
        "--layers",
        "2",
        "--output",
        "out.safetensors",
        "--compact",
        "--report",
        "runs/x",
    )
    assert code == 0
    assert "0.8008" in screen or "0.7988" in screen or "0.8000" in screen
    assert (tmp_path / "runs/x/report.html").is_file()
    loaded = prunus.load(tmp_path / "out.safetensors")
    assert list(loaded.masks) == ["2.weight"]
    code, screen, _ = run(
        "prune",
        "r.yaml",
        "--model",
        "user_module:build",
        "--weights",
        "out.safetensors",
        "--output",
        "again.safetensors",
    )
    assert code == 0
    again = prunus.load(tmp_path / "again.safetensors")
    assert (again.masks["2.weight"] & ~loaded.masks["2.weight"]).sum() == 0


def test_a_calibration_function_serves_methods_that_need_data(run, tmp_path):
    from tests.helpers import toy_pruner  # noqa: F401 (registers the pruner)

    code, _, _ = run(
        "prune",
        "toy",
        "--model",
        "user_module:build",
        "--sparsity",
        "0.5",
        "--calibration",
        "user_module:batches",
        "--output",
        "o.safetensors",
    )
    assert code == 0


def test_check_plans_the_statistics_to_fit_the_memory(run):
    arguments = ("check", "second.yaml", "--model", "user_module:build")
    code, screen, _ = run(*arguments)
    assert code == 0
    assert "10.0 KiB" in screen  # 32x8: 32 rows of 8 * 8 + 2 * 8 numbers
    assert "groups" not in screen
    code, screen, _ = run(*arguments, "--memory", "8KiB")
    assert code == 0
    assert "statistics of 30.0 KiB in 4 groups, one at a time: 14 passes" in " ".join(
        screen.split()
    )


def test_check_names_what_comes_after_the_blocks(run, tmp_path):
    text = "modifiers:\n  - prune: {pruner: wanda, sparsity: 0.5, layers: '*', sequential: true}\n"
    (tmp_path / "blocks.yaml").write_text(text)
    code, screen, _ = run("check", str(tmp_path / "blocks.yaml"), "--model", "user_module:llama")
    assert code == 0
    assert "outside the blocks, pruned after them: lm_head" in " ".join(screen.split())


def test_prune_takes_memory_and_recalibrates(run):
    code, screen, error = run(
        "prune",
        "second.yaml",
        "--model",
        "user_module:build",
        "--calibration",
        "user_module:labelled",
        "--memory",
        "8KiB",
        "--recalibrate",
        "--output",
        "o.safetensors",
    )
    assert code == 0, error
    assert "0.5000" in screen


def test_check_shows_what_will_be_folded_and_why_the_rest_will_not(run):
    pytest.importorskip("transformers")
    code, out, _ = run("check", "permuted.yaml", "--model", "user_module:llama")
    text = " ".join(out.split())
    assert code == 0
    assert "permutations to be folded in" in text
    assert "down_proj <- up_proj" in text
    assert "mlp: 32 channels" in text
    assert "2 copies" in text  # of the heads that share their keys and values
    assert "none: its input is shared with" in text


def test_prune_goes_block_by_block_and_permutes(run, tmp_path):
    pytest.importorskip("transformers")
    arguments = ["prune", "ria", "--model", "user_module:llama", "--pattern", "2:4"]
    arguments += ["--calibration", "user_module:tokens", "--output", "sparse.safetensors"]
    code, out, err = run(*arguments, "--sequential", "auto", "--permute", "lsa")
    assert (code, err) == (0, "")
    assert "channel permutations: score kept" in " ".join(out.split())
    code, out, _ = run(*arguments, "--sequential", "model.layers")
    assert code == 0
    code, _, err = run(*arguments, "--sequential", "model.layer")
    assert code == 2
    assert "did you mean 'model.layers'" in err
    code, _, err = run(*arguments, "--device", "cpu")
    assert (code, "--sequential auto" in err) == (2, True)


def test_report_makes_the_page(run, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
    prunus.prune(model, "magnitude", sparsity=0.5, output_dir="runs/y")
    code, _, _ = run("report", "runs/y")
    assert code == 0
    assert (tmp_path / "runs/y/report.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "magnitud"], "did you mean 'magnitude'?"),
        (["check", "nothing.yaml"], "no recipe file 'nothing.yaml'"),
        (["check", "r.yaml", "--set", "sparsity"], "must be written name=value"),
        (["check", "r.yaml", "--model", "user_module"], "must be written package.module:function"),
        (["check", "r.yaml", "--model", "user_modul:build"], "cannot import 'user_modul'"),
        (["check", "r.yaml", "--model", "user_module:bild"], "did you mean 'build'?"),
        (
            ["check", "r.yaml", "--model", "user_module:number"],
            "gives int, not a torch.nn.Module",
        ),
        (["check", "r.yaml", "--model", "torch:zeros"], "cannot be called without arguments"),
        (["report", "empty"], "no records.jsonl in 'empty'"),
        (
            [
                "prune",
                "magnitude",
                "--model",
                "user_module:build",
                "--output",
                "o",
                "--sparsity",
                "3",
            ],
            "sparsity 3.0 is not between 0 and 1",
        ),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(run, arguments, message):
    code, _, errors = run(*arguments)
    assert code == 2
    assert message in errors
    assert len(errors.strip().splitlines()) == 1


def test_the_command_is_installed():
    done = run_module("prunus", "--help")
    assert done.returncode == 0
    assert "check" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        (
            "prune",
            "magnitude",
            "--model",
            "made:fails",
            "--sparsity",
            "0.5",
            "--output",
            "file/m.st",
        ),
        ("prune", "magnitude", "--model", "made:fails", "--sparsity", "0.5", "--output", "folder"),
        ("prune", "magnitude", "--model", "made:fails", "--output", "m.st", "--report", "file"),
        ("shrink", "made:fails", "--inputs", "made:fails", "--output", "folder"),
        ("estimate", "made:fails", "--batch", "made:fails", "--report", "file"),
    ],
)
def test_paths_that_cannot_be_written_are_told_before_the_work(run, tmp_path, arguments):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    code, _, error = run(*arguments)
    assert code == 2
    assert "file" in error or "folder" in error
    assert "made" not in error


def test_the_version_and_the_shipped_recipes_are_printed(run):
    code, screen, _ = run("--version")
    assert code == 0
    assert re.fullmatch(r"prunus \d+\.\d+\S*, torch \S+\n", screen)
    code, screen, _ = run("list", "recipes")
    assert code == 0
    assert "vit/magnitude-90" in screen
    assert run("list", "recipe")[0] == 2
    assert run("check", "vit/magnitude-90")[0] == 0


ODD = """
import torch

def odd():
    return torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in ((8, 6), (6, 8), (8, 2))))

def idle():
    model = odd()
    model.forward = lambda x: model[0](x)
    return model
"""


def test_layers_that_do_not_fit_are_shown_and_may_be_left_dense(run, tmp_path):
    (tmp_path / "user_module.py").write_text(MODULE + ODD)
    recipe = "modifiers: [{prune: {pattern: '2:4', misfits: dense}}]"
    (tmp_path / "odd.yaml").write_text(recipe)
    code, screen, _ = run("check", "odd.yaml", "--model", "user_module:odd")
    line = "do not fit, left dense: 1 (pattern 2:4 does not divide 6 input channels)"
    assert code == 0
    assert line in screen
    prune = ["prune", "magnitude", "--pattern", "2:4", "--model", "user_module:odd"]
    code, screen, _ = run(*prune, "--misfits", "dense", "--output", "o.safetensors")
    assert code == 0
    assert line in screen
    code, _, errors = run(*prune, "--output", "o.safetensors")
    assert code == 2
    assert "with misfits: dense" in errors


def test_layers_without_data_may_be_pruned_by_magnitude(run, tmp_path):
    (tmp_path / "user_module.py").write_text(MODULE + ODD)
    prune = ["prune", "wanda", "--sparsity", "0.5", "--calibration", "user_module:batches"]
    prune += ["--model", "user_module:idle", "--output", "o.safetensors"]
    code, screen, _ = run(*prune, "--unreached", "magnitude")
    assert code == 0
    assert "pruned by magnitude, because no calibration data tells of them: 1" in screen
    code, _, errors = run(*prune)
    assert code == 2
    assert "unreached: magnitude or unreached: dense" in errors
