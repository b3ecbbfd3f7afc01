"""What a model shows in evaluation mode while its masks decay."""

import copy
import io

import pytest
import torch

import prunus

from tests.oracles.nm import Net

RECIPE = """
modifiers:
  - nm_training:
      pattern: 1:4
      layers: ["attn.qkv[q]", "attn.proj"]
      masking: {name: mdgf, %s}
      window: {from: 1step, to: 9step}
"""


class Setting:
    def __init__(self, options="", compiled=""):
        torch.manual_seed(0)
        self.net = Net().double()
        self.model = torch.compile(self.net, backend="eager") if compiled == "before" else self.net
        if compiled == "full graph":
            self.model = torch.compile(self.net, backend="eager", fullgraph=True)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1)
        self.session = prunus.attach(self.model, self.optimizer, RECIPE % options)
        if compiled == "after":
            self.model = torch.compile(self.net, backend="eager")
        if compiled == "in place":
            self.net.compile(backend="eager")
        self.batches = torch.randn(10, 3, 4, 5, generator=torch.Generator().manual_seed(1)).double()

    def train(self, steps):
        for x in self.batches[self.session.step : self.session.step + steps]:
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    @property
    def weights(self):
        return self.net.attn.qkv.weight[:8], self.net.attn.proj.weight

    @property
    def is_hard(self):
        kept = {int((w != 0).reshape(-1, 4).sum(1).unique()) for w in self.weights}
        assert kept in ({1}, {4})
        return kept == {1}

    def soft(self):
        """The hidden weights by their formula, from the dense ones in the session's state."""
        run = self.session.state_dict()["runs"][0]
        dense, seen = run["dense"], []
        for w in (dense["attn.qkv[q]"], dense["attn.proj"]):
            groups = w.abs().reshape(-1, 4)
            keep = (groups == groups.amax(1, keepdim=True)).reshape(w.shape)
            seen.append(torch.where(keep, w, (1 - (self.session.step - 1) / 8) * w))
        return seen


def test_evaluation_shows_the_hard_mask_and_training_the_soft_one_again():
    it = Setting().train(4)
    x = it.batches[0]
    soft = [w.detach().clone() for w in it.weights]
    torch.testing.assert_close(soft, it.soft())
    training = it.model(x)
    assert not it.is_hard
    it.model.eval()
    hard = it.model(x)
    assert it.is_hard
    for w, s in zip(it.weights, soft, strict=True):
        assert torch.equal(w[w != 0], s[w != 0])
    assert not torch.equal(hard, training)
    it.model.train()
    assert torch.equal(it.model(x), training)
    assert all(torch.equal(w, s) for w, s in zip(it.weights, soft, strict=True))


def test_evaluation_shows_the_soft_mask_where_that_was_chosen():
    it = Setting("eval: soft").train(4)
    training = it.model(it.batches[0])
    it.model.eval()
    assert torch.equal(it.model(it.batches[0]), training)
    assert not it.is_hard
    it.train(6)
    assert it.is_hard


def test_before_the_window_evaluation_shows_the_dense_weights():
    it = Setting()
    before = it.net.attn.proj.weight.detach().clone()
    it.model.eval()
    it.model(it.batches[0])
    assert torch.equal(it.net.attn.proj.weight, before)


def test_evaluation_may_run_in_inference_mode_and_training_goes_on():
    plain, it = Setting().train(8), Setting().train(4)
    it.model.eval()
    with torch.inference_mode():
        it.model(it.batches[0])
    assert it.is_hard
    it.model.train()
    it.train(4)
    assert all(torch.equal(a, b) for a, b in zip(it.weights, plain.weights, strict=True))


def test_a_part_of_the_model_is_evaluated_with_hard_masks_too():
    it = Setting().train(4)
    it.model.eval()
    it.net.attn(torch.randn(2, 4, 8).double())
    assert it.is_hard
    it.model.train()
    it.net.attn.proj(torch.randn(2, 8).double())
    assert not it.is_hard


def test_a_part_kept_in_evaluation_mode_trains_on_the_soft_mask():
    plain, it = Setting().train(6), Setting()
    it.net.attn.eval()
    it.train(6)
    assert not it.is_hard
    assert all(torch.equal(a, b) for a, b in zip(it.weights, plain.weights, strict=True))


@pytest.mark.parametrize("compiled", ["before", "after", "in place"])
def test_a_compiled_model_is_evaluated_with_hard_masks_too(compiled):
    plain, it = Setting().train(4), Setting(compiled=compiled).train(4)
    for _ in range(2):
        plain.model.eval()
        it.model.eval()
        torch.testing.assert_close(it.model(it.batches[0]), plain.model(it.batches[0]))
        assert it.is_hard
        plain.model.train()
        it.model.train()
        plain.train(2)
        it.train(2)
        torch.testing.assert_close(it.weights, plain.weights)
        assert not it.is_hard


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_between_a_forward_pass_and_its_backward_pass_is_refused(mode):
    it = Setting().train(4)
    loss = it.model(it.batches[0]).square().mean()
    it.model.eval()
    with mode():
        it.model(it.batches[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_model_compiled_in_one_graph_before_attaching_is_evaluated_with_hard_masks_too():
    plain, it = Setting().train(2), Setting(compiled="full graph").train(2)
    for setting in (plain, it):
        setting.model.eval()
    torch.testing.assert_close(it.model(it.batches[0]), plain.model(it.batches[0]))
    assert it.is_hard


@pytest.mark.parametrize("evaluated_before", [False, True])
def test_averaged_weights_are_evaluated_as_they_are_and_training_goes_on(evaluated_before, caplog):
    plain, it = Setting().train(8), Setting().train(4)
    averaged = copy.deepcopy(it.net)
    with torch.no_grad():
        for p in averaged.parameters():
            p.mul_(1.5)
    mine = copy.deepcopy(it.net.state_dict())
    it.model.eval()
    if evaluated_before:
        it.model(it.batches[0])
    it.net.load_state_dict(averaged.state_dict())
    for _ in range(2):
        assert torch.equal(it.model(it.batches[0]), averaged(it.batches[0]))
    it.net.load_state_dict(mine)
    if not evaluated_before:
        it.model(it.batches[0])
        assert it.is_hard
    it.model.train()
    it.train(4)
    assert all(torch.equal(a, b) for a, b in zip(it.weights, plain.weights, strict=True))
    assert not caplog.records


def test_weights_loaded_before_an_evaluation_are_adopted_after_it(caplog):
    it = Setting().train(4)
    torch.manual_seed(5)
    new = Net().double()
    it.net.load_state_dict(new.state_dict())
    it.model.eval()
    assert torch.equal(it.model(it.batches[0]), new(it.batches[0]))
    it.model.train()
    assert torch.equal(it.model(it.batches[0]), new(it.batches[0]))
    it.optimizer.step()  # without gradients, so that it changes nothing
    dense = it.session.state_dict()["runs"][0]["dense"]
    assert torch.equal(dense["attn.proj"], new.attn.proj.weight)
    assert torch.equal(dense["attn.qkv[q]"], new.attn.qkv.weight[:8])
    assert "the weights of 2 layers were written between two steps" in caplog.text


def test_an_evaluation_within_an_autocast_region_does_not_compute_with_cached_casts():
    it = Setting()
    it.net.float()
    x = it.batches.float()[0]
    it.batches = it.batches.float()
    it.train(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        it.model(x)
        it.model.eval()
        seen = it.model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(it.model(x), seen)


def test_a_session_that_goes_back_before_the_freeze_is_evaluated_with_hard_masks_again():
    plain, it = Setting().train(8), Setting().train(4)
    states = copy.deepcopy([it.net.state_dict(), it.session.state_dict()])
    it.train(6)
    it.net.load_state_dict(states[0])
    it.session.load_state_dict(states[1])
    it.model.eval()
    it.model(it.batches[0])
    assert it.is_hard
    it.model.train()
    it.train(4)
    assert all(torch.equal(a, b) for a, b in zip(it.weights, plain.weights, strict=True))


def test_copies_of_the_model_are_nobodys_business():
    it = Setting().train(4)
    averaged = copy.deepcopy(it.net)
    buffer = io.BytesIO()
    torch.save(it.net, buffer)
    buffer.seek(0)
    for other in (averaged, torch.load(buffer, weights_only=False)):
        with torch.no_grad():
            other.attn.proj.weight.fill_(0.5)
        other.eval()(it.batches[0])
        assert (other.attn.proj.weight == 0.5).all()
    it.train(1)
    assert not (it.net.attn.proj.weight == 0.5).any()


def test_nothing_watches_after_the_session():
    it = Setting().train(4)
    dense = it.session.state_dict()["runs"][0]["dense"]["attn.proj"]
    it.session.close(finish=False)
    it.model.eval()
    it.model(it.batches[0])
    assert torch.equal(it.net.attn.proj.weight, dense)
    assert not any(module._forward_pre_hooks for module in it.net.modules())


def test_a_file_written_while_masks_decay_says_so_by_having_none(tmp_path):
    it = Setting().train(4)
    prunus.save(it.net, tmp_path / "soft.safetensors", pruning=it.session)
    it.net.eval()
    it.net(it.batches[0])
    prunus.save(it.net, tmp_path / "hard.safetensors", pruning=it.session)
    assert not prunus.load(tmp_path / "soft.safetensors").masks
    assert set(prunus.load(tmp_path / "hard.safetensors").masks) == {
        "attn.qkv.weight",
        "attn.proj.weight",
    }
