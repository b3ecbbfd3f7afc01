"""The program that prunes trained vision models in one shot, on digits."""

import csv
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import prunus
from prunus.core.ranks import Ranks

from tests.helpers.programs import run_module
from tests.oracles.pruning import SINGLE
from tests.research import training_runs as runs

# isort: split
from research import demo, one_shot_pruning
from research.common import vision_data, vision_models

CAP = """
modifiers:
  - prune: {pruner: {name: cap, block_size: 16, num_grads: 12, damp: 1.0e-6}, sparsity: 0.5}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a recipe and a digits model that has seen one epoch."""
    folder = tmp_path_factory.mktemp("one-shot")
    (folder / "cap.yaml").write_text(CAP)
    with mock.patch.object(vision_models, "EPOCHS", 1):
        vision_models.trained_on_digits("digits_vit", folder, Ranks())
    return folder


def flags(home, output, *more):
    where = ["--model-folder", str(home), "--output-dir", str(output), "--device", "cpu"]
    return [*where, "--recipe", str(home / "cap.yaml"), "--gs_loader", *more]


def run(home, output, *more):
    """The rows of the table after the program has run."""
    with mock.patch.object(vision_data, "Digits", runs.Few):
        one_shot_pruning.main(flags(home, output, *more))
    return table(output)


def table(output):
    with (output / "results.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_the_table_says_what_pruning_by_hand_says(home, tmp_path):
    found = run(home, tmp_path, "--sparsities", "0.9", "0.5", "--save_model", "-gb", "8")
    assert [row["sparsity"] for row in found] == [0.0, 0.5, 0.9]
    assert (tmp_path / "results.png").is_file()
    few = runs.Few(False, "L")
    x = torch.from_numpy(few.pixels)[:, None].float() / 127.5 - 1
    y = torch.tensor(few.labels)
    for row in found:
        model = timm.create_model("digits_vit").eval()
        saved = tmp_path / f"digits_vit_sparsity={row['sparsity']:g}.safetensors"
        dense = home / "digits_vit.safetensors"
        prunus.load(saved if row["sparsity"] else dense, model)
        with torch.no_grad():
            output = model(x)
        top1 = 100 * (output.argmax(1) == y).float().mean()
        assert row["top1"] == pytest.approx(float(top1), abs=1e-3)
        loss = nn.functional.cross_entropy(output, y)
        assert row["loss"] == pytest.approx(float(loss), abs=1e-5)
        assert row["model_sparsity"] == pytest.approx(float(prunus.sparsity(model)))
        pruned = [w for n, w in model.named_parameters() if n.startswith("blocks") and w.dim() == 2]
        zeros = sum(int((w == 0).sum()) for w in pruned)
        assert zeros == round(row["sparsity"] * sum(w.numel() for w in pruned))


def test_one_set_of_statistics_serves_all_sparsities(home, tmp_path):
    batches = []
    loss = nn.functional.cross_entropy

    def counted(output, labels, **more):
        batches.extend([] if more else [len(labels)])  # evaluation sums
        return loss(output, labels, **more)

    with mock.patch.object(nn.functional, "cross_entropy", counted):
        run(home, tmp_path, "--sparsities", "0.3", "0.5", "0.7", "0.9", "-gb", "8")
    assert batches == [8] * 13  # the first once more: it shows the ends of the network


def test_what_is_left_of_an_interrupted_sweep_is_done_as_it_would_have_been(home, tmp_path):
    whole = run(home, tmp_path / "whole", "--sparsities", "0.5", "0.75", "0.9")
    keep = one_shot_pruning.Program.keep
    done = []

    def killed(program, target):
        done.append(target)
        if len(done) == 2:
            raise KeyboardInterrupt
        return keep(program, target)

    sparsities = ["--sparsities", "0.5", "0.75", "0.9"]
    with mock.patch.object(one_shot_pruning.Program, "keep", killed):
        with pytest.raises(KeyboardInterrupt):
            run(home, tmp_path / "killed", *sparsities)
        assert table(tmp_path / "killed") == whole[:2]
        done[:] = [None] * 2
        assert run(home, tmp_path / "killed", *sparsities) == whole
    assert done[2:] == [0.75, 0.9]
    with mock.patch.object(prunus, "sweep", side_effect=AssertionError):
        assert run(home, tmp_path / "killed", *sparsities) == whole


def test_a_model_that_is_asked_for_later_is_made_and_its_row_stays(home, tmp_path):
    first = run(home, tmp_path, "--sparsities", "0.5", "0.75")
    assert run(home, tmp_path, "--sparsities", "0.5", "--save-model") == first
    assert [p.name for p in tmp_path.glob("*.safetensors")] == [
        "digits_vit_sparsity=0.5.safetensors"
    ]


def test_a_tuple_among_the_settings_is_the_list_that_a_file_holds(tmp_path):
    for _ in range(2):
        results = one_shot_pruning.Results(tmp_path, {"model_kwargs": {"init_values": (1, 2)}})
        results.add(0.0, nn.Linear(2, 2), {"top1": 0.0})
    with pytest.raises(ValueError, match="with another model_kwargs"):
        one_shot_pruning.Results(tmp_path, {"model_kwargs": {"init_values": (1, 3)}})


def test_results_of_other_settings_are_not_mixed(home, tmp_path):
    run(home, tmp_path, "--sparsities", "0.5")
    with pytest.raises(ValueError, match="with another seed; give another --experiment"):
        run(home, tmp_path, "--sparsities", "0.5", "--seed", "1")


def test_a_run_that_found_nothing_binds_none(home, tmp_path):
    with pytest.raises(ValueError, match="is not a file"):
        run(home, tmp_path, "--checkpoint", "nosuch.pth")
    assert [row["sparsity"] for row in run(home, tmp_path, "--sparsities", "0.5")] == [0.0, 0.5]


def test_the_batch_size_counts_where_batches_are_normalized(home, tmp_path):
    """It changes the results of --recalibrate, and no others."""
    recipe = tmp_path / "magnitude.yaml"
    recipe.write_text("modifiers: [{prune: {sparsity: 0.5}}]\n")
    more = ["--sparsities", "0.5", "--recipe", str(recipe)]
    prunus.save(timm.create_model("digits_resnet"), tmp_path / "resnet.safetensors")
    more += ["--model", "digits_resnet", "--checkpoint", str(tmp_path / "resnet.safetensors")]
    plain = run(home, tmp_path / "plain", *more, "-vb", "45")
    assert run(home, tmp_path / "plain", *more, "-vb", "60") == plain
    run(home, tmp_path / "anew", *more, "--recalibrate", "-vb", "45")
    with pytest.raises(ValueError, match="results with another val_batch_size; give"):
        run(home, tmp_path / "anew", *more, "--recalibrate", "-vb", "60")


def test_a_sparse_checkpoint_is_listed_by_its_sparsity(home, tmp_path):
    model = timm.create_model("digits_vit")
    prunus.load(home / "digits_vit.safetensors", model)
    prunus.prune(model, "magnitude", sparsity=0.3, layers=["blocks.*"])
    prunus.save(model, tmp_path / "sparse.safetensors")
    (tmp_path / "recipe.yaml").write_text(
        "modifiers: [{prune: {sparsity: 0.5, layers: ['blocks.*']}}]\n"
    )
    more = ["--recipe", str(tmp_path / "recipe.yaml")]
    more += ["--checkpoint", str(tmp_path / "sparse.safetensors"), "--sparsities", "0.75"]
    found = run(home, tmp_path / "runs", *more)
    assert [row["sparsity"] for row in found] == pytest.approx([0.3, 0.75], abs=1e-4)
    assert found[0]["model_sparsity"] == pytest.approx(float(prunus.sparsity(model)))
    with mock.patch.object(one_shot_pruning.Program, "evaluate", side_effect=AssertionError):
        assert run(home, tmp_path / "runs", *more) == found


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ("--model digits_vitt", "--model digits_vitt: .* did you mean 'digits_vit'"),
        ("--checkpoint nosuch.pth", "--checkpoint nosuch.pth is not a file; give"),
        ("--checkpoint {}/cap.yaml", "--checkpoint .*cap.yaml: no weights for this model"),
        ("--checkpoint {}/empty.pth", r"empty.pth: no weights for this model.*: \w+"),
        (
            "--model digits_resnet --checkpoint {}/digits_vit.safetensors",
            "_vit.safetensors: no .* Missing key",
        ),
        ("--num-classes 5", "--num-classes 5: .* digits are for 10; leave it out, or give --check"),
        ("--num-classes 5 --checkpoint {}/five.safetensors", "have 10 classes, the model 5; give"),
        ("--model-kwargs embed_dim=32", "digits_vit: no weights .* --model-kwargs: .* cls_token"),
    ],
)
def test_a_model_that_cannot_be_is_refused_with_the_option(home, tmp_path, flags, remedy):
    (home / "empty.pth").touch()
    prunus.save(timm.create_model("digits_vit", num_classes=5), home / "five.safetensors")
    with pytest.raises(ValueError, match=remedy):
        run(home, tmp_path, *flags.format(home).split())
    assert not list(tmp_path.iterdir())


def test_wandb_is_missed_before_the_work_is_done(home, tmp_path):
    with (
        mock.patch.object(one_shot_pruning.importlib.util, "find_spec", return_value=None),
        mock.patch.object(one_shot_pruning, "Program", side_effect=AssertionError),
        pytest.raises(ValueError, match=r"--log-wandb needs: pip install 'prunus\[wandb\]'"),
    ):
        run(home, tmp_path, "--log-wandb")


def test_images_are_cropped_as_the_model_wants_them(home, tmp_path):
    wide = Image.fromarray(np.arange(128, dtype=np.uint8).reshape(8, 16))
    for mode, seen in (
        ("squash", wide.resize((8, 8), Image.Resampling.BILINEAR)),
        ("center", wide.crop((4, 0, 12, 8))),
    ):
        with mock.patch.dict(vision_models.CONFIG, crop_mode=mode):
            args = one_shot_pruning.parse(flags(home, tmp_path))
            program = one_shot_pruning.Program(args, Ranks(), torch.device("cpu"))
        assert np.array_equal(program.test.dataset.transform(wide)[0], np.asarray(seen))


def test_the_command_of_caps_readme_runs(home, tmp_path):
    """But for the names in angle brackets: options in its order, and its spelling of the recipe."""
    command = ["--data-dir", "digits", "--sparseml-recipe", str(home / "cap.yaml")]
    command += ["--model", "digits_vit", "--experiment", "first", "-gb", "16", "-vb", "64"]
    command += ["--sparsities", "0.5", "0.75", "--output-dir", str(tmp_path)]
    more = ["--model_folder", str(home), "--device", "cpu"]
    done = run_module("research.one_shot_pruning", *command, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [row["sparsity"] for row in table(tmp_path / "first")] == [0.0, 0.5, 0.75]
    assert "top-1" in done.stdout


@pytest.mark.parametrize("name", ["run_one_shot_pruning.sh", "run_gradual_pruning.sh"])
def test_scripts_take_paths_from_where_they_are_called(tmp_path, name):
    """And otherwise from the repository; digits are no path."""
    for folder in ("images", "digits"):
        (tmp_path / folder).mkdir()
    (tmp_path / "mine.yaml").touch()

    def given(**variables):
        done = subprocess.run(
            [str(runs.RESEARCH / name), "--seed", "1"],
            env={**SINGLE, "PYTHON": "echo", **variables},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        words = done.stdout.split()
        assert words[-2:] == ["--seed", "1"]
        return [words[words.index(f"--{key.lower().replace('_', '-')}") + 1] for key in variables]

    mine = str(tmp_path / "mine.yaml")
    assert given(RECIPE="mine.yaml", DATA_DIR="images") == [mine, str(tmp_path / "images")]
    shipped = "recipes/vit/cap-gradual-90.yaml"
    assert given(RECIPE=shipped, DATA_DIR="digits") == [shipped, "digits"]
    assert given(RECIPE=mine) == [mine]
    if "gradual" in name:
        assert given(CONFIG="mine.yaml") == [mine]


def test_two_processes_prune_alike_and_evaluate_each_image_once(ranks, home, tmp_path):
    (home / "fastcap.yaml").write_text(CAP.replace("cap, block_size: 16", "fastcap"))
    more = ["--recipe", str(home / "fastcap.yaml"), "--sparsities", "0.5"]
    both = ranks(runs.prune_on_ranks, [*flags(home, tmp_path / "two"), *more])
    assert torch.equal(both[0], both[1])
    one = run(home, tmp_path / "one", *more)
    two = table(tmp_path / "two")
    assert one[0] == pytest.approx(two[0], abs=1e-6)  # the dense model, on all images
    assert one[1]["model_sparsity"] == two[1]["model_sparsity"]


def test_a_pattern_that_fixes_the_sparsity_is_pruned_to_it(home, tmp_path):
    (home / "nm.yaml").write_text(CAP.replace(", sparsity: 0.5}", ', pattern: "1:4"}'))
    found = run(home, tmp_path, "--recipe", str(home / "nm.yaml"), "--save-model")
    assert [row["sparsity"] for row in found] == [0.0, 0.75]
    state = load_file(tmp_path / "digits_vit_sparsity=0.75.safetensors")
    w = state["blocks.0.mlp.fc1.weight"]
    assert set(w.view(len(w), -1, 4).count_nonzero(2).flatten().tolist()) == {1}


def test_batchnorm_statistics_are_estimated_anew_on_request(tmp_path):
    torch.manual_seed(0)
    prunus.save(timm.create_model("digits_resnet"), tmp_path / "digits_resnet.safetensors")
    recipe = tmp_path / "magnitude.yaml"
    recipe.write_text("modifiers: [{prune: {sparsity: 0.5}}]\n")
    more = ["--model", "digits_resnet", "--recipe", str(recipe), "--sparsities", "0.5"]
    (tmp_path / "cap.yaml").touch()
    saved = []
    for name, flag in (("old", []), ("new", ["--recalibrate"])):
        run(tmp_path, tmp_path / name, *more, "--save-model", "-vb", "60", *flag)
        saved.append(load_file(tmp_path / name / "digits_resnet_sparsity=0.5.safetensors"))
    old, new = saved
    assert torch.equal(old["layer1.0.conv1.weight"], new["layer1.0.conv1.weight"])
    assert not torch.equal(old["bn1.running_mean"], new["bn1.running_mean"])


@pytest.mark.parametrize(
    ("recipe", "remedy"),
    [
        (CAP + CAP.split("\n", 2)[2], "has 2 'prune' entries; use one with exactly one"),
        ("modifiers: [freeze: {parameters: 'head.*'}]\n", "has 0 'prune' entries"),
        ("modifiers: [acdc: {sparsity: 0.5, window: {to: 9ep}}]\n", "'acdc' needs training: use"),
        ("modifiers: [movement: {sparsity: 0.5}]\n", "'movement' needs training: use"),
        ("modifiers: [prune: {pruner: wanda, sequential: true, sparsity: 0.5}]\n", "prunus.prune"),
    ],
)
def test_a_recipe_that_cannot_be_swept_is_refused(home, tmp_path, recipe, remedy):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    with pytest.raises(ValueError, match=remedy):
        run(home, tmp_path, "--recipe", str(path))


def test_a_table_goes_to_wandb(home, tmp_path):
    fake = mock.MagicMock(__spec__=mock.sentinel.there)
    with mock.patch.dict(sys.modules, wandb=fake):
        found = run(home, tmp_path, "--sparsities", "0.5", "--log-wandb")
    logged = [call.args[0] for call in fake.init.return_value.log.call_args_list]
    assert [(r["sparsity"], r["val/acc"]) for r in logged] == [
        (row["sparsity"], row["top1"]) for row in found
    ]


def test_digits_are_those_of_the_demo():
    (x, y), _ = demo.digits()
    digits = vision_data.Digits(True, "L")
    assert digits.labels == y.tolist()
    torch.testing.assert_close(
        torch.from_numpy(digits.pixels).float() / 127.5 - 1, x[:, 0], atol=4e-3, rtol=0
    )
