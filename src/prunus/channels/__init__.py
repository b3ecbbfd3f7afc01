"""Structured pruning: channels, heads and blocks that are removed."""

from prunus.channels.groups import Channels, Group, Slot, channels

__all__ = ["Channels", "Group", "Slot", "channels"]
