"""The battery: what every pruner must do, whoever wrote it."""

import dataclasses

import pytest
import torch
from torch import nn

import prunus
from prunus.core.patterns import parse_pattern

from tests.helpers.cases import PRUNERS
from tests.helpers.toy_pruner import CASE, Toy
from tests.oracles.pruning import small_cnn, small_mlp

CASES = {**PRUNERS, "toy": CASE}
ROWS = [
    pytest.param(case, pattern, id=f"{name}-{pattern}")
    for name, case in CASES.items()
    for pattern in case.patterns
]
EACH = [pytest.param(case, id=name) for name, case in CASES.items()]


def data_for(case, shape, dtype=torch.float32):
    batches = [torch.randn(4, *shape, dtype=dtype) for _ in range(3)]
    loss = lambda out: out.float().square().mean()  # noqa: E731
    forward = lambda model, x: loss(model(x))  # noqa: E731
    return prunus.Calibration(batches, forward=forward) if case.needs_data else None


def target(pattern, sparsity=0.5):
    return None if parse_pattern(pattern).fixed is not None else sparsity


def middle_conv(model):
    return model[5]


@pytest.mark.parametrize(("case", "pattern"), ROWS)
def test_the_target_is_met_exactly(case, pattern):
    model = small_mlp()
    result = prunus.prune(
        model,
        case.pruner,
        sparsity=target(pattern),
        pattern=pattern,
        calibration=data_for(case, (8,)),
    )
    expected = parse_pattern(pattern).fixed or 0.5
    assert result.sparsity == expected
    assert all(row.size == model.get_submodule(row.name).weight.numel() for row in result.rows)


@pytest.mark.parametrize(("case", "pattern"), ROWS)
def test_convolutions_are_pruned_along_input_channels(case, pattern):
    model = small_cnn()
    result = prunus.prune(
        model,
        case.pruner,
        sparsity=target(pattern),
        pattern=pattern,
        layers=["5"],
        calibration=data_for(case, (3, 8, 8)),
    )
    zeros = middle_conv(model).weight == 0
    assert zeros.sum() == result.rows[0].zeros
    by_channel = zeros.permute(0, 2, 3, 1)  # out, kh, kw, in
    if pattern in ("2:4", "1:4"):
        n = int(pattern[0])
        assert (by_channel.reshape(-1, 4).sum(1) == 4 - n).all()
    if pattern == "1x4":
        assert set(by_channel.reshape(-1, 4).sum(1).tolist()) == {0, 4}
    if pattern == "4x1":
        groups = zeros.reshape(2, 4, 16, 3, 3).sum(1)
        assert set(groups.unique().tolist()) == {0, 4}
    if pattern == "row":
        assert len(set(zeros.flatten(1).sum(1).tolist())) == 1


@pytest.mark.parametrize("case", EACH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_dtype_and_memory_format_gives_the_target(case, dtype):
    model = small_cnn(dtype).to(memory_format=torch.channels_last)
    before = middle_conv(model).weight.stride()
    result = prunus.prune(
        model,
        case.pruner,
        sparsity=0.75,
        layers=["5", "8"],
        calibration=data_for(case, (3, 8, 8), dtype),
    )
    assert abs(result.sparsity - 0.75) < 1e-3
    assert middle_conv(model).weight.dtype == dtype
    assert middle_conv(model).weight.stride() == before


@pytest.mark.parametrize("case", EACH)
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_and_everything_can_be_pruned(case, sparsity):
    model = small_mlp()
    result = prunus.prune(model, case.pruner, sparsity=sparsity, calibration=data_for(case, (8,)))
    assert result.sparsity == sparsity


@pytest.mark.parametrize(("case", "pattern"), ROWS)
def test_the_same_target_again_changes_nothing(case, pattern):
    model, data = small_mlp(), data_for(case, (8,))
    arguments = {"sparsity": target(pattern), "pattern": pattern, "calibration": data}
    prunus.prune(model, case.pruner, **arguments)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    prunus.prune(model, case.pruner, **arguments)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("case", EACH)
def test_zeros_stay_zero_when_more_is_pruned(case):
    model, data = small_mlp(), data_for(case, (8,))
    prunus.prune(model, case.pruner, sparsity=0.4, calibration=data)
    zeros = [p == 0 for p in model.parameters()]
    prunus.prune(model, case.pruner, sparsity=0.8, calibration=data)
    assert all((p[z] == 0).all() for p, z in zip(model.parameters(), zeros, strict=True))


@pytest.mark.parametrize("case", EACH)
def test_the_mask_in_the_result_is_where_the_weight_is_not_zero(case):
    model = small_mlp()
    result = prunus.prune(model, case.pruner, sparsity=0.6, calibration=data_for(case, (8,)))
    parameters = dict(model.named_parameters())
    assert result.masks
    assert all(torch.equal(mask, parameters[name] != 0) for name, mask in result.masks.items())


@pytest.mark.parametrize("case", EACH)
def test_a_training_run_prunes_in_steps_and_resumes_bit_for_bit(case):
    recipe = prunus.Recipe(
        (
            prunus.PruningModifier(
                case.pruner,
                prunus.modifiers.prune.Schedule(0.2, 0.8, "cubic"),
                window=prunus.modifiers.timing.Window("2step", "10step", "4step"),
            ),
        )
    )
    calibration = data_for(case, (8,))
    batches = [torch.randn(4, 8) for _ in range(12)]

    def train(model, optimizer, session, steps):
        for x in steps:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        torch.manual_seed(1)
        model = small_mlp()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        return model, optimizer, prunus.attach(model, optimizer, recipe, calibration=calibration)

    model, optimizer, session = fresh()
    train(model, optimizer, session, batches)
    session.close()
    first, optimizer1, session1 = fresh()
    train(first, optimizer1, session1, batches[:7])
    second, optimizer2, session2 = fresh()
    second.load_state_dict(first.state_dict())
    optimizer2.load_state_dict(optimizer1.state_dict())
    session2.load_state_dict(session1.state_dict())
    train(second, optimizer2, session2, batches[7:])
    session2.close()
    assert abs(session.sparsity - 0.8) < 1e-3
    for a, b in zip(model.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", EACH)
def test_nan_weights_are_refused_and_nothing_is_changed(case):
    model = small_mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"2\.weight has 1 NaN or infinite weights; nothing was"):
        prunus.prune(model, case.pruner, sparsity=0.5, calibration=data_for(case, (8,)))
    for name, t in model.state_dict().items():
        assert torch.equal(t.nan_to_num(7.0), before[name].nan_to_num(7.0))


@pytest.mark.parametrize("case", EACH)
def test_hyperparameters_are_documented_and_round_trip(case):
    from prunus.recipe.schema import class_schema

    properties = class_schema(type(case.pruner)).get("properties", {})
    assert set(properties) == {f.name for f in dataclasses.fields(case.pruner)}
    assert all(schema.get("description") for schema in properties.values())
    recipe = prunus.Recipe((prunus.PruningModifier(case.pruner, 0.5),))
    assert prunus.Recipe.load(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.needs_data])
def test_without_data_a_method_that_learns_from_data_says_so(case):
    with pytest.raises(ValueError, match="learns from data; pass calibration="):
        prunus.prune(small_mlp(), case.pruner, sparsity=0.5)


def test_a_pruner_from_outside_is_known_by_name_to_recipes():
    recipe = prunus.Recipe.load(
        "modifiers:\n  - prune: {pruner: {name: toy, power: 2}, sparsity: 0.5}\n"
    )
    assert recipe.modifiers[0].pruner == Toy(power=2.0)
    assert "toy" in prunus.list_pruners()


@pytest.mark.parametrize("pruner", ["magnitude", prunus.Magnitude])
def test_a_modifier_in_python_needs_a_pruner_object(pruner):
    with pytest.raises(ValueError, match="is no pruner; give one"):
        prunus.PruningModifier(pruner, 0.5)


def test_registering_half_a_pruner_names_what_is_missing():
    @dataclasses.dataclass(frozen=True)
    class Half:
        name = "half"
        patterns = ("unstructured",)

    with pytest.raises(ValueError, match="pruner Half lacks scores; derive it from"):
        prunus.register_pruner(Half)
    with pytest.raises(ValueError, match="Linear must be a frozen dataclass: write"):
        prunus.register_pruner(nn.Linear)


def test_scores_of_the_wrong_shape_are_refused():
    class Wrong(Toy):
        def scores(self, w, stat, pattern, ranks):
            return w[:, :1]

    data = prunus.Calibration([torch.randn(2, 8)])
    with pytest.raises(ValueError, match="Wrong.scores gives shape"):
        prunus.prune(small_mlp(), Wrong(), sparsity=0.5, calibration=data)


def test_rebuilt_weights_that_are_not_finite_leave_the_model_untouched():
    model = small_mlp()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    data = prunus.Calibration([torch.randn(2, 8)])
    with pytest.raises(ValueError, match="new weights from toy; nothing was pruned"):
        prunus.prune(model, Toy(scale=float("inf")), sparsity=0.5, calibration=data)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
