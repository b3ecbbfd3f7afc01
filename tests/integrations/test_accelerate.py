"""A plain Accelerate loop. No callback is needed."""

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

import prunus

from tests.oracles.pruning import small_mlp

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

GRADUAL = """
modifiers:
  - prune:
      sparsity: {from: 0.2, to: 0.8, curve: cubic}
      window: {from: 0ep, to: 2ep, every: 2step}
"""
EPOCHS, ACCUMULATE = 3, 2


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def prepare(accelerator, wrap=lambda model: model):
    torch.manual_seed(0)
    model = wrap(small_mlp())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(28, 8, generator=generator))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    return accelerator.prepare(model, optimizer, scheduler, loader)


def train(accelerator, model, optimizer, scheduler, loader, epochs=EPOCHS):
    for _ in range(epochs):
        for (x,) in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(x).square().mean())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


def attach(parts):
    model, optimizer, _, loader = parts
    return prunus.attach(
        model,
        optimizer,
        GRADUAL,
        steps_per_epoch=len(loader),
        epochs=EPOCHS,
        gradient_accumulation_steps=ACCUMULATE,
    )


class Wrapper(nn.Module):
    """As DDP holds a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper], ids=["plain", "wrapped"])
def test_a_prepared_model_and_optimizer_attach_with_clean_names(accelerator, wrap):
    parts = prepare(accelerator, wrap)
    model, optimizer = parts[:2]
    with attach(parts) as session:
        train(accelerator, *parts)
        # 7 batches make 4 optimizer steps: the last of an epoch has one batch
        assert session.step == 4 * EPOCHS
        assert session.optimizer is optimizer.optimizer
    assert set(session.masks) == {"0.weight", "2.weight"}
    assert abs(session.sparsity - 0.8) < 2e-3
    plain = getattr(model, "module", model)
    assert all((plain.get_parameter(n)[~m] == 0).all() for n, m in session.masks.items())
    ticks = [e["step"] for e in session.recorder.events if e["event"] == "prune"]
    assert ticks == [1, 2, 4, 6, 8]


def test_accelerates_own_checkpoints_carry_the_session(accelerator, tmp_path):
    def run(directory, *, stop, resume):
        parts = prepare(accelerator)
        session = attach(parts)
        accelerator.register_for_checkpointing(session)
        if resume:
            accelerator.load_state(directory)
        train(accelerator, *parts, epochs=stop)
        if stop < EPOCHS and not resume:
            accelerator.save_state(directory)
        session.close(finish=resume or stop == EPOCHS)
        accelerator._custom_objects.clear()
        accelerator.free_memory()
        return parts[0].state_dict()

    whole = run(tmp_path / "whole", stop=EPOCHS, resume=False)
    run(tmp_path / "parts", stop=1, resume=False)
    resumed = run(tmp_path / "parts", stop=EPOCHS - 1, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
