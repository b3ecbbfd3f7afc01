"""A training script written for SparseML 1.x, with its import changed."""

import copy
import json

import pytest
import torch
from torch import nn

from prunus import Calibration, Recipe
from prunus.integrations.sparseml.manager import ScheduledModifierManager
from prunus.integrations.sparseml.samplers import calibration_of
from prunus.integrations.sparseml.variables import parse_variables
from prunus.modifiers import Keep, LearningRate
from prunus.recipe import RecipeError

RECIPE = """
num_epochs: 4
final: 0.75
training_modifiers:
- !EpochRangeModifier {start_epoch: 0.0, end_epoch: eval(num_epochs)}
- !LearningRateFunctionModifier {lr_func: linear, init_lr: 0.1, final_lr: 0.0,
    start_epoch: 0.0, end_epoch: eval(num_epochs)}
pruning_modifiers:
- !GMPruningModifier {init_sparsity: 0.25, final_sparsity: eval(final), start_epoch: 0,
    end_epoch: 2.5, update_frequency: 1, params: __ALL_PRUNABLE__}
"""
SECOND_ORDER = """
- !OBSPruningModifier {init_sparsity: 0.5, final_sparsity: 0.5, start_epoch: 0, end_epoch: 1,
    update_frequency: 1, params: ['re:0.weight'], num_grads: 6, fisher_block_size: 8, damp: 1e-4,
    grad_sampler_kwargs: {batch_size: 2}}
"""


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


DATA = [(torch.randn(4, 8), torch.randint(4, (4,))) for _ in range(5)]


def train(model, optimizer, epochs, begin=0):
    for _ in range(begin, epochs):
        for x, y in DATA:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)


def zeros(model):
    return float(torch.cat([model[i].weight.flatten() == 0 for i in (0, 2)]).float().mean())


def test_the_old_script_runs(tmp_path):
    path = tmp_path / "old_recipe.yaml"
    path.write_text(RECIPE)
    model = net()
    optimizer = sgd(model)
    manager = ScheduledModifierManager.from_yaml(str(path))
    hooked = manager.modify(model, optimizer, steps_per_epoch=len(DATA))
    assert hooked is optimizer
    seen = []
    for epoch in range(manager.max_epochs):
        train(model, hooked, epoch + 1, epoch)
        seen.append(round(zeros(model), 4))
    manager.finalize(model)
    assert seen == sorted(seen)
    assert seen[-1] == 0.75
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / (4 * len(DATA)))
    train(model, optimizer, 1)  # nothing is hooked any more
    assert zeros(model) < 0.75


def test_attach_and_modify_are_one_and_the_same():
    import prunus

    mine, theirs = net(), net()
    optimizer = sgd(mine)
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    train(mine, manager.modify(mine, optimizer, len(DATA)), 4)
    manager.finalize(mine)
    optimizer = sgd(theirs)
    with prunus.attach(theirs, optimizer, RECIPE, steps_per_epoch=len(DATA)):
        train(theirs, optimizer, 4)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_all_that_prunes_is_a_pruning_modifier():
    inner = "start_epoch: 0, end_epoch: 3, update_frequency: 1, params: __ALL_PRUNABLE__"
    text = (
        f"- !ACDCPruningModifier {{compression_sparsity: 0.5, {inner}}}\n"
        f"- !MovementPruningModifier {{init_sparsity: 0, final_sparsity: 0.5, {inner}}}\n"
        "- !ConstantPruningModifier {params: __ALL_PRUNABLE__}\n"
        "- !SetLearningRateModifier {learning_rate: 0.1}\n"
    )
    names = {m.name for m in ScheduledModifierManager.from_yaml(text).pruning_modifiers}
    assert names == {"acdc", "movement", "keep"}


def test_what_scripts_ask_a_manager():
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    assert (manager.min_epochs, manager.max_epochs) == (0, 4)
    assert [type(m) for m in manager.learning_rate_modifiers] == [LearningRate]
    assert [m.name for m in manager.pruning_modifiers] == ["prune"]
    assert list(manager.iter_modifiers()) == manager.modifiers
    assert len(manager.epoch_modifiers) == 1
    assert manager.quantization_modifiers == manager.distillation_modifiers == []
    assert manager.structured_modifiers == []
    assert not manager.qat_active(2)
    assert not manager.initialized
    loss = torch.ones(())
    assert manager.loss_update(loss, net(), None, epoch=1, steps_per_epoch=3) is loss
    short = ScheduledModifierManager.from_yaml(RECIPE, recipe_variables="num_epochs=3")
    assert short.max_epochs == 3
    part = RECIPE.replace("end_epoch: eval(num_epochs)", "end_epoch: 3.2")
    assert ScheduledModifierManager.from_yaml(part).max_epochs == 4  # whole epochs, for range()
    native = ScheduledModifierManager.from_yaml("modifiers:\n- keep: {}\n")
    assert (native.max_epochs, native.min_epochs, native.epoch_modifiers) == (-1, 0, [])


def test_recipes_and_modifiers_make_managers_and_are_saved(tmp_path):
    manager = ScheduledModifierManager.from_yaml(RECIPE, add_modifiers=[Keep()])
    assert manager.modifiers[-1] == Keep()
    manager.save(tmp_path / "new.yaml")
    again = ScheduledModifierManager.from_yaml(tmp_path / "new.yaml")
    assert again.recipe == manager.recipe == ScheduledModifierManager(manager.recipe).recipe
    assert str(again) == str(manager)
    assert again.max_epochs == 4
    assert ScheduledModifierManager([Keep()], metadata={"a": 1}).modifiers == [Keep()]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {}),
        ("", {}),
        ({"a": [1]}, {"a": [1]}),
        ('{"a": 1, "b": "x"}', {"a": 1, "b": "x"}),
        ("a=1,b=x", {"a": 1.0, "b": "x"}),
        ("a = 1e-3 , b: 2", {"a": 1e-3, "b": 2.0}),
    ],
)
def test_variables_come_in_three_forms(given, expected):
    assert parse_variables(given) == expected


@pytest.mark.parametrize("given", ["a", "a=1,b", "=1", "a=1=2", "[1]"])
def test_other_forms_of_variables_are_refused(given):
    with pytest.raises(ValueError, match="recipe_variables="):
        parse_variables(given)


def test_overrides_reach_the_recipe_and_unknown_ones_do_not():
    manager = ScheduledModifierManager.from_yaml(RECIPE, recipe_variables={"final": 0.5})
    assert manager.pruning_modifiers[0].schedule.final == 0.5
    with pytest.raises(RecipeError, match="unknown variable 'finale'; did you mean 'final'"):
        ScheduledModifierManager.from_yaml(RECIPE, recipe_variables=json.dumps({"finale": 1}))
    with pytest.raises(ValueError, match="zoo:x: stubs of SparseZoo are not looked up"):
        ScheduledModifierManager.from_yaml("zoo:x")


def test_scripts_set_sparsities_before_they_apply_a_recipe():
    text = "pruning_modifiers:\n" + SECOND_ORDER
    manager, model = ScheduledModifierManager.from_yaml(text), net()
    for value in (0.25, 0.75):
        manager.modifiers[0].init_sparsity = value
        manager.modifiers[0].final_sparsity = value
        pruned = copy.deepcopy(model)
        manager.apply(pruned, grad_sampler=Calibration(DATA, nn.functional.cross_entropy))
        assert float((pruned[0].weight == 0).float().mean()) == value
    (view,) = manager.modifiers
    assert (view.init_sparsity, view.final_sparsity) == (0.75, 0.75)
    assert view.pruner.num_grads == 6


def test_the_ends_of_a_gradual_recipe_are_set_one_by_one():
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    (view,) = manager.pruning_modifiers
    assert (view.init_sparsity, view.final_sparsity) == (0.25, 0.75)
    view.final_sparsity, view.init_sparsity = 0.9, 0.5
    assert (view.schedule.from_, view.schedule.to, view.schedule.kind) == (0.5, 0.9, "cubic")
    assert view.window == Recipe.load(RECIPE).modifiers[-1].window
    with pytest.raises(ValueError, match="falls"):
        view.init_sparsity = 0.95
    assert view.init_sparsity == 0.5
    fixed = ScheduledModifierManager.from_yaml("modifiers: [prune: {pattern: '2:4'}]\n")
    assert fixed.modifiers[0].final_sparsity is None
    with pytest.raises(ValueError, match="has sparsity 0.5"):
        fixed.modifiers[0].final_sparsity = 0.75
    with pytest.raises(AttributeError, match="momentum"):
        _ = view.momentum


def test_gradients_without_a_sampler_are_asked_for_at_once():
    manager, model = (
        ScheduledModifierManager.from_yaml("pruning_modifiers:\n" + SECOND_ORDER),
        net(),
    )
    for call in (lambda: manager.modify(model, sgd(model), 5), lambda: manager.apply(model)):
        with pytest.raises(ValueError, match=r"give modify\(\) or apply\(\) a grad_sampler"):
            call()


def test_the_session_keeps_its_records_after_the_end():
    manager, model = ScheduledModifierManager.from_yaml(RECIPE), net()
    optimizer = manager.modify(model, sgd(model), len(DATA))
    train(model, optimizer, 4)
    manager.finalize(model)
    assert manager.session.sparsity == pytest.approx(0.75, abs=0.01)
    assert not manager.initialized
    assert manager.state_dict() == {}


class Sampler:
    """Counts how loaders are built, in either spelling; without end, as SparseML's are."""

    def __init__(self, spelling):
        self.calls, self.spelling = [], spelling

    @property
    def given(self):
        if self.spelling == "loss_fn":
            return {"data_loader_builder": self.by_keywords, "loss_fn": self.loss}
        return {"data_loader_builder": self.by_mapping, "loss_function": self.loss}

    def by_keywords(self, batch_size):
        self.calls.append(batch_size)
        return self.batches(batch_size)

    def by_mapping(self, kwargs):
        self.calls.append(kwargs["batch_size"])
        return self.batches(kwargs["batch_size"])

    def batches(self, size):
        while True:
            for x, y in DATA:
                yield [x[:size]], {}, y[:size]

    def loss(self, output, target):
        return nn.functional.cross_entropy(output, target)


def plain_obs(model):
    """The same pruning by the native call, with the batches the sampler gives."""
    import prunus

    batches = [(x[:2], y[:2]) for x, y in [*DATA, DATA[0]]]
    pruner = prunus.OBS(block_size=8, num_grads=6, damp=1e-4)
    data = Calibration(batches, nn.functional.cross_entropy)
    prunus.prune(model, pruner, sparsity=0.5, layers=["0"], calibration=data)


@pytest.mark.parametrize("spelling", ["loss_fn", "loss_function"])
def test_both_spellings_of_the_grad_sampler_prune_alike(spelling):
    model, expected = net(), net()
    sampler = Sampler(spelling)
    manager = ScheduledModifierManager.from_yaml(SECOND_ORDER)
    manager.apply(model, grad_sampler=sampler.given, finalize=True)
    plain_obs(expected)
    assert set(sampler.calls) == {2}
    torch.testing.assert_close(model[0].weight, expected[0].weight, rtol=0, atol=0)
    assert int((model[0].weight == 0).sum()) == 64


def test_models_with_several_outputs_and_keywords_are_sampled():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net()

        def forward(self, *, inputs):
            logits = self.inner(inputs)
            return logits, logits.softmax(-1)

    def builder(kwargs):
        assert kwargs == {}
        return lambda: ([[], {"inputs": x}, y] for x, y in DATA)

    given = {"data_loader_builder": builder, "loss_function": nn.functional.cross_entropy}
    calibration = calibration_of(given, {}, 3)
    losses = [calibration.loss(Wrapped(), batch).item() for batch in calibration]
    assert losses == [nn.functional.cross_entropy(net()(x), y).item() for x, y in DATA[:3]]
    assert calibration_of(calibration, {}, 1) is calibration


def test_a_grad_sampler_that_lacks_a_part_is_refused():
    manager = ScheduledModifierManager.from_yaml(SECOND_ORDER)
    for part in ({"loss_fn": print}, {"data_loader_builder": print}):
        with pytest.raises(
            ValueError, match="it needs 'data_loader_builder', and 'loss_function' or 'loss_fn'"
        ):
            manager.apply(net(), grad_sampler=part)


def test_second_order_pruners_work_in_training():
    model = net()
    optimizer = sgd(model)
    sampler = Sampler("loss_function")
    manager = ScheduledModifierManager.from_yaml(SECOND_ORDER)
    manager.initialize(model, grad_sampler=sampler.given)
    with torch.no_grad():
        before = copy.deepcopy(model.state_dict())
    manager.modify(model, optimizer, steps_per_epoch=len(DATA))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    train(model, optimizer, 1)
    manager.finalize(model)
    assert int((model[0].weight == 0).sum()) == 64
    assert sampler.calls


def test_apply_without_finalize_and_modify_keep_the_zeros():
    model = net()
    manager = ScheduledModifierManager.from_yaml(
        "- !GMPruningModifier {init_sparsity: 0.5, final_sparsity: 0.5, start_epoch: 2, end_epoch: 3,"
        " update_frequency: 1, params: [0.weight]}\n"
    )
    manager.apply(model, finalize=False)
    gone = model[0].weight == 0
    assert int(gone.sum()) == 64
    optimizer = manager.modify(model, sgd(model), steps_per_epoch=len(DATA))
    train(model, optimizer, 1)
    assert torch.equal(model[0].weight == 0, gone)  # long before the recipe prunes in training
    train(model, optimizer, 3, begin=1)
    manager.finalize()
    assert torch.equal(model[0].weight == 0, gone)
    with pytest.raises(ValueError, match="one-shot pruning has no epochs"):
        manager.apply(model, epoch=3)


def test_apply_of_a_recipe_that_prunes_nothing_changes_nothing():
    model, same = net(), net()
    ScheduledModifierManager.from_yaml("- !ConstantPruningModifier {params: __ALL__}\n").apply(
        model
    )
    ScheduledModifierManager.from_yaml(RECIPE).apply_structure(model, epoch=3)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )


def test_training_goes_on_at_an_epoch_and_keeps_its_zeros():
    model = net()
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    train(model, manager.modify(model, sgd(model), len(DATA)), 3)
    assert zeros(model) == 0.75
    gone = model[0].weight == 0
    again = ScheduledModifierManager.from_yaml(RECIPE)
    optimizer = again.modify(model, sgd(model), len(DATA), epoch=3)
    assert again.session.step == 3 * len(DATA)
    train(model, optimizer, 4, begin=3)
    again.finalize(model)
    assert torch.equal(model[0].weight == 0, gone)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / (4 * len(DATA)))


def test_states_resume_a_run_bit_for_bit():
    whole = net()
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    train(whole, manager.modify(whole, sgd(whole), len(DATA)), 4)
    manager.finalize()
    first, optimizer = net(), None
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    optimizer = manager.modify(first, sgd(first), len(DATA))
    train(first, optimizer, 2)
    state, momentum = manager.state_dict(), copy.deepcopy(optimizer.state_dict())
    second = copy.deepcopy(first)
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    with pytest.raises(ValueError, match="call it first"):
        manager.load_state_dict(state)
    assert manager.state_dict() == {}
    optimizer = manager.modify(second, sgd(second), len(DATA), epoch=2)
    optimizer.load_state_dict(momentum)
    manager.load_state_dict(state, strict=True)
    train(second, optimizer, 4, begin=2)
    manager.finalize()
    for a, b in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_scaler_may_be_wrapped_and_is_given_back():
    model = net()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", enabled=False)
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    assert manager.modify(model, optimizer, len(DATA), wrap_optim=scaler) is scaler
    for x, y in DATA:
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert manager.session.step == len(DATA)
    assert zeros(model) > 0.2
    with pytest.raises(ValueError, match="at work already; call finalize"):
        manager.modify(model, optimizer, len(DATA))
    manager.finalize(model)
    manager.finalize(model)


class ManyScalars:
    def __init__(self):
        self.said = []

    def log_scalars(self, tag, values, step=None):
        self.said.append((tag, values, step))


class OneScalar:
    def __init__(self):
        self.said = []

    def log_scalar(self, tag, value, step=None):
        self.said.append((tag, value, step))


class ManagerOfLoggers(ManyScalars):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize("how", ["initialize_loggers", "modify", "initialize"])
def test_loggers_hear_of_every_pruning_step(how):
    many, one, events = ManyScalars(), OneScalar(), []
    loggers = [many, one, events.append]
    model = net()
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    if how == "initialize":
        manager.initialize(model, epoch=0, loggers=loggers)
    if how == "initialize_loggers":
        manager.initialize_loggers(loggers)
    train(
        model,
        manager.modify(
            model, sgd(model), len(DATA), **({"loggers": loggers} if how == "modify" else {})
        ),
        3,
    )
    manager.finalize(model)
    steps = [step for _, _, step in many.said]
    assert steps == [1, 5, 12]  # after epochs 0 and 1, and at the end, which is near to 2
    assert many.said[-1][:2] == ("ParamPruning", {"0": 0.75, "2": 0.75})
    assert one.said[-1] == ("ParamPruning/2", 0.75, 12)
    assert [e["event"] for e in events] == ["start", "prune", "prune", "prune", "end"]
    assert manager.loggers.all == []


def test_one_logger_or_a_manager_of_them_will_do():
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    logger = ManagerOfLoggers()
    manager.initialize_loggers(logger)
    manager.apply(net())
    assert logger.said[-1][1] == {"0": 0.75, "2": 0.75}
    with pytest.raises(ValueError, match="int cannot log"):
        manager.initialize_loggers([3])
    manager.initialize_loggers(None)
    assert manager.loggers.all == []


def test_a_strict_manager_refuses_and_another_skips():
    text = RECIPE + "other_modifiers:\n- !QuantizationModifier {start_epoch: 6}\n"
    with pytest.raises(RecipeError, match="!QuantizationModifier: prunus does not quantize"):
        ScheduledModifierManager.from_yaml(text)
    manager = ScheduledModifierManager.from_yaml(text, strict=False)
    assert manager.max_epochs == 6
    assert (
        manager.recipe.modifiers == Recipe.load(RECIPE).modifiers[:1] + manager.recipe.modifiers[1:]
    )
