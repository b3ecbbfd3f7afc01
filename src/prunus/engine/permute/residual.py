"""One permutation of the residual stream: every layer that reads or writes it takes part.

Each parameter has a role, by its name and shape; one without a known role refuses the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from prunus.core.layers import Layer
from prunus.engine.permute.folds import FoldError, FoldPlan, Slot
from prunus.engine.permute.graph import Network, as_layer, join, memory, straight

READERS = (
    *("q_proj", "k_proj", "v_proj", "qkv", "qkv_proj", "c_attn", "query", "key", "value"),
    *("attn.gate", "gate_proj", "up_proj", "gate_up_proj", "fc1", "fc1_g", "fc1_x", "c_fc"),
    *("intermediate.dense", "w1", "w3", "lm_head", "head", "head_dist", "classifier", "score"),
    *("qa_outputs", "predictions.decoder", "seq_relationship"),
)
WRITERS = (
    *("o_proj", "out_proj", "attn.proj", "attention.output.dense", "down_proj", "fc2", "c_proj"),
    *("output.dense", "w2", "patch_embed.proj", "patch_embeddings.projection", "patch_embedding"),
)
# what they write is read by a layer tied to the embeddings, or by the classifier
BOTH = ("predictions.transform.dense", "pooler.dense")
# normalization of heads or hidden channels, of the stream's width only by chance
INNER = ("attn.norm", "mlp.norm", "mlp.grn", "q_norm", "k_norm")
INNER_VECTORS = ("q_bias", "k_bias", "v_bias", "relative_position_bias_table")
# vectors of the stream, its channels last
VECTORS = (
    *("cls_token", "dist_token", "reg_token", "mask_token", "pos_embed", "position_embeddings"),
    *("class_embedding", "gamma", "gamma_1", "gamma_2", "lambda1"),
)
ROTARY = ("rot", "rope")


def named(name: str, known: Sequence[str]) -> bool:
    return f".{name}".endswith(tuple(f".{each}" for each in known))


class _Roles:
    """Slots of every parameter along a stream of `width` channels, and names of unknown ones."""

    def __init__(self, net: Network, width: int) -> None:
        self.net, self.width, self.positions = net, width, straight(1, 1, width)
        self.slots: list[Slot] = []
        self.unknown: list[str] = []

    def add(self, module: nn.Module, attribute: str, dim: int) -> None:
        self.slots.append(self.net.slot(module, attribute, dim, self.positions, self.width))

    def layer(self, name: str, layer: Layer) -> bool:
        """Is the role of a layer known? Its bias goes with what it writes."""
        reads, writes = named(name, READERS), named(name, WRITERS)
        reads, writes = (True, True) if named(name, BOTH) else (reads, writes)
        if reads:
            self.slots.append(self.net.reads(layer, self.positions))
        if writes:
            self.slots += self.net.writes(name, self.positions, self.width)
        return reads or writes

    def vector(self, module: nn.Module, attribute: str, tensor: Tensor) -> bool:
        """Is the role of a parameter known that belongs to no layer?"""
        kind = type(module).__name__.lower()
        if isinstance(module, nn.Embedding):
            self.add(module, attribute, 1)
        elif tensor.dim() == 1 and ("layernorm" in kind or "rmsnorm" in kind):
            if not named(self.net.names[module], INNER):
                self.add(module, attribute, 0)
        elif attribute in VECTORS:
            self.add(module, attribute, -1)
        # a bias that is added to logits (BERT), and what stays within attention
        elif attribute not in INNER_VECTORS and not named(
            join(self.net.names[module], attribute), ("predictions.bias",)
        ):
            return False
        return True

    def buffer(self, module: nn.Module, attribute: str, tensor: Tensor) -> bool:
        """Is it known that a buffer is apart from the stream?"""
        if attribute in INNER_VECTORS:
            return True
        rotary = any(word in type(module).__name__.lower() for word in ROTARY)
        return rotary or not tensor.is_floating_point() or self.width not in tensor.shape

    def visit(self, name: str, module: nn.Module) -> None:
        layer = as_layer(module)
        if layer is not None and self.layer(name, layer):
            return
        for attribute, tensor in module._parameters.items():
            own = tensor is None or (layer is None and self.vector(module, attribute, tensor))
            if not own:
                self.unknown.append(join(name, attribute))
        for attribute, held in module._buffers.items():
            if held is not None and not self.buffer(module, attribute, held):
                self.unknown.append(join(name, attribute))


def _slots(net: Network, width: int, taken: Mapping[tuple[int, int], str]) -> list[Slot]:
    roles = _Roles(net, width)
    for module, name in net.names.items():
        roles.visit(name, module)
    if roles.unknown:
        some = ", ".join(roles.unknown[:3]) + (", ..." if len(roles.unknown) > 3 else "")
        raise FoldError(f"the part that {some} plays in the residual stream is not known")
    for slot in roles.slots:
        if fold := taken.get((memory(slot.tensor), slot.dim)):
            raise FoldError(f"{slot.name} moves with {fold} already")
    return roles.slots


def residual_folds(
    net: Network, layers: Sequence[Layer], taken: Mapping[tuple[int, int], str]
) -> FoldPlan:
    """The fold of the stream, whose readers are those of `layers` that read it.

    ``taken`` says which (tensor, dimension) moves with which fold already.
    """
    readers = tuple(layer for layer in layers if named(layer.name, (*READERS, *BOTH)))
    if not readers:
        return FoldPlan((), {})
    try:
        widths = {reader.channels() for reader in readers}
        if len(widths) > 1:
            raise FoldError(f"layers read residual streams of several widths: {sorted(widths)}")
        width = widths.pop()
        slots, positions = _slots(net, width, taken), straight(1, 1, width)
        fold = net.fold("residual stream", "residual", readers, positions, slots)
    except FoldError as reason:
        return FoldPlan((), {reader.name: str(reason) for reader in readers})
    # a backbone that ends in the stream gives it permuted, which only the whole shows
    return FoldPlan((replace(fold, scope=net.model),), {})
