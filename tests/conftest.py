import pytest
import torch

from tests.helpers.ranks import RankProcesses

torch.set_num_threads(1)  # pytest-xdist runs one process for each core


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Two processes that answer calls."""
    if not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch shards models on GPUs only")
    group = RankProcesses(tmp_path_factory.mktemp("ranks"))
    yield group
    group.stop()
