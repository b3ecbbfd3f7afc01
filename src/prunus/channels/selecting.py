"""Which groups may lose units."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

from prunus.channels.groups import Channels, Group
from prunus.core.names import did_you_mean


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None


def _matching(groups: Sequence[Group], patterns: Sequence[str], what: str) -> set[str]:
    """Names of groups of which a module that writes the channels matches a pattern."""
    patterns = [patterns] if isinstance(patterns, str) else patterns
    chosen: set[str] = set()
    for pattern in patterns:
        regex = _regex(pattern)
        hits = {g.name for g in groups if any(map(regex.fullmatch, [g.name, *g.writers]))}
        if not hits:
            names = [name for g in groups for name in g.writers]
            raise ValueError(f"{what}: {pattern!r} matches no group{did_you_mean(pattern, names)}")
        chosen |= hits
    return chosen


def chosen_groups(
    found: Channels, layers: Sequence[str] | None, exclude: Sequence[str], width: bool
) -> list[Group]:
    """Groups by the modules that write them; those that norms run over only with ``width``.

    Raises ValueError for a pattern that matches nothing, and where no group is left.
    """
    offered = [g for g in found.groups if width or not g.norms]
    groups = offered
    if layers is not None:
        names = _matching(found.groups, layers, "layers")
        groups = [g for g in found.groups if g.name in names]
    if exclude:
        names = _matching(found.groups, exclude, "exclude")
        groups = [g for g in groups if g.name not in names]
    if not groups:
        reasons = [f"{name}: {reason}" for name, reason in list(found.refused.items())[:3]]
        more = "; width=True offers what norms run over" if len(offered) < len(found.groups) else ""
        raise ValueError(f"no group is left to remove units from ({'; '.join(reasons)}){more}")
    return groups
