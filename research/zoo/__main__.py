"""Try every pruning on every architecture, and write what came of it to a table.

    python -m research.zoo --output runs/zoo.jsonl --table docs/zoo.md
    python -m research.zoo --only llama "timm *" --jobs 1

Architectures that the output has already are not tried again; delete it, or give ``--anew``.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from pathlib import Path

from research.zoo.all import ARCHITECTURES
from research.zoo.pool import results
from research.zoo.table import page
from research.zoo.trial import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=["*"], help="names, with wildcards")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--limit", type=float, default=180, help="seconds for an architecture")
    parser.add_argument("--output", type=Path, default=Path("runs/zoo.jsonl"))
    parser.add_argument("--table", type=Path, help="page whose table is written anew")
    parser.add_argument("--anew", action="store_true", help="forget earlier results")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.anew:
        args.output.unlink(missing_ok=True)
    text = args.output.read_text() if args.output.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    tried = {row["name"] for row in rows}
    names = [name for name in ARCHITECTURES if name not in tried]
    names = [name for name in names if any(fnmatch.fnmatch(name, only) for only in args.only)]
    with args.output.open("a") as file:
        for found in results(names, args.jobs, args.limit):
            rows += found
            file.writelines(json.dumps(row) + "\n" for row in found)
            file.flush()
            print(f"{found[0]['name']}: {', '.join(map(outcome, found))}", flush=True)
    rows.sort(key=lambda row: list(ARCHITECTURES).index(row["name"]))
    if args.table is not None:
        args.table.write_text(page(args.table.read_text(), rows))
    faults = [row for row in rows if "fault" in row]
    for row in faults:
        print(f"{row['name']}, {row['method']}: {row['fault']}", file=sys.stderr)
    print(
        f"{len({row['name'] for row in rows})} architectures, {len(METHODS)} methods, "
        f"{len(faults)} faults"
    )
    sys.exit(bool(faults))


def outcome(row: dict) -> str:
    if "fault" in row:
        return f"{row['method']} FAULT"
    return f"{row['method']} refused" if "refused" in row else f"{row['method']} {row['share']:.0%}"


if __name__ == "__main__":
    main()
