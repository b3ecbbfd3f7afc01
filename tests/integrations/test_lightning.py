"""`PrunusCallback` in a real Lightning ``Trainer``."""

import logging

import pytest
import torch
from torch import nn

import prunus

from tests.helpers import toy_pruner  # noqa: F401 (registers a pruner that needs data)

pytest.importorskip("lightning")

import lightning.pytorch as pl

from prunus.integrations.lightning import PrunusCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

GRADUAL = """
modifiers:
  - prune:
      layers: ["net.*"]
      sparsity: {from: 0.2, to: 0.8, curve: cubic}
      window: {from: 0ep, to: 80%, every: 2step}
"""
AT_ONCE = 'modifiers:\n  - prune: {layers: ["net.*"], sparsity: 0.75}\n'


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.ReLU()
        )
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.net(x))

    def training_step(self, batch, _):
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, _):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class TwoOptimizers(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [
            torch.optim.SGD(self.head.parameters(), 0.1),
            torch.optim.AdamW(self.net.parameters(), 1e-2),
        ]


class SeededSteps(Module):
    """Lightning saves neither random states nor the place in the data; each step brings its own."""

    def training_step(self, _, index):
        torch.manual_seed(self.global_step)
        return super().training_step((torch.randn(4, 8), torch.randint(2, (4,))), index)


class StopAfter(pl.Callback):
    """An exception in the middle of training, or a polite stop."""

    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            if self.error:
                raise self.error
            trainer.should_stop = True


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(dataset())


def dataset(count=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 8, generator=generator)
    return [(row, int(row.sum() > 0)) for row in x]


def loader(data=None):
    return torch.utils.data.DataLoader(data or dataset(), batch_size=4)


def make_trainer(directory, callbacks, **arguments):
    arguments = {"max_epochs": 2, "enable_checkpointing": False, **arguments}
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=directory,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **arguments,
    )


def module(kind=Module):
    torch.manual_seed(0)
    return kind()


def hooks(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def masked_are_zero(state, session):
    return all((state[name][~mask] == 0).all() for name, mask in session.masks.items())


def ticks(session):
    return [event["step"] for event in session.recorder.events if event["event"] == "prune"]


def test_training_reaches_the_target_and_the_saved_model_keeps_it(tmp_path):
    callback, model = PrunusCallback(GRADUAL), module()
    trainer = make_trainer(tmp_path, [callback])
    trainer.fit(model, loader())
    session = callback.session
    assert session.closed
    assert hooks(trainer.optimizers[0]) == 0
    assert abs(session.sparsity - 0.8) < 2e-3
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    saved = torch.load(tmp_path / "final.ckpt", weights_only=True)
    assert masked_are_zero(saved["state_dict"], session)
    assert saved["state_dict"].keys() == model.state_dict().keys()


def test_the_clock_counts_optimizer_steps_under_gradient_accumulation(tmp_path):
    callback = PrunusCallback(GRADUAL)
    # 6 batches, 2 optimizer steps (4 and 2 batches) in each of 5 epochs
    trainer = make_trainer(tmp_path, [callback], max_epochs=5, accumulate_grad_batches=4)
    trainer.fit(module(), loader())
    assert trainer.global_step == callback.session.step == 10
    assert ticks(callback.session) == [1, 2, 4, 6, 8]


@pytest.mark.parametrize("data", [None, Stream()], ids=["sized", "stream"])
def test_max_steps_sets_the_length_of_training(data, tmp_path):
    callback = PrunusCallback(GRADUAL)
    make_trainer(tmp_path, [callback], max_epochs=-1, max_steps=10).fit(module(), loader(data))
    assert callback.session.step == 10
    assert ticks(callback.session)[-1] == 8


def test_training_of_unknown_length_takes_recipes_in_steps_only(tmp_path):
    with pytest.raises(ValueError, match="share of training"):
        make_trainer(tmp_path, [PrunusCallback(GRADUAL)]).fit(module(), loader(Stream()))
    callback = PrunusCallback(GRADUAL.replace("80%", "8step"))
    make_trainer(tmp_path, [callback]).fit(module(), loader(Stream()))
    assert ticks(callback.session)[-1] == 8


@pytest.mark.parametrize("stop", [3, 6, 9])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(stop, tmp_path):
    def run(directory, callbacks, ckpt_path=None):
        pruning = PrunusCallback(GRADUAL, output_dir=directory / "records")
        keep = pl.callbacks.ModelCheckpoint(
            directory, filename="{step}", every_n_train_steps=3, save_top_k=-1
        )
        trainer = make_trainer(directory, [pruning, keep, *callbacks], enable_checkpointing=True)
        model = module(SeededSteps)
        trainer.fit(model, loader(), ckpt_path=ckpt_path)
        return model.state_dict(), pruning.session

    whole, whole_session = run(tmp_path / "whole", [])
    with pytest.raises(RuntimeError):
        run(tmp_path / "parts", [StopAfter(stop + 1, RuntimeError("power"))])
    resumed, session = run(tmp_path / "parts", [], tmp_path / "parts" / f"step={stop}.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert session.step == whole_session.step == 12
    assert all(torch.equal(session.masks[n], m) for n, m in whole_session.masks.items())
    assert ticks(session) == ticks(whole_session)


def test_a_state_that_was_read_for_testing_is_not_resumed_from(tmp_path):
    callback = PrunusCallback(GRADUAL)
    trainer = make_trainer(tmp_path, [callback])
    trainer.fit(module(), loader())
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    again = PrunusCallback(GRADUAL)
    trainer = make_trainer(tmp_path, [again])
    trainer.validate(module(), loader(), ckpt_path=tmp_path / "final.ckpt")
    assert again.session is None
    trainer.fit(module(), loader())
    assert again.session.step == 12


def test_an_exception_in_training_closes_the_hooks_without_pruning_further(tmp_path):
    callback = PrunusCallback(GRADUAL)
    trainer = make_trainer(tmp_path, [callback, StopAfter(3, RuntimeError("out of luck"))])
    optimizers = []
    model = module()
    configure = model.configure_optimizers
    model.configure_optimizers = lambda: optimizers.append(configure()) or optimizers[0]
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(model, loader())
    assert callback.session.closed
    assert hooks(optimizers[0][0][0]) == 0
    assert callback.session.sparsity < 0.7


def test_a_stop_before_the_end_prunes_to_the_target(tmp_path, caplog):
    callback, model = PrunusCallback(GRADUAL), module()
    with caplog.at_level(logging.WARNING, "prunus"):
        make_trainer(tmp_path, [callback, StopAfter(3)]).fit(model, loader())
    assert abs(callback.session.sparsity - 0.8) < 2e-3
    assert masked_are_zero(model.state_dict(), callback.session)
    assert "closed at step 3" in caplog.text


def test_several_optimizers_need_a_number(tmp_path):
    with pytest.raises(ValueError, match="2 optimizers; say which .*optimizer=0"):
        make_trainer(tmp_path, [PrunusCallback(GRADUAL)]).fit(module(TwoOptimizers), loader())
    with pytest.raises(ValueError, match="optimizer=2: the module has 2"):
        callback = PrunusCallback(GRADUAL, optimizer=2)
        make_trainer(tmp_path, [callback]).fit(module(TwoOptimizers), loader())


@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_epochs": 3, "max_steps": 24}])
def test_each_of_several_optimizers_can_have_a_recipe(length, tmp_path):
    body = PrunusCallback(GRADUAL, optimizer=1)
    head = PrunusCallback(AT_ONCE.replace("net.*", "head"), optimizer=0)
    model = module(TwoOptimizers)
    trainer = make_trainer(tmp_path, [body, head], **length)
    trainer.fit(model, loader())
    assert body.session.step == head.session.step == 12
    assert ticks(body.session)[-1] == 10  # 80% of 12
    assert set(body.session.masks) == {"net.0.weight", "net.3.weight"}
    assert set(head.session.masks) == {"head.weight"}
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    saved = torch.load(tmp_path / "final.ckpt", weights_only=True)["callbacks"]
    assert len([key for key in saved if "PrunusCallback" in key]) == 2


def test_frozen_weights_stay_although_lightning_computes_gradients_inside_the_step(tmp_path):
    model = module()
    before = [p.clone() for p in model.head.parameters()]
    recipe = AT_ONCE + '  - freeze: {parameters: ["head.*"]}\n'
    make_trainer(tmp_path, [PrunusCallback(recipe)]).fit(model, loader())
    assert all(torch.equal(p, b) for p, b in zip(model.head.parameters(), before, strict=True))


def test_the_metrics_of_each_epoch_are_recorded(tmp_path):
    callback = PrunusCallback(AT_ONCE, output_dir=tmp_path / "records")
    make_trainer(tmp_path, [callback]).fit(module(), loader(), loader())
    events = [e for e in callback.session.recorder.events if e["event"] == "metrics"]
    assert [e["step"] for e in events] == [6, 12]
    assert all({"loss_epoch", "val_loss"} <= set(event) for event in events)


def test_a_pruner_that_needs_data_reads_the_batches_of_a_loader(tmp_path):
    recipe = AT_ONCE.replace("{layers", "{pruner: toy, layers")
    callback = PrunusCallback(recipe, calibration=prunus.Calibration(loader()))
    make_trainer(tmp_path, [callback]).fit(module(), loader())
    assert abs(callback.session.sparsity - 0.75) < 2e-3
