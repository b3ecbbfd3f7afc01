"""What an axis of a parameter is to its module: where channels are written, read or scaled."""

from __future__ import annotations

from torch import nn

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def inputs_first(module: nn.Module) -> bool:
    """Whether the weight is stored as (inputs, outputs): transposed, or transformers' Conv1D."""
    return isinstance(module, _TRANSPOSED) or type(module).__name__ == "Conv1D"


def role(model: nn.Module, parameter: str, dim: int) -> str:
    """``out``, ``in``, ``channel`` or ``other``."""
    module = model.get_submodule(module_of(parameter))
    attribute = parameter.rpartition(".")[2]
    dims = getattr(module, attribute).dim()
    if dims == 1:
        return "channel"
    if attribute != "weight":
        return "other"
    if isinstance(module, nn.Embedding):
        return "out" if dim == 1 else "other"
    if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or inputs_first(module):
        return "out" if dim == int(inputs_first(module)) else "in"
    return "other"
