"""Statistics: what is measured on calibration data for one layer."""

from prunus.stats.base import GradientStatistic, RowStatistic, Statistic
from prunus.stats.block_fisher import BlockFisher, Sampling
from prunus.stats.inputs import InputGram, InputNorm
from prunus.stats.shared_fisher import SharedFisher

__all__ = [
    "BlockFisher",
    "GradientStatistic",
    "InputGram",
    "InputNorm",
    "RowStatistic",
    "Sampling",
    "SharedFisher",
    "Statistic",
]
