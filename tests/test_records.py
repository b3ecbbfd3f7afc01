import json
import sys

import pytest
import torch

import prunus
from oracles import small_mlp
from prunus.records import FILE, Recorder, atomic_write, read_records

RECIPE = """
modifiers:
  - prune:
      sparsity: {from: 0.2, to: 0.8}
      window: {from: 1step, to: 5step, every: 2step}
"""


def start(**arguments):
    torch.manual_seed(0)
    model = small_mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return model, optimizer, prunus.attach(model, optimizer, RECIPE, **arguments)


def train(model, optimizer, session, steps):
    for _ in range(steps):
        model(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        session.log(loss=session.step / 10)


def steps_of(events, kind):
    return [event["step"] for event in events if event["event"] == kind]


def test_records_stream_while_training_goes_on(tmp_path):
    model, optimizer, session = start(output_dir=tmp_path)
    train(model, optimizer, session, 3)
    events = read_records(tmp_path)
    assert steps_of(events, "prune") == [1, 3]
    assert steps_of(events, "metrics") == [1, 2, 3]
    session.close(finish=False)


def test_a_resumed_run_goes_on_in_the_same_file_without_repeating(tmp_path):
    model, optimizer, session = start(output_dir=tmp_path)
    train(model, optimizer, session, 2)
    state = session.state_dict()
    train(model, optimizer, session, 2)  # lost in the crash
    session.close(finish=False)
    model, optimizer, session = start(output_dir=tmp_path)
    session.load_state_dict(state)
    train(model, optimizer, session, 4)
    session.close()
    events = read_records(tmp_path)
    assert steps_of(events, "start") == [0]
    assert steps_of(events, "prune") == [1, 3, 5]
    assert steps_of(events, "metrics") == [1, 2, 3, 4, 5, 6]
    assert steps_of(events, "end") == [6]


def test_a_second_run_in_the_same_directory_begins_anew(tmp_path):
    for _ in range(2):
        model, optimizer, session = start(output_dir=tmp_path)
        train(model, optimizer, session, 1)
        session.close()
    assert steps_of(read_records(tmp_path), "start") == [0]


def test_a_function_receives_every_event():
    seen = []
    model, optimizer, session = start(log=seen.append)
    train(model, optimizer, session, 5)
    session.close()
    assert [e["event"] for e in seen if e["event"] != "metrics"] == [
        "start", "prune", "prune", "prune", "end"]  # fmt: skip
    assert seen[-1]["sparsity"] == pytest.approx(0.8, abs=2e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_receives_sparsity_and_metrics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, optimizer, session = start(output_dir=tmp_path, log="tensorboard")
    train(model, optimizer, session, 5)
    session.close()
    log = EventAccumulator(str(tmp_path)).Reload()
    sparsities = [(e.step, round(e.value, 3)) for e in log.Scalars("prunus/sparsity")]
    assert sparsities[:3] == [(1, 0.201), (3, 0.5), (5, 0.799)]
    assert [e.step for e in log.Scalars("prunus/loss")] == [1, 2, 3, 4, 5]


@pytest.mark.filterwarnings("ignore")
def test_wandb_receives_sparsity_and_metrics_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = wandb.init(project="prunus-test")
    model, optimizer, session = start(log="wandb")
    train(model, optimizer, session, 5)
    session.close()
    assert run.summary["prunus/sparsity"] == pytest.approx(0.8, abs=2e-3)
    assert run.summary["prunus/loss"] == pytest.approx(0.5)
    assert run.summary["prunus/step"] == 5
    run.finish()
    assert list(tmp_path.rglob("*.wandb"))


def test_an_unknown_logger_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match="log='wandbb' is not known; did you mean 'wandb'"):
        start(log="wandbb")


@pytest.mark.parametrize(("log", "module", "message"), [
    ("wandb", "wandb", r"pip install 'prunus\[wandb\]'"),
    ("tensorboard", "torch.utils.tensorboard", "pip install tensorboard"),
])  # fmt: skip
def test_a_missing_logger_names_what_to_install(log, module, message, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        start(log=log)


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write():
        with atomic_write(path) as draft:
            draft.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_recorder_keeps_events_without_a_directory(tmp_path):
    recorder = Recorder()
    recorder({"event": "metrics", "step": 1, "loss": 0.5})
    recorder.save(tmp_path)
    lines = (tmp_path / FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == recorder.events
