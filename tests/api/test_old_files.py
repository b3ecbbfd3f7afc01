"""What version 0.1 wrote is still read: recipes, states, checkpoints, records, names.

The files in ``tests/data/v0_1`` were written by that version, in the middle and at the end of ten
steps of the training below.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import prunus
from prunus.modifiers import NMTraining, PruningModifier, Run, SemiSparseTraining
from prunus.modifiers.nm.maskings import SRSTE
from prunus.report.records import read_records

OLD = Path(__file__).parents[1] / "data" / "v0_1"


def net():
    torch.manual_seed(0)
    layers = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 2)
    a, b, c, d = layers
    return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), c, nn.Tanh(), d)


def step(model, optimizer, i):
    inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
    model(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def load(path):
    with pytest.warns(FutureWarning) as warned:
        recipe = prunus.Recipe.load(path)
    return recipe, [str(w.message) for w in warned]


def test_recipes_are_read_in_the_words_of_today_with_the_place_of_each_old_one():
    recipe, messages = load(OLD / "recipe.yaml")
    kinds = [type(modifier) for modifier in recipe.modifiers[:3]]
    assert kinds == [PruningModifier, NMTraining, SemiSparseTraining]
    assert [message.split(": ")[0] for message in messages] == [
        f"{OLD / 'recipe.yaml'}:3",
        f"{OLD / 'recipe.yaml'}:4",
    ]
    assert prunus.Recipe.load(recipe.to_yaml()) == recipe


def test_a_state_goes_on_to_the_same_weights():
    recipe, _ = load(OLD / "recipe.yaml")
    state = torch.load(OLD / "state.pt", weights_only=True)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with prunus.attach(model, optimizer, recipe) as session:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        session.load_state_dict(state["session"])
        for i in range(5, 10):
            step(model, optimizer, i)
    for name, weight in torch.load(OLD / "final.pt", weights_only=True).items():
        torch.testing.assert_close(model.state_dict()[name], weight)


@pytest.mark.parametrize("name", ["compact.safetensors", "dense.safetensors"])
def test_checkpoints_are_read(name):
    checkpoint = prunus.load(OLD / name)
    for key, weight in torch.load(OLD / "final.pt", weights_only=True).items():
        assert torch.equal(checkpoint.state_dict[key], weight)
    assert {key: int((~mask).sum()) for key, mask in checkpoint.masks.items()} == {
        "0.weight": round(0.6 * 128),
        "2.weight": 128,
    }
    with pytest.warns(FutureWarning):
        assert [m.name for m in checkpoint.recipe.modifiers][:2] == ["prune", "nm_training"]


def test_records_are_read_and_reported(tmp_path):
    events = read_records(OLD)
    assert events[0]["event"] == "start"
    assert {event["pruner"] for event in events if event["event"] == "prune"} == {"magnitude"}


def test_a_masking_given_to_the_pruning_modifier_makes_n_m_training():
    with pytest.warns(FutureWarning, match="NMTraining"):
        entry = prunus.PruningModifier(pattern="2:4", masking=SRSTE(), layers=("2",))
    assert entry == NMTraining(pattern="2:4", masking=SRSTE(), layers=("2",))


def test_a_hard_masking_in_a_recipe_is_dropped():
    text = "modifiers:\n  - prune: {sparsity: 0.5, masking: hard}\n"
    with pytest.warns(FutureWarning, match="recipe:2: .*'masking' is gone"):
        assert prunus.Recipe.load(text).modifiers == (PruningModifier(sparsity=0.5),)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("prune: {structure: stepwise, pattern: '2:4'}", "use the entry 'nm_training'"),
        ("prune: {masking: ste, pattern: '2:4', pruner: cap}", "drop 'pruner'"),
        ("prune: {masking: ste, pattern: '2:4', sparsity: 0.75}", "drop 'sparsity'"),
        ("prune: {masking: ste, pattern: '2:4', sequential: true}", "drop it"),
        ("acdc: {masking: ste, pattern: '2:4'}", "drop 'masking'"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_never_went_together_still_does_not(entry, message):
    with pytest.raises(ValueError, match=message):
        prunus.Recipe.load(f"modifiers:\n  - {entry}\n")


def test_runs_with_the_old_names_of_methods_still_run():
    with pytest.warns(FutureWarning, match=r"Old\.after_step is now prune"):

        class Old(Run):
            def after_step(self, step):
                return step

    assert Old().prune(3) == 3


@pytest.mark.parametrize(
    ("old", "name"),
    [
        ("prunus.layers", "Layer"),
        ("prunus.distributed", "Shards"),
        ("prunus.patterns", "parse_pattern"),
        ("prunus.timing", "Window"),
        ("prunus.semi_sparse", "SemiSparseLinear"),
        ("prunus.semi_sparse.linear", "SemiSparseLinear"),
        ("prunus.compat.sparseml", "ScheduledModifierManager"),
        ("prunus.execution.modules", "Sparse"),
    ],
)
def test_modules_are_found_under_their_old_names(old, name):
    sys.modules.pop(old, None)
    with pytest.warns(FutureWarning) as warned:  # of its parent as well
        module = importlib.import_module(old)
    assert str(warned[-1].message).startswith(f"{old} is now prunus.")
    assert getattr(module, name).__module__.startswith("prunus.")
