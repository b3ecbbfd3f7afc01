"""What may lie between a writer and a reader: modules that treat every channel alike."""

from __future__ import annotations

from torch import Tensor, nn

from prunus.engine.permute.folds import FoldError, Slot
from prunus.engine.permute.graph import Network, as_layer

# equivariant under permutations of channels once their own vectors are permuted
NORMS = ("batchnorm", "layernorm", "rmsnorm", "instancenorm", "globalresponsenorm", "prelu")
# the files of torch, timm and transformers in which elementwise modules are defined
ELEMENTWISE = ("activation", "drop")
MIXING = {"GLU", "LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin"}


def _file(module: nn.Module) -> str:
    return type(module).__module__.rpartition(".")[2]


def _elementwise(module: nn.Module, spatial: bool) -> bool:
    kind = type(module).__name__
    if isinstance(module, nn.Identity):
        return True
    # over features that come last, pooling takes neighbours together
    pooling = spatial and _file(module) == "pooling"
    known = pooling or _file(module).startswith(ELEMENTWISE)
    return known and kind not in MIXING and not any(True for _ in module.parameters())


def passes(
    net: Network, name: str, positions: Tensor, width: int, spatial: bool = False
) -> list[Slot]:
    """The vectors of the named module that move with the channels it passes on.

    ``positions`` are those of the reader, of whose input the module makes ``width`` channels;
    ``spatial`` says that these are not the last dimension. Raises FoldError unless the module is
    known to treat channels alike.
    """
    module, kind = net.modules[name], type(net.modules[name]).__name__
    if _elementwise(module, spatial):
        return []
    if not any(norm in kind.lower() for norm in NORMS):
        raise FoldError(f"{name} ({kind}) lies between it and what writes its input")
    slots = []
    for inner in module.modules():
        if inner is not module and not _elementwise(inner, spatial):
            raise FoldError(f"{name} ({kind}) holds {type(inner).__name__}, which no rule knows")
    for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
        counter = tensor is None or tensor.dim() == 0
        shared = kind == "PReLU" and tensor is not None and tensor.numel() == 1
        if not counter and not shared:
            slots.append(net.slot(module, attribute, 0, positions, width))
    return slots


def writer_of_run(net: Network, run: list[str], reader: str) -> tuple[str, list[str]]:
    """In a run of modules called one after the other: what writes for `reader`, what is between.

    Raises FoldError if the reader comes first.
    """
    at = run.index(reader)
    for back in range(at - 1, -1, -1):
        name = run[back]
        if isinstance(net.modules[name], nn.Flatten):
            raise FoldError(f"{name} (Flatten) makes several inputs of each channel")
        if as_layer(net.modules[name]) is not None:
            return name, run[back + 1 : at]
    raise FoldError("no rule knows what writes its input")
