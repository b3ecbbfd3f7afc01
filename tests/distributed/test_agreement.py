"""Two ranks that were asked for different things, and a first rank that cannot save."""

from datetime import timedelta

import pytest
import torch
from torch import nn

import prunus
from prunus.core import ranks as core_ranks

from tests.distributed import workers
from tests.distributed.workers import batches, net, outcome, recipe, wrapped


def second():
    return workers.world()[0] == 1


CASES = {
    "recipe": (
        {"recipe": lambda: recipe().replace("0.", "0.1") if second() else recipe()},
        "given different recipe: rank 0 '",
    ),
    "epochs": (
        {"epochs": lambda: 3 if second() else 2, "steps_per_epoch": lambda: 4},
        "given different timeline: rank 0 'Timeline(steps_per_epoch=4, epochs=2)', rank 1 'Ti",
    ),
    "calibration": (
        {"calibration": lambda: None if second() else prunus.Calibration(batches(2))},
        "given different calibration: rank 0 'given, loss_fn none, forward none', rank 1 'none'",
    ),
    "loss": (
        {
            "calibration": lambda: prunus.Calibration(
                batches(2), None if second() else nn.functional.mse_loss
            )
        },
        "given different calibration: rank 0 'given, loss_fn given, forward none', rank 1 'given",
    ),
}


def _attach(case):
    model = wrapped(net(), "ddp")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    arguments = {name: make() for name, make in CASES[case][0].items()}
    text = arguments.pop("recipe", recipe())
    before = len(optimizer._optimizer_step_post_hooks)
    error = outcome(lambda: prunus.attach(model, optimizer, text, **arguments))
    return error, len(optimizer._optimizer_step_post_hooks) - before


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_were_given_different_things_are_all_refused_when_attaching(ranks, case):
    for error, hooks in ranks(_attach, case):
        assert error.startswith("ValueError: the ranks were " + CASES[case][1])
        assert error.endswith("; give all of them the same")
        assert hooks == 0


def _at_once(call):
    model, target = wrapped(net(), "ddp"), 0.6 if second() else 0.5
    calls = {
        "prune": lambda: prunus.prune(model, "magnitude", sparsity=target, layers="*"),
        "sweep": lambda: prunus.sweep(model, "magnitude", [target], lambda model: 0.0, layers="*"),
    }
    return outcome(calls[call]), not any((p == 0).any() for p in model.parameters())


@pytest.mark.parametrize("call", ["prune", "sweep"])
def test_different_sparsities_are_refused_at_once(ranks, call):
    for error, untouched in ranks(_at_once, call):
        assert "ValueError: the ranks were given different" in error
        assert "0.5" in error
        assert "0.6" in error
        assert untouched


def _one_cannot():
    model = wrapped(net(), "ddp")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    text = "modifiers: [{prun: {}}]" if second() else recipe()
    bad = outcome(lambda: prunus.attach(model, optimizer, text))
    data = prunus.Calibration([torch.ones(3)] if second() else batches(2))
    worse = outcome(
        lambda: prunus.attach(
            model, optimizer, recipe().replace("pruner: ", "pruner: wanda #"), calibration=data
        )
    )
    return bad, worse, len(optimizer._optimizer_step_post_hooks)


def test_what_one_rank_cannot_attach_none_attaches(ranks):
    (other, other_data, hooks), (itself, itself_data, hooks_too) = ranks(_one_cannot)
    assert itself.startswith("RecipeError: recipe:1: modifiers[0].prun: unknown modifier")
    assert other == f"RuntimeError: rank 1 failed with {itself}"
    assert itself_data.startswith("ValueError: calibration: its first batch cannot be used")
    assert other_data == f"RuntimeError: rank 1 failed with {itself_data}"
    assert hooks == hooks_too == 0


def _save(path, who):
    model = wrapped(net(), "ddp")
    if who == "first" and second():
        return "waits for nobody", path.is_file()
    error = outcome(lambda: prunus.save(model, path))
    return error, path.is_file()


def test_what_the_first_rank_cannot_save_fails_on_all(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    first, other = ranks(_save, tmp_path / "file" / "model.safetensors", "all")
    assert first[0].startswith("FileExistsError")
    assert other[0].startswith("RuntimeError: rank 0 failed with FileExistsError")


def test_a_file_is_there_when_any_rank_goes_on_and_the_first_may_save_alone(ranks, tmp_path):
    answers = ranks(_save, tmp_path / "all.safetensors", "all")
    assert all(saved for _, saved in answers)
    ranks(_save, tmp_path / "first.safetensors", "first")
    assert (tmp_path / "first.safetensors").is_file()


def _second_alone(path):
    model, patience = wrapped(net(), "ddp"), core_ranks.PATIENCE
    core_ranks.PATIENCE = timedelta(seconds=0.2)
    try:
        return outcome(lambda: prunus.save(model, path)) if second() else "no error"
    finally:
        core_ranks.PATIENCE = patience


def test_others_do_not_wait_for_ever_for_a_first_rank_that_does_not_save(ranks, tmp_path):
    _, error = ranks(_second_alone, tmp_path / "nobody.safetensors")
    assert error.startswith("RuntimeError: rank 0 has not done this: save ")
    assert error.endswith("call it on every rank, or on that one only")
