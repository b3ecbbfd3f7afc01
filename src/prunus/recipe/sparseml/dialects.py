"""Which of the two dialects a file is written in."""

from __future__ import annotations

from collections.abc import Sequence

from prunus.recipe.sparseml.document import Entry
from prunus.recipe.sparseml.parts import CAP, SPARSEML

TAGS = {"CAPruningModifier", "FastCAPruningModifier", "GWProdPruningModifier"}
KEYS = {
    "blocks_in_parallel",
    "block_implementation",
    "cycle_mul",
    "decay_epochs",
    "decay_rate",
    "fisher_inv_device",
    "recomputation_inter_func",
    "traces_backup_dir",
    "warmup",
}
GLOBAL = {"GlobalMagnitudePruningModifier", "MagnitudePruningModifier"}


def dialect_of(entries: Sequence[Entry]) -> str:
    """CAP's if there is a modifier or a setting that only CAP has, else SparseML's."""
    return CAP if any(map(_only_caps, entries)) else SPARSEML


def _only_caps(entry: Entry) -> bool:
    ratio = entry.settings.get("mask_type")
    return (
        entry.tag in TAGS
        or not KEYS.isdisjoint(entry.settings)
        or (entry.tag in GLOBAL and "global_sparsity" in entry.settings)
        or (entry.tag == "OBSPruningModifier" and isinstance(ratio, str) and ":" in ratio)
    )
