"""CPU time of `import prunus` against `import torch`, and of `prunus --help`.

Each is a fresh process, in turn with the others, with bytecode that is already compiled; medians
over the rounds.

    python -m research.benchmarks.import_time [--rounds 10]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping

from research.benchmarks.measure import hardware

CALLS = {
    "import torch": "import torch",
    "import prunus": "import prunus",
    "prunus --help": "import sys; sys.argv = ['prunus', '--help']; "
    "from prunus.cli.main import main; main()",
}


def cpu_seconds(code: str, environment: Mapping[str, str]) -> float:
    """User and system time of a process that runs the code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    args.device, args.threads, args.clock = "cpu", None, "cpu"
    times: dict[str, list[float]] = {name: [] for name in CALLS}
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for code in CALLS.values():
            cpu_seconds(code, environment)
        for _ in range(args.rounds):
            for name, code in CALLS.items():
                times[name].append(cpu_seconds(code, environment))
    torch = times["import torch"]
    print(hardware(args))
    print("| | CPU seconds | beyond torch | times torch |\n|---|---|---|---|")
    for name, each in times.items():
        beyond = statistics.median(a - b for a, b in zip(each, torch, strict=True))
        ratio = statistics.median(a / b for a, b in zip(each, torch, strict=True))
        print(f"| `{name}` | {statistics.median(each):.2f} | {beyond:+.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
