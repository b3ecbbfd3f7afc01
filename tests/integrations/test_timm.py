"""A loop as timm writes it: layer decay, its scheduler, its EMA. No callback is needed."""

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

import timm
from timm.optim import Lookahead, create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

import prunus

STEPS, EPOCHS = 4, 3
AT_ONCE = "modifiers:\n  - prune: {sparsity: 0.5}\n"
GRADUAL = """
modifiers:
  - prune:
      layers: ["blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.fc*"]
      sparsity: {from: 0.2, to: 0.8, curve: cubic}
      window: {from: 0ep, to: 2ep, every: 3step}
"""


def vit():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=4,
        drop_path_rate=0.1,
    )


def make_optimizer(model):
    return create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.75)


def train(model, optimizer, session, ema=None, scheduler=None):
    generator = torch.Generator().manual_seed(1)
    rates = []
    for epoch in range(EPOCHS):
        for i in range(STEPS):
            x = torch.randn(4, 3, 16, 16, generator=generator)
            y = torch.randint(4, (4,), generator=generator)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            rates.append([group["lr"] for group in optimizer.param_groups])
            if scheduler is not None:
                scheduler.step_update(epoch * STEPS + i + 1)
            if ema is not None:
                ema.update(model, step=epoch * STEPS + i)
                session.project(ema)
        if scheduler is not None:
            scheduler.step(epoch + 1)
    return rates


def masked_are_zero(model, session):
    parameters = dict(model.named_parameters())
    return all((parameters[name][~mask] == 0).all() for name, mask in session.masks.items())


def test_a_loop_of_timm_reaches_the_target_and_its_ema_keeps_the_zeros():
    model = vit()
    optimizer, ema = make_optimizer(model), ModelEmaV3(model, decay=0.9)
    scheduler = CosineLRScheduler(optimizer, t_initial=EPOCHS, warmup_t=1, warmup_lr_init=1e-4)
    with prunus.attach(model, optimizer, GRADUAL, steps_per_epoch=STEPS, epochs=EPOCHS) as session:
        train(model, optimizer, session, ema, scheduler)
    assert abs(session.sparsity - 0.8) < 1e-3
    assert len(session.masks) == 8
    assert masked_are_zero(model, session)
    assert masked_are_zero(ema.module, session)
    assert not torch.equal(ema.module.head.weight, model.head.weight)


def test_a_pruned_checkpoint_loads_in_plain_timm(tmp_path):
    model = vit()
    optimizer = make_optimizer(model)
    with prunus.attach(model, optimizer, GRADUAL, steps_per_epoch=STEPS, epochs=EPOCHS) as session:
        train(model, optimizer, session)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "last.pth")
    other = vit()
    timm.models.load_checkpoint(other, str(tmp_path / "last.pth"))
    assert masked_are_zero(other, session)


def test_a_learning_rate_of_the_recipe_respects_layer_decay():
    model = vit()
    optimizer = make_optimizer(model)
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert len(set(scales)) > 2
    recipe = GRADUAL + "  - learning_rate: {curve: linear, from: 1e-2, to: 0.0}\n"
    with prunus.attach(model, optimizer, recipe, steps_per_epoch=STEPS, epochs=EPOCHS) as session:
        rates = train(model, optimizer, session)
    total = STEPS * EPOCHS
    for step, present in enumerate(rates):
        assert present == pytest.approx([1e-2 * (1 - step / total) * s for s in scales])


def test_the_default_layers_of_a_timm_model_spare_the_stem_and_the_head():
    model = vit()
    with prunus.attach(model, make_optimizer(model), AT_ONCE) as session:
        loss = model(torch.randn(2, 3, 16, 16)).square().mean()
        loss.backward()
        session.optimizer.step()
    assert len(session.masks) == 8
    assert not any(name.startswith(("patch_embed", "head")) for name in session.masks)


def test_timms_lookahead_is_counted_and_its_slow_weights_are_masked():
    model = vit()
    optimizer = Lookahead(make_optimizer(model), k=2)
    with prunus.attach(model, optimizer, AT_ONCE) as session:
        for step in range(1, 6):
            model(torch.randn(2, 3, 16, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert session.step == step
            assert all((model.get_parameter(n)[~m] == 0).all() for n, m in session.masks.items())
    assert session.sparsity == pytest.approx(0.5, abs=1e-3)
