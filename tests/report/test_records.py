import json
import struct
import sys
import warnings

import pytest
import torch

import prunus
from prunus.core.files import atomic_write
from prunus.report.records import FILE, Recorder, read_records

from tests.helpers.training import train
from tests.oracles.pruning import small_mlp

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


def log_steps(model, optimizer, session, steps):
    train(model, optimizer, steps, after=lambda _: session.log(loss=session.step / 10))


def steps_of(events, kind):
    return [event["step"] for event in events if event["event"] == kind]


def test_records_stream_while_training_goes_on(tmp_path):
    model, optimizer, session = start(output_dir=tmp_path)
    log_steps(model, optimizer, session, 3)
    events = read_records(tmp_path)
    assert steps_of(events, "prune") == [1, 3]
    assert steps_of(events, "metrics") == [1, 2, 3]
    session.close(finish=False)


def test_a_resumed_run_goes_on_in_the_same_file_without_repeating(tmp_path):
    model, optimizer, session = start(output_dir=tmp_path)
    log_steps(model, optimizer, session, 2)
    state = session.state_dict()
    log_steps(model, optimizer, session, 2)  # lost in the crash
    session.close(finish=False)
    model, optimizer, session = start(output_dir=tmp_path)
    session.load_state_dict(state)
    log_steps(model, optimizer, session, 4)
    session.close()
    events = read_records(tmp_path)
    assert steps_of(events, "start") == [0]
    assert steps_of(events, "prune") == [1, 3, 5]
    assert steps_of(events, "metrics") == [1, 2, 3, 4, 5, 6]
    assert steps_of(events, "end") == [6]


def test_a_second_run_in_the_same_directory_begins_anew(tmp_path):
    for _ in range(2):
        model, optimizer, session = start(output_dir=tmp_path)
        log_steps(model, optimizer, session, 1)
        session.close()
    assert steps_of(read_records(tmp_path), "start") == [0]


def test_a_session_that_goes_back_drops_the_later_records_from_the_file(tmp_path):
    model, optimizer, session = start(output_dir=tmp_path)
    log_steps(model, optimizer, session, 2)
    state = session.state_dict()
    log_steps(model, optimizer, session, 2)
    session.load_state_dict(state)
    log_steps(model, optimizer, session, 1)
    events = read_records(tmp_path)
    assert events == session.recorder.events
    assert steps_of(events, "start") == [0]
    assert steps_of(events, "metrics") == [1, 2, 3]
    session.close(finish=False)


def test_a_run_resumed_from_the_very_beginning_or_the_very_end_repeats_nothing(tmp_path):
    _, _, session = start()
    states = [session.state_dict()]
    model, optimizer, session = start(output_dir=tmp_path)
    log_steps(model, optimizer, session, 6)
    states.append(session.state_dict())
    session.close()
    for state, steps in zip(reversed(states), (0, 6), strict=True):
        model, optimizer, session = start(output_dir=tmp_path)
        session.load_state_dict(state)
        log_steps(model, optimizer, session, steps)
        session.close()
        events = read_records(tmp_path)
        assert steps_of(events, "start") == [0]
        assert steps_of(events, "prune") == [1, 3, 5]
        assert steps_of(events, "metrics") == [1, 2, 3, 4, 5, 6]
        assert steps_of(events, "end") == [6]


def test_a_run_resumed_in_another_directory_says_what_it_is(tmp_path):
    model, optimizer, session = start()
    log_steps(model, optimizer, session, 2)
    state = session.state_dict()
    session.close(finish=False)
    model, optimizer, session = start(output_dir=tmp_path)
    session.load_state_dict(state)
    log_steps(model, optimizer, session, 1)
    session.close(finish=False)
    first = read_records(tmp_path)[0]
    assert (first["event"], first["step"]) == ("start", 2)
    assert first["bytes"] == 4 * first["parameters"]
    assert "prune" in first["recipe"]


def test_the_file_goes_on_after_closing_and_after_a_report_in_its_directory(tmp_path):
    model, optimizer, session = start(output_dir=tmp_path)
    log_steps(model, optimizer, session, 1)
    session.recorder.save(tmp_path)  # as a report does
    log_steps(model, optimizer, session, 1)
    assert steps_of(read_records(tmp_path), "metrics") == [1, 2]
    session.close()
    session.log(accuracy=0.9)
    assert read_records(tmp_path)[-1]["accuracy"] == 0.9
    assert read_records(tmp_path) == session.recorder.events


def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path):
    model, optimizer, session = start(output_dir=tmp_path)
    log_steps(model, optimizer, session, 2)
    state = session.state_dict()
    session.close(finish=False)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"event": "metr')
    model, optimizer, session = start(output_dir=tmp_path)
    session.load_state_dict(state)
    log_steps(model, optimizer, session, 1)
    assert steps_of(read_records(tmp_path), "metrics") == [1, 2, 3]
    session.close(finish=False)


@pytest.mark.parametrize(
    "rubbish",
    [
        '{"event": "metr',
        "[1]",
        "{}",
        '{"event": "metrics"}',
        '{"event": "prune", "step": 1}',
        '{"event": "metrics", "step": "x"}',
        '{"event": "metrics", "step": -1}',
        '{"event": "metrics", "step": 1, "time": NaN}',
        "[" * 100_000,
        "\x00\x01",
    ],
)
def test_a_line_in_the_middle_that_is_no_record_is_left_out_and_named(tmp_path, caplog, rubbish):
    events = [{"event": "metrics", "step": i, "loss": 0.5, "time": 1.0} for i in range(3)]
    first, *rest = (json.dumps(event) + "\n" for event in events)
    (tmp_path / FILE).write_text(first + rubbish + "\n" + "".join(rest))
    assert read_records(tmp_path) == events
    assert "records.jsonl:2: this line is not a record" in caplog.text


def test_a_line_torn_inside_a_letter_is_left_out(tmp_path, caplog):
    line = b'{"event": "end", "step": 1}\n'
    (tmp_path / FILE).write_bytes(line + '{"event": "ü'.encode()[:-1] + b"\n" + line)
    assert len(read_records(tmp_path)) == 2
    assert "records.jsonl:2" in caplog.text


def test_a_file_without_any_record_is_refused(tmp_path):
    (tmp_path / FILE).write_text("epoch,loss\n1,0.5\n")
    with pytest.raises(ValueError, match="no line of this file is a record"):
        read_records(tmp_path)


def strict(text):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_json_does_not_know_are_written_strictly_and_read_back(tmp_path):
    model, optimizer, session = start(output_dir=tmp_path)
    log_steps(model, optimizer, session, 1)
    session.log(a=float("nan"), b=float("inf"), c=-float("inf"), d=10**400, e=1e308)
    session.close(finish=False)
    session.recorder.save(tmp_path / "again")
    for directory in (tmp_path, tmp_path / "again"):
        lines = (directory / FILE).read_text().splitlines()
        event = next(e for e in map(strict, lines) if "a" in e)
        assert [event[key] for key in "abcd"] == ["NaN", "Infinity", "-Infinity", "Infinity"]
        back = next(e for e in read_records(directory) if "a" in e)
        assert back["a"] != back["a"]
        assert [back[key] for key in "bcde"] == [float("inf"), -float("inf"), float("inf"), 1e308]


def test_records_of_0_1_with_bare_nan_are_read(tmp_path):
    (tmp_path / FILE).write_text('{"event": "metrics", "step": 1, "loss": NaN}\n')
    (event,) = read_records(tmp_path)
    assert event["loss"] != event["loss"]


def test_a_log_function_that_raises_is_told_once_and_training_goes_on(caplog):
    calls = []

    def broken(event):
        calls.append(event)
        raise ConnectionError("no route to host")

    model, optimizer, session = start(log=broken)
    log_steps(model, optimizer, session, 6)
    session.close()
    assert prunus.sparsity(model) == prunus.sparsity(trained().model)
    assert len(calls) == len(session.recorder.events)
    told = [r.getMessage() for r in caplog.records if "log= raised" in r.getMessage()]
    assert len(told) == 1
    assert "ConnectionError: no route to host" in told[0]


def test_an_interrupt_in_a_log_function_still_stops_training():
    def stop(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(log=stop)


def test_the_step_of_a_metric_is_that_of_the_session():
    model, optimizer, session = start()
    log_steps(model, optimizer, session, 2)
    session.log(step=99, event=1, loss=0.5)
    event = session.recorder.events[-1]
    assert (event["event"], event["step"], event["loss"]) == ("metrics", 2, 0.5)
    session.close(finish=False)


def test_every_event_has_a_time():
    session = trained()
    swept = prunus.sweep(small_mlp(), "magnitude", [0.5], lambda model: 0.0)
    shot = prunus.prune(small_mlp(), "magnitude", sparsity=0.5)
    for recorder in (session.recorder, swept.recorder, shot.recorder):
        assert all(event["time"] > 1.7e9 for event in recorder.events)


def trained(**arguments):
    model, optimizer, session = start(**arguments)
    log_steps(model, optimizer, session, 5)
    session.close()
    return session


def test_a_function_receives_every_event():
    seen = []
    session = trained(log=seen.append)
    assert seen == session.recorder.events
    kinds = [e["event"] for e in seen if e["event"] != "metrics"]
    assert kinds == ["start", "prune", "prune", "prune", "end"]
    assert seen[-1]["sparsity"] == pytest.approx(0.8, abs=2e-3)


def scalars(directory, name):
    # its protobufs are generated by an older compiler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        log = EventAccumulator(str(directory)).Reload()
    return [(event.step, round(event.value, 3)) for event in log.Scalars(f"prunus/{name}")]


def test_tensorboard_receives_sparsity_and_metrics(tmp_path):
    trained(output_dir=tmp_path, log="tensorboard")
    assert scalars(tmp_path, "sparsity")[:3] == [(1, 0.201), (3, 0.5), (5, 0.799)]
    assert scalars(tmp_path, "loss") == [(i, i / 10) for i in range(1, 6)]


def test_tensorboard_shows_a_resumed_run_once(tmp_path):
    model, optimizer, session = start(output_dir=tmp_path, log="tensorboard")
    log_steps(model, optimizer, session, 2)
    state = session.state_dict()
    log_steps(model, optimizer, session, 2)  # lost in the crash
    session.close(finish=False)
    model, optimizer, session = start(output_dir=tmp_path, log="tensorboard")
    session.load_state_dict(state)
    log_steps(model, optimizer, session, 3)
    session.close()
    assert scalars(tmp_path, "loss") == [(i, i / 10) for i in range(1, 6)]


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    module = pytest.importorskip("wandb")
    module.teardown()  # it reads the environment once
    yield module
    module.teardown()


def history(path):
    """What an offline run holds: a LevelDB log, in blocks of 32 KiB, of protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            items = Record.FromString(whole).history.item
            whole = b""
            if items:
                yield {"".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def check_wandb(wandb, directory):
    wandb.teardown()  # the file may be written after the end of the run
    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    rows = list(history(path))
    losses = [(r["prunus/step"], r["prunus/loss"]) for r in rows if "prunus/loss" in r]
    assert losses == [(i, i / 10) for i in range(1, 6)]
    sparsities = [round(r["prunus/sparsity"], 3) for r in rows if "prunus/target" in r]
    assert sparsities == [0.201, 0.5, 0.799]
    return rows


def test_wandb_receives_sparsity_and_metrics_in_a_run_that_ends_with_the_session(wandb, tmp_path):
    session = trained(log="wandb")
    assert wandb.run is None
    session.log(accuracy=0.9)  # into the records only
    check_wandb(wandb, tmp_path)


def test_wandb_goes_on_with_the_run_of_the_loop(wandb, tmp_path):
    run = wandb.init(project="mine")
    trained(log="wandb")
    assert wandb.run is run
    run.log({"of the loop": 1})
    run.finish()
    assert check_wandb(wandb, tmp_path)[-1]["of the loop"] == 1


@pytest.mark.parametrize("log", ["wandb", "tensorboard"])
def test_attaching_in_vain_leaves_no_log_behind(log, wandb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small_mlp()
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="does not hold"):
        prunus.attach(model, other, RECIPE, log=log)
    assert wandb.run is None
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_logger_is_an_error_with_a_suggestion():
    with pytest.raises(ValueError, match="log='wandbb' is not known; did you mean 'wandb'"):
        start(log="wandbb")


@pytest.mark.parametrize(("log", "module", "message"), [
    ("wandb", "wandb", r"pip install 'prunus\[wandb\]'"),
    ("tensorboard", "torch.utils.tensorboard", r"pip install 'prunus\[tensorboard\]'"),
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
