"""Modules whose weight is stored in a form: the module stays, and changes its class.

So names, hooks, buffers, and what others know of it stay. The Parameter is put aside without its
data and comes back when the module is dense again.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from prunus.execution.inference.candidates import candidates
from prunus.execution.inference.forms import Form
from prunus.execution.inference.stored import Stored

MOVED = (
    "a layer that ran sparse was moved to another device or dtype and is dense again; call "
    "prunus.accelerate anew to measure what is fastest there"
)

NO_EXPORT = (
    "a layer that runs sparse cannot be exported, traced or scripted: call restore() on what "
    "prunus.accelerate returned, and export the dense model, whose zeros stay"
)

READ_ONLY = (
    "the weight of a layer that runs sparse is read-only; call restore() on what "
    "prunus.accelerate returned, write it, and accelerate anew"
)


@dataclass
class Held:
    """What a sparse module keeps in place of its weight."""

    stored: Stored
    parameter: nn.Parameter
    inputs_first: bool
    """the weight is (inputs, outputs), as transformers' Conv1D has it"""
    rows: int
    """input rows for which the form was chosen"""


class _ForInference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *inputs: Tensor | None) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "a layer that runs sparse has no backward pass; call restore() on what "
            "prunus.accelerate returned before you train"
        )


def run(form: Form, x: Tensor, bias: Tensor | None) -> Tensor:
    """What the dense layer computes of (..., inputs); under autocast in the form's own dtype.

    The output is in the dtype in which autocast would compute, contiguous. Its backward pass raises
    RuntimeError.
    """
    kind = x.device.type
    casts = torch.is_autocast_enabled(kind) and form.dtype != torch.float64
    with torch.no_grad():
        rows = x.reshape(-1, x.shape[-1])
        if casts:
            with torch.autocast(kind, enabled=False):
                y = form.linear(rows.to(form.dtype), bias).to(torch.get_autocast_dtype(kind))
        else:
            y = form.linear(rows, bias)
        y = y.view(*x.shape[:-1], form.shape[0])
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        y = cast(Tensor, _ForInference.apply(y, x, bias))
    return y


class Sparse(nn.Module):
    """Mixed into the class of a linear layer; ``weight`` is computed, not stored."""

    _held: Held

    @property
    def weight(self) -> Tensor:
        """The dense weight, in new memory at each access; its backward pass raises RuntimeError."""
        held = self._held
        dense = held.stored.dense()
        if held.inputs_first:
            dense = dense.t().contiguous()
        if torch.is_grad_enabled() and held.parameter.requires_grad:
            dense = cast(Tensor, _ForInference.apply(dense, held.parameter))
        return dense

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise RuntimeError(READ_ONLY)
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        traced = torch._C._get_tracing_state() is not None or not isinstance(x, Tensor)
        if traced or _is_exporting():
            raise ValueError(NO_EXPORT)
        if self._parameters["weight"] is not None:  # as torch.func.functional_call puts it there
            raise RuntimeError(READ_ONLY)
        bias = self._parameters["bias"]
        return run(self._held.stored.form, x, bias)

    def __prepare_scriptable__(self) -> NoReturn:
        raise ValueError(NO_EXPORT)  # torch.jit.script asks each module

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, (dense_class(type(self)),), self.__dict__

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *values: Any, **named: Any) -> None:
        held = self._held
        become_dense(self)
        self._load_from_state_dict(*values, **named)  # the dense class's, for such is this now
        matrix = matrix_of(self)
        specs, _ = candidates(matrix, held.rows)
        for spec in specs:
            if spec.name == held.stored.spec.name:
                become_sparse(self, Stored.of(matrix, spec), held.rows)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        form = self._held.stored.form
        then = fn(torch.empty(0, dtype=form.dtype, device=form.device))
        if (then.dtype, then.device) == (form.dtype, form.device):
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        become_dense(self)
        warnings.warn(MOVED, stacklevel=2)
        return self._apply(fn, recurse)  # the dense class's, for such is this now


class SparseLinear(Sparse, nn.Linear):  # type: ignore[override]
    """A Linear whose weight is stored in a form that runs without its zeros."""


@cache
def sparse_class(dense: Any) -> type[Sparse]:
    """The class that a linear layer of this class takes while it is sparse."""
    if dense is nn.Linear:
        return SparseLinear
    # the same name, because transformers' Conv1D is known by it
    return type(dense.__name__, (Sparse, dense), {"__module__": dense.__module__})


def dense_class(sparse: type[nn.Module]) -> type[nn.Module]:
    """The class that such a module had before."""
    return cast(type[nn.Module], sparse.__bases__[1])


def _blank(dense: type[nn.Module]) -> nn.Module:
    made: Any = sparse_class(cast(Any, dense))
    return cast(nn.Module, made.__new__(made))


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (outputs, inputs), detached, contiguous."""
    weight = cast(Tensor, module.weight).detach()
    return weight if isinstance(module, nn.Linear) else weight.t().contiguous()


def _is_exporting() -> bool:
    asked: Any = getattr(torch.compiler, "is_exporting", None)  # since torch 2.7
    return asked is not None and bool(asked())


@cache
def _leave_out_of_graphs() -> None:
    """`torch.compile` calls sparse layers as they are: it cannot read sparse tensors.

    Not when this module is imported, because it imports the compiler.
    """
    plain: Any = torch.compiler.disable
    takes_reason = "reason" in inspect.signature(plain).parameters  # since torch 2.7
    options = {"reason": NO_EXPORT} if takes_reason else {}
    Sparse.forward = plain(Sparse.forward, **options)  # type: ignore[method-assign]


def become_sparse(module: nn.Module, stored: Stored, rows: int) -> None:
    """Let the module run in the form that its weight has been brought into.

    ``rows`` is for how many input rows that form was chosen.
    """
    _leave_out_of_graphs()
    parameter = module._parameters["weight"]
    assert parameter is not None
    inputs_first = not isinstance(module, nn.Linear)
    module.__dict__["_held"] = Held(stored, parameter, inputs_first, rows)
    module._parameters["weight"] = None  # the place stays, and with it the order of the parameters
    module.__class__ = sparse_class(cast(Any, type(module)))
    parameter.data = parameter.data.new_empty(0)


def become_dense(module: nn.Module) -> None:
    """The inverse of `become_sparse`: the same Parameter has its data again, to the bit."""
    held: Held = module.__dict__["_held"]
    held.parameter.data = cast(Tensor, module.weight).detach()
    module._parameters["weight"] = held.parameter
    del module.__dict__["_held"]
    module.__class__ = dense_class(type(module))


def restore(model: nn.Module) -> None:
    """Let every module of the model that runs sparse run dense, as before `prunus.accelerate`."""
    for module in model.modules():
        if isinstance(module, Sparse):
            become_dense(module)
