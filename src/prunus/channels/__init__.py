"""Structured pruning: channels, heads and blocks that are removed."""

from prunus.channels.criteria import CRITERIA, Criterion, Evidence
from prunus.channels.depth import Shallower, block_influence, drop_blocks
from prunus.channels.groups import Channels, Group, Slot, channels
from prunus.channels.latency import latency
from prunus.channels.optimizers import follow
from prunus.channels.patterns import unit_masks
from prunus.channels.result import Shrunk
from prunus.channels.shapes import load, save
from prunus.channels.shrink import shrink

__all__ = [
    "CRITERIA",
    "Channels",
    "Criterion",
    "Evidence",
    "Group",
    "Shallower",
    "Shrunk",
    "Slot",
    "block_influence",
    "channels",
    "drop_blocks",
    "follow",
    "latency",
    "load",
    "save",
    "shrink",
    "unit_masks",
]
