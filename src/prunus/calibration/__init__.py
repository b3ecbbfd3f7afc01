"""Statistics collected on data: passes over it, their memory, and what is made of them."""

from prunus.calibration.calibration import Calibration

__all__ = ["Calibration"]
