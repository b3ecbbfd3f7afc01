"""Models that are hard to follow: each exact, or refused with its reason; none is silently wrong."""

import copy

import pytest
import torch

from prunus.channels import channels, shrink

from tests.channels.awkward_channel_models import EXACT, INEXACT, REFUSED
from tests.channels.channel_oracles import as_double, error, masked_copy, outputs, randomized


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", EXACT)
def test_the_shrunk_model_computes_what_the_masked_one_does(name, seed):
    build, inputs, sizes = EXACT[name]
    torch.manual_seed(seed)
    model, x = randomized(build(), seed), as_double(inputs())
    found = channels(model, x)
    assert sorted(g.size for g in found.groups) == sorted(sizes)
    assert all(g.exact for g in found.groups)
    dense = copy.deepcopy(model)
    table = {group.name: 0.5 for group in found.groups}
    result = shrink(model, x, "random", allocator=table, width=True, measure=False)
    expected = masked_copy(dense, found, result.gone)
    assert sum(map(len, result.gone.values())) > 0
    assert error(expected, model, x) < 1e-12
    assert error(dense, model, x) > 1e-6
    assert result.after.params == sum(p.numel() for p in model.parameters()) < result.before.params


@pytest.mark.parametrize("name", INEXACT)
def test_norms_over_a_pruned_width_are_said_to_be_inexact_and_left_out_by_default(name):
    build, inputs = INEXACT[name]
    model, x = randomized(build()), as_double(inputs())
    found = channels(model, x)
    assert [g.exact for g in found.groups] == [False]
    with pytest.raises(ValueError, match="width=True offers"):
        shrink(model, x, target={"params": 0.6}, measure=False)
    dense = copy.deepcopy(model)
    result = shrink(model, x, target={"params": 0.6}, width=True, measure=False)
    assert error(masked_copy(dense, found, result.gone), model, x) > 1e-3
    assert [row.exact for row in result.rows] == [False]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_is_refused_with_its_reason(name):
    build, inputs, module, reason = REFUSED[name]
    found = channels(randomized(build()), as_double(inputs()))
    assert reason in found.refused[module]
    written = sum(g.size for g in found.groups if module in g.writers)
    assert written < found.trace.parameters[f"{module}.weight"][0][1].numel()
    assert f"stays {'in part' if written else 'whole'}: {module}" in str(found)


def test_whole_groups_of_a_group_norm_are_exact():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 1), torch.nn.GroupNorm(8, 16), torch.nn.Conv2d(16, 2, 1)
    )
    model, x = randomized(net), torch.randn(2, 3, 4, 4).double()
    found = channels(model, x)
    assert [(g.size, g.width, g.exact) for g in found.groups] == [(8, 2, True)]
    dense = copy.deepcopy(model)
    result = shrink(model, x, "random", allocator={"*": 0.5}, measure=False)
    assert model[1].num_groups == 4
    assert error(masked_copy(dense, found, result.gone), model, x) < 1e-12


def test_unused_parameters_are_refused():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    model.extra = torch.nn.Linear(4, 4)
    model.forward = lambda x: model[1](model[0](x))
    found = channels(model, torch.randn(2, 4))
    assert "does not read" in found.refused["extra"]


def test_tracing_leaves_the_model_as_it_was():
    build, inputs, _ = EXACT["residual and flatten"]
    model, x = randomized(build()), as_double(inputs())
    model.train()
    before = copy.deepcopy(model.state_dict())
    channels(model, x)
    assert model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_outputs_of_any_form_are_never_removed():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)

        def forward(self, x):
            h = self.a(x)
            return {"hidden": [h], "out": self.b(h)}

    found = channels(Two(), torch.randn(2, 4))
    assert not found.groups
    assert found.refused["a"] == "it is the model's output"
    assert outputs(Two(), torch.randn(2, 4))
