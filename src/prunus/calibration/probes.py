"""Batches in which one sequence is another, to see whose tokens the rows of an input are."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.core.wrappers import unwrap

MASK = "attention_mask"
DECODER, ENCODER = "decoder_", "encoder_"
TOKENS = ("input_ids", "inputs_embeds", "inputs", "input_values", "input_features", "hidden_states")
BESIDE = (
    *("token_type_ids", "mm_token_type_ids", "position_ids", "segment_ids", "special_tokens_mask"),
    *("global_attention_mask", "bbox", "langs", "labels", "xpath_tags_seq", "xpath_subs_seq"),
)
"""what is given for each token, beside the tokens"""


class RecordedBatch(Mapping[str, Any]):
    """A batch of what a part of a model is given, in place of the whole model's batch."""

    told: set[str]
    """what was said in the log before, of other parts of the model"""

    @abstractmethod
    def probes(self) -> Mapping[str, Sequence[Any]]:
        """What the part is given for the probes of the whole model's batch, by mask."""


def padding_masks(batch: Any) -> dict[str, Tensor]:
    """(examples, tokens) True where tokens are real, by key; of masks that call some padding."""
    masks = {key: batch[key] for key in _mask_keys(batch)} if isinstance(batch, Mapping) else {}
    return {key: m.bool() for key, m in masks.items() if m.shape[1] > 1 and not bool(m.all())}


def kind_of(batch: Any) -> tuple[Any, ...]:
    """What batches have in common that are fed through a model in the same way.

    A single example may be fed otherwise than several, and flags say how.
    """
    items = batch.items() if isinstance(batch, Mapping) else ()
    flags = [(str(key), repr(x) if isinstance(x, bool | int | str) else "") for key, x in items]
    padded = [(key, len(mask) == 1) for key, mask in padding_masks(batch).items()]
    return tuple(sorted(flags)), tuple(sorted(padded))


def probes_of(batch: Any, model: nn.Module) -> dict[str, list[Any]]:
    """For each mask with padding, batches in which its sequence alone is another, the best first.

    It has half the tokens; one token less, for models that do not take the half, as where all
    tokens of an image must be there; other padding, for models that take one length alone. None if
    it is not known which tensors are the sequence.
    """
    if isinstance(batch, RecordedBatch):
        return {key: [*probes] for key, probes in batch.probes().items()}
    decodes = bool(getattr(getattr(unwrap(model), "config", None), "is_encoder_decoder", False))
    found = {}
    for key, mask in padding_masks(batch).items():
        if names := _sequence(batch, key, decodes):
            lengths = dict.fromkeys((mask.shape[1] // 2, mask.shape[1] - 1))
            found[key] = [_changed(batch, names, lambda x, n=n: x[:, :n]) for n in lengths]
            tokens = [k for k in names if k != key and k not in BESIDE]
            found[key].append(_changed(batch, tokens, lambda x, mask=mask: _repadded(x, mask)))
            given = {"labels", *(f"{DECODER}{name}" for name in TOKENS)} & set(batch)
            if key == MASK and decodes and not given and "input_ids" in batch:
                for probe in found[key]:
                    probe[f"{DECODER}input_ids"] = batch["input_ids"]  # BART decodes it, shifted
    return found


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
    if set(TOKENS) & set(batch):
        return [key, *beside, *(k for k in own if k in TOKENS)]
    unnamed = [k for k in own if k not in (key, "labels", *beside)]
    return [key, *beside, *unnamed] if len(unnamed) == 1 else []


def _changed(batch: Mapping[str, Any], names: Sequence[str], change: Callable[..., Any]) -> Any:
    changed = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
    for name in names:
        changed[name] = change(batch[name])
    return changed


def _repadded(x: Tensor, mask: Tensor) -> Tensor:
    """The tokens with others in place of padding: real ones of the batch, if they are numbers."""
    real = mask.to(x.device)
    if not x.is_floating_point():
        if not bool(real.any()):
            return x
        first, second = x[real].min(), x[real].max()
        return torch.where(real, x, torch.where(x == first, second, first))
    wave = torch.cos(torch.arange(x.numel(), device=x.device)).view_as(x).to(x.dtype)
    real = real.view(*mask.shape, *[1] * (x.dim() - 2))
    return torch.where(real, x, x + wave * (1 + x.abs().mean()))
