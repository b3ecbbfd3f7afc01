"""What a session says is counted in the model, whoever has written to it since."""

import copy
import logging

import pytest
import torch
from torch import nn

import prunus
from prunus.report.records import read_records

GRADUAL = """
modifiers:
  - prune:
      sparsity: {from: 0.1, to: 0.9}
      window: {from: 2step, to: 8step, every: 2step}
"""


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def step(model, optimizer, times=1):
    for _ in range(times):
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def attached(recipe=GRADUAL, make=lambda parameters: torch.optim.AdamW(parameters, 1e-2)):
    model = net()
    optimizer = make(model.parameters())
    return model, optimizer, prunus.attach(model, optimizer, recipe)


def zeros(model):
    weights = [model[i].weight for i in (0, 2)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def test_best_weights_loaded_before_closing_are_pruned_and_the_log_says_where(tmp_path, caplog):
    model, optimizer, session = attached()
    with session:
        step(model, optimizer, 4)
        best = copy.deepcopy(model.state_dict())
        step(model, optimizer, 8)
        model.load_state_dict(best)
        assert session.sparsity == zeros(model) < 0.5
    assert session.sparsity == zeros(model) == pytest.approx(0.9, abs=1e-3)
    assert session.recorder.events[-1]["sparsity"] == session.sparsity
    (record,) = [r for r in caplog.records if "were not zero" in r.message]
    off = round((0.9 - 0.3) * 1536)
    assert abs(int(record.message.split(": ")[1].split()[0]) - off) < 0.2 * off
    assert "2.weight (" in record.message
    prunus.save(model, tmp_path / "best.safetensors", pruning=session)
    assert len(prunus.load(tmp_path / "best.safetensors").masks) == 2


def test_each_pruning_step_begins_with_what_is_pruned_at_zero(caplog):
    model, optimizer, session = attached()
    step(model, optimizer, 4)
    with torch.no_grad():
        model[2].weight.add_(1.0)
    step(model, optimizer, 1)
    assert not [r for r in caplog.records if "were not zero" in r.message]  # put on at each step
    with torch.no_grad():
        model[2].weight.add_(1.0)
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()
    assert "before pruning after step 6" in caplog.text
    session.close()


def test_training_after_closing_is_counted_and_a_file_names_the_masks_it_drops(tmp_path, caplog):
    model, optimizer, session = attached()
    with session:
        step(model, optimizer, 9)
    step(model, optimizer, 1)
    assert session.sparsity == zeros(model) < 0.9
    off = session.masks.off()
    prunus.save(model, tmp_path / "after.safetensors", pruning=session)
    assert prunus.load(tmp_path / "after.safetensors").masks == {}
    for name, count in off.items():
        assert f"{name} ({count} of " in caplog.text


def test_saving_an_open_session_puts_its_masks_back_on(tmp_path, caplog):
    model, optimizer, session = attached()
    step(model, optimizer, 9)
    other = torch.optim.SGD(model.parameters(), 0.1)
    step(model, other, 1)
    assert session.sparsity == zeros(model) < 0.9
    prunus.save(model, tmp_path / "open.safetensors", pruning=session)
    assert zeros(model) == pytest.approx(0.9, abs=1e-3)
    assert len(prunus.load(tmp_path / "open.safetensors").masks) == 2
    assert "saving: " in caplog.text
    session.close()


def replaced_by_hand(model, optimizer):
    old = model[2].weight
    model[2].weight = nn.Parameter(old.detach().clone())
    group = optimizer.param_groups[0]
    group["params"] = [model[2].weight if p is old else p for p in group["params"]]


def replaced_by_loading(model, optimizer):
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


@pytest.mark.parametrize("replace", [replaced_by_hand, replaced_by_loading])
@pytest.mark.parametrize("recipe", [GRADUAL, "modifiers: [nm_training: {window: {to: 8step}}]"])
def test_a_parameter_that_was_replaced_is_followed_by_its_name(replace, recipe, caplog):
    model, optimizer, session = attached(recipe)
    with session:
        step(model, optimizer, 3)
        replace(model, optimizer)
        step(model, optimizer, 9)
    assert "2.weight was replaced by another parameter" in caplog.text
    assert (
        session.sparsity
        == zeros(model)
        == pytest.approx(0.9 if "prune" in recipe else 0.5, abs=1e-3)
    )
    assert session.masks.weight("2.weight") is model[2].weight


def test_a_parametrization_added_in_between_is_an_error_that_names_the_layer():
    model, optimizer, session = attached()
    step(model, optimizer, 3)
    nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(ValueError, match=r"2\.weight is computed by something else since"):
        step(model, optimizer, 1)
    session.close(finish=False)


@pytest.mark.parametrize("kind", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_a_schedule_free_optimizer_does_not_bring_pruned_weights_back(kind):
    schedulefree = pytest.importorskip("schedulefree")
    make = lambda p: getattr(schedulefree, kind)(p, lr=0.05)  # noqa: E731
    model = net()
    optimizer = make(model.parameters())
    optimizer.train()
    with prunus.attach(model, optimizer, GRADUAL) as session:
        step(model, optimizer, 12)
        for mode in (optimizer.eval, optimizer.train, optimizer.eval):
            mode()
            assert session.sparsity == zeros(model) == pytest.approx(0.9, abs=1e-3)
    assert zeros(model) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_pruned_weights_at_zero(bad):
    model, optimizer, session = attached()
    step(model, optimizer, 9)
    model(torch.randn(8, 16)).sum().backward()
    model[2].weight.grad.fill_(bad)
    optimizer.step()
    pruned = ~session.masks["2.weight"]
    assert (model[2].weight[pruned] == 0).all()
    session.close(finish=False)


def test_a_layer_of_which_nothing_is_left_is_named_everywhere(tmp_path, caplog):
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    result = prunus.prune(model, "magnitude", sparsity=0.95)
    assert int(model[2].weight.count_nonzero()) == 0
    assert "collapsed: no weight is left in 2" in " ".join(str(result).split())
    assert "collapsed: no weight is left in 2" in caplog.text
    result.report(tmp_path)
    assert "no weight is left in 2" in (tmp_path / "report.html").read_text()
    (event,) = [e for e in read_records(tmp_path) if e["event"] == "prune"]
    assert event["collapsed"] == ["2"]


def test_no_table_rounds_to_one_while_weights_are_left():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 4))
    result = prunus.prune(model, "magnitude", sparsity=1 - 1 / 256**2, allocator="uniform")
    assert int(model[1].weight.count_nonzero()) == 1
    assert "0.9999" in str(result)
    assert "1.0000" not in str(result) + str(prunus.sparsity(model))


def test_masks_that_decay_are_not_taken_for_weights_that_came_back(caplog):
    caplog.set_level(logging.WARNING)
    recipe = "modifiers: [nm_training: {masking: {name: mdgf, eval: soft}, window: {to: 8step}}]"
    model, optimizer, session = attached(recipe)
    step(model, optimizer, 4)
    assert session.verify() == {}
    assert session.sparsity == zeros(model) < 0.5
    step(model, optimizer, 6)
    assert session.sparsity == 0.5
    session.close()
    assert "were not zero" not in caplog.text
