"""Numbers that cannot be computed with are refused where they stand, by file and line."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import prunus
from prunus import Recipe
from prunus.core.numbers import MAX_STEPS
from prunus.modifiers import LearningRate, WeightDecay
from prunus.modifiers.schedules import Schedule
from prunus.modifiers.timing import Timeline, Window, parse_duration
from prunus.recipe import RecipeError

HUGE = "9" * 400
SPARSEML = "modifiers:\n- !EpochRangeModifier {start_epoch: 0, end_epoch: 10}\n- "
GRADUAL = (
    "!GMPruningModifier {start_epoch: %s, end_epoch: %s, init_sparsity: 0.05, "
    "final_sparsity: %s, params: ['re:.*'], update_frequency: %s}\n"
)
SCHEDULER = (
    "!LearningRateModifier {start_epoch: 0, end_epoch: 10, init_lr: 0.1, lr_class: %s, "
    "lr_kwargs: {%s}}\n"
)
RATES = (
    "!LearningRateFunctionModifier {start_epoch: 0, end_epoch: 10, init_lr: %s, final_lr: %s, "
    "lr_func: %s, cycle_epochs: %s}\n"
)


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", HUGE, "-" + HUGE, "1e400"])
@pytest.mark.parametrize(
    "text",
    [
        "modifiers:\n- prune: {sparsity: %s}\n",
        "modifiers:\n- prune: {sparsity: {from: %s, to: 0.5}}\n",
        "modifiers:\n- prune: {sparsity: 0.5, pruner: {name: cap, damp: %s}}\n",
        "modifiers:\n- prune: {sparsity: 0.5, pruner: {name: cap, num_grads: %s}}\n",
        "modifiers:\n- prune: {allocator: {a: %s}}\n",
        "modifiers:\n- learning_rate: {to: %s}\n",
        "modifiers:\n- weight_decay: {values: [0.1, %s]}\n",
        "modifiers:\n- learning_rate: {to: 0.1, window: {from: %sep}}\n",
        "modifiers:\n- learning_rate: {to: 0.1, from: 1, cycle: %sep}\n",
        "\nepochs: %s\nmodifiers: [{prune: {sparsity: 0.5}}]\n",
    ],
)
def test_numbers_that_are_not_finite_are_refused_with_file_and_line(text, number):
    with pytest.raises(RecipeError, match=r"^f\.yaml:2: "):
        Recipe.from_yaml(text % number, "f.yaml")


@pytest.mark.parametrize("text", ["learning_rate: {to: -0.1}", "weight_decay: {values: [0.1, -1]}"])
def test_negative_rates_are_refused_with_file_and_line(text):
    with pytest.raises(RecipeError, match=r"^f\.yaml:2: .* is negative; give 0 or more"):
        Recipe.from_yaml(f"modifiers:\n- {text}\n", "f.yaml")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cls", [Schedule, LearningRate, WeightDecay])
def test_schedules_written_in_python_are_finite(cls, value):
    with pytest.raises(ValueError, match="is no finite number"):
        cls(from_=0.1, to=value)


@pytest.mark.parametrize("text", [HUGE + "ep", "9007199254740993000step", "1e308ep", "nanep"])
def test_durations_longer_than_any_training_are_refused(text):
    with pytest.raises(ValueError, match="longer than any training|is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize("steps", [2.5, 3.0, True, 0, -1, math.nan, math.inf, 10**400, "3"])
def test_steps_per_epoch_is_a_whole_number(steps):
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recipe = "modifiers: [{learning_rate: {to: 0.1}}]"
    for attach in (
        lambda: Timeline(steps, 2),
        lambda: prunus.attach(model, optimizer, recipe, steps_per_epoch=steps),
    ):
        with pytest.raises(ValueError, match="steps_per_epoch=.*; give a whole number, at least 1"):
            attach()


@pytest.mark.parametrize("steps", [3, np.int64(3), torch.tensor(3)])
def test_whole_numbers_of_other_libraries_are_steps(steps):
    timeline = Timeline(steps, 2)
    assert timeline.total == 6
    assert type(timeline.steps_per_epoch) is int


@pytest.mark.parametrize("steps", [2.5, True, 0])
def test_gradient_accumulation_steps_is_a_whole_number(steps):
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=.*; give a whole number"):
        prunus.attach(
            model,
            optimizer,
            "modifiers: [{learning_rate: {to: 0.1}}]",
            gradient_accumulation_steps=steps,
        )


@pytest.mark.parametrize("epochs", [math.nan, math.inf, 0, -1, True, 10**400, 1e308])
def test_epochs_is_a_positive_finite_number(epochs):
    for make in (lambda: Timeline(3, epochs), lambda: Recipe((), epochs)):
        with pytest.raises(ValueError, match="epochs=.*; give a positive number"):
            make()


def test_a_window_of_more_pruning_steps_than_memory_is_refused():
    with pytest.raises(ValueError, match="pruning steps; give the window a longer 'every'"):
        Window(to=f"{MAX_STEPS}step", every="1step").ticks(Timeline())


@pytest.mark.parametrize(
    "modifier",
    [
        GRADUAL % (1, 8, HUGE, 1),
        GRADUAL % (HUGE, 8, 0.8, 1),
        GRADUAL % (1, "1e308", 0.8, 1),
        GRADUAL % (1, 8, 0.8, "eval(1/1e308)"),
        GRADUAL % (1, 8, ".nan", 1),
        GRADUAL % (1, 8, "-0.5", 1),
        SCHEDULER % ("StepLR", "step_size: 1e-300, gamma: 0.5"),
        SCHEDULER % ("StepLR", "step_size: 0, gamma: 0.5"),
        SCHEDULER % ("StepLR", "step_size: 1, gamma: .nan"),
        SCHEDULER % ("StepLR", "step_size: 1, gamma: 1e300"),
        SCHEDULER % ("StepLR", "step_size: 1, gamma: -2"),
        SCHEDULER % ("StepLR", f"step_size: {HUGE}, gamma: 0.5"),
        SCHEDULER % ("MultiStepLR", "milestones: [.nan], gamma: 0.5"),
        SCHEDULER % ("MultiStepLR", "milestones: [1, 2, 3], gamma: 1e200"),
        SCHEDULER % ("CosineAnnealingWarmRestarts", "cycle_epochs: 1e-300, lr_min: 0"),
        RATES % (".inf", 0, "linear", 1),
        RATES % (0.1, -0.1, "linear", 1),
        RATES % (0.1, 0, "cyclic_linear", "1e-300"),
        "!SetLearningRateModifier {start_epoch: 0, learning_rate: -1}\n",
    ],
)
@pytest.mark.parametrize("dialect", ["sparseml", "cap"])
def test_sparsemls_numbers_are_refused_with_file_line_and_modifier(modifier, dialect):
    if dialect == "cap" and "cyclic" in modifier:
        modifier = modifier.replace("cyclic_linear", "cosine")
    with pytest.raises(RecipeError, match=r"^f\.yaml:3: modifiers\[1\].*!\w+Modifier: "):
        Recipe.from_yaml(SPARSEML + modifier, "f.yaml", dialect=dialect)


def test_a_minus_zero_of_sparsemls_is_zero():
    text = SPARSEML + GRADUAL % ("-0.0", 8, 0.8, 1)
    assert Recipe.from_yaml(text).modifiers[0].window.from_ == "0ep"
