"""Statistics: what is measured on calibration data for one layer."""

from prunus.stats.base import (
    SAMPLES,
    STATISTICS,
    Samples,
    Sampling,
    Statistic,
    all_reduce_statistics,
    checked_statistic,
    register_statistic,
    take_in,
)
from prunus.stats.block_fisher import DTYPES, BlockFisher
from prunus.stats.inputs import InputGram, InputNorm
from prunus.stats.shared_fisher import SharedFisher

__all__ = [
    "DTYPES",
    "SAMPLES",
    "STATISTICS",
    "BlockFisher",
    "InputGram",
    "InputNorm",
    "Samples",
    "Sampling",
    "SharedFisher",
    "Statistic",
    "all_reduce_statistics",
    "checked_statistic",
    "register_statistic",
    "take_in",
]
