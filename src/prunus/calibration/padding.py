"""Padding in layers' inputs: left out where it is known whose tokens the rows of an input are.

Equal shapes prove nothing: there may be as many tokens in an encoder as in a decoder, as many words
as image patches. So one batch of each kind is run once more with half the tokens of one sequence.
The inputs that have half the rows then are tokens of this sequence; no others are. Models that take
one length alone are run with other padding instead: the rows that change are the padding. So are
those that flatten examples and tokens, whose rows might be in any order.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import needs_all_ranks, random_states_kept
from prunus.calibration.probes import RecordedBatch, kind_of, padding_masks, probes_of
from prunus.core.layers import Layer
from prunus.core.names import few
from prunus.core.ranks import all_ranks

log = logging.getLogger("prunus")
UNKNOWN = "unknown"

Place = tuple[Layer, int]
"""a layer, and how often it was called before in the same forward pass"""


def _axes(examples: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """The first axes of an input whose rows are tokens, by the name of its layout."""
    return {
        "examples first": (examples, tokens),
        "tokens first": (tokens, examples),
        "flat": (examples * tokens,),
        "flat, tokens first": (tokens * examples,),
    }


def _real(mask: Tensor, layout: str) -> Tensor:
    """The mask as an index of an input of this layout."""
    axes = _axes(*mask.shape)[layout]
    return (mask.T if layout.endswith("tokens first") else mask).reshape(axes)


def _is_expert(layer: Layer) -> bool:
    """Whether a layer is given tokens in an order of their own; shared experts are not."""
    in_tensor = layer.piece is not None and layer.piece.kind == "expert"
    return in_tensor or ("experts." in layer.name and "shared" not in layer.name)


@dataclass
class _Rows:
    """What is kept of an input: its shape and a number for each row."""

    shape: tuple[int, ...]
    marks: Tensor | None = None
    sizes: Tensor | None = None

    @classmethod
    def of(cls, x: Any, with_marks: bool) -> _Rows:
        if not isinstance(x, Tensor):  # a sparse tensor has no tokens
            return cls(())
        if not with_marks:
            return cls(tuple(x.shape))
        x = x.detach().double()
        weights = torch.cos(torch.arange(x.shape[-1], dtype=x.dtype, device=x.device))
        return cls(tuple(x.shape), x @ weights, x.abs().sum(-1))

    def changed(self, other: _Rows) -> Tensor:
        """Where the rows are others, but for rounding."""
        assert self.marks is not None
        assert self.sizes is not None
        assert other.marks is not None
        return (self.marks - other.marks).abs() > 1e-5 * self.sizes


@dataclass
class _Probe:
    """What layers were given in the run of a probe."""

    length: int = 0
    """tokens in its sequence"""
    rows: dict[Place, _Rows] = field(default_factory=dict)

    def layout(self, place: Place, mask: Tensor, x: Any) -> str | None:
        """How an input lies that has the tokens of the mask; None for others, or UNKNOWN."""
        if place not in self.rows:
            return UNKNOWN
        whole = self.length == mask.shape[1]
        now, then = _Rows.of(x, whole), self.rows[place]
        if not whole:
            return self._by_shape(mask, now.shape, then.shape)
        return self._by_value(mask, now, then) if now.shape == then.shape else UNKNOWN

    def _by_shape(self, mask: Tensor, now: tuple[int, ...], then: tuple[int, ...]) -> str | None:
        less = _axes(len(mask), self.length)
        for name, axes in _axes(*mask.shape).items():
            n = len(axes)
            if len(now) > n and (now[:n], then[:n]) == (axes, less[name]) and now[n:] == then[n:]:
                return name
        return None if now == then else UNKNOWN

    def _by_value(self, mask: Tensor, now: _Rows, then: _Rows) -> str | None:
        if not now.shape:
            return None
        changed, found = now.changed(then), list[str]()
        for name, axes in _axes(*mask.shape).items():
            n = len(axes)
            if len(now.shape) > n and now.shape[:n] == axes:
                rows = changed.reshape(*axes, -1).any(-1)
                if torch.equal(rows, ~_real(mask, name).to(rows.device)):
                    found.append(name)
        if len(found) == 1 or (found and len(mask) == 1):  # of one example all orders are the same
            return found[0]
        return UNKNOWN if bool(changed.any()) else None


class Padding:
    """Says which rows of the layers' inputs are real tokens, batch by batch."""

    def __init__(self, model: nn.Module, told: set[str]) -> None:
        self.model, self.told = model, told
        self.kinds: dict[Any, dict[str, dict[Place, str | None]]] = {}
        """layouts of inputs, by mask, of the kinds of batches"""
        self.layouts: dict[str, dict[Place, str | None]] = {}
        self.probes: dict[str, list[_Probe]] = {}
        self.masks: dict[str, Tensor] = {}
        self.calls: Counter[Layer] = Counter()
        self.watched: _Probe | None = None
        self.whole = False  # whether the probe has the batch's own length
        self.kept: dict[str, None] = {}

    @property
    def watching(self) -> bool:
        """Whether a probe is run, of which nothing is measured."""
        return self.watched is not None

    def begin(self, batch: Any, run: Callable[[Any], Any]) -> None:
        """Tell of the batch that is run next; `run` is called with probes before, if need be."""
        self.masks, kind = padding_masks(batch), kind_of(batch)
        self.told = batch.told if isinstance(batch, RecordedBatch) else self.told
        first = kind not in self.kinds
        self.layouts = self.kinds.setdefault(kind, {key: {} for key in self.masks})
        probes = probes_of(batch, self.model) if first and self.masks else {}
        if all_ranks().group is not None and needs_all_ranks(self.model):
            self.probes = self._watch_in_common(batch, probes, run)
        else:
            self.probes = {key: self._watch_all(key, each, run) for key, each in probes.items()}
        self.watched = None
        self.calls.clear()

    def _watch_all(self, key: str, probes: list[Any], run: Callable[[Any], Any]) -> list[_Probe]:
        """The first shorter probe that runs to its end, or what came furthest.

        And the one with other padding, where that has to show in which order rows are.
        """
        examples, tokens = self.masks[key].shape
        best, ended = _Probe(), False
        for probe in (probe for probe in probes if probe[key].shape[1] < tokens):
            seen, ended = self._watch(key, probe, run)
            best = seen if len(seen.rows) > len(best.rows) else best
            if ended:
                break
        flat = any(rows.shape[:1] == (examples * best.length,) for rows in best.rows.values())
        if ended and not flat:
            return [best]
        others = [probe for probe in probes if probe[key].shape[1] == tokens]
        seen = self._watch(key, others[0], run)[0] if others else _Probe()
        return [seen] if len(seen.rows) > len(best.rows) else [best, seen]

    def _watch(self, key: str, probe: Any, run: Callable[[Any], Any]) -> tuple[_Probe, bool]:
        """What a probe shows, and whether it ran to its end."""
        seen = self._open(key, probe)
        with random_states_kept():
            try:
                run(probe)
            except Exception as error:
                # a loss may not take the shorter output; layers that were not reached keep padding
                log.debug("a batch with other tokens was not run to its end: %s", error)
                return seen, False
        return seen, True

    def _open(self, key: str, probe: Any) -> _Probe:
        length = probe[key].shape[1]
        self.watched, self.whole = _Probe(length), length == self.masks[key].shape[1]
        self.calls.clear()
        return self.watched

    def _watch_in_common(
        self, batch: Any, probes: dict[str, list[Any]], run: Callable[[Any], Any]
    ) -> dict[str, list[_Probe]]:
        """As often on every rank, where a forward pass needs all ranks, and none may fail."""
        ranks, due, found = all_ranks(), list(probes), {}
        counts = torch.zeros(ranks.world_size, dtype=torch.int64)
        counts[ranks.rank] = len(due)
        for i in range(int(ranks.all_reduce(counts).max())):
            probe, self.watched = batch, _Probe()  # another rank has one
            if i < len(due):
                probe = probes[due[i]][-1]  # of the same length, which all models take
                found[due[i]] = [self._open(due[i], probe)]
            with random_states_kept():
                run(probe)
        return found

    def real(self, layer: Layer, x: Any) -> Tensor | None:
        """An index of the real tokens in a layer's input; None for all. To be called once each."""
        place = layer, self.calls[layer]
        self.calls[layer] += 1
        if self.watched is not None:
            self.watched.rows[place] = _Rows.of(x, self.whole)
            return None
        layouts = {key: self._layout(key, mask, place, x) for key, mask in self.masks.items()}
        for key, layout in layouts.items():
            mask = self.masks[key]
            axes = _axes(*mask.shape).get(layout or "")
            if axes is not None and tuple(x.shape[: len(axes)]) == axes:
                return _real(mask, str(layout)).to(x.device)
        if any(layout is not None for layout in layouts.values()):
            self.kept[re.sub(r"\d+", "*", layer.name)] = None
        return None

    def _layout(self, key: str, mask: Tensor, place: Place, x: Any) -> str | None:
        layouts = self.layouts[key]
        if key in self.probes:
            first, *others = self.probes[key]
            layouts[place] = first.layout(place, mask, x)
            if (layouts[place] or "").startswith("flat"):
                # as many rows may be tokens in another order, which experts have anew in each batch
                values = [first, *others][-1].layout(place, mask, x)
                in_order = values in ("flat", "flat, tokens first") and not _is_expert(place[0])
                layouts[place] = values if in_order else UNKNOWN
        return layouts.get(place, UNKNOWN)

    def tell(self) -> None:
        """One line about the layers of which padding was not left out, if that was not said yet."""
        names = [name for name in self.kept if name not in self.told]
        self.told.update(names)
        if names:
            log.warning(
                "padding counts in the statistics of %s: it is not known which rows of their "
                "inputs are tokens of which attention_mask",
                few(names),
            )
