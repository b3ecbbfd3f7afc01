"""The methods, one file each."""

from prunus.pruners.base import (
    PRUNERS,
    Proposal,
    Pruner,
    list_pruners,
    register_pruner,
    supports,
)
from prunus.pruners.magnitude import Magnitude

__all__ = [
    "PRUNERS",
    "Magnitude",
    "Proposal",
    "Pruner",
    "list_pruners",
    "register_pruner",
    "supports",
]
