"""How sparsity is spread over layers, one file each."""

from prunus.allocators.alphapruning import AlphaPruning
from prunus.allocators.base import (
    ALLOCATORS,
    Allocation,
    Allocator,
    Problem,
    SignalAllocator,
    Unit,
    filled,
    register_allocator,
)
from prunus.allocators.erk import ERK
from prunus.allocators.global_ranking import Global
from prunus.allocators.owl import OWL
from prunus.allocators.table import Table
from prunus.allocators.uniform import Uniform

__all__ = [
    "ALLOCATORS",
    "ERK",
    "OWL",
    "Allocation",
    "Allocator",
    "AlphaPruning",
    "Global",
    "Problem",
    "SignalAllocator",
    "Table",
    "Uniform",
    "Unit",
    "filled",
    "register_allocator",
]
