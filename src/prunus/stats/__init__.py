"""Statistics: what is measured on calibration data for one layer."""

from prunus.stats.base import Statistic
from prunus.stats.inputs import InputNorm

__all__ = ["InputNorm", "Statistic"]
