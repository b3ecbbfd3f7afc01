"""The program that trains vision models while they are pruned, on digits and on folders of images."""

import argparse
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import prunus
from prunus.core.ranks import Ranks

from tests.helpers.programs import call
from tests.oracles.pruning import SINGLE
from tests.research import training_runs as runs
from tests.research.training_runs import CAP, GRADUAL, PLAIN, Killed, killed_at, rows, train

# isort: split
from research import sparse_training
from research.common import vision_data
from research.training import files as training_files
from research.training import options as training_options
from research.training import parts as training_parts

STEPS = 11  # of an epoch: 180 images in whole batches of 16
RANDOM = ["--mixup", "0.5", "--reprob", "0.5", "--drop-path", "0.2", "--smoothing", "0.1"]
RANDOM += ["--scale", "0.5", "1.0", "--aa", "rand-m5-n1", "--color-jitter", "0.1"]
EVERYTHING = [*RANDOM, "--model-ema", "--model-ema-decay", "0.9", "--opt", "adamw", "--lr", "2e-3"]
EVERYTHING += ["--checkpoint-steps", "2", "--clip-grad", "1.0", "--sched-on-updates", "--distill"]


def same_files(one, other):
    """All tables and weights that two runs left."""
    assert rows(one) == rows(other)
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}
    for path in one.glob("*.safetensors"):
        mine, theirs = load_file(path), load_file(other / path.name)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), path.name
    for path in one.glob("sparsity_distribution*.json"):
        assert path.read_text() == (other / path.name).read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with all that is random in it, from beginning to end."""
    return train(tmp_path_factory.mktemp("whole"), CAP, *EVERYTHING)


@pytest.mark.parametrize("update", [1, *random.Random(0).sample(range(2, 3 * STEPS), 2), 2 * STEPS])
def test_a_run_killed_at_any_step_and_resumed_ends_with_the_same_weights(whole, tmp_path, update):
    with killed_at(update), pytest.raises(Killed):
        train(tmp_path, CAP, *EVERYTHING)
    same_files(train(tmp_path, CAP, *EVERYTHING, "--resume"), whole)


def train_until_killed(command):
    save = sparse_training.Training._save

    def save_and_die(training):
        save(training)
        if training.updates == 14:
            os.kill(os.getpid(), signal.SIGKILL)

    sparse_training.Training._save = save_and_die
    runs.main(command)


def test_a_process_that_was_killed_leaves_files_to_go_on_with(whole, tmp_path):
    command = runs.flags(tmp_path, CAP, *EVERYTHING)
    assert call(train_until_killed, command).returncode == -signal.SIGKILL
    state = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert (state["next_epoch"], state["next_batch"]) == (1, 3)
    runs.main([*command, "--resume", str(tmp_path / "run" / "last.pth")])
    same_files(tmp_path / "run", whole)


def test_a_finished_run_resumed_stays_as_it_is(whole, tmp_path):
    run = train(tmp_path, GRADUAL, "--epochs", "1")
    before = load_file(run / "model.safetensors")
    train(tmp_path, GRADUAL, "--epochs", "1", "--resume")
    after = load_file(run / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_each_pruning_step_writes_its_distribution_with_accuracy_before_and_after(whole):
    files = sorted(whole.glob("sparsity_distribution_epoch=*.json"))
    assert [f.name for f in files] == [f"sparsity_distribution_epoch={n}.json" for n in (0, 1, 2)]
    table = rows(whole)
    for path, step, target in zip(files, (1, STEPS, 2 * STEPS), (0.3, 0.55, 0.8), strict=True):
        said = json.loads(path.read_text())
        assert said["step"] == step
        assert said["sparsity"] == pytest.approx(target, abs=1e-3)
        assert said["after"]["sparsity"] == said["sparsity"] > said["before"]["sparsity"]
        assert len(said["layers"]) == 8
        if step > 1:  # at the end of an epoch: its row says what it has learnt, and then the cost
            row = table[step // STEPS - 1]
            assert float(row["eval_top1"]) == said["before"]["eval_top1"]
            assert float(row["sparsity"]) == said["before"]["sparsity"]
            assert float(row["pruned_eval_top1"]) == said["after"]["eval_top1"]


def test_the_best_model_of_each_sparsity_is_kept_with_its_masks(whole):
    values = {}
    for said in map(json.loads, (p.read_text() for p in whole.glob("sparsity_distribution*.json"))):
        for m in (said["before"], said["after"]):
            level = f"{m['sparsity']:.4f}"
            values.setdefault(level, []).extend([m["eval_top1"], m["ema_top1"]])
    last = rows(whole)[-1]
    values[f"{float(last['sparsity']):.4f}"] += [float(last["eval_top1"]), float(last["ema_top1"])]
    files = {p.name.partition("=")[2][:6]: p for p in whole.glob("best_sparsity=*.safetensors")}
    assert set(files) == set(values) == {"0.0000", "0.3000", "0.5500", "0.8000"}
    test = runs.Few(False, "L")
    x = torch.from_numpy(test.pixels)[:, None].float() / 127.5 - 1
    for level, path in files.items():
        model = timm.create_model("digits_vit", embed_dim=16, depth=2, num_heads=2).eval()
        masks = prunus.load(path, model).masks
        with torch.no_grad():
            top1 = (model(x).argmax(1) == torch.tensor(test.labels)).float().mean() * 100
        assert float(top1) == pytest.approx(max(values[level]), abs=1e-3)
        zeros = sum(int((~mask).sum()) for mask in masks.values())
        size = sum(mask.numel() for mask in masks.values())
        assert zeros == round(float(level) * size)


STAGES = """
modifiers:
  - nm_training:
      pattern: "1:4"
      masking: {name: sr_ste}
      structure: ["2:4", "1:4"]
      window: {from: 1ep, to: 3ep}
"""


def test_each_stage_of_an_nm_training_is_measured_before_the_next_and_kept(tmp_path):
    run = train(tmp_path, STAGES, "--epochs", "4")
    found = [(float(r["sparsity"]), r["pruned_sparsity"]) for r in rows(run)]
    # each epoch ends with what it trained; a change after its last update is told beside it
    assert [sparsity for sparsity, _ in found] == pytest.approx([0, 0.5, 0.75, 0.75])
    assert [float(pruned or -1) for _, pruned in found] == pytest.approx([0.5, 0.75, 0.75, -1])
    best = {p.name for p in run.glob("best_sparsity=*")}
    assert best == {f"best_sparsity={s}.safetensors" for s in ("0.0000", "0.5000", "0.7500")}
    for path in run.glob("best_sparsity=*"):
        model = timm.create_model("digits_vit", embed_dim=16, depth=2, num_heads=2)
        prunus.load(path, model)
        expected = float(path.stem.partition("=")[2])
        weight = model.blocks[0].mlp.fc1.weight
        assert float((weight == 0).float().mean()) == pytest.approx(expected)


def test_measuring_soft_masks_leaves_training_alone(tmp_path):
    recipe = STAGES.replace("{name: sr_ste}", "{name: mdgf, eval: soft}")
    more = ["--epochs", "3", "--lr", "0.01", "--checkpoint-steps", "2"]
    one = train(tmp_path / "one", recipe, *more)
    with killed_at(STEPS + 5), pytest.raises(Killed):
        train(tmp_path / "two", recipe, *more)
    same_files(one, train(tmp_path / "two", recipe, *more, "--resume"))
    nothing = {"_before_pruning": mock.DEFAULT, "_after_pruning": mock.DEFAULT}
    with mock.patch.multiple(sparse_training.Training, **nothing):
        blind = train(tmp_path / "blind", recipe, *more)
    mine, theirs = (load_file(run / "model.safetensors") for run in (one, blind))
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_average_of_the_weights_is_as_sparse_as_they_are(whole):
    state = torch.load(whole / "last.pth", weights_only=True)
    for name in state["prunus"]["masks"]:
        pruned = state["state_dict"][name] == 0
        assert pruned.float().mean() > 0.5
        assert torch.equal(pruned, state["state_dict_ema"][name] == 0)
    head = "head.weight"
    assert not torch.equal(state["state_dict"][head], state["state_dict_ema"][head])
    assert not state["prunus"]["masks"].keys() & {head}


def test_plain_timm_reads_the_checkpoints(whole):
    for path in (whole / "last.pth", whole / "model.safetensors"):
        model = timm.create_model("digits_vit", embed_dim=16, depth=2, num_heads=2)
        timm.models.load_checkpoint(model, str(path), use_ema=False)
        assert float(prunus.sparsity(model)) > 0.7


def test_the_table_has_sparsity_columns_and_the_numbers_of_the_run(whole):
    table = rows(whole)
    assert [row["epoch"] for row in table] == ["0", "1", "2"]
    assert float(table[-1]["sparsity"]) == pytest.approx(0.8, abs=1e-3)
    model = timm.create_model("digits_vit", embed_dim=16, depth=2, num_heads=2)
    prunus.load(whole / "model.safetensors", model)
    assert float(table[-1]["model_sparsity"]) == pytest.approx(float(prunus.sparsity(model)))
    assert float(table[-1]["train_loss"]) < float(table[0]["train_loss"])


def test_gradient_accumulation_leaves_the_schedule_and_the_updates_alone(tmp_path):
    short = [*PLAIN, "--no-aug", "--epochs", "2"]
    once = train(tmp_path / "once", GRADUAL, *short)
    added = train(tmp_path / "added", GRADUAL, *short, "-b", "8", "--grad-accum-steps", "2")
    assert pruned_at(once) == pruned_at(added) == {0: 1, 1: STEPS, 2: 2 * STEPS}
    one, other = (load_file(run / "model.safetensors") for run in (once, added))
    for name, w in one.items():
        torch.testing.assert_close(other[name], w, atol=1e-4, rtol=1e-3)


def test_batches_that_are_left_over_make_an_update_of_their_own(tmp_path):
    more = ["-b", "4", "--grad-accum-steps", "7", "--epochs", "2"]  # 45 batches
    assert pruned_at(train(tmp_path, GRADUAL, *PLAIN, *more)) == {0: 1, 1: 7, 2: 14}


def pruned_at(run):
    """Epoch -> step of each pruning."""
    said = [json.loads(path.read_text()) for path in run.glob("sparsity_distribution_*.json")]
    return {one["epoch"]: one["step"] for one in said}


def test_a_recipe_sets_epochs_and_learning_rate(tmp_path):
    recipe = (
        GRADUAL + "  - learning_rate: {curve: linear, from: 1e-2, to: 0.0, window: {to: 2ep}}\n"
    )
    command = [f for f in runs.flags(tmp_path, recipe) if f not in ("--epochs", "3")]
    runs.main(command)
    table = rows(tmp_path / "run")
    assert len(table) == 2
    assert [float(row["lr"]) for row in table] == pytest.approx(
        [1e-2 * (1 - (step - 1) / (2 * STEPS)) for step in (STEPS, 2 * STEPS)]
    )
    typed = runs.options(tmp_path / "typed", recipe, "--epochs", "1")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    assert training_parts.plan(typed, prunus.Recipe.load(recipe), optimizer, STEPS) == (None, 1)


@pytest.mark.parametrize(("end", "epochs"), [("1ep", 2), ("2.4ep", 3)])
def test_a_recipe_is_trained_until_its_last_window_ends_in_whole_epochs(end, epochs):
    rate = f"  - learning_rate: {{curve: linear, from: 1e-2, to: 0.0, window: {{to: {end}}}}}\n"
    args = training_options.parse([])
    recipe = prunus.Recipe.load(GRADUAL + rate)
    assert training_parts.plan(args, recipe, mock.Mock(), STEPS) == (None, epochs)


def test_a_recipes_epochs_are_all_there_is(tmp_path):
    args = training_options.parse(["--recipe", "r.yaml", "--cooldown-epochs", "2"])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    recipe = prunus.Recipe.load("epochs: 2\n" + GRADUAL)
    _, epochs = training_parts.plan(args, recipe, optimizer, STEPS)
    assert epochs == 2


def test_a_dense_phase_writes_no_distribution(tmp_path):
    recipe = "modifiers: [acdc: {sparsity: 0.5, window: {to: 2ep, every: 1ep}}]\n"
    run = train(tmp_path, recipe)
    said = [json.loads(p.read_text()) for p in run.glob("sparsity_distribution*.json")]
    assert said
    assert all(one["layers"] and one["sparsity"] > 0 for one in said)


def test_distilling_from_an_untrained_model_is_said(tmp_path, caplog):
    for more, count in ((["--pretrained"], 0), (["--initial-checkpoint", "x"], 0), ([], 1)):
        args = runs.options(tmp_path, GRADUAL, "--distill", *more)
        training_parts.build_teacher(args, nn.Linear(2, 2))
        assert caplog.text.count("the dense model is untrained") == count


def test_pruning_that_training_does_not_reach_is_done_in_the_end(tmp_path):
    run = train(tmp_path, GRADUAL.replace("to: 2ep", "to: 9ep"), "--epochs", "1")
    assert float(prunus.load(run / "model.safetensors").masks["blocks.0.mlp.fc1.weight"].sum())
    model = timm.create_model("digits_vit", embed_dim=16, depth=2, num_heads=2)
    prunus.load(run / "model.safetensors", model)
    said = json.loads((run / f"sparsity_distribution_epoch=1_step={STEPS}.json").read_text())
    assert said["after"]["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert said["after"]["model_sparsity"] == pytest.approx(float(prunus.sparsity(model)))


def test_distillation_is_the_divergence_from_the_dense_models_answer():
    args = training_options.build_parser().parse_args(["--smoothing", "0"])
    args.distill_weight, args.distill_temperature = 0.25, 3.0
    teacher, images = nn.Linear(4, 5).double(), torch.randn(6, 4).double()
    output, labels = torch.randn(6, 5).double(), torch.randint(5, (6,))
    found = training_parts.Loss(args, False, teacher)(output, labels, images)
    slow = 0.0
    for row, answer, label in zip(output, teacher(images), labels, strict=True):
        p, q = (torch.softmax(z / 3.0, 0) for z in (answer, row))
        divergence = sum(a * (a.log() - b.log()) for a, b in zip(p, q, strict=True))
        slow += (0.75 * -torch.log_softmax(row, 0)[label] + 0.25 * 9.0 * divergence) / 6
    torch.testing.assert_close(found, slow)


def test_the_teacher_stays_the_dense_model(tmp_path):
    more = ["--distill", "--epochs", "1", "--lr", "0.1", "-b", "256"]
    args = runs.options(tmp_path, GRADUAL, *more)
    training = sparse_training.Training(args, Ranks(), torch.device("cpu"))
    dense = {name: w.clone() for name, w in training.plain.state_dict().items()}
    training.run()
    teacher = training.loss.teacher.state_dict()
    assert all(torch.equal(teacher[name], w) for name, w in dense.items())


@pytest.mark.parametrize("more", [["float16", "--report"], ["bfloat16", "--torchcompile", "eager"]])
def test_mixed_precision_and_a_compiled_model_reach_the_target(tmp_path, more):
    run = train(tmp_path, GRADUAL, "-b", "60", "--amp", "--amp-dtype", *more)
    assert float(rows(run)[-1]["sparsity"]) == pytest.approx(0.8, abs=1e-3)
    assert (run / "report.html").is_file() == ("--report" in more)


def test_histograms_count_the_weights_that_are_left_and_go_to_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    logged = []
    fake = mock.MagicMock()
    fake.init.return_value.id = "first"
    fake.init.return_value.log = lambda values, step: logged.append((step, values))
    fake.Histogram = lambda np_histogram: np_histogram
    with mock.patch.dict(sys.modules, wandb=fake):
        more = ["--epochs", "2", "--log-wandb", "--log-param-histogram"]
        run = train(tmp_path, GRADUAL, *more)
        train(tmp_path, GRADUAL, *more, "--resume")
    assert [step for step, _ in logged] == [STEPS, 2 * STEPS]
    assert fake.init.call_args.kwargs["id"] == "first"  # the same run of W&B goes on
    assert logged[1][1]["sparsity"] == float(rows(run)[1]["sparsity"])
    lines = [json.loads(line) for line in (run / "histograms.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    state = load_file(run / "model.safetensors")
    for name, shape in lines[1]["layers"].items():
        left = state[name][state[name] != 0]
        counts, edges = logged[1][1][f"weights/{name}"]
        assert sum(shape["counts"]) == counts.sum() == len(left)
        assert (edges[0], edges[-1]) == (left.min(), left.max())


# timm leaves the files of images to be closed when they are forgotten
leaves_files_open = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
SPREAD = ["--scale", "0.3", "1.0", "--color-jitter", "0.3", "--drop-path", "0.3", "--mixup", "0.5"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Stripes of three kinds, 16 to train on and 4 to evaluate on, as a folder and as tars."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for kind in range(3):
            folder = root / "folder" / split / f"kind{kind}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 80, (12, 12, 3))
                pixels[:: 2 + kind] += 170
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    (root / "tars").mkdir()
    for split in ("train", "val"):
        run = [
            "tar",
            "-cf",
            str(root / "tars" / f"{split}.tar"),
            "-C",
            str(root / "folder" / split),
        ]
        subprocess.run([*run, "."], check=True)
    whole = ["tar", "-cf", str(root / "one.tar"), "-C", str(root), "folder"]
    subprocess.run(whole, check=True)
    return root


def of_images(path, *more):
    kwargs = ["img_size=12", "patch_size=4", "embed_dim=16", "depth=2", "num_heads=2"]
    model = ["--model", "vit_tiny_patch16_224", "--num-classes", "3", "--model-kwargs", *kwargs]
    data = ["--data-dir", str(path), "--img-size", "12", "-b", "16", "--lr", "1e-2"]
    return [*model, *data, *more]


@leaves_files_open
def test_a_folder_of_images_trains_the_same_with_any_number_of_workers(images, tmp_path):
    """And resumed in the middle of an epoch, where each image must be changed as before."""
    more = of_images(images / "folder", *SPREAD, "--checkpoint-steps", "2")
    alone = train(tmp_path / "alone", CAP, *more, "-j", "0")
    with killed_at(5), pytest.raises(Killed):
        train(tmp_path / "helped", CAP, *more, "-j", "2")
    same_files(alone, train(tmp_path / "helped", CAP, *more, "-j", "1", "--resume"))


@leaves_files_open
@pytest.mark.parametrize("path", ["tars", "one.tar"])
def test_a_tar_holds_the_images_of_its_folder(images, path):
    for split in ("train", "validation"):
        one, other = (
            vision_data.open_dataset(str(images / p), "", split, 3) for p in ("folder", path)
        )
        assert len(one) == len(other) == (48 if split == "train" else 12)

        def content(data):
            return sorted(
                (label, image.tobytes()) for image, label in map(data.__getitem__, range(len(data)))
            )

        assert content(one) == content(other)


@leaves_files_open
def test_only_one_of_several_splits_is_evaluated_on(images, tmp_path):
    """The one asked for, or else the first synonym that there is, in a tar and in a folder."""
    for split, kinds in (("val", 2), ("test", 1)):
        for kind in range(kinds):
            folder = tmp_path / "data" / split / f"kind{kind}"
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes((images / "folder/val/kind0/0.png").read_bytes())
    tar = tmp_path / "data.tar"
    subprocess.run(["tar", "-cf", str(tar), "-C", str(tmp_path), "data"], check=True)
    for path in (tmp_path / "data", tar):
        sizes = [
            len(vision_data.open_dataset(str(path), "", split, 3))
            for split in ("validation", "val", "test")
        ]
        assert sizes == [2, 2, 1]


def test_a_split_that_a_folder_has_not_is_refused(images, tmp_path):
    with pytest.raises(ValueError, match=r"split 'vall', only train, val; .* --val-split"):
        vision_data.open_dataset(str(images / "folder"), "", "vall", 3)
    with pytest.raises(ValueError, match=r"split 'vall', only train.tar, val.tar"):
        vision_data.open_dataset(str(images / "tars"), "", "vall", 3)
    (tmp_path / "cats").mkdir()  # classes, and no splits
    with pytest.raises(ValueError, match=r"split 'validation', only cats"):
        vision_data.open_dataset(str(tmp_path), "", "validation", 3)


@pytest.mark.parametrize(
    ("path", "name", "remedy"),
    [
        ("zipped.tar", "", "cannot be read as a tar that is not compressed .* decompress it"),
        ("nowhere", "", "give --data-dir a folder, or 'digits'"),
        ("x.tar.gz", "", "gunzip it first"),
        ("empty.tar", "", r"has no images in a folder train/<class>/"),
        ("x.tar.gz", "wds/x", "wds/x is a stream, .* use files instead"),
    ],
)
def test_data_that_cannot_be_read_is_refused_with_the_remedy(tmp_path, path, name, remedy):
    if path != "nowhere":
        (tmp_path / path).touch()
    if path == "zipped.tar":
        (tmp_path / path).write_bytes(gzip.compress(bytes(1024)))
    if path == "empty.tar":
        subprocess.run(["tar", "-cf", str(tmp_path / path), "-T", os.devnull], check=True)
    stream = mock.MagicMock(spec=torch.utils.data.IterableDataset)
    with (
        mock.patch.object(vision_data, "create_dataset", return_value=stream),
        pytest.raises(ValueError, match=remedy),
    ):
        vision_data.open_dataset(str(tmp_path / path), name, "train", 3)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.integers(0, 9)
)
def test_ranks_share_an_epoch_and_resume_where_they_were(images, batch, world, repeats, epoch):
    orders = []
    for rank in range(world):
        if images // world < batch:
            with pytest.raises(ValueError, match="use smaller batches"):
                vision_data.Order(images, batch, 0, Ranks(None, rank, world), repeats)
            return
        order = vision_data.Order(images, batch, 0, Ranks(None, rank, world), repeats)
        order.epoch = lambda: epoch
        drawn = list(order)
        assert len(drawn) == len(order) == images // world // batch * batch
        order.begin = batch
        assert list(order) == drawn[batch:]
        assert list(order) == drawn  # only the next pass leaves some out
        orders += drawn
    numbers, indices = zip(*orders, strict=True)
    assert len(set(numbers)) == len(numbers)
    assert max(indices.count(i) for i in set(indices)) <= max(1, repeats)
    order.epoch = lambda: epoch + 1
    assert not set(numbers) & {number for number, _ in order}


def test_two_processes_train_as_one_with_batches_twice_as_large(ranks, tmp_path):
    more = [*PLAIN, "--no-aug", "--epochs", "2"]
    one = runs.train_on_ranks(tmp_path / "one", GRADUAL, *more)
    half = ["-b", "8"]
    both = ranks(runs.train_on_ranks, tmp_path / "two", GRADUAL, *more, *half)
    for name, w in one.items():
        assert torch.equal(both[0][name], both[1][name])
        assert torch.equal(both[0][name] == 0, w == 0)
        torch.testing.assert_close(both[0][name], w, atol=1e-4, rtol=1e-3)
    assert len(rows(tmp_path / "two" / "run")) == 2


def test_statistics_of_batchnorm_are_the_mean_over_processes_and_resume_as_averages_do(
    ranks, tmp_path
):
    more = ["--model", "digits_resnet", "--epochs", "1", "--checkpoint-steps", "4", "-b", "8"]
    more += ["--model-ema", "--model-ema-decay", "0.9"]
    slim = [x for x in runs.SMALL if x not in ("--model-kwargs", *runs.TINY)]
    with mock.patch.object(runs, "SMALL", [*slim]):
        command = runs.flags(tmp_path, GRADUAL, *more)
    both = ranks(runs.run_on_ranks, command)
    norms = [name for name in both[0] if "running" in name]
    assert norms
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0])
    whole = rows(tmp_path / "run")
    again = [*command[:3], str(tmp_path / "again"), *command[4:]]
    ranks(runs.run_on_ranks, again, 7)
    resumed = ranks(runs.run_on_ranks, [*again, "--resume"])
    assert all(torch.equal(resumed[0][name], w) for name, w in both[0].items())
    averages = [
        torch.load(tmp_path / where / "last.pth", weights_only=True)["state_dict_ema"]
        for where in ("run", "again/run")
    ]
    assert all(torch.equal(w, averages[1][name]) for name, w in averages[0].items())
    for mine, theirs in zip(rows(tmp_path / "again" / "run"), whole, strict=True):
        assert {k: float(v) for k, v in mine.items()} == pytest.approx(
            {k: float(v) for k, v in theirs.items()}
        )


def test_torchrun_starts_it_on_two_processes(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--master-port", "0", "--rdzv-endpoint", "localhost:0", "--rdzv-backend", "c10d"]
    folder = ["--output", str(tmp_path), "--model-folder", str(tmp_path), "--device", "cpu"]
    small = ["--no-pretrained", "--model-kwargs", *runs.TINY, "--epochs", "1", "-gb", "128"]
    command = [*launch, "-m", "research.sparse_training", *folder, *small]
    done = subprocess.run(command, env=SINGLE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "digits_vit"
    (row,) = rows(run)
    assert float(row["sparsity"]) == pytest.approx(0.9, abs=1e-3)
    assert done.stderr.count("epoch 0: top-1") == 1
    assert (run / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "path", sorted((runs.RESEARCH / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_config_names_options_and_is_overridden_by_typed_ones(path):
    typed = ["--data-dir", "x", "--recipe", "y", "--config", str(path)]
    args = training_options.parse([*typed, "--weight_decay", "0.5"])
    plain = training_options.parse([*typed[:4], "--weight-decay", "0.5"])
    assert args.weight_decay == 0.5
    assert args.opt == "adamw" != plain.opt
    assert args.recipe == "y"


def test_a_config_of_timm_with_options_we_do_not_have_is_read_where_they_are_off(tmp_path):
    path = tmp_path / "timm.yaml"
    off = "apex_amp: false\naug_splits: 0\nstart_epoch: null\nopt_betas: null\nepochs: 7\noutput: ''\n"
    path.write_text(off)
    command = ["--data-dir", "x", "--recipe", "y", "--config", str(path)]
    args = training_options.parse(command)
    assert (args.epochs, args.output) == (7, "runs/train")
    path.write_text(off.replace("aug_splits: 0", "aug_splits: 3"))
    with pytest.raises(ValueError, match="aug_splits: 3 is not supported; remove it"):
        training_options.parse(command)
    path.write_text("weigth_decay: 0.1\n")
    with pytest.raises(
        ValueError, match="unknown option 'weigth_decay'; did you mean 'weight_decay'"
    ):
        training_options.parse(command)


def test_without_data_the_digits_and_their_config_are_taken():
    args = training_options.parse([])
    assert (args.data_dir, args.model, args.workers) == ("digits", "digits_vit", 0)
    assert args.pretrained
    assert Path(args.recipe).is_file()
    assert not training_options.parse(["--no-pretrained", "--data_dir=digits"]).pretrained


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("eval_metric: acc1", "eval_metric: 'acc1'; expected one of 'top1', 'top5', 'loss'"),
        ("amp_dtype: bf16", "expected one of 'float16', 'bfloat16'; did you mean 'bfloat16'"),
        ("no_aug: 'false'", "no_aug: 'false'; expected true or false"),
        ("pretrained: 1", "expected true or false"),
        ("batch_size: 64.5", "batch_size: 64.5; expected a whole number"),
        ("batch_size: true", "expected a whole number"),
        ("lr: fast", "lr: 'fast'; expected a number"),
        ("mean: 0.5", "mean: 0.5; expected a list of values"),
        ("input_size: [3, 8]", "expected a list of 3"),
        ("scale: [0.5, wide]", "expected a number"),
        ("set: lr=3", "set: 'lr=3'; expected a mapping"),
        ("[a, b]", "not a mapping of options to values"),
    ],
)
def test_values_of_a_config_are_checked_as_options_are(line, remedy, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(line)
    with pytest.raises(ValueError, match=re.escape(remedy)):
        training_options.parse(["--data-dir", "x", "--recipe", "y", "--config", str(path)])


def test_typed_variables_add_to_those_of_a_config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("set: {a: 1, b: 2}\nrecipe: r.yaml\nlr: 1e-3\n")  # which YAML reads as text
    args = training_options.parse(["--data-dir", "x", "--config", str(path), "--set", "b=3"])
    assert args.set == {"a": 1, "b": 3}
    assert args.lr == 1e-3


@pytest.mark.parametrize(("flag", "alone"), [("resume", "auto"), ("distill", "dense")])
def test_data_after_an_option_that_needs_no_value_is_data(flag, alone, tmp_path):
    begin, (file, run) = ["--recipe", "r.yaml"], (tmp_path / "a.pth", tmp_path / "run")
    run.mkdir()
    for data in (str(tmp_path), "digits", "images.tar"):
        args = training_options.parse([*begin, "--model", "x", f"--{flag}", data])
        assert (args.data_dir, getattr(args, flag)) == (data, alone)
    args = training_options.parse([*begin, str(tmp_path), f"--{flag}", str(file)])
    assert (args.data_dir, getattr(args, flag)) == (str(tmp_path), str(file))
    (run / "last.pth").touch()
    args = training_options.parse([*begin, "--resume", str(run)])
    assert args.resume == str(run / "last.pth")


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (["--sparsities", "0.5", "0.9"], "for others: --set sparsity=0.9"),
        (["--data-dir", "x"], "--recipe is needed"),
        (["--sched", "plateau"], "use another"),
        (["--epoch", "5"], "unrecognized arguments: --epoch"),
        (["--distill-weight", "2"], "is not between 0 and 1"),
    ],
)
def test_options_that_cannot_be_are_refused_with_the_remedy(flags, remedy, capsys):
    with pytest.raises(SystemExit, match="2"):
        training_options.parse(flags)
    assert remedy in capsys.readouterr().err


def test_what_would_overwrite_or_change_a_run_is_refused(tmp_path):
    train(tmp_path, GRADUAL, "--epochs", "1")
    with pytest.raises(ValueError, match="holds a run; give --resume"):
        train(tmp_path, GRADUAL, "--epochs", "1")
    with pytest.raises(ValueError, match="epochs was 1 and is 2; seed was 42 and is 7"):
        train(tmp_path, GRADUAL, "--epochs", "2", "--seed", "7", "--resume")
    told = (tmp_path / "run" / "args.yaml").read_text()
    with pytest.raises(ValueError, match="the state is of another recipe"):
        train(tmp_path, CAP, "--epochs", "1", "--resume")
    with pytest.raises(ValueError, match="the run had 11 batches in an epoch, this data makes 89"):
        sparse_training.main(runs.flags(tmp_path, GRADUAL, "--epochs", "1", "--resume"))
    assert (tmp_path / "run" / "args.yaml").read_text() == told
    last = str(tmp_path / "run" / "last.pth")
    with pytest.raises(ValueError, match="goes on beside its other files; leave out --experiment"):
        train(tmp_path / "other", GRADUAL, "--epochs", "1", "--resume", last)
    torch.save({"state_dict": {}}, last)
    with pytest.raises(ValueError, match=r"last.pth is no checkpoint of this program"):
        train(tmp_path, GRADUAL, "--epochs", "1", "--resume")
    Path(last).write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"last.pth cannot be read .* give a last.pth"):
        train(tmp_path, GRADUAL, "--epochs", "1", "--resume")


def test_a_full_disk_is_an_error_and_keeps_the_last_checkpoint(tmp_path):
    train(tmp_path, GRADUAL, "--epochs", "1")
    last = tmp_path / "run" / "last.pth"
    before = last.read_bytes()
    files = training_files.RunFolder(last.parent, argparse.Namespace())
    full = mock.patch.object(torch, "save", side_effect=RuntimeError("file write failed"))
    with full, pytest.raises(OSError, match="the old one is there: file write failed"):
        files.save({})
    assert last.read_bytes() == before


def test_what_a_run_without_a_checkpoint_left_is_removed(tmp_path):
    left = tmp_path / "run" / "best_sparsity=0.1234.safetensors"
    left.parent.mkdir()
    left.touch()
    train(tmp_path, GRADUAL, "--epochs", "1")
    assert not left.exists()


def test_the_number_of_processes_stays(tmp_path):
    train(tmp_path, GRADUAL, "--epochs", "1")
    args = runs.options(tmp_path, GRADUAL, "--epochs", "1", "--resume")
    with (
        mock.patch.object(sparse_training, "DistributedDataParallel", lambda model, **_: model),
        pytest.raises(ValueError, match="is of 1 processes, now there are 2, .* start as many"),
    ):
        sparse_training.Training(args, Ranks(None, 0, 2), torch.device("cpu"))
