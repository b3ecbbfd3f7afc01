"""A package of its own that extends prunus: its entry point names this module."""

from toy_plugin import allocator, modifier, pruner

__all__ = ["allocator", "modifier", "pruner"]
