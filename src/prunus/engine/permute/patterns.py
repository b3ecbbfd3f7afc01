"""Which structures are known: by the names of layers within one parent, and by shapes.

To teach a new one, add a row to `RULES` (and its layers' names to `residual.READERS` and
`residual.WRITERS`). Names can deceive, so `verify` a fold before it is trusted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from prunus.core.layers import Layer
from prunus.engine.permute.attention import attention
from prunus.engine.permute.folds import Fold, FoldError, FoldPlan, Slot
from prunus.engine.permute.gather import gather_folds, sharing
from prunus.engine.permute.graph import Network, join, memory, straight
from prunus.engine.permute.passthrough import passes, writer_of_run
from prunus.engine.permute.residual import residual_folds

Shared = Literal["leave", "residual", "gather"]


@dataclass(frozen=True)
class Rule:
    """A reader and what writes its input, all by their names below one parent."""

    kind: Literal["mlp", "attention"]
    reader: str
    writers: tuple[str, ...]


# the first row of which all names are there counts
RULES = (
    Rule("mlp", "down_proj", ("up_proj", "gate_proj")),  # Llama, Qwen, Mistral, Gemma
    Rule("mlp", "down_proj", ("gate_up_proj",)),  # Phi-3: gate rows, then up rows
    Rule("mlp", "down_proj", ("up_proj",)),
    Rule("mlp", "fc2", ("fc1_g", "fc1_x")),  # SwiGLU of timm
    Rule("mlp", "fc2", ("fc1",)),  # timm, OPT, CLIP, ViT; twice as many rows in GluMlp
    Rule("mlp", "c_proj", ("c_fc",)),  # GPT-2
    Rule("mlp", "output.dense", ("intermediate.dense",)),  # BERT
    Rule("mlp", "w2", ("w1", "w3")),
    Rule("attention", "o_proj", ("v_proj",)),  # Llama, Qwen, Mistral, Gemma, ViT
    Rule("attention", "o_proj", ("qkv_proj",)),  # Phi-3
    Rule("attention", "out_proj", ("v_proj",)),  # OPT, CLIP
    Rule("attention", "out_proj", ("in_proj_weight",)),  # torch's MultiheadAttention
    Rule("attention", "proj", ("qkv",)),  # timm
    Rule("attention", "proj", ("v_proj",)),  # timm, unfused
    Rule("attention", "c_proj", ("c_attn",)),  # GPT-2
    Rule("attention", "output.dense", ("self.value",)),  # BERT
    Rule("attention", "output.dense", ("attention.value",)),  # ViT before transformers 5
)


def _chain(
    net: Network, layer: Layer, writers: Sequence[str], between: Sequence[str]
) -> tuple[Tensor, list[Slot]]:
    """Positions and slots of a reader whose input channels are what its writers' rows become.

    One writer with twice as many rows is taken as two halves that are multiplied.
    """
    width, spatial = layer.channels(), layer.weight.dim() > 2
    positions = straight(1, 1, width)
    slots = [net.reads(layer, positions)]
    for name in writers:
        rows = net.rows(name)
        if rows != width and (rows != 2 * width or len(writers) > 1):
            raise FoldError(f"{name} has {rows} outputs where {width} are read")
        slots += net.writes(name, straight(1, rows // width, width), rows)
    for name in between:
        slots += passes(net, name, positions, width, spatial)
    return positions, slots


def _chain_fold(
    net: Network, layer: Layer, parent: str, writers: Sequence[str], between: Sequence[str]
) -> Fold:
    """``writers`` by their names below `parent`, ``between`` by their whole ones."""
    full = [join(parent, writer) for writer in writers]
    positions, slots = _chain(net, layer, full, between)
    kind = "convolution" if layer.weight.dim() > 2 else "mlp"
    return net.fold(f"{layer.name} <- {', '.join(writers)}", kind, (layer,), positions, slots)


def _by_table(net: Network, layer: Layer) -> Fold | None:
    for rule in RULES:
        parent = net.parent_of(layer.name, rule.reader)
        if parent is None or not all(net.has(parent, writer) for writer in rule.writers):
            continue
        inner = net.registered_between(parent, rule.writers, rule.reader)
        if rule.kind == "attention":
            return attention(net, layer, parent, rule.writers[0], inner)
        return _chain_fold(net, layer, parent, rule.writers, [*inner.values()])
    return None


def _by_number(net: Network, layer: Layer) -> Fold | None:
    """``conv3 <- conv2`` and the like, with the normalization registered between them."""
    parent, _, last = layer.name.rpartition(".")
    match = re.fullmatch(r"(conv|fc|linear)(\d+)", last)
    if match is None:
        return None
    before = f"{match[1]}{int(match[2]) - 1}"
    if not net.has(parent, before):
        return None
    inner = net.registered_between(parent, (before,), last)
    return _chain_fold(net, layer, parent, [before], [*inner.values()])


def _run(net: Network, name: str) -> Iterator[str]:
    """What a plain Sequential calls, one after the other, Sequentials within it taken apart."""
    module = net.modules[name]
    if type(module) is nn.Sequential:
        for child, inner in module._modules.items():
            yield from _run(net, join(name, child)) if inner is not None else ()
    else:
        yield name


def _by_run(net: Network, layer: Layer) -> Fold | None:
    """The layer before it in a Sequential, through activations and normalization."""
    outermost, parent = None, layer.name
    while parent:
        parent = parent.rpartition(".")[0]
        if type(net.modules[parent]) is not nn.Sequential:
            break
        outermost = parent
    if outermost is None:
        return None
    writer, between = writer_of_run(net, [*_run(net, outermost)], layer.name)
    return _chain_fold(net, layer, "", [writer], between)


FINDERS: tuple[Callable[[Network, Layer], Fold | None], ...] = (_by_table, _by_number, _by_run)


def _find(net: Network, layer: Layer, taken: dict[tuple[int, int], str]) -> Fold:
    """Raises FoldError if no rule knows the layer, or its writers move with another already."""
    fold = next((fold for finder in FINDERS if (fold := finder(net, layer)) is not None), None)
    if fold is None:
        raise FoldError(sharing(layer))
    keys = {(memory(slot.tensor), slot.dim): slot.name for slot in fold.slots}
    for key, name in keys.items():
        if key in taken:
            raise FoldError(f"{name} moves with {taken[key]} already")
    taken.update(dict.fromkeys(keys, fold.name))
    return fold


def find_folds(model: nn.Module, layers: Sequence[Layer], shared: Shared = "leave") -> FoldPlan:
    """The folds for the input channels of these layers, and the reasons where there is none.

    Layers whose input others read too (query, key and value, say) are left as they are
    (``shared="leave"``), take part in one permutation of the whole residual stream
    (``"residual"``), or gather their input at run time (``"gather"``). The result is a guess from
    names and shapes until it is verified.
    """
    net, folds = Network(model), []
    taken: dict[tuple[int, int], str] = {}
    refused: dict[str, str] = {}
    for layer in layers:
        try:
            folds.append(_find(net, layer, taken))
        except FoldError as reason:
            refused[layer.name] = str(reason)
    rest = [layer for layer in layers if layer.name in refused]
    if shared != "leave" and rest:
        more = residual_folds(net, rest, taken) if shared == "residual" else gather_folds(net, rest)
        folds += more.folds
        covered = {reader.name for fold in more.folds for reader in fold.readers}
        refused = {n: more.refused.get(n, r) for n, r in refused.items() if n not in covered}
    return FoldPlan(tuple(folds), refused)


def with_whole_groups(plan: FoldPlan, m: int) -> FoldPlan:
    """The plan without the folds that groups of ``m`` do not divide."""
    folds, refused = [], dict(plan.refused)
    for fold in plan.folds:
        width = fold.positions.shape[2]
        if width % m or bool((fold.positions[..., 0] % m).any()):
            message = f"groups of {m} do not divide its parts of {width} channels"
            refused |= {reader.name: message for reader in fold.readers}
        else:
            folds.append(fold)
    return FoldPlan(tuple(folds), refused)
