"""What runs record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunus.method import LayerRow


def layers_event(
    pruner: str, pattern: str, rows: Sequence[LayerRow], step: int, target: float | None
) -> dict[str, Any]:
    """What records and reports know of layers at one step; ``pruner`` and ``pattern`` say why."""
    zeros, size = sum(row.zeros for row in rows), sum(row.size for row in rows)
    return {
        "event": "prune",
        "step": step,
        "pruner": pruner,
        "pattern": pattern,
        "target": target,
        "sparsity": zeros / max(1, size),
        "layers": {row.name: row.sparsity for row in rows},
        "sizes": {row.name: row.size for row in rows},
        "saved": {row.name: row.saved for row in rows},
    }
