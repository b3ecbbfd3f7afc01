"""What layers are given on calibration data: means, absolute means, Gram matrices, all streamed."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunus.calibration.calibration import Calibration, undisturbed
from prunus.channels.roles import inputs_first
from prunus.core.progress import track

MEMORY = 4 << 30  # bytes of Gram matrices in one pass


def is_reader(model: nn.Module, name: str) -> bool:
    """Whether the layer's inputs can be seen as rows of a matrix."""
    module = model.get_submodule(name)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return (
            module.groups == 1
            and not isinstance(module.padding, str)
            and module.padding_mode == "zeros"
        )
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def kernel_of(module: nn.Module) -> int:
    """Columns of the matrix for each input channel."""
    weight: Any = module.weight
    return int(weight.shape[2:].numel())


def weight_matrix(module: nn.Module) -> Tensor:
    """(outputs, inputs * kernel positions), a view."""
    weight: Any = module.weight
    w: Tensor = weight.detach()
    return w.t() if inputs_first(module) else w.flatten(1)


def input_matrix(module: Any, x: Tensor) -> Tensor:
    """(samples, inputs * kernel positions)."""
    x = x.detach()
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    one = isinstance(module, nn.Conv1d)
    ones, zeros = ((1,), (0,)) if one else ((), ())
    patches = F.unfold(
        x.unsqueeze(-2) if one else x,
        ones + module.kernel_size,
        ones + module.dilation,
        (*zeros, *module.padding),
        ones + module.stride,
    )
    return patches.transpose(1, 2).flatten(0, 1)


@dataclass
class InputMoments:
    """Sums over samples, in float64 where they are vectors; all are (columns,) but the Gram."""

    kernel: int
    count: int
    total: Tensor
    absolute: Tensor
    square: Tensor
    gram: Tensor | None

    @classmethod
    def empty(cls, module: nn.Module, gram: bool) -> InputMoments:
        w = weight_matrix(module)
        zero = torch.zeros(w.shape[1], dtype=torch.float64, device=w.device)
        square = torch.zeros(w.shape[1], w.shape[1], dtype=torch.float32, device=w.device)
        return cls(kernel_of(module), 0, zero, zero.clone(), zero.clone(), square if gram else None)

    def add(self, x: Tensor) -> None:
        """``x`` is (samples, columns)."""
        x = x.float()
        self.count += len(x)
        self.total += x.sum(0)
        self.absolute += x.abs().sum(0)
        self.square += x.square().sum(0)
        if self.gram is not None:
            self.gram.addmm_(x.t(), x)

    @property
    def mean(self) -> Tensor:
        return self.total / max(1, self.count)

    @property
    def variance(self) -> Tensor:
        return (self.square / max(1, self.count) - self.mean.square()).clamp_min(0)

    def centered(self) -> Tensor:
        """(columns, columns) covariance of the inputs, float64."""
        assert self.gram is not None
        mean = self.mean
        return self.gram.double() / max(1, self.count) - torch.outer(mean, mean)

    def raw(self) -> Tensor:
        """(columns, columns) mean outer product of the inputs, float64."""
        assert self.gram is not None
        return self.gram.double() / max(1, self.count)


def damped(gram: Tensor, share: float) -> Tensor:
    """With ``share`` of the mean diagonal added, and at least what makes it invertible."""
    extra = share * gram.diagonal().mean().clamp_min(1e-12)
    return gram + extra * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def input_moments(
    model: nn.Module, calibration: Calibration, names: Collection[str], gram: bool
) -> dict[str, InputMoments]:
    """Moments for each of the layers, by name, from one pass over the data if memory allows.

    Raises ValueError if there were no data, or a layer was not called.
    """
    found: dict[str, InputMoments] = {}
    for part in _portions(model, names, gram):
        found.update(_one_pass(model, calibration, part, gram))
    idle = [name for name, m in found.items() if m.count == 0]
    if idle:
        raise ValueError(f"the calibration data never reached {', '.join(idle[:3])}; is it empty?")
    return found


def _portions(model: nn.Module, names: Collection[str], gram: bool) -> list[list[str]]:
    """Layers whose Gram matrices fit the memory together; each portion is a pass over the data."""
    portions: list[list[str]] = [[]]
    total = 0
    for name in names:
        size = 4 * weight_matrix(model.get_submodule(name)).shape[1] ** 2 if gram else 0
        if total + size > MEMORY and portions[-1]:
            portions.append([])
            total = 0
        portions[-1].append(name)
        total += size
    return portions


def _one_pass(
    model: nn.Module, calibration: Calibration, names: Collection[str], gram: bool
) -> dict[str, InputMoments]:
    modules = {name: model.get_submodule(name) for name in names}
    found = {name: InputMoments.empty(module, gram) for name, module in modules.items()}

    def hook(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        found[name].add(input_matrix(module, args[0]))

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(partial(hook, name)).remove)
        with undisturbed(model, calibration), torch.no_grad():
            for batch in track(calibration, "inputs of layers"):
                calibration.run(model, batch)
    return found
