"""How sparsity is spread over layers, one file each."""

from prunus.allocators.base import ALLOCATORS, Allocation, Allocator, Problem, Unit
from prunus.allocators.erk import ERK
from prunus.allocators.globally import Global
from prunus.allocators.table import Table
from prunus.allocators.uniform import Uniform

__all__ = [
    "ALLOCATORS",
    "ERK",
    "Allocation",
    "Allocator",
    "Global",
    "Problem",
    "Table",
    "Uniform",
    "Unit",
]
