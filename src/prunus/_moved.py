"""Modules of version 0.1 under the names they had then."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "accelerating": "api.accelerate",
    "admm": "solvers.admm",
    "allocators.globally": "allocators.global_ranking",
    "bench_table": "cli.bench",
    "block_inputs": "engine.sequential.replay",
    "block_recording": "engine.sequential.record",
    "block_walk": "engine.sequential.walk",
    "blocks": "core.blocks",
    "catalogue": "cli.catalogue",
    "checkpoint": "api.checkpoint",
    "cli_arguments": "cli.arguments",
    "column_sweep": "solvers.column_sweep",
    "compat": "integrations.sparseml",
    "compat.sparseml": "integrations.sparseml.manager",
    "curvature": "calibration.fisher",
    "distributed": "core.ranks",
    "elimination": "solvers.obs",
    "ends": "core.default_dense_layers",
    "execution.candidates": "execution.inference.candidates",
    "execution.choice": "execution.inference.choice",
    "execution.forms": "execution.inference.forms",
    "execution.modules": "execution.inference.modules",
    "execution.semi_structured": "execution.inference.semi_structured",
    "execution.stopwatch": "execution.inference.stopwatch",
    "execution.stored": "execution.inference.stored",
    "execution.targets": "execution.inference.targets",
    "execution.zeros": "execution.inference.zeros",
    "files": "core.files",
    "finished_blocks": "engine.sequential.resume",
    "fused": "core.fused_qkv",
    "gradient_pass": "calibration.gradient_pass",
    "gradients": "calibration.example_gradients",
    "group_sweep": "solvers.column_sweep_numpy",
    "input_pass": "calibration.input_pass",
    "layers": "core.layers",
    "lazy_weights": "engine.sequential.lazy_weights",
    "linalg": "solvers.cholesky",
    "looking": "engine.allocator_signals",
    "masking": "core.masks",
    "measuring": "calibration.measurements",
    "memory": "calibration.memory_plan",
    "method": "engine.method",
    "modifiers.accelerate": "modifiers.semi_sparse",
    "modifiers.overlap": "modifiers.conflicts",
    "modifiers.param_groups": "modifiers.optimizer_groups",
    "modifiers.trained": "modifiers.nm.layer_state",
    "modifiers.trained_layers": "modifiers.nm.state",
    "modifiers.training_run": "modifiers.nm.run",
    "modifiers.watching": "modifiers.nm.eval_hook",
    "names": "core.names",
    "oneshot": "api.oneshot",
    "patterns": "core.patterns",
    "permute": "engine.permute",
    "permute.between": "engine.permute.passthrough",
    "permute.follow": "engine.permute.statistics",
    "permute.network": "engine.permute.graph",
    "permute.rules": "engine.permute.patterns",
    "permuting": "engine.permute.step",
    "preview": "cli.preview",
    "progress": "core.progress",
    "recalibration": "calibration.batch_norm",
    "records": "report.records",
    "refitting": "solvers.least_squares",
    "regexes": "core.regex_alternatives",
    "results": "api.results",
    "schedules": "modifiers.schedules",
    "selection": "core.selection",
    "semi_sparse": "execution.training",
    "sequential": "engine.sequential.prune",
    "session": "api.session",
    "shares": "engine.allocation",
    "solving": "engine.layer_solve",
    "stats.fisher": "stats.block_fisher",
    "structure": "modifiers.nm.stages",
    "swapping": "solvers.mask_swaps",
    "tally": "calibration.gradient_checks",
    "timing": "modifiers.timing",
    "training_masks": "modifiers.nm.maskings",
}
"""old name -> new name, both below ``prunus``; what lay below the old one lies below the new"""


RENAMED = {"prunus.core.ranks": {"Shards": "Ranks"}}
"""what a module of today calls what had another name in the one before it"""


def new_name(old: str) -> str | None:
    """Where a module of 0.1 is now; None if it is where it was."""
    head, tail = old, ""
    while head:
        if head in MOVED:
            return f"{MOVED[head]}{tail}"
        head, _, last = head.rpartition(".")
        tail = f".{last}{tail}"
    return None


class _Alias(Loader):
    def __init__(self, new: str) -> None:
        self.new = new

    def exec_module(self, module: ModuleType) -> None:
        moved, names = importlib.import_module(self.new), RENAMED.get(self.new, {})
        module.__getattr__ = lambda name: getattr(  # type: ignore[method-assign]
            moved, names.get(name, name)
        )


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        moved = new_name(old) if package == "prunus" else None
        if moved is None:
            return None
        new = f"prunus.{moved}"
        warnings.warn(f"{name} is now {new}", FutureWarning, stacklevel=2)
        spec = ModuleSpec(name, _Alias(new), is_package=True)
        spec.submodule_search_locations = []
        return spec


def install() -> None:
    """Let the old names be imported, with a FutureWarning each."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
