"""Padding in layers' inputs: left out where it is known whose tokens the rows of an input are.

Equal shapes prove nothing: there may be as many tokens in an encoder as in a decoder, as many words
as image patches. So one batch of each kind is run once more with half the tokens of one sequence.
The inputs that have half the rows then are tokens of this sequence; no others are.
"""

from __future__ import annotations

import copy
import logging
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import needs_all_ranks, random_states_kept
from prunus.core.layers import Layer, unwrap
from prunus.core.names import few
from prunus.core.ranks import all_ranks

log = logging.getLogger("prunus")
MASK = "attention_mask"
DECODER, ENCODER = "decoder_", "encoder_"
TOKENS = ("input_ids", "inputs_embeds", "inputs", "input_values", "input_features", "hidden_states")
BESIDE = (
    *("token_type_ids", "mm_token_type_ids", "position_ids", "segment_ids", "special_tokens_mask"),
    *("global_attention_mask", "bbox", "langs", "labels", "xpath_tags_seq", "xpath_subs_seq"),
)
"""what is given for each token, beside the tokens"""

Place = tuple[Layer, int]
"""a layer, and how often it was called before in the same forward pass"""
Shape = tuple[int, ...]


class RecordedBatch(Mapping[str, Any]):
    """A batch of what a part of a model is given, in place of the whole model's batch."""

    told: set[str]
    """what was said in the log before, of other parts of the model"""

    @abstractmethod
    def shorter(self) -> Mapping[str, Sequence[Any]]:
        """What the part is given for the batches of `shorter_batches`, by mask."""


def padding_masks(batch: Any) -> dict[str, Tensor]:
    """(examples, tokens) True where tokens are real, by key; of masks that call some padding."""
    masks = {key: batch[key] for key in _mask_keys(batch)} if isinstance(batch, Mapping) else {}
    return {key: m.bool() for key, m in masks.items() if m.shape[1] > 1 and not bool(m.all())}


def _mask_keys(batch: Mapping[str, Any]) -> list[str]:
    """Keys of padding masks: others that are called so have no tokens of their own."""
    found = []
    for key, value in batch.items():
        if isinstance(key, str) and MASK in key and isinstance(value, Tensor) and value.dim() == 2:
            before, after = _affixes(key)
            own = any(f"{before}{name}{after}" in batch for name in TOKENS)
            if own or (before, after) in (("", ""), (DECODER, "")):
                found.append(key)
    return found


def _affixes(key: str) -> tuple[str, str]:
    before, _, after = key.partition(MASK)
    return before, after


def kind_of(batch: Any) -> tuple[Any, ...]:
    """What batches have in common that are fed through a model in the same way."""
    names = tuple(sorted(map(str, batch))) if isinstance(batch, Mapping) else ()
    return names, tuple(sorted(padding_masks(batch)))


def shorter_batches(batch: Any, model: nn.Module) -> dict[str, list[Any]]:
    """For each mask with padding, the batch with half the tokens of its sequence.

    And with one token less, for models that do not take the half, as where all tokens of an image
    must be there. A mask is left out if it is not known of which tensors it is.
    """
    if isinstance(batch, RecordedBatch):
        return {key: [*cuts] for key, cuts in batch.shorter().items()}
    decodes = bool(getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False))
    found = {}
    for key, mask in padding_masks(batch).items():
        if names := _sequence(batch, key, decodes):
            lengths = dict.fromkeys((mask.shape[1] // 2, mask.shape[1] - 1))
            found[key] = [_cut(batch, names, length) for length in lengths]
            given = {"labels", *(f"{DECODER}{name}" for name in TOKENS)} & set(batch)
            if key == MASK and decodes and not given and "input_ids" in batch:
                for cut in found[key]:
                    cut[f"{DECODER}input_ids"] = batch["input_ids"]  # which BART decodes, shifted
    return found


def _cut(batch: Mapping[str, Any], names: Sequence[str], length: int) -> Any:
    cut = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
    for name in names:
        cut[name] = batch[name][:, :length]
    return cut


def _sequence(batch: Mapping[str, Any], key: str, decodes: bool) -> list[str]:
    """Keys of the tensors that run along the tokens of a mask; none if that is not clear."""
    before, after = _affixes(key)
    shape = batch[key].shape
    long = [k for k, x in batch.items() if isinstance(x, Tensor) and x.shape[:2] == shape]
    own = [k for k in long if k.startswith(before) and k.endswith(after)]
    if before or after:
        return own + [k for k in long if k == "labels" and before == DECODER]
    others = [_affixes(k) for k in _mask_keys(batch) if k != key] + [(DECODER, ""), (ENCODER, "")]
    own = [k for k in own if not any(k.startswith(b) and k.endswith(a) for b, a in others)]
    beside = [k for k in own if k in BESIDE and not (k == "labels" and decodes)]
    tokens = [k for k in own if k in TOKENS]
    unnamed = [k for k in own if k not in (key, "labels", *beside, *tokens)]
    if not tokens and len(unnamed) != 1 and not set(TOKENS) & set(batch):
        return []
    return [key, *beside, *(tokens or ([] if set(TOKENS) & set(batch) else unnamed))]


def _layouts(examples: int, tokens: int) -> dict[str, Shape]:
    """The first axes of an input whose rows are tokens."""
    return {
        "examples first": (examples, tokens),
        "tokens first": (tokens, examples),
        "flat": (examples * tokens,),
    }


def _layout(mask: Shape, full: Shape, length: int, cut: Shape) -> str | None:
    """How an input lies whose tokens get as few: None if none do, "unknown" if it only changes."""
    examples, tokens = mask
    after = _layouts(examples, length)
    for name, axes in _layouts(examples, tokens).items():
        n = len(axes)
        heads = full[:n] == axes and cut[:n] == after[name]
        if heads and len(full) > n and full[n:] == cut[n:]:
            return name
    return None if full == cut else "unknown"


@dataclass
class _Sequence:
    """Where the tokens of a mask go."""

    length: int = 0
    """of the shorter batch"""
    cut: dict[Place, Shape] = field(default_factory=dict)
    """shapes of inputs for the shorter batch"""
    layouts: dict[Place, str | None] = field(default_factory=dict)

    def decide(self, place: Place, mask: Shape, full: Shape) -> None:
        cut = self.cut.get(place)
        layout = "unknown" if cut is None else _layout(mask, full, self.length, cut)
        # (tokens * examples) looks the same, and is likely where tokens come first
        if layout == "flat" and mask[0] > 1 and "tokens first" in self.layouts.values():
            layout = "unknown"
        self.layouts[place] = layout


class Padding:
    """Says which rows of the layers' inputs are real tokens, batch by batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kinds: dict[tuple[Any, ...], dict[str, _Sequence]] = {}
        self.sequences: dict[str, _Sequence] = {}
        self.masks: dict[str, Tensor] = {}
        self.calls: Counter[Layer] = Counter()
        self.first = False  # whether the batch is the first one of its kind
        self.watched: dict[Place, Shape] | None = None
        self.kept: dict[str, None] = {}
        self.told: set[str] = set()

    @property
    def watching(self) -> bool:
        """Whether a shorter batch is run, of which nothing is measured."""
        return self.watched is not None

    def begin(self, batch: Any, run: Callable[[Any], Any]) -> None:
        """Tell of the batch that is run next; `run` is called with others before, if need be."""
        self.masks, kind = padding_masks(batch), kind_of(batch)
        self.told = batch.told if isinstance(batch, RecordedBatch) else self.told
        self.first = kind not in self.kinds
        self.sequences = self.kinds.setdefault(kind, {key: _Sequence() for key in self.masks})
        if needs_all_ranks(self.model):
            self._watch_in_common(batch, run)
        elif self.first:
            for key, cuts in shorter_batches(batch, self.model).items():
                for cut in cuts:
                    if self._watch(key, cut, run):
                        break
        self.watched = None
        self.calls.clear()

    def _watch(self, key: str, cut: Any, run: Callable[[Any], Any]) -> bool:
        """Run a shorter batch; whether to its end."""
        self.sequences[key].length, self.sequences[key].cut = cut[key].shape[1], {}
        self.watched = self.sequences[key].cut
        self.calls.clear()
        with random_states_kept():
            try:
                run(cut)
            except Exception as error:
                # a loss may not take the shorter output; layers that were not reached keep padding
                log.debug("a batch with fewer tokens was not run to its end: %s", error)
                return False
        return True

    def _watch_in_common(self, batch: Any, run: Callable[[Any], Any]) -> None:
        """As often on every rank, where a forward pass needs all ranks; none may fail."""
        cuts = shorter_batches(batch, self.model) if self.first else {}
        ranks, due = all_ranks(), [(key, few_less[-1]) for key, few_less in cuts.items()]
        counts = torch.zeros(ranks.world_size, dtype=torch.int64)
        counts[ranks.rank] = len(due)
        for i in range(int(ranks.all_reduce(counts).max())):
            key, cut = due[i] if i < len(due) else (None, batch)
            self.watched = {}
            if key is not None:
                self.sequences[key].length = cut[key].shape[1]
                self.watched = self.sequences[key].cut
            self.calls.clear()
            with random_states_kept():
                run(cut)

    def real(self, layer: Layer, x: Any) -> Tensor | None:
        """An index of the real tokens in a layer's input; None for all. To be called once each."""
        place, shape = (layer, self.calls[layer]), tuple(x.shape) if isinstance(x, Tensor) else ()
        self.calls[layer] += 1
        if self.watched is not None:
            self.watched[place] = shape
            return None
        for key, mask in self.masks.items():
            sequence, size = self.sequences[key], tuple(mask.shape)
            if self.first:
                sequence.decide(place, size, shape)
            layout = sequence.layouts.get(place, "unknown")
            axes = _layouts(*size).get(layout or "")
            if axes is not None and shape[: len(axes)] == axes:
                mask = mask.T if layout == "tokens first" else mask
                return mask.reshape(axes).to(x.device)
            if layout is not None:
                self.kept[re.sub(r"\d+", "*", layer.name)] = None
        return None

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
