"""Whether what a person wrote as a number can be computed with."""

from __future__ import annotations

import math
import operator
from typing import Any

MAX_STEPS = 2**53
"""the last count that a float holds exactly; no training is longer"""


def is_finite(value: Any) -> bool:
    """Whether a number is neither NaN nor infinite and fits into a float.

    >>> is_finite(0.5), is_finite(float("nan")), is_finite(10**400)
    (True, False, False)
    """
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def shortened(value: Any) -> str:
    """The value as an error shows it: of a number of hundreds of digits the first and the last."""
    text = (
        str(value)
        if not isinstance(value, int) or is_finite(value)
        else "a number of over 300 digits"
    )
    return text if len(text) <= 60 else f"{text[:40]}...{text[-10:]}"


def count(name: str, value: Any) -> int:
    """A whole number from 1 on, as an ``int``. Raises ValueError naming the argument."""
    try:
        whole = operator.index(value)
    except TypeError:
        whole = 0
    if isinstance(value, bool) or not 1 <= whole <= MAX_STEPS:
        raise ValueError(f"{name}={shortened(value)}; give a whole number, at least 1")
    return whole
