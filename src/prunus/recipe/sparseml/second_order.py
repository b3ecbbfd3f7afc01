"""The pruners that measure a Fisher matrix, with SparseML's and CAP's defaults."""

from __future__ import annotations

from typing import Any

from prunus.core.patterns import NM, Pattern
from prunus.pruners import CAP, OBS, FastCAP, Pruner
from prunus.recipe.sparseml.parts import Situation, build
from prunus.recipe.sparseml.settings import Settings

BLOCK_SIZES = {"cap": 50, "sparseml": 1}
"""``fisher_block_size`` where the file names none"""


def obs(settings: Settings, situation: Situation, pattern: Pattern) -> Pruner:
    pruner: Pruner = build(OBS, settings, **_shared(settings, situation, pattern))
    return pruner


def cap(settings: Settings, situation: Situation, pattern: Pattern) -> Pruner:
    pruner: Pruner = build(CAP, settings, **_shared(settings, situation, pattern))
    return pruner


def fast_cap(settings: Settings, situation: Situation, pattern: Pattern) -> Pruner:
    situation.ignore(settings, "block_size")
    pruner: Pruner = build(FastCAP, settings, **_sampled(settings, situation, pattern))
    return pruner


def _shared(settings: Settings, situation: Situation, pattern: Pattern) -> dict[str, Any]:
    count = settings.integer("num_recomputations", 1)
    ramp = settings.choice("recomputation_inter_func", "linear", ("linear", "cubic"))
    stages = {"num_recomputations": count, "ramp": ramp} if count != 1 else {}
    return {**_sampled(settings, situation, pattern), **stages}


def _sampled(settings: Settings, situation: Situation, pattern: Pattern) -> dict[str, Any]:
    for key, value in settings.mapping("grad_sampler_kwargs").items():
        if situation.sampler.setdefault(key, value) != value:
            message = f"{key}={situation.sampler[key]!r} of an earlier modifier counts for all"
            situation.note(settings, f"grad_sampler_kwargs: {message}")
        else:
            message = f"{key}={value!r} is for the manager's sampler; a Calibration brings its own"
            situation.note(settings, f"grad_sampler_kwargs: {message}", harmless=True)
    situation.ignore(settings, "traces_backup_dir", "blocks_in_parallel", "block_implementation")
    return {
        "block_size": _block_size(settings, situation, pattern),
        "num_grads": settings.integer("num_grads", 1024),
        "damp": settings.number("damp", 1e-7),
        "device": settings.text("fisher_inv_device", None),
    }


def _block_size(settings: Settings, situation: Situation, pattern: Pattern) -> int:
    """A multiple of what the pattern keeps together."""
    default = BLOCK_SIZES[situation.dialect]
    size: int = settings.integer("fisher_block_size", default)
    group = pattern.m if isinstance(pattern, NM) else getattr(pattern, "cols", 1)
    whole = max(group, size // group * group)
    if size > 0 and whole != size:
        message = f"so that the groups of pattern '{pattern}' stay whole"
        situation.note(settings, f"fisher_block_size {size} is read as {whole}, {message}", True)
        return whole
    return size
