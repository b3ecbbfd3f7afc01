"""OBS, CAP and FastCAP through the front door: whole models beside loops, and known traps."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

import prunus

from tests.helpers.training import same, snapshot
from tests.oracles import second_order as slow
from tests.oracles.pruning import global_keep, small_cnn
from tests.oracles.second_order import batches, data_for, masked_gradients, mse, net

METHODS = {
    "obs": prunus.OBS(block_size=4, damp=1e-3),
    "cap": prunus.CAP(block_size=4, damp=1e-3),
    "fastcap": prunus.FastCAP(),
}
EACH = pytest.mark.parametrize("pruner", METHODS.values(), ids=METHODS)
AS_PUBLISHED = prunus.CAP(block_size=4, damp=1e-3, score="loss")
BLOCKWISE = pytest.mark.parametrize(
    "pruner", [METHODS["obs"], METHODS["cap"], AS_PUBLISHED], ids=["obs", "cap", "cap-as-published"]
)


@BLOCKWISE
@pytest.mark.parametrize("num_grads", [1024, 3], ids=["primal", "dual"])
def test_a_whole_model_equals_the_loops_in_a_first_and_a_second_step(pruner, num_grads):
    model, pruner = net(), replace(pruner, num_grads=num_grads)
    for sparsity in (0.4, 0.7):
        expected = slow.slowly_pruned(model, batches()[:num_grads], pruner, sparsity)
        prunus.prune(model, pruner, sparsity=sparsity, layers="*", calibration=data_for(model))
        for mine, theirs in zip(slow.weights(model), expected, strict=True):
            assert torch.equal(mine == 0, theirs == 0)
            torch.testing.assert_close(mine.detach(), theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("block_size", [None, 4])
def test_fastcap_equals_the_published_loop_and_not_magnitude(block_size):
    model, before, pruner = net(), net(), prunus.FastCAP(block_size=block_size)
    result = prunus.prune(model, pruner, sparsity=0.5, layers="0", calibration=data_for(model))
    w, grads = before[0].weight.detach(), masked_gradients(before, batches())[0]
    d = block_size or 6
    new, f = torch.empty_like(w), torch.zeros(d, d, dtype=w.dtype)
    cuts = slow.blocks_of_row(6, d)
    for cut in cuts:
        size = cut.stop - cut.start
        f[:size, :size] += 2 / 5 * sum(g[:, cut].T @ g[:, cut] for g in grads)
    for cut in cuts:
        size, kept = cut.stop - cut.start, result.masks["0.weight"][:, cut]
        part = f[:size, :size]
        damped = part + 0.01 * part.diagonal().mean() * torch.eye(size, dtype=w.dtype)
        choose = lambda scores, begin, end: global_keep([scores], int((~kept).sum()))[0]  # noqa: B023, E731
        new[:, cut], keep, _ = slow.column_loop(w[:, cut], slow.upper_factor(damped), choose, 128)
        assert torch.equal(keep, kept)
    torch.testing.assert_close(model[0].weight.detach(), new, rtol=1e-8, atol=1e-10)
    prunus.prune(before, "magnitude", sparsity=0.5, layers="0")
    assert not torch.equal(model[0].weight == 0, before[0].weight == 0)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("zeros", [0, 0.3])
def test_cap_keeps_n_of_4_by_the_greedys_own_choice(n, zeros):
    model, pruner = net(cols=12), prunus.CAP(block_size=8, damp=1e-3)
    with torch.no_grad():
        model[0].weight *= torch.rand(10, 12) >= zeros
    w = model[0].weight.detach().clone()
    grads = masked_gradients(model, batches(cols=12))[0]
    greedy = lambda f, w: slow.cap_groups_keep(slow.inverse(f), w, n, 4)  # noqa: E731
    keep = slow.per_block(grads, 1e-3, 8, greedy, w) == 1
    expected = slow.per_block(grads, 1e-3, 8, slow.SLOW["cap"][1], w, keep)
    prunus.prune(model, pruner, pattern=f"{n}:4", layers="0", calibration=data_for(model))
    assert int((model[0].weight.reshape(-1, 4) != 0).sum(1).max()) == n
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-8, atol=1e-10)


@EACH
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "8:12", "20:40"])
def test_patterns_keep_n_of_every_m(pruner, pattern):
    model, (n, m) = net(cols=120), map(int, pattern.split(":"))
    settings = {} if pruner.name == "fastcap" else {"block_size": m}
    result = prunus.prune(
        model, type(pruner)(**settings), pattern=pattern, layers="0", calibration=data_for(model)
    )
    assert bool(((model[0].weight.reshape(-1, m) != 0).sum(1) == n).all())
    assert result.sparsity == pytest.approx(1 - n / m)


@EACH
def test_a_layer_can_be_zeroed_completely_and_pruning_goes_on(pruner):
    model = net()
    for rate in (0.4, 0.8):
        table = {"0": 1.0, "2": rate, "4": 0.2}
        prunus.prune(model, pruner, layers="*", allocator=table, calibration=data_for(model))
        assert not model[0].weight.any()
        assert int((model[2].weight == 0).sum()) == rate * 50


@EACH
def test_channels_last_weights_give_what_contiguous_ones_do(pruner):
    torch.manual_seed(0)
    one = small_cnn(torch.float64)
    other = small_cnn(torch.float64).to(memory_format=torch.channels_last)
    other.load_state_dict(one.state_dict())
    x = torch.randn(3, 4, 3, 8, 8, dtype=torch.float64)
    data = prunus.Calibration(list(x), forward=lambda model, x: model(x).square().mean())
    for model in (one, other):
        prunus.prune(model, pruner, sparsity=0.5, layers=["2", "5"], calibration=data)
    assert other[5].weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@BLOCKWISE
@pytest.mark.parametrize("ramp", slow.RAMPS)
def test_stages_ramp_from_the_sparsity_that_is_there(pruner, ramp):
    model, present = net(), 0.0
    pruner = type(pruner)(block_size=4, num_grads=1, num_recomputations=4, ramp=ramp)
    for target in (0.5, 0.9):
        seen = []
        prunus.prune(
            model, pruner, sparsity=target, layers="*", calibration=slow.watched(model, seen)
        )
        expected = [slow.RAMPS[ramp](k / 4, present, target) for k in range(4)]
        assert seen == pytest.approx(expected, abs=0.51 / 125)
        present = target


def begun(pruner, seen, lr=0.1):
    schedule = prunus.modifiers.prune.Schedule(0.2, 0.8)
    window = prunus.modifiers.timing.Window("1step", "5step", "2step")
    entry = prunus.PruningModifier(pruner, schedule, layers=("*",), window=window)
    model = net()
    optimizer, recipe = torch.optim.Adam(model.parameters(), lr), prunus.Recipe((entry,))
    before = len(seen)
    session = prunus.attach(model, optimizer, recipe, calibration=slow.watched(model, seen))
    del seen[before:]  # attaching tries a batch
    return model, optimizer, session


def trained(model, optimizer, session, steps):
    """The masks after each step."""
    masks = []
    for x, y in steps:
        optimizer.zero_grad()
        mse(model(x), y).backward()
        optimizer.step()
        masks.append([mask.clone() for mask in session.masks.values()])
    return masks


@EACH
def test_every_step_of_a_gradual_run_meets_its_target_and_empties_no_layer(pruner):
    model, optimizer, session = begun(pruner, [])
    trained(model, optimizer, session, batches(6))
    steps = [event for event in session.recorder.events if event["event"] == "prune"]
    assert [step["sparsity"] for step in steps] == pytest.approx([0.2, 0.5, 0.8], abs=0.51 / 125)
    assert all(0.3 < row.sparsity < 0.95 for row in session.runs[0].rows)


@EACH
def test_in_training_pruned_weights_are_gone_for_the_next_pruning_step(pruner):
    seen = []
    masks = trained(*begun(pruner, seen, lr=0.5), batches(6))
    for before, after in itertools.pairwise(masks):
        assert not any(bool((b & ~a).any()) for a, b in zip(before, after, strict=True))
    assert seen[::4] == pytest.approx([0, 0.2, 0.5], abs=0.51 / 125)


def test_stages_of_a_resumed_run_are_those_of_an_uninterrupted_one():
    pruner = prunus.CAP(num_grads=1, num_recomputations=2, ramp="linear")
    whole, parts = [], []
    model, optimizer, session = begun(pruner, whole)
    trained(model, optimizer, session, batches(6))
    first, first_optimizer, session = begun(pruner, parts)
    trained(first, first_optimizer, session, batches(6)[:3])
    second, optimizer, resumed = begun(pruner, parts)
    second.load_state_dict(first.state_dict())
    optimizer.load_state_dict(first_optimizer.state_dict())
    resumed.load_state_dict(session.state_dict())
    trained(second, optimizer, resumed, batches(6)[3:])
    assert whole == parts
    assert same(second, snapshot(model))
    assert whole == pytest.approx([0, 0.1, 0.2, 0.35, 0.5, 0.65], abs=0.51 / 125)


@BLOCKWISE
@pytest.mark.parametrize("arguments", [{"sparsity": 0.8}, {"pattern": "1:4"}], ids=str)
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_stage_that_fails_takes_back_those_before(pruner, arguments, fails_at):
    model, seen = net(cols=8), []
    before = snapshot(model)
    pruner = type(pruner)(block_size=8, num_grads=1, num_recomputations=3)
    with pytest.raises(ArithmeticError, match="no loss"):
        data = slow.watched(model, seen, fails_at)
        prunus.prune(model, pruner, layers="0", calibration=data, **arguments)
    assert (seen[-1] > 0) == (fails_at > 1)
    assert same(model, before)


@EACH
def test_a_layer_that_the_loss_does_not_depend_on_is_named(pruner):
    model = net()
    before = snapshot(model)
    part = lambda model, batch: model[:3](batch[0]).square().mean()  # noqa: E731
    data = prunus.Calibration(batches(), forward=part)
    with pytest.raises(ValueError, match=r"depends on 4; nothing was pruned: exclude them"):
        prunus.prune(model, pruner, sparsity=0.5, layers="*", calibration=data)
    assert same(model, before)
    prunus.prune(model, pruner, sparsity=0.5, exclude="4", layers="*", calibration=data)


@pytest.mark.parametrize(
    ("pruner", "pattern", "remedy"),
    [
        (prunus.OBS(block_size=6), "1x4", "; use 4"),
        (prunus.OBS(block_size=3), "1x4", "; use 4"),
        (prunus.CAP(block_size=6), "2:4", "; use 4"),
        (prunus.FastCAP(block_size=6), "2:4", ""),
    ],
    ids=str,
)
def test_a_block_size_that_cuts_groups_is_refused(pruner, pattern, remedy):
    model = net(cols=8)
    before, fixed = snapshot(model), 0.5 if "x" in pattern else None
    said = f"block_size={pruner.block_size} cuts the groups of pattern '{pattern}'{remedy}"
    with pytest.raises(ValueError, match=said):
        data = data_for(model)
        prunus.prune(model, pruner, sparsity=fixed, pattern=pattern, layers="0", calibration=data)
    assert same(model, before)


@EACH
@pytest.mark.parametrize("value", [0, -1e-7, float("nan"), float("inf")])
def test_wrong_settings_are_refused_by_name(pruner, value):
    for name in {"block_size", "num_grads", "num_recomputations", "damp"} & set(vars(pruner)):
        with pytest.raises(ValueError, match=name):
            type(pruner)(**{name: value if name == "damp" else 0})


def recipe(settings):
    return prunus.Recipe.load(f"modifiers: [{{prune: {{pruner: {settings}, sparsity: 0.5}}}}]")


@pytest.mark.parametrize("setting", ["block_size: 0", "samples: batch", "ramp: fast", "damp: x"])
def test_wrong_settings_in_a_recipe_are_refused_by_name(setting):
    with pytest.raises(ValueError, match=setting.split(":")[0]):
        recipe(f"{{name: cap, {setting}}}")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("text", ["1e-7", "1E-7", "1.0e-07", "0.0000001"])
def test_damp_in_a_recipe_is_a_number(name, text):
    assert recipe(f"{{name: {name}, damp: {text}}}").modifiers[0].pruner.damp == 1e-7


def test_blocks_of_any_length_are_ranked_alike_where_the_fisher_says_nothing():
    model = torch.nn.Sequential(torch.nn.Linear(20, 9), torch.nn.Tanh(), torch.nn.Linear(9, 30))
    data = prunus.Calibration([(torch.randn(4, 20), torch.randn(4, 30)) for _ in range(3)], mse)
    plain, as_published = copy.deepcopy(model), copy.deepcopy(model)
    prunus.prune(model, prunus.CAP(8, damp=1e6), sparsity=0.6, layers="*", calibration=data)
    prunus.prune(plain, "magnitude", sparsity=0.6, layers="*")
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine == 0, theirs == 0)
    pruner = prunus.CAP(8, damp=1e6, score="loss")
    prunus.prune(as_published, pruner, sparsity=0.6, layers="*", calibration=data)
    ends = as_published[0].weight[:, 16:] == 0  # blocks of four, all eaten up
    assert float(ends.float().mean()) > 0.9 > float((model[0].weight[:, 16:] == 0).float().mean())


def test_an_unknown_score_is_refused_with_a_near_miss():
    with pytest.raises(ValueError, match=r"unknown score 'increas'.*increase"):
        prunus.CAP(score="increas")


def _masks(scale, damp, gradients, block_size=24):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 5)).double()
    g = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(8, 24, dtype=torch.float64, generator=g),
            torch.randint(0, 5, (8,), generator=g),
        )
        for _ in range(gradients)
    ]
    prunus.prune(
        model,
        prunus.CAP(num_grads=gradients, block_size=block_size, damp=damp),
        sparsity=0.75,
        layers=["0"],
        calibration=prunus.Calibration(
            batches, lambda output, y: scale * nn.functional.cross_entropy(output, y)
        ),
    )
    return model[0].weight.detach() != 0


@pytest.mark.parametrize("gradients", [8, 32])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_caps_masks_do_not_change_when_loss_and_damp_are_scaled_together(scale, gradients):
    plain = _masks(1.0, 1e-8, gradients)
    assert torch.equal(_masks(scale, 1e-8 * scale**2, gradients), plain)


def test_caps_masks_of_a_summed_loss_are_those_of_a_larger_damp_not_of_rounding(caplog):
    huge = _masks(1e6, 1e-8, 8)
    assert "is too small beside gradients of this size" in caplog.text
    assert torch.equal(_masks(1e8, 1e-8, 8), huge)  # the damp follows the gradients


@pytest.mark.parametrize(("gradients", "told"), [(23, True), (24, False)])
def test_fewer_gradients_than_a_block_is_long_are_told(gradients, told, caplog):
    _masks(1.0, 1e-8, gradients)
    assert (f"{gradients} gradients for blocks of 24 weights" in caplog.text) is told
