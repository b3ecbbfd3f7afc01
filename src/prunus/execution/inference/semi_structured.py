"""2:4 on GPUs, by `torch.sparse`: the kernels of CUTLASS and of cuSPARSELt.

Mishra et al., "Accelerating Sparse Deep Neural Networks" (https://arxiv.org/abs/2104.08378).
"""

from __future__ import annotations

import inspect
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.sparse import (
    SparseSemiStructuredTensor,
    SparseSemiStructuredTensorCUSPARSELT,
    SparseSemiStructuredTensorCUTLASS,
)

from prunus.execution.inference.forms import Form, Spec, as_stable
from prunus.execution.inference.zeros import is_nm

BACKENDS: dict[str, type[SparseSemiStructuredTensor]] = {
    "cutlass": SparseSemiStructuredTensorCUTLASS,
    "cusparselt": SparseSemiStructuredTensorCUSPARSELT,
}
NAMES = ("cutlass", "cusparselt", "cusparselt-searched")


class SemiStructured(Form):
    """Two of every four weights, and two bits for the place of each."""

    def __init__(self, matrix: Tensor, backend: str, algorithm: int | None = None) -> None:
        self.backend, self.algorithm = backend, algorithm
        self.shape = matrix.shape[0], matrix.shape[1]
        self.dtype, self.device = matrix.dtype, matrix.device
        with as_stable():
            self._matrix: Any = BACKENDS[backend].from_dense(matrix.contiguous())
        if algorithm is not None:
            self._matrix.alg_id_cusparselt = algorithm

    def __reduce__(self) -> tuple[Any, ...]:
        # torch 2.6 cannot copy the tensor itself
        return SemiStructured, (self.dense(), self.backend, self.algorithm)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x.contiguous(), self._matrix, bias).contiguous()

    def dense(self) -> Tensor:
        dense: Tensor = self._matrix.to_dense()
        return dense.contiguous()

    @property
    def nbytes(self) -> int:
        parts = self._matrix.packed, self._matrix.meta
        return sum(part.nbytes for part in parts if part is not None)


@cache
def _fastest(shape: tuple[int, int], rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """The number of cuSPARSELt's fastest algorithm; what the weights are does not matter."""
    matrix = torch.zeros(shape, dtype=dtype, device=device)
    x = matrix.new_zeros(-(-rows // 8) * 8, shape[1]).t()
    packed, kernel = torch._cslt_compress(matrix), SparseSemiStructuredTensorCUSPARSELT._mm
    # newer versions of torch let the kernel write the result transposed
    transposes = "should_transpose_dense" in inspect.signature(kernel).parameters
    return int(torch._cslt_sparse_mm_search(packed, x, transpose_result=transposes))


def searched(matrix: Tensor, rows: int) -> SemiStructured:
    """By the fastest of cuSPARSELt's algorithms for this many input rows."""
    shape = matrix.shape[0], matrix.shape[1]
    algorithm = _fastest(shape, rows, matrix.dtype, matrix.device)
    return SemiStructured(matrix, "cusparselt", algorithm)


def candidates(matrix: Tensor, rows: int) -> tuple[list[Spec], dict[str, str]]:
    """The kernels worth measuring for so many input rows, and why the others are not."""
    specs = [Spec(name, partial(SemiStructured, backend=name)) for name in BACKENDS]
    specs.append(Spec(NAMES[2], partial(searched, rows=rows)))
    refused = {name: message for name in NAMES if (message := _unfit(matrix, name))}
    return [spec for spec in specs if spec.name not in refused], refused


def _unfit(matrix: Tensor, name: str) -> str:
    if matrix.device.type != "cuda":
        return "needs a CUDA device"
    if torch.cuda.get_device_capability(matrix.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or more"
    if name != "cutlass" and not torch.backends.cusparselt.is_available():
        return "this torch is built without cuSPARSELt"
    if matrix.dtype not in (torch.float16, torch.bfloat16):
        # float32 would be rounded to TF32
        return f"for half precision only, and the weight is {str(matrix.dtype)[6:]}"
    sizes = BACKENDS[name.partition("-")[0]]._DTYPE_SHAPE_CONSTRAINTS[matrix.dtype]
    rows, cols = sizes.sparse_min_rows, sizes.sparse_min_cols
    if matrix.shape[0] % rows or matrix.shape[1] % cols:
        return f"outputs must divide by {rows} and inputs by {cols}"
    return "" if is_nm(matrix, 2, 4) else "not 2:4 in the order in which it is stored"
