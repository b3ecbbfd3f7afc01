"""N:M patterns that tighten while training goes on (structure decay, SdGF).

Bambhaniya et al., "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers",
2024, https://arxiv.org/abs/2402.04744, section 4.
"""

from __future__ import annotations

from dataclasses import replace

from prunus.core.names import did_you_mean
from prunus.core.patterns import NM, NMAlongOutputs, parse_pattern

Groups = NM | NMAlongOutputs
DOUBLINGS = 3  # geometric: 8:64, 4:32, 2:16, 1:8


def stepwise(target: Groups) -> list[Groups]:
    """One weight of each group goes, then N halves down to the target: 7:8, 4:8, 2:8, 1:8."""
    kept = [target.m - 1]
    half = target.m // 2
    while half > target.n:
        kept += [half] if half < kept[-1] else []
        half //= 2
    kept += [target.n] if target.n < kept[-1] else []
    return [replace(target, n=n) for n in kept]


def geometric(target: Groups) -> list[Groups]:
    """The target's share from the first on, in groups that halve: 8:64, 4:32, 2:16, 1:8."""
    sizes = [2**k for k in range(DOUBLINGS, -1, -1)]
    return [replace(target, n=size * target.n, m=size * target.m) for size in sizes]


NAMED = {"stepwise": stepwise, "geometric": geometric}


def stages(structure: tuple[str, ...], target: Groups) -> list[Groups]:
    """The patterns in turn, the target last; without a structure the target alone.

    ``structure`` is empty, a name (``stepwise``, ``geometric``) or patterns such as ``7:8``. Raises
    ValueError for anything else.
    """
    if not structure:
        return [target]
    if len(structure) == 1 and structure[0] in NAMED:
        return NAMED[structure[0]](target)
    patterns = []
    for text in structure:
        if ":" not in str(text):
            raise ValueError(f"structure: {text!r} is no N:M pattern{did_you_mean(text, NAMED)}")
        pattern = parse_pattern(text)
        assert isinstance(pattern, Groups)
        patterns.append(replace(target, n=pattern.n, m=pattern.m))
    if patterns[-1] != target:
        raise ValueError(f"structure ends with {patterns[-1]}, but the pattern is {target}")
    return patterns


def fitting(
    structure: tuple[str, ...], patterns: list[Groups], shape: tuple[int, int], channels: int
) -> list[Groups]:
    """The patterns that divide a layer; of named structures those that do not are left out.

    Raises ValueError if one that was written out does not.
    """
    fit = []
    for pattern in patterns:
        try:
            pattern.check(*shape, channels)
            fit.append(pattern)
        except ValueError:
            if structure[:1] not in [(name,) for name in NAMED] or pattern is patterns[-1]:
                raise
    return fit
