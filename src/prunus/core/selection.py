"""Choosing by name: globs, ``re:`` regexes and class names, with include and exclude."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from prunus.core.default_dense_layers import dense_line, left_dense
from prunus.core.fused_qkv import split_third, subtract, third_of
from prunus.core.layers import Layer, all_layers
from prunus.core.names import nearest
from prunus.core.regex_alternatives import dead_alternatives
from prunus.core.ties import not_writable, refuse_overlaps, tied_names
from prunus.core.transformed import is_transformed
from prunus.core.unseen import unseen_weights
from prunus.core.wrappers import clean_name, unwrap

log = logging.getLogger("prunus")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
T = TypeVar("T")


@dataclass(frozen=True)
class Selection:
    """The layers chosen, and those that the default spares."""

    layers: list[Layer]
    spared: dict[str, str] = field(default_factory=dict)
    """name -> why it is left dense"""
    by_default: bool = False
    """whether nobody named the layers"""

    @property
    def left_dense(self) -> list[str]:
        return list(self.spared)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        regex = pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern)
        return re.compile(regex)
    except re.error as error:
        raise ValueError(f"pattern '{pattern}' is not a regular expression: {error}") from None


def _hits(items: Sequence[T], names: Callable[[T], Sequence[str]], pattern: str) -> list[int]:
    regex = _compile(pattern)
    hits = [i for i, item in enumerate(items) if any(map(regex.fullmatch, names(item)))]
    if not hits and _NUMBERED.search(pattern) and not pattern.startswith("re:"):
        # experts.up[3] is a name, unless something is called experts.up3
        return _hits(items, names, _NUMBERED.sub(r"[[]\1]", pattern))
    return hits


_NUMBERED = re.compile(r"(?<!\[)\[(\d+)\]")


def match_names(
    items: Sequence[T], names: Callable[[T], Sequence[str]], patterns: Sequence[str], what: str
) -> list[T]:
    """The items one of whose names matches one of the patterns, in their own order.

    Raises ValueError for a pattern without a match, listing the nearest names; an alternative of
    a regex that matches nothing is a warning in the log.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    chosen: set[int] = set()
    for pattern in patterns:
        hits = _hits(items, names, pattern)
        if not hits:
            near = _near(items, names, pattern)
            raise ValueError(f"{what} pattern '{_as_written(pattern)}' matches nothing{near}")
        if pattern.startswith("re:"):
            _warn_of_dead_alternatives([n for i in hits for n in names(items[i])], pattern)
        chosen.update(hits)
    return [item for i, item in enumerate(items) if i in chosen]


_ADDED = re.compile(r"(\.\*)?\(\?<=weight\)")
"""what reading a recipe of SparseML's adds to a regex, which there matches beginnings of names"""


def _as_written(pattern: str) -> str:
    return _ADDED.sub("", pattern)


def _warn_of_dead_alternatives(names: Sequence[str], pattern: str) -> None:
    for part in dead_alternatives(pattern[3:], list(names)):
        written = _as_written(part), _as_written(pattern)
        log.warning("alternative '%s' of pattern '%s' matches nothing", *written)


_ANY = re.compile(r"(\\d|\[0-9\]|\.)[+*]\??|\\d(\{[\d,]*\})?")
"""what stands for any number, or for anything, in regexes"""


def _near(items: Sequence[T], names: Callable[[T], Sequence[str]], pattern: str) -> str:
    word = pattern
    if pattern.startswith("re:"):
        word = re.sub(r"[\\^$]", "", _ANY.sub("*", pattern[3:]))
    # the name itself, and classes, which have no dots
    every = [names(item) for item in items]
    known = dict.fromkeys([n[0] for n in every] + [x for n in every for x in n if "." not in x])
    near = nearest(word, known, most=5, cutoff=0.3, globs=True)
    near = near or list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in known))[:5]
    return f"; nearest: {', '.join(near)}" if near else "; the model has no such weights at all"


def _layer_names(layer: Layer) -> list[str]:
    classes = [c.__name__ for c in type(layer.module).__mro__ if issubclass(c, nn.Module)]
    return [layer.name, layer.parameter_name, *classes[:-1]]


def _match(
    layers: Sequence[Layer], patterns: Sequence[str], what: str, modules: dict[str, nn.Module]
) -> list[Layer]:
    """The layers, and thirds of layers, that patterns name, in the order of the model.

    Raises ValueError where one is named both whole and in part.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    thirds = [p for p in patterns if split_third(p)[1] and not _hits(layers, _layer_names, p)]
    whole = [p for p in patterns if p not in thirds]
    chosen = match_names(layers, _layer_names, whole, what)
    for pattern in thirds:
        base, letter = split_third(pattern)
        for layer in match_names(layers, _layer_names, [base], what):
            if layer in chosen:
                raise ValueError(f"{layer.name} is named whole and, by '{pattern}', in part")
            part = third_of(layer, letter, modules)
            chosen += [] if part.name in {c.name for c in chosen} else [part]
    places = {id(layer.weight): i for i, layer in enumerate(layers)}
    return sorted(chosen, key=lambda layer: (places[id(layer.weight)], layer.part_key or 0))


def _refuse_second_name(model: nn.Module, pattern: str) -> None:
    """Raises ValueError for a pattern that names tied or empty weights, and no layer."""
    tied = list(tied_names(model).items())
    for i in _hits(tied, lambda pair: [pair[0], pair[0].removesuffix(".weight")], pattern):
        other, first = tied[i]
        if first:
            raise ValueError(
                f"layer pattern {pattern!r} names {other}, which is tied to {first}: one weight, "
                "known by its first name; write that"
            )
        raise ValueError(f"layer pattern {pattern!r} names {other}, which has no entries to prune")


def _refuse_unseen(model: nn.Module, layers: Sequence[Layer], patterns: Sequence[str]) -> None:
    """Raises ValueError for a pattern that names only weights which are no layers."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if _hits(layers, _layer_names, split_third(pattern)[0]):
            continue
        _refuse_second_name(model, pattern)
        unseen = unseen_weights(model)
        hits = [
            unseen[i]
            for i in _hits(unseen, lambda x: [x.name, x.name.rpartition(".")[0], x.kind], pattern)
        ]
        if hits:
            raise ValueError(
                f"layer pattern '{pattern}' names {hits[0].name} ({hits[0].kind}), which prunus "
                "does not know as a weight that inputs are multiplied with, and leaves dense; drop "
                "the pattern, or make it the weight of a Linear"
            )


def _check(layer: Layer, tried: bool) -> None:
    """Raises ValueError for a weight that cannot be pruned; some were ``tried`` before."""
    weight, why = layer.weight, ""
    if nn.parameter.is_lazy(weight):
        why = "has no shape yet; run a batch through the model first"
    elif not isinstance(weight, nn.Parameter):
        why = (
            "is computed, not stored (is it parametrized, pruned by torch.nn.utils, or accelerated "
            "by prunus?); remove or restore that first, or exclude it"
        )
    elif not_writable(weight):
        why = not_writable(weight)
    elif weight.dtype not in FLOATS:
        why = f"is {weight.dtype}; only floats of 16 bits or more can be pruned; exclude it"
    elif not tried and is_transformed(layer):
        kind = type(layer.module).__name__
        why = f"is transformed by {kind} before use, so zeros in it would be none; exclude it"
    if why:
        raise ValueError(f"{layer.parameter_name} {why}")


def select(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    run: Callable[[], object] | None = None,
) -> Selection:
    """The layers of a model by name, parameter name or class name.

    A pattern is a glob (``*`` crosses dots), a class name (``Linear``) or ``re:`` and a regular
    expression for the whole name. ``attn.qkv[q]`` is a third of a fused weight (unless a layer is
    called so by the rules of globs). Default: every Linear, convolution, recurrent weight and
    expert but those that `left_dense` spares, for which ``run`` may make a forward pass of the
    model.

    Raises ValueError for a pattern that matches nothing, for a chosen weight that cannot be pruned,
    and when no layer is left.
    """
    candidates = list(all_layers(model))
    if not candidates:
        quantized = any(".quantized" in type(m).__module__ for m in model.modules())
        hint = "; its layers are quantized by torch: prune first, quantize then"
        raise ValueError(
            f"{type(model).__name__} has no Linear or convolution to prune{hint * quantized}"
        )
    modules = {clean_name(name): module for name, module in unwrap(model).named_modules()}
    spared: dict[str, str] = {}
    layers = candidates
    if include is not None:
        _refuse_unseen(model, candidates, include)
        layers = _match(candidates, include, "layer", modules)
    else:
        spared = left_dense(model, candidates, run)
        layers = [layer for layer in candidates if layer.name not in spared]
        if spared:
            log.info("%s", dense_line(spared))
    if exclude:
        gone = _match(candidates, exclude, "exclude", modules)
        layers = [rest for layer in layers for rest in subtract(layer, gone, modules)]
    if not layers:
        names = ", ".join(layer.name for layer in candidates[:5])
        why = f" ({dense_line(spared)})" if spared else ""
        raise ValueError(
            f"no layer is left to prune{why}; name some with layers=, such as: {names}"
        )
    for layer in layers:
        _check(layer, tried=include is None)
    refuse_overlaps(model, layers)
    return Selection(layers, spared, include is None)


def select_parameters(
    parameters: dict[str, nn.Parameter], include: Sequence[str], exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Parameters by clean name, glob or ``re:``. Raises ValueError as `select` does."""
    items = list(parameters)
    chosen = match_names(items, lambda name: [name], include, "parameter")
    if exclude:
        gone = set(match_names(items, lambda name: [name], exclude, "exclude"))
        chosen = [name for name in chosen if name not in gone]
    return {name: parameters[name] for name in chosen}
