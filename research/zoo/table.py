"""The page of the zoo: a row for each architecture, and what was refused, with the reasons."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from research.zoo.trial import METHODS

BEGIN, END = "<!-- zoo -->", "<!-- end of zoo -->"
ONE = r"[\w\[\]]+(\.[\w\[\]]+)*"
SHORT = {
    rf"^(sequential: )?(?!sequential)({ONE}, )*{ONE}(?=:| \(| is in no block)": r"\1*layer*",
    rf"((reached|depends on) )({ONE}, )*{ONE}": r"\1*layer*",
    rf"no block of '{ONE}'": "no block of the list",
    r"divide \d+": "divide the",
}
VERBS = {"reads": "reads", "writes": "writes", "routes": "routes"}
Row = Mapping[str, Any]


def page(text: str, rows: Sequence[Row]) -> str:
    """The page with a new table between its marks."""
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


def table(rows: Sequence[Row]) -> str:
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row["name"], {})[row["method"]] = row
    notes: dict[str, int] = {}
    lines = [
        f"| architecture | left dense by default | {' | '.join(METHODS)} |",
        f"|---|---|{'---|' * len(METHODS)}",
    ]
    for name, found in by_name.items():
        cells = [_cell(found.get(method), notes) for method in METHODS]
        lines.append(f"| {name} | {_spared(found)} | {' | '.join(cells)} |")
    lines += ["", _counts(rows), "", "Refused, or at fault, because:", ""]
    lines += [f"{number}. {message}" for message, number in notes.items()]
    return "\n".join(lines)


def _counts(rows: Sequence[Row]) -> str:
    done = [row for row in rows if "refused" not in row and "fault" not in row]
    refused = [row for row in rows if "refused" in row]
    return (
        f"{len({row['name'] for row in rows})} architectures; of {len(rows)} trials {len(done)} "
        f"came out as asked, {len(refused)} were refused with a reason, and "
        f"{len(rows) - len(done) - len(refused)} are faults."
    )


def _cell(row: Row | None, notes: dict[str, int]) -> str:
    if row is None:
        return "-"
    if "fault" not in row and "refused" not in row:
        return f"{row['share']:.0%}"
    message = shortened(row["refused"]) if "refused" in row else f"fault: {row['fault'][:100]}"
    return f"({notes.setdefault(message, len(notes) + 1)})"


def shortened(message: str) -> str:
    """The reason without names and sizes, so that the same reason reads the same everywhere."""
    first = re.split(r"[;:] (?:nor|exclude|use|remove|include)| \(left dense", message)[0]
    for pattern, short in SHORT.items():
        first = re.sub(pattern, short, first)
    return first[:160].replace("|", "/")


def _spared(found: Mapping[str, Row]) -> str:
    """Such as ``reads `stem`, writes `head` ``; numbered layers of one kind together."""
    spared: Mapping[str, str] = next((r["spared"] for r in found.values() if "spared" in r), {})
    names: dict[str, dict[str, int]] = {}
    for name, reason in spared.items():
        short = re.sub(r"\b\d+\b", "*", name)
        counts = names.setdefault(VERBS.get(reason.split()[0], "transforms"), {})
        counts[short] = counts.get(short, 0) + 1
    parts = []
    for verb, counts in names.items():
        listed = [f"`{name}`" + (f" x{n}" if n > 1 else "") for name, n in counts.items()]
        more = f", {len(listed) - 3} more" if len(listed) > 3 else ""
        parts.append(f"{verb} {', '.join(listed[:3])}{more}")
    return "; ".join(parts) or "-"
