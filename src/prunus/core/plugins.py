"""Other packages that extend this one: their modules, imported before names are looked up.

A package names its module in the entry point group `GROUP`; importing it registers what it brings.
"""

from __future__ import annotations

import functools
import logging
from importlib.metadata import EntryPoint, entry_points

GROUP = "prunus.plugins"
log = logging.getLogger("prunus")


@functools.cache
def _waiting() -> list[EntryPoint]:
    """The plugins that have not been imported yet, read once from what is installed."""
    return list(dict.fromkeys(entry_points(group=GROUP)))


def load_plugins() -> None:
    """Import every plugin, the first time; one that fails is a warning in the log."""
    waiting = _waiting()
    while waiting:
        plugin = waiting.pop(0)  # first, since a plugin may look names up while it is imported
        try:
            plugin.load()
        except (Exception, SystemExit) as error:
            log.warning(
                "plugin %r (%s) cannot be used: %s: %s; mend it, or uninstall %s",
                plugin.name,
                plugin.value,
                type(error).__name__,
                error,
                plugin.dist.name if plugin.dist else "its package",
            )
