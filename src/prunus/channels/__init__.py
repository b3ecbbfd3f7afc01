"""Structured pruning: channels, heads and blocks that are removed."""

from prunus.channels.criteria import CRITERIA, Criterion, Evidence
from prunus.channels.groups import Channels, Group, Slot, channels
from prunus.channels.result import Shrunk
from prunus.channels.shrink import shrink

__all__ = [
    "CRITERIA",
    "Channels",
    "Criterion",
    "Evidence",
    "Group",
    "Shrunk",
    "Slot",
    "channels",
    "shrink",
]
