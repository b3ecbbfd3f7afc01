"""`PrunusCallback` in a real `transformers.Trainer`."""

import logging

import pytest
import torch

from tests.helpers import toy_pruner  # noqa: F401 (registers a pruner that needs data)
from tests.helpers.training import same

pytest.importorskip("transformers")

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import prunus
from prunus.integrations.transformers import PrunusCallback

# no accelerator to pin memory for
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

GRADUAL = """
modifiers:
  - prune:
      sparsity: {from: 0.2, to: 0.8, curve: cubic}
      window: {from: 0ep, to: 80%, every: 2step}
"""
AT_ONCE = "modifiers:\n  - prune: {sparsity: 0.75}\n"


def bert():
    set_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )


def gpt2():
    set_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )


def data(count=24):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(50, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": int(row[0] % 2)} for row in ids]


def text(count=16):
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in data(count)]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(data())


def make_trainer(directory, callbacks, model=None, train=None, **arguments):
    arguments = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        **arguments,
    }
    args = TrainingArguments(
        str(directory),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    model = model or bert()
    return Trainer(
        model, args, train_dataset=train or data(), eval_dataset=data(4), callbacks=callbacks
    )


class StopAfter(TrainerCallback):
    """An exception in the middle of training, or a polite stop."""

    def __init__(self, step, error=None):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            if self.error:
                raise self.error
            control.should_training_stop = True


def hooks(optimizer):
    inner = prunus.api.optimizer_hooks.innermost(optimizer)
    return len(inner._optimizer_step_pre_hooks) + len(inner._optimizer_step_post_hooks)


def masked_are_zero(model, session):
    parameters = dict(model.named_parameters())
    return all((parameters[name][~mask] == 0).all() for name, mask in session.masks.items())


@pytest.mark.parametrize(("model", "train"), [(bert, data), (gpt2, text)], ids=["bert", "gpt2"])
def test_training_reaches_the_target_and_the_saved_model_keeps_it(model, train, tmp_path):
    callback = PrunusCallback(GRADUAL)
    trainer = make_trainer(tmp_path, [callback], model(), train())
    trainer.train()
    session = callback.session
    assert session.closed
    assert hooks(trainer.optimizer) == 0
    assert abs(session.sparsity - 0.8) < 1e-3
    trainer.save_model(tmp_path / "final")
    loaded = type(trainer.model).from_pretrained(tmp_path / "final")
    assert same(loaded, trainer.model)
    assert masked_are_zero(loaded, session)


def test_the_clock_counts_optimizer_steps_under_gradient_accumulation(tmp_path):
    callback = PrunusCallback(GRADUAL)
    # 24 samples: 6 batches, 2 optimizer steps (4 and 2 batches) in each of 5 epochs
    trainer = make_trainer(tmp_path, [callback], num_train_epochs=5, gradient_accumulation_steps=4)
    trainer.train()
    ticks = [e["step"] for e in callback.session.recorder.events if e["event"] == "prune"]
    assert trainer.state.global_step == callback.session.step == 10
    assert ticks == [1, 2, 4, 6, 8]


@pytest.mark.parametrize("train", [data(), Stream()], ids=["sized", "stream"])
def test_max_steps_sets_the_length_of_training(train, tmp_path):
    callback = PrunusCallback(GRADUAL)
    make_trainer(tmp_path, [callback], train=train, max_steps=10).train()
    ticks = [e["step"] for e in callback.session.recorder.events if e["event"] == "prune"]
    assert callback.session.step == 10
    assert ticks[-1] == 8


@pytest.mark.parametrize("stop", [3, 6, 9])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(stop, tmp_path):
    def run(directory, callbacks, **resume):
        pruning = PrunusCallback(GRADUAL, output_dir=directory / "records")
        arguments = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}
        trainer = make_trainer(directory, [pruning, *callbacks], **arguments)
        with pruning:
            trainer.train(**resume)
        return trainer, pruning.session

    whole, whole_session = run(tmp_path / "whole", [])
    with pytest.raises(RuntimeError):
        run(tmp_path / "parts", [StopAfter(stop + 1, RuntimeError("power"))])
    set_seed(123)
    resumed, session = run(tmp_path / "parts", [], resume_from_checkpoint=True)
    assert same(whole.model, resumed.model)
    assert session.step == whole_session.step == 12
    assert session.masks.keys() == whole_session.masks.keys()
    assert all(torch.equal(session.masks[n], m) for n, m in whole_session.masks.items())
    steps = [e["step"] for e in session.recorder.events if e["event"] == "prune"]
    assert steps == [e["step"] for e in whole_session.recorder.events if e["event"] == "prune"]


def test_a_checkpoint_elsewhere_is_found_when_named(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path / "old", [PrunusCallback(GRADUAL)], **saving).train()
    # a run of the same length lies in the new directory: its state must not be taken
    set_seed(5)
    other = make_trainer(tmp_path / "new", [PrunusCallback(GRADUAL)], learning_rate=1e-2, **saving)
    other.train()

    checkpoint = tmp_path / "old" / "checkpoint-8"
    trainer = make_trainer(tmp_path / "new", [PrunusCallback(GRADUAL)], **saving)
    with pytest.raises(ValueError, match="resume_from="):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    callback = PrunusCallback(GRADUAL, resume_from=checkpoint)
    trainer = make_trainer(tmp_path / "new", [callback], **saving)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert abs(callback.session.sparsity - 0.8) < 1e-3
    assert masked_are_zero(trainer.model, callback.session)


def test_a_state_of_another_recipe_is_refused_and_leaves_no_hooks(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, [PrunusCallback(GRADUAL)], **saving).train()
    trainer = make_trainer(tmp_path, [PrunusCallback(AT_ONCE)], **saving)
    with pytest.raises(ValueError, match="another recipe"):
        trainer.train(resume_from_checkpoint=True)
    assert hooks(trainer.optimizer) == 0


def test_an_exception_inside_with_closes_the_hooks_without_pruning_further(tmp_path):
    callback = PrunusCallback(GRADUAL)
    trainer = make_trainer(tmp_path, [callback, StopAfter(3, RuntimeError("out of luck"))])
    with pytest.raises(RuntimeError, match="out of luck"), callback:
        trainer.train()
    assert callback.session.closed
    assert hooks(trainer.optimizer) == 0
    assert callback.session.sparsity < 0.7


def test_training_again_after_an_exception_leaves_one_session(tmp_path):
    callback, stop = PrunusCallback(AT_ONCE), StopAfter(3, RuntimeError("out of luck"))
    trainer = make_trainer(tmp_path, [callback, stop])
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train()
    first, stop.step = callback.session, -1
    trainer.train()
    assert first.closed
    assert callback.session is not first
    assert callback.session.step == 12
    assert hooks(trainer.optimizer) == 0


def test_a_stop_before_the_end_prunes_to_the_target(tmp_path, caplog):
    callback = PrunusCallback(GRADUAL)
    trainer = make_trainer(tmp_path, [callback, StopAfter(3)])
    with caplog.at_level(logging.WARNING, "prunus"):
        trainer.train()
    assert abs(callback.session.sparsity - 0.8) < 1e-3
    assert masked_are_zero(trainer.model, callback.session)
    assert "closed at step 3" in caplog.text


def test_a_best_model_from_before_the_last_pruning_step_is_masked(tmp_path, caplog):
    best_first = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "epoch",  # a number that rises: the first checkpoint wins
        "greater_is_better": False,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
    }
    callback = PrunusCallback(GRADUAL)
    trainer = make_trainer(tmp_path, [callback], **best_first)
    trainer.compute_metrics = lambda _: {"epoch": trainer.state.epoch}
    with caplog.at_level(logging.WARNING, "prunus"):
        trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    assert masked_are_zero(trainer.model, callback.session)
    assert "load_best_model_at_end" in caplog.text


def test_logged_numbers_become_metrics_of_the_session(tmp_path):
    callback = PrunusCallback(AT_ONCE, output_dir=tmp_path / "records")
    trainer = make_trainer(tmp_path, [callback], eval_strategy="epoch")
    trainer.train()
    events = [e for e in callback.session.recorder.events if e["event"] == "metrics"]
    assert [e["step"] for e in events if "loss" in e] == list(range(1, 13))
    assert [e["step"] for e in events if "eval_loss" in e] == [6, 12]
    assert (tmp_path / "records" / "records.jsonl").is_file()


def test_a_pruner_that_needs_data_reads_the_batches_of_a_loader(tmp_path):
    rows = [{**row, "labels": torch.tensor(row["labels"])} for row in data(8)]
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    recipe = "modifiers:\n  - prune: {pruner: toy, sparsity: 0.5}\n"
    callback = PrunusCallback(recipe, calibration=prunus.Calibration(loader))
    make_trainer(tmp_path, [callback]).train()
    assert abs(callback.session.sparsity - 0.5) < 1e-2
