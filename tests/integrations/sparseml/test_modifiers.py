"""What each of SparseML's and CAP's modifiers becomes."""

import logging
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import prunus
from prunus import CAP, OBS, FastCAP, Magnitude, PruningModifier, Recipe
from prunus.allocators import Uniform
from prunus.modifiers import ACDC, Freeze, Keep, LearningRate, MovementPruning, WeightDecay
from prunus.modifiers.schedules import Schedule
from prunus.modifiers.timing import Interval, Window
from prunus.recipe import RecipeError
from prunus.recipe.sparseml.reading import CONVERTERS
from prunus.recipe.sparseml.refused import REFUSED


def tag(name, **settings):
    inner = ", ".join(f"{key}: {value}" for key, value in settings.items())
    return f"- !{name}Modifier {{{inner}}}\n"


def pruning(name, **settings):
    given = {"init_sparsity": 0.2, "final_sparsity": 0.8, "start_epoch": 1, "end_epoch": 5}
    return tag(name, **{**given, "update_frequency": 2, "params": "['re:fc']", **settings})


def load(*entries, **options):
    return Recipe.load("modifiers:\n" + "".join(entries), **options).modifiers


def only(*entries, **options):
    (modifier,) = load(*entries, **options)
    return modifier


GRADUAL = {"sparsity": Schedule(0.2, 0.8, "cubic"), "layers": ("re:fc.*(?<=weight)",)}
WINDOW = Window("1ep", "5ep", "2ep")


@pytest.mark.parametrize(
    ("entry", "pruner", "allocator"),
    [
        (pruning("MagnitudePruning"), Magnitude(), Uniform()),
        (pruning("GMPruning"), Magnitude(), Uniform()),
        (pruning("GMPruning", global_sparsity="True"), Magnitude(), None),
        (pruning("LegacyGMPruning", global_sparsity="True"), Magnitude(), None),
        (pruning("GMPruning", score_type="magnitude", phased="False"), Magnitude(), Uniform()),
        (pruning("GlobalMagnitudePruning"), Magnitude(), None),
        (pruning("OBSPruning"), OBS(1, 1024, 1e-7), None),
        (pruning("OBSPruning", global_sparsity="False"), OBS(1, 1024, 1e-7), Uniform()),
        (pruning("OBSPruning", fisher_inv_device="cpu"), OBS(50, 1024, 1e-7, device="cpu"), None),
        (pruning("CAPruning"), CAP(50, 1024, 1e-7), None),
        (
            pruning("CAPruning", num_recomputations=4, fisher_block_size=192, damp="1e-8"),
            CAP(192, 1024, 1e-8, num_recomputations=4, ramp="linear"),
            None,
        ),
        (
            pruning("CAPruning", num_recomputations=4, recomputation_inter_func="cubic"),
            CAP(50, 1024, 1e-7, num_recomputations=4, ramp="cubic"),
            None,
        ),
        (pruning("FastCAPruning", damp="1e-2"), FastCAP(50, 1024, 1e-2), None),
    ],
)
def test_each_pruning_modifier_has_its_pruner_and_defaults(entry, pruner, allocator):
    expected = PruningModifier(pruner, allocator=allocator, window=WINDOW, **GRADUAL)
    assert only(entry) == expected


def test_every_converter_and_every_refusal_is_in_these_tests():
    assert not set(CONVERTERS) & set(REFUSED)
    wanted = {"EpochRange", "LearningRateFunction", "SetLearningRate", "LearningRate"}
    wanted |= {"TrainableParams", "SetWeightDecay", "ConstantPruning", "MagnitudePruning"}
    wanted |= {"GlobalMagnitudePruning", "GMPruning", "OBSPruning", "CAPruning", "FastCAPruning"}
    assert {name + "Modifier" for name in wanted} <= set(CONVERTERS)


def test_the_default_block_size_is_the_dialects():
    assert only(pruning("OBSPruning"), dialect="cap").pruner.block_size == 50
    assert only(pruning("OBSPruning"), dialect="sparseml").pruner.block_size == 1
    assert only(pruning("CAPruning")).pruner.block_size == 50


def test_fastcaps_damp_is_relative_and_the_others_absolute():
    """The same number, taken as it stands, by pruners that say so of their own damp."""
    entries = [pruning(name, damp=0.03) for name in ("OBSPruning", "CAPruning", "FastCAPruning")]
    assert [load(entry)[0].pruner.damp for entry in entries] == [0.03] * 3
    docs = {
        cls: prunus.recipe.schema.class_schema(cls)["properties"]["damp"]
        for cls in (OBS, CAP, FastCAP)
    }
    assert "absolute" in docs[OBS]["description"]
    assert "absolute" in docs[CAP]["description"]
    assert "relative" in docs[FastCAP]["description"]


@pytest.mark.parametrize("curve", ["linear", "cubic", "inverse_cubic"])
def test_inter_func_is_the_curve(curve):
    assert only(pruning("GMPruning", inter_func=curve)).schedule == Schedule(0.2, 0.8, curve)


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        ({"start_epoch": -1}, Window("0ep", "5ep", "2ep")),
        ({"end_epoch": -1}, Window("1ep", None, "2ep")),
        ({"update_frequency": -1}, Window("1ep", "5ep", "1step")),
        ({"update_frequency": 0.01}, Window("1ep", "5ep", "0.01ep")),
        ({"start_epoch": 1e-05}, Window("0.00001ep", "5ep", "2ep")),
        ({"start_epoch": 2.75, "end_epoch": 3.0}, Window("2.75ep", "3ep", "2ep")),
    ],
)
def test_epochs_become_a_window(settings, window):
    assert only(pruning("GMPruning", **settings)).window == window


def test_an_end_before_the_start_is_an_error():
    with pytest.raises(RecipeError, match="end_epoch=5 comes before start_epoch=6"):
        load(pruning("GMPruning", start_epoch=6))


def test_equal_sparsities_are_pruned_at_once():
    constant = only(pruning("GMPruning", init_sparsity=0.8))
    assert (constant.sparsity, constant.window) == (0.8, Window("1ep"))
    assert only(pruning("GMPruning", init_sparsity=0.8, start_epoch=0)).window is None


def test_a_falling_sparsity_is_pruned_at_its_end_value_with_a_warning(caplog):
    assert only(pruning("GMPruning", init_sparsity=0.25, final_sparsity=0.03)).sparsity == 0.03
    assert "final_sparsity 0.03 is below init_sparsity 0.25" in caplog.text


def test_from_param_holds_what_is_there_and_begins_at_zero():
    keep, prune = load(pruning("GMPruning", init_sparsity="__FROM_PARAM__"))
    assert keep == Keep(("re:fc.*(?<=weight)",), window=Interval("1ep"), allow_dense=True)
    assert prune.schedule == Schedule(0.0, 0.8, "cubic")


def test_from_param_never_loses_the_sparsity_there_is():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight[:8] = 0
    zeros = model[0].weight == 0
    entry = pruning("GMPruning", init_sparsity="__FROM_PARAM__", params="[0.weight]", start_epoch=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recipe = Recipe.load(entry)
    with prunus.attach(model, optimizer, recipe, steps_per_epoch=2) as session:
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(8, 16)).square().mean().backward()
            optimizer.step()
            assert bool((model[0].weight[zeros] == 0).all())
    targets = [e["sparsity"] for e in session.recorder.events if e["event"] == "prune"]
    assert targets == sorted(targets)
    assert targets[0] == 0.5
    assert targets[-1] == pytest.approx(0.8, abs=1 / 256)


def test_a_mapping_of_sparsities_is_one_entry_for_each_and_the_first_match_counts():
    entry = pruning(
        "GMPruning", final_sparsity="{0.6: ['re:a', b.weight], '0.9': 're:.*'}", params="[]"
    )
    first, second = load(entry)
    assert (first.layers, first.exclude) == (("re:a.*(?<=weight)", "b.weight"), ())
    assert first.schedule == Schedule(0.2, 0.6, "cubic")
    assert (second.layers, second.exclude) == (("re:.*(?<=weight)",), first.layers)
    assert second.schedule == Schedule(0.2, 0.9, "cubic")
    with pytest.raises(RecipeError, match=r"'params' must be \[\] where final_sparsity names them"):
        load(pruning("GMPruning", final_sparsity="{0.6: ['re:a']}"))
    with pytest.raises(RecipeError, match="expected sparsities, each with a list of names"):
        load(pruning("GMPruning", final_sparsity="{much: ['re:a']}", params="[]"))


@pytest.mark.parametrize(
    ("mask_type", "pattern"),
    [
        ("unstructured", "unstructured"),
        ("block4", "1x4"),
        ("[1, 4]", "1x4"),
        ("[4, 1]", "4x1"),
        ("null", "unstructured"),
    ],
)
def test_mask_types_are_patterns(mask_type, pattern):
    assert only(pruning("GMPruning", mask_type=mask_type)).pattern == pattern


NM = {"init_sparsity": 0.75, "final_sparsity": 0.75, "start_epoch": 0}


@pytest.mark.parametrize("written", ["1:4", "'1:4'", "64", "' 1 : 4 '"])
def test_n_of_m_is_kept_in_sparseml_and_removed_in_cap(written):
    kept = only(pruning("GMPruning", mask_type=written, **NM))
    assert (kept.pattern, kept.sparsity, kept.allocator) == ("1:4", None, None)
    removed = {**NM, "init_sparsity": 0.25, "final_sparsity": 0.25}
    cap = only(pruning("CAPruning", mask_type=written, fisher_block_size=32, **removed))
    assert cap.pattern == "3:4"


def test_two_of_four_read_as_base_sixty_is_two_of_four():
    half = {"init_sparsity": 0.5, "final_sparsity": 0.5}
    for entry in (
        pruning("GMPruning", mask_type=124, **half),
        pruning("CAPruning", mask_type=124, **half),
    ):
        assert only(entry).pattern == "2:4"
    assert only(pruning("GMPruning", mask_type="tensorrt", **half)).pattern == "2:4"
    assert only(pruning("CAPruning", mask_type="N:M", n=2, m=4, **half)).pattern == "2:4"


def test_n_of_m_has_one_sparsity():
    with pytest.raises(RecipeError, match=r"0.8 is not the sparsity of 2:4 \(0.5\)"):
        load(pruning("GMPruning", mask_type="2:4"))
    with pytest.raises(RecipeError, match="N:M has one sparsity; set init_sparsity to 0.5 too"):
        load(pruning("GMPruning", mask_type="2:4", final_sparsity=0.5))
    late = only(pruning("GMPruning", mask_type="2:4", init_sparsity=0, final_sparsity=0.5))
    assert late.window == Window("5ep")


def test_fisher_blocks_hold_whole_groups():
    half = {"init_sparsity": 0.5, "final_sparsity": 0.5, "mask_type": "'2:4'"}
    assert only(pruning("CAPruning", **half)).pruner.block_size == 48
    assert only(pruning("OBSPruning", mask_type="block4")).pruner.block_size == 4


@pytest.mark.parametrize(
    "mask_type", ["filter", "channel", "diamond", "[1, 4, 2]", "[1, 1]", "4:2", "4:4:4"]
)
def test_other_mask_types_are_refused(mask_type):
    with pytest.raises(RecipeError, match=r"mask_type: !GMPruningModifier"):
        load(pruning("GMPruning", mask_type=mask_type))


@pytest.mark.parametrize("mask_type", ["filter", "channel", "diamond"])
def test_unknown_mask_types_are_refused_with_those_there_are(mask_type):
    with pytest.raises(RecipeError, match=f"'{mask_type}'.*; use unstructured, block4"):
        load(pruning("GMPruning", mask_type=mask_type))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score_type": "MFAC"}, "score_type 'MFAC' has a modifier of its own"),
        ({"phased": "True"}, "phased pruning is AC/DC; use !ACDCPruningModifier"),
    ],
)
def test_what_sparseml_gave_up_itself_is_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        load(pruning("GMPruning", **settings))


def test_masks_that_would_be_lifted_are_a_warning_if_training_goes_on(caplog):
    load(pruning("GMPruning", leave_enabled="False"))
    assert caplog.text == ""
    load(pruning("GMPruning", leave_enabled="False"), tag("EpochRange", start_epoch=0, end_epoch=9))
    assert "leave_enabled: false would let weights come back after epoch 5" in caplog.text


def test_constant_pruning_holds_the_zeros():
    assert only(tag("ConstantPruning", params="['re:.*weight']")) == Keep(
        ("re:.*weight.*(?<=weight)",)
    )
    later = only(
        tag(
            "ConstantPruning",
            params="__ALL_PRUNABLE__",
            start_epoch=2,
            end_epoch=9,
            update_frequency=1,
        )
    )
    assert later == Keep(("*",), window=Interval("2ep"))


def test_movement_is_an_entry_of_its_own():
    expected = MovementPruning(window=WINDOW, **GRADUAL)
    assert only(pruning("MovementPruning")) == expected


def test_acdc_is_acdc():
    settings = {
        "compression_sparsity": 0.9,
        "start_epoch": 5,
        "end_epoch": 75,
        "params": "['re:fc']",
    }
    entry = tag("ACDCPruning", update_frequency=5, **settings)
    layers = ("re:fc.*(?<=weight)",)
    expected = ACDC(sparsity=0.9, layers=layers, window=Window("5ep", "75ep", "5ep"))
    assert only(entry) == expected
    settings |= {
        "momentum_buffer_reset": "False",
        "global_sparsity": "False",
        "mask_type": "block4",
    }
    other = only(tag("ACDCPruning", update_frequency=5, **settings))
    assert (other.reset_momentum, other.allocator, other.pattern) == (False, Uniform(), "1x4")
    later = pruning("GMPruning", global_sparsity="True", init_sparsity=0.9, final_sparsity=0.9)
    assert (
        len(
            load(
                entry,
                later.replace("start_epoch: 1, end_epoch: 5", "start_epoch: 75, end_epoch: 80"),
            )
        )
        == 2
    )


def test_what_is_pruned_already_is_not_pruned_again():
    """As CAP's gradual recipes end: a last modifier from 0.8 to 0.8 that holds the masks."""
    first = pruning("CAPruning")
    again = {"init_sparsity": 0.8, "start_epoch": 5, "end_epoch": 9}
    assert len(load(first, pruning("CAPruning", **again))) == 1
    assert len(load(first, pruning("CAPruning", **again), pruning("CAPruning", **again))) == 1
    assert len(load(first, pruning("CAPruning", **{**again, "params": "['re:other']"}))) == 2
    assert len(load(first, pruning("CAPruning", **{**again, "final_sparsity": 0.9}))) == 2
    assert len(load(first, pruning("CAPruning", **{**again, "start_epoch": 4}))) == 2
    assert len(load(first, pruning("OBSPruning", **again))) == 2


def test_only_what_has_ended_before_has_pruned_already():
    again = pruning("CAPruning", init_sparsity=0.8, start_epoch=3)
    assert len(load(pruning("CAPruning", end_epoch=-1), again)) == 2


def test_the_length_of_training_is_the_last_epoch_named():
    ranged = tag("EpochRange", start_epoch=0, end_epoch=3.5)
    assert Recipe.load(ranged) == Recipe((), 3.5)
    assert Recipe.load(ranged + pruning("GMPruning")).epochs == 5
    assert Recipe.load(pruning("GMPruning")).epochs is None


def rates(recipe, steps_per_epoch, epochs, groups=1, lr=1.0):
    """The learning rate at each step, of the first group or of all."""
    weights = [nn.Parameter(torch.ones(2)) for _ in range(groups)]
    optimizer = torch.optim.SGD([{"params": [w]} for w in weights], lr=lr)
    seen = []
    with prunus.attach(
        nn.ParameterList(weights), optimizer, recipe, steps_per_epoch=steps_per_epoch, epochs=epochs
    ):
        for _ in range(round(steps_per_epoch * epochs)):
            optimizer.step()
            seen.append([group["lr"] for group in optimizer.param_groups])
    return [row[0] for row in seen] if groups == 1 else seen


def function(**settings):
    given = {"start_epoch": 0, "end_epoch": 4, "lr_func": "linear", "init_lr": 0.4, "final_lr": 0.0}
    return tag("LearningRateFunction", **{**given, **settings})


def sparseml_rate(kind, epoch, start, end, first, last):
    """SparseML's formulas, as its documentation states them."""
    x = (epoch - start) / (end - start)
    share = x if kind == "linear" else (1 - math.cos(math.pi * x)) / 2
    return first + (last - first) * share


@settings(deadline=None)
@given(
    st.sampled_from(["linear", "cosine"]),
    st.integers(0, 3),
    st.integers(1, 5),
    st.floats(1e-4, 1),
    st.floats(1e-4, 1),
    st.integers(1, 7),
)
def test_learning_rate_functions_follow_their_formulas(kind, start, length, first, last, per_epoch):
    end = start + length
    entry = function(lr_func=kind, start_epoch=start, end_epoch=end, init_lr=first, final_lr=last)
    found = rates(Recipe.load(entry), per_epoch, end + 1, lr=0.123)
    for step, rate in enumerate(found[: end * per_epoch]):
        epoch = step / per_epoch
        before = epoch < start
        expected = 0.123 if before else sparseml_rate(kind, epoch, start, end, first, last)
        assert rate == pytest.approx(expected, rel=1e-6)


def test_a_rate_stays_at_its_final_value_when_training_goes_on():
    warmup = function(end_epoch=1, init_lr=0.0, final_lr=0.4)
    found = rates(Recipe.load(warmup + tag("EpochRange", start_epoch=0, end_epoch=3)), 4, 3)
    assert found == pytest.approx([0.0, 0.1, 0.2, 0.3] + [0.4] * 8)
    followed = load(warmup, function(start_epoch=1, end_epoch=3))
    assert len(followed) == 2


def test_a_rate_that_ends_leaves_another_one_that_runs_alone():
    early = function(end_epoch=4, init_lr=1.0, final_lr=0.5)
    late = function(start_epoch=2, end_epoch=10, init_lr=0.8, final_lr=0.0)
    falling = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert rates(Recipe.load(early + late), 1, 10) == pytest.approx([1, 0.875, *falling])
    inner = function(start_epoch=3, end_epoch=5, init_lr=0.2, final_lr=0.1)
    found = rates(Recipe.load(late + inner), 1, 10)
    assert found[2:] == pytest.approx([0.8, 0.2, 0.15, 0.5, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("groups", [None, "[0, 1]"])
def test_a_rate_settles_in_groups_that_no_other_one_takes_over(groups):
    chosen = {} if groups is None else {"param_groups": groups}
    early = function(end_epoch=2, init_lr=1.0, final_lr=0.5, **chosen)
    for start, first in ((2, [1, 0.75, 0.4, 0.2]), (1, [1, 0.4, 0.8 / 3, 0.4 / 3])):
        late = function(start_epoch=start, end_epoch=4, param_groups="[0]")
        found = rates(Recipe.load(early + late), 1, 4, groups=2)
        assert [r[0] for r in found] == pytest.approx(first)
        assert [r[1] for r in found] == pytest.approx([1, 0.75, 0.5, 0.5])


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({"lr_func": "step", "decay_rate": 0.5, "decay_epochs": 1}, 0.05),
        ({"cycle_epochs": 2, "cycle_mul": 0.5, "final_lr": 0.1}, 0.05),
        ({"cycle_epochs": 3, "cycle_mul": 1}, 0.4 * 2 / 3),  # it stands still in the fourth epoch
    ],
)
def test_caps_rates_stay_where_they_ended(settings, last):
    recipe = Recipe.load(function(**settings) + EPOCHS, dialect="cap")
    assert rates(recipe, 1, 7)[4:] == pytest.approx([last] * 3)


def test_a_cycle_of_one_epoch_is_what_sparseml_writes_itself(caplog):
    assert only(function(cycle_epochs=1.0)) == only(function())
    assert caplog.text == ""


def test_linear_cycles_in_cap_and_not_in_sparseml(caplog):
    entry = function(cycle_epochs=2)
    assert only(entry) == LearningRate(0.4, 0.0, "linear", window=Interval("0ep", "4ep"))
    assert "load them with dialect='cap'" in caplog.text
    caplog.clear()
    only(entry, dialect="sparseml")
    assert caplog.text == ""
    cycling = LearningRate(0.4, 0.0, "linear", cycle="2ep", window=Interval("0ep", "4ep"))
    assert only(entry, dialect="cap") == cycling
    assert load(entry, pruning("CAPruning"))[0] == cycling
    assert rates(Recipe.load(entry, dialect="cap"), 2, 4) == pytest.approx([0.4, 0.3, 0.2, 0.1] * 2)


@pytest.mark.parametrize("sign", ["cycle_mul: 1.0", "decay_rate: 0.9", "warmup: 0"])
def test_settings_that_only_cap_has_show_the_dialect(sign):
    key, value = sign.split(": ")
    assert only(function(cycle_epochs=2, **{key: value})).cycle == "2ep"


def test_more_signs_of_cap():
    entry = function(cycle_epochs=2)
    for other in (
        pruning("GlobalMagnitudePruning", global_sparsity="True"),
        pruning("FastCAPruning"),
        pruning("OBSPruning", fisher_inv_device="cpu"),
        pruning("OBSPruning", mask_type="'2:4'", init_sparsity=0.5, final_sparsity=0.5),
    ):
        assert load(entry, other)[0].cycle == "2ep"
    assert load(entry, pruning("GMPruning", global_sparsity="True"))[0].cycle is None


def test_cycles_of_cap_may_shrink():
    entry = function(cycle_epochs=2, cycle_mul=0.5)
    assert rates(Recipe.load(entry), 2, 4) == pytest.approx(
        [0.4, 0.3, 0.2, 0.1, 0.2, 0.15, 0.1, 0.05]
    )


def test_what_is_left_over_of_caps_cycles_stands_still():
    found = rates(Recipe.load(function(cycle_epochs=2, cycle_mul=1, end_epoch=5)), 2, 5)
    assert found == pytest.approx([0.4, 0.3, 0.2, 0.1] * 2 + [0.2, 0.2])


def test_caps_steps_go_down_to_the_final_rate():
    entry = function(lr_func="step", decay_rate=0.5, decay_epochs=1, final_lr=0.1)
    assert rates(Recipe.load(entry), 2, 4) == pytest.approx(
        [0.4, 0.4, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 1, "cycle_mul": 1}, "warmup has no counterpart"),
        ({"lr_func": "exponential", "cycle_mul": 1}, "no lr_func 'exponential' here"),
        ({"lr_func": "wave"}, "no lr_func 'wave'; use linear, cosine or cyclic_linear"),
        ({"lr_func": "step"}, "no lr_func 'step'; CAP does: load the recipe with dialect='cap'"),
        ({"end_epoch": 0}, "end_epoch must come after start_epoch"),
        ({"param_groups": "all"}, "expected a list of numbers, not 'all'"),
    ],
)
def test_learning_rates_that_have_no_counterpart_are_refused(settings, message):
    with pytest.raises(RecipeError, match=message):
        load(function(**settings))


def test_cyclic_linear_squeezes_its_last_cycle():
    found = rates(Recipe.load(function(lr_func="cyclic_linear", cycle_epochs=2, end_epoch=5)), 2, 5)
    assert found == pytest.approx([0.4, 0.3, 0.2, 0.1] * 2 + [0.4, 0.2])
    assert only(function(lr_func="cyclic_linear")).cycle == "1ep"


def test_groups_get_their_own_rates():
    recipe = Recipe.load(
        function(param_groups="[1]") + function(param_groups="[]", init_lr=0.2, start_epoch=2)
    )
    found = rates(recipe, 1, 4, groups=2)
    assert found == [pytest.approx(row) for row in ([1.0, 0.4], [1.0, 0.3], [0.2, 0.2], [0.1, 0.1])]


def test_a_set_rate_stays_until_a_later_modifier():
    recipe = Recipe.load(
        function(start_epoch=2, end_epoch=4)
        + tag(
            "SetLearningRate",
            start_epoch=0,
            learning_rate=0.7,
            constant_logging="False",
            end_epoch=-1,
        )
    )
    assert rates(recipe, 1, 5) == pytest.approx([0.7, 0.7, 0.4, 0.2, 0.0])
    assert only(tag("SetLearningRate", learning_rate="1e-3")) == LearningRate(to=1e-3)


def scheduler(kind, **keywords):
    inner = ", ".join(f"{key}: {value}" for key, value in keywords.items())
    return tag("LearningRate", lr_class=kind, lr_kwargs=f"{{{inner}}}", init_lr=0.8, start_epoch=1)


EPOCHS = tag("EpochRange", start_epoch=0, end_epoch=7)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (scheduler("MultiStepLR", milestones=[3, 5], gamma=0.5), [1, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2]),
        (scheduler("StepLR", step_size=2, gamma=0.5), [1, 0.8, 0.8, 0.4, 0.4, 0.2, 0.2]),
        (scheduler("ExponentialLR", gamma=0.5), [1, 0.8, 0.4, 0.2, 0.1, 0.05, 0.025]),
        (
            scheduler("CosineAnnealingWarmRestarts", lr_min=0.0, cycle_epochs=2),
            [1, 0.8, 0.4, 0.8, 0.4, 0.8, 0.4],
        ),
    ],
)
def test_torchs_schedulers_count_in_epochs(entry, expected):
    found = rates(Recipe.load(entry + EPOCHS), 3, 7)
    assert found[::3] == pytest.approx(expected)


def test_milestones_after_the_end_are_left_out(caplog):
    entry = scheduler("MultiStepLR", milestones=[3, 5, 6], gamma=0.5)
    found = rates(
        Recipe.load(entry.replace("start_epoch: 1", "start_epoch: 1, end_epoch: 5")), 1, 7
    )
    assert found == pytest.approx([1, 0.8, 0.8, 0.4, 0.4, 0.4, 0.4])
    assert "left out: milestones [5, 6], which end_epoch=5 cuts off" in caplog.text


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (scheduler("StepLR", step_size=2), "lr_kwargs needs the number 'gamma', not None"),
        (scheduler("MultiStepLR", milestones=3, gamma=0.1), "milestones=3; give a list of epochs"),
        (scheduler("OneCycleLR"), "unknown lr_class 'OneCycleLR'; use StepLR, MultiStepLR, "),
        (
            scheduler("CosineAnnealingWarmRestarts", lr_min=0, cycle_epochs=2, T_mult=2),
            "T_mult=2: cycles cannot grow; write a modifier for each cycle",
        ),
    ],
)
def test_schedulers_with_missing_or_unknown_parts_are_refused(entry, message):
    with pytest.raises(RecipeError, match=message):
        load(entry, EPOCHS)
    with pytest.raises(RecipeError, match="end_epoch must come after start_epoch"):
        load(scheduler("StepLR", step_size=2, gamma=0.1))


def test_weight_decay_is_set():
    assert only(tag("SetWeightDecay", weight_decay=0.0, start_epoch=0)) == WeightDecay(to=0.0)
    later = only(tag("SetWeightDecay", weight_decay="1e-4", start_epoch=3, param_groups=[0]))
    assert later == WeightDecay(to=1e-4, window=Interval("3ep"), groups=(0,))


def trainable(params, value, **settings):
    return tag("TrainableParams", params=params, trainable=value, **settings)


def test_parameters_are_frozen_and_thawed():
    assert only(trainable("['re:stem']", "False")) == Freeze(("re:stem.*",))
    until = only(trainable("[a.bias]", "False", start_epoch=1, end_epoch=3))
    assert until == Freeze(("a.bias",), window=Interval("1ep", "3ep"))
    but_the_head = load(trainable("__ALL__", "False"), trainable("['re:head']", "True"))
    assert but_the_head == (Freeze(("*",), exclude=("re:head.*",)),)
    thawing = load(trainable("__ALL__", "False"), trainable("['re:head']", "True", start_epoch=2))
    assert thawing == (
        Freeze(("*",), window=Interval("0ep", "2ep")),
        Freeze(("*",), ("re:head.*",), Interval("2ep")),
    )
    assert load(trainable("['re:head']", "True"), function()) == load(function())


def test_what_can_be_pruned_is_no_name_for_freezing():
    with pytest.raises(RecipeError, match="__ALL_PRUNABLE__ is read for pruning only; name them"):
        load(trainable("[__ALL_PRUNABLE__]", "False"))


def test_names_that_may_be_missing_are_one_pattern():
    freeze = only(trainable("['re:a', 're:b']", "False", params_strict="False"))
    assert freeze.parameters == ("re:a.*|re:b.*".replace("|re:", "|"),)


def test_all_modifiers_that_cannot_be_read_are_told_at_once():
    refused = [tag(name, start_epoch=0) for name in ("Quantization", "Distillation")]
    text = [*refused, tag("GMPrunning", start_epoch=0), tag("SetParam", start_epoch=0)]
    with pytest.raises(RecipeError) as caught:
        load(*text)
    lines = str(caught.value).split("\n")
    assert [re.search(r"modifiers\[(\d)\]: .*!(\w+)Modifier", x).groups() for x in lines] == [
        ("0", "Quantization"), ("1", "Distillation"), ("2", "GMPrunning"), ("3", "SetParam"),
    ]  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        load(*text, strict=False)
    assert "\n" not in str(caught.value)  # only the unknown one is left


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_known_modifiers_without_counterpart_are_refused_by_name_or_skipped(name, caplog):
    entries = f"- !{name} {{start_epoch: 0, anything: [1, 2]}}\n", pruning("GMPruning")
    with pytest.raises(RecipeError, match=rf"modifiers\[0\]: !{name}: .*strict=False"):
        load(*entries)
    assert len(load(*entries, strict=False)) == 1
    (line,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert f"!{name}: skipped: " in line.getMessage()


def test_a_recipe_of_which_nothing_is_left_is_an_error():
    with pytest.raises(RecipeError, match="nothing is left"):
        load(tag("Quantization", start_epoch=0), strict=False)


def test_unknown_modifiers_are_refused_even_if_not_strict():
    for strict in (True, False):
        with pytest.raises(
            RecipeError,
            match="unknown modifier !GMPrunningModifier; did you mean 'GMPruningModifier'",
        ):
            load(tag("GMPrunning"), strict=strict)


def test_every_modifier_survives_the_way_through_our_yaml():
    entries = [pruning(n) for n in ("GMPruning", "OBSPruning", "CAPruning", "FastCAPruning")]
    entries += [
        function(cycle_epochs=2, cycle_mul=0.9),
        EPOCHS,
        scheduler("StepLR", step_size=2, gamma=0.3),
    ]
    entries += [tag("ConstantPruning", params="[x.weight]"), trainable("__ALL__", "False")]
    recipe = Recipe.load("modifiers:\n" + "".join(entries))
    assert Recipe.load(recipe.to_yaml()) == recipe
    assert recipe.epochs == 7


def test_a_recipes_epochs_are_the_length_of_training_unless_attach_is_told():
    text = "epochs: ${n}\nvariables: {n: 4}\nmodifiers:\n- learning_rate: {from: 0.4, to: 0.0}\n"
    weight = nn.Parameter(torch.ones(2))
    for epochs, end in ((None, 4), (8, 8)):
        optimizer = torch.optim.SGD([weight], lr=1.0)
        session = prunus.attach(
            nn.ParameterList([weight]),
            optimizer,
            Recipe.load(text),
            steps_per_epoch=1,
            epochs=epochs,
        )
        assert session.runs[0].end == end
    with pytest.raises(RecipeError, match="epochs: expected a positive number, not 0"):
        Recipe.load(text, n=0)
    with pytest.raises(ValueError, match="epochs=-1; give a positive number"):
        Recipe((), -1)
