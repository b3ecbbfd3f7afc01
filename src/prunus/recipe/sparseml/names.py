"""``params`` of SparseML to patterns of ours.

There a regex matches the beginning of a parameter's name (``re.match``); here the whole of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from prunus.core.regex_alternatives import alternatives
from prunus.recipe.sparseml.settings import Settings

ALL, ALL_PRUNABLE, FROM_PARAM = "__ALL__", "__ALL_PRUNABLE__", "__FROM_PARAM__"
_GLOB = re.compile(r"[*?\[]")
_WRAPPER = re.compile(r"(re:)?module\\?\.")
_WHOLE = re.compile(r"(?<!\\)(?:\.\*|\$)$")
_A_WEIGHT = "(?<=weight)"
"""ends what is matched against layers: their names and classes are not to match, as a rule"""


def patterns(
    names: Sequence[str], settings: Settings, key: str = "params", weights: bool = True
) -> tuple[str, ...]:
    """The names as our patterns, everything for ``__ALL__`` and ``__ALL_PRUNABLE__``.

    With ``weights`` regexes match names of weights only, for they choose layers, which have other
    names too. ``module.`` at the front, which DistributedDataParallel puts there, is left out.
    Raises RecipeError for a regex that does not compile.
    """
    if ALL in names or ALL_PRUNABLE in names:
        return ("*",)
    return tuple(_pattern(name, settings, key, _A_WEIGHT if weights else "") for name in names)


def _pattern(name: str, settings: Settings, key: str, ending: str) -> str:
    if match := _WRAPPER.match(name):
        name = (match[1] or "") + name[match.end() :]
    if not name.startswith("re:"):
        return "re:" + re.escape(name) if _GLOB.search(name) else name
    regex = name[3:]
    try:
        re.compile(regex)
    except re.error as error:
        raise settings.error(f"{name!r} is not a regular expression: {error}", key) from None
    return "re:" + "|".join(_prefix(part) + ending for part in alternatives(regex))


def _prefix(regex: str) -> str:
    """A regex for whole names that begin as this one says."""
    return regex if _WHOLE.search(regex) else regex + ".*"
