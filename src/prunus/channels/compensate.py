"""The readers of removed channels, refitted to what is left of their inputs.

For a reader with weights W, (rows, d), and inputs of mean m and covariance C, the best weights for
the kept columns K are ``W C[:, K] (C[K, K] + damp)^-1``, and the bias takes ``W m - W' m[K]``.
Without a bias the second moment stands in place of the covariance. It is the least-squares
reconstruction of Y. He et al., "Channel pruning", 2017, https://arxiv.org/abs/1707.06168, in closed
form; S. Shin et al., "OPTIN" and "LLM-BIP" use its bias alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from prunus.calibration.calibration import Calibration
from prunus.channels.groups import Channels
from prunus.channels.moments import InputMoments, damped, input_moments, is_reader, weight_matrix
from prunus.channels.roles import inputs_first, role
from prunus.channels.surgery import Change, kept_positions

Update = Literal["none", "bias", "weights"]
DAMP = 1e-3


def refitted(w: Tensor, moments: InputMoments, keep: Tensor, has_bias: bool, damp: float) -> Tensor:
    """(rows, kept) the least-squares weights; ``w`` is (rows, d), ``keep`` (d,) bool; float64."""
    second = moments.centered() if has_bias else moments.raw()
    kept = damped(second[keep][:, keep], damp)
    target = w.double() @ second[:, keep]
    # the damping pulls towards the weights as they are
    pull = kept - second[keep][:, keep]
    target += w.double()[:, keep] @ pull
    weights: Tensor = torch.linalg.solve(kept, target.t()).t()
    return weights


def lossy_readers(model: nn.Module, found: Channels, gone: Tensor) -> dict[str, Tensor]:
    """Linear layers and ungrouped convolutions that lose inputs -> (channels,) what they keep."""
    readers = {}
    for parameter, axes in kept_positions(found, gone).items():
        name = parameter.rpartition(".")[0]
        for dim, keep in axes.items():
            if role(model, parameter, dim) == "in" and is_reader(model, name):
                readers[name] = keep
    return readers


class Compensation:
    """Measured before units go, applied to the model in which they are gone."""

    def __init__(
        self,
        model: nn.Module,
        found: Channels,
        gone: Tensor,
        update: Update,
        calibration: Calibration,
        known: Mapping[str, InputMoments] | None = None,
        damp: float = DAMP,
    ) -> None:
        self.update, self.damp = update, damp
        self.model = model
        self.keep = lossy_readers(model, found, gone)
        gram = update == "weights"
        known = {n: m for n, m in (known or {}).items() if not gram or m.gram is not None}
        missing = [name for name in self.keep if name not in known]
        self.moments = {name: known[name] for name in self.keep if name in known}
        if missing:
            self.moments.update(input_moments(model, calibration, missing, gram))
        self.weights = {
            name: weight_matrix(model.get_submodule(name)).clone() for name in self.keep
        }
        self.rows = {name: self._rows(found, gone, name) for name in self.keep}
        self.unbiased: list[str] = []
        """readers that have no bias to correct"""

    def _rows(self, found: Channels, gone: Tensor, name: str) -> Tensor:
        """(rows,) which outputs of the reader stay."""
        axes = kept_positions(found, gone).get(f"{name}.weight", {})
        out = int(inputs_first(self.model.get_submodule(name)))
        w = self.weights[name]
        return axes.get(out, torch.ones(len(w), dtype=torch.bool)).to(w.device)

    def apply(self, change: Change) -> None:
        """Change the readers of the shrunk model; ``change`` remembers what they were."""
        for name, channels in self.keep.items():
            module = self.model.get_submodule(name)
            w, m = self.weights[name][self.rows[name]], self.moments[name]
            keep = channels.to(w.device).repeat_interleave(m.kernel)
            bias = getattr(module, "bias", None)
            new = w[:, keep].double()
            if self.update == "weights":
                new = refitted(w, m, keep, bias is not None, self.damp)
                self._write(module, new, change)
            if bias is not None:
                shift = w.double() @ m.mean - new @ m.mean[keep]
                change.data(bias, bias.data + shift.to(bias.dtype), bias.grad)
            elif self.update == "bias":
                self.unbiased.append(name)

    def _write(self, module: nn.Module, matrix: Tensor, change: Change) -> None:
        weight: Tensor = module.weight  # type: ignore[assignment]
        new = matrix.t() if inputs_first(module) else matrix.reshape(weight.shape)
        change.data(weight, new.to(weight.dtype).contiguous(), weight.grad)
