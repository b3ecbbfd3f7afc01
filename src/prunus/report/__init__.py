"""One page about a run: ``report.html``, self-contained, and ``report.png``, from its records."""

from __future__ import annotations

import io
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from prunus.records import FILE, Event, atomic_write, read_records
from prunus.report.figure import draw
from prunus.report.summary import Summary

TEMPLATE = Path(__file__).with_name("template.html")


def write_report(directory: str | os.PathLike[str]) -> Path:
    """Read ``records.jsonl`` there and write ``report.html`` and ``report.png`` beside it.

    Returns the path of the page. Raises FileNotFoundError without records, ValueError if they are
    empty, ImportError if the extra ``report`` is not installed.
    """
    events = read_records(directory)
    if not events:
        raise ValueError(f"{FILE} in '{directory}' is empty; nothing has happened in this run yet")
    summary = Summary(events)
    try:
        figure = draw(summary)
        page = _render(summary, _svg(figure), events)
    except ImportError as error:
        raise ImportError(f"{error}; reports need: pip install 'prunus[report]'") from None
    with atomic_write(Path(directory) / "report.png") as draft:
        figure.savefig(draft, format="png", dpi=150)
    target = Path(directory) / "report.html"
    with atomic_write(target) as draft:
        draft.write_text(page, encoding="utf-8")
    return target


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _render(summary: Summary, svg: str, events: list[Event]) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    stamp = max((float(event.get("time", 0)) for event in events), default=0.0)
    day = datetime.fromtimestamp(stamp).strftime("%Y-%m-%d %H:%M") if stamp else ""
    values: dict[str, Any] = {"s": summary, "svg": svg, "day": day}
    return template.render(values)
