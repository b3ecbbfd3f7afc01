"""What a unit is worth: one file for each criterion."""

from prunus.channels.criteria.activation import Activation
from prunus.channels.criteria.base import CRITERIA, Criterion, Evidence
from prunus.channels.criteria.flap import FLAP
from prunus.channels.criteria.gamma import Gamma
from prunus.channels.criteria.magnitude import Magnitude
from prunus.channels.criteria.obs import OBS
from prunus.channels.criteria.random import Random
from prunus.channels.criteria.taylor import Taylor

__all__ = [
    "CRITERIA",
    "FLAP",
    "OBS",
    "Activation",
    "Criterion",
    "Evidence",
    "Gamma",
    "Magnitude",
    "Random",
    "Taylor",
]
