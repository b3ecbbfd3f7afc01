"""Two processes of torchrun: other people's trainers beside a plain loop, and ranks that fail."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prunus.report.records import read_records

from tests.distributed import failing_rank
from tests.distributed import trainer_workers as workers
from tests.oracles.pruning import SINGLE

PATIENCE = 200  # seconds until processes that do not end count as hanging


def torchrun(script, *args):
    """The finished process of a script on two ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", str(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=SINGLE, timeout=PATIENCE)


@pytest.fixture(scope="module")
def one():
    """What one process makes of all the data, without a trainer."""
    return workers.outcome(workers.by_loop(Path(), 0, 1))


def told(events):
    return [{key: value for key, value in event.items() if key != "time"} for event in events]


@pytest.mark.parametrize("trainer", workers.TRAINERS)
def test_two_processes_prune_and_train_as_one_does(trainer, one, tmp_path):
    pytest.importorskip(trainer)
    done = torchrun(workers.__file__, trainer, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        answer = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        assert answer["masks"].keys() == one["masks"].keys()
        for name, mask in one["masks"].items():
            assert torch.equal(answer["masks"][name], mask), name
        for name, weight in one["weights"].items():
            torch.testing.assert_close(answer["weights"][name], weight, rtol=1e-9, atol=1e-11)
        assert told(answer["events"]) == told(one["events"])
    written = [event for event in read_records(tmp_path / "records") if event["event"] == "prune"]
    assert told(written) == told(one["events"])


@pytest.mark.usefixtures("ranks")  # skips where torch shards on GPUs only
@pytest.mark.parametrize(
    ("how", "where"), [("fsdp", "loss"), ("ddp", "update"), ("fsdp", "between")]
)
def test_a_rank_that_fails_ends_the_run_with_its_message(how, where):
    done = torchrun(failing_rank.__file__, how, where)
    assert done.returncode != 0
    assert "ArithmeticError: out of luck" in done.stderr
    assert "trained to the end" not in done.stdout
