"""Two processes: other people's trainers beside a plain loop, and ranks that fail."""

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from prunus.report.records import read_records

from tests.distributed import failing_rank
from tests.distributed import trainer_workers as workers
from tests.helpers.programs import call
from tests.oracles.pruning import SINGLE

PATIENCE = 200  # seconds until processes that do not end count as hanging


@pytest.fixture(scope="module")
def one():
    """What one process makes of all the data, without a trainer."""
    return workers.outcome(workers.by_loop(Path(), 0, 1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder where two processes of torchrun leave what each installed trainer makes."""
    folder = tmp_path_factory.mktemp("trainers")
    installed = [name for name in workers.TRAINERS if importlib.util.find_spec(name)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", workers.__file__, str(folder), *installed]
    done = subprocess.run(command, capture_output=True, text=True, env=SINGLE, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def told(events):
    return [{key: value for key, value in event.items() if key != "time"} for event in events]


@pytest.mark.parametrize("trainer", workers.TRAINERS)
def test_two_processes_prune_and_train_as_one_does(trainer, one, trained):
    if not importlib.util.find_spec(trainer):
        pytest.skip(f"{trainer} is not installed")
    for rank in range(2):
        answer = torch.load(trained / trainer / f"rank{rank}.pt", weights_only=False)
        assert answer["masks"].keys() == one["masks"].keys()
        for name, mask in one["masks"].items():
            assert torch.equal(answer["masks"][name], mask), name
        for name, weight in one["weights"].items():
            torch.testing.assert_close(answer["weights"][name], weight, rtol=1e-9, atol=1e-11)
        assert told(answer["events"]) == told(one["events"])
    written = [
        event for event in read_records(trained / trainer / "records") if event["event"] == "prune"
    ]
    assert told(written) == told(one["events"])


@pytest.mark.usefixtures("ranks")  # skips where torch shards on GPUs only
@pytest.mark.parametrize(
    ("how", "where"), [("fsdp", "loss"), ("ddp", "update"), ("fsdp", "between")]
)
def test_a_rank_that_fails_ends_the_run_with_its_message(how, where, tmp_path):
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(
            lambda rank: call(failing_rank.train, rank, how, where, tmp_path), (0, 1)
        )
    assert "ArithmeticError: out of luck" in second.stderr
    assert first.returncode == second.returncode == 1  # the first does not wait for ever
    assert not list(tmp_path.glob("finished*"))
