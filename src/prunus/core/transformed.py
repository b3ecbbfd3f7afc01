"""Weights that a module transforms before it computes with them.

What is zero in such a parameter is not zero in the computation (weight standardization, say), so
pruning it would make nothing sparse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from prunus.core.layers import CONVS, TRANSPOSED, Layer
from prunus.core.wrappers import is_sharded

PLAIN = {cls.forward for cls in (nn.Linear, *CONVS, *TRANSPOSED)}


def is_transformed(layer: Layer) -> bool:
    """Whether the module computes with something else than the weight that it stores.

    Only asked where the class has a forward of its own: then by trying whether the output is linear
    in the weight, on a random input. A module that cannot be tried so counts as plain.
    """
    module, name = layer.module, layer.parameter_name.rpartition(".")[2]
    own = type(module).forward not in PLAIN and isinstance(module, (nn.Linear, *CONVS))
    own = own and not type(module).__module__.startswith("prunus.")  # 2:4 layers mask by themselves
    weight = layer.weight
    if not own or weight.is_meta or is_sharded(weight) or not isinstance(weight, nn.Parameter):
        return False
    generator = torch.Generator().manual_seed(0)
    kept = (torch.rand(weight.shape, generator=generator) < 0.5).to(weight.device)
    try:
        x = _input(module, weight, generator)
        with torch.no_grad():
            whole, part, rest, none = (
                functional_call(module, {name: weight * mask}, (x,))
                for mask in (torch.ones_like(kept), kept, ~kept, torch.zeros_like(kept))
            )
        return not torch.allclose(part + rest, whole + none, rtol=1e-3, atol=_slack(whole))
    except Exception:
        return False


def _slack(whole: Tensor) -> float:
    return 1e-3 * float(whole.abs().max()) + 1e-12


def _input(module: Any, weight: Tensor, generator: torch.Generator) -> Tensor:
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (2, module.in_features)
    else:
        shape = (1, module.in_channels, *(2 * k for k in module.kernel_size))
    return torch.randn(shape, generator=generator).to(weight)
