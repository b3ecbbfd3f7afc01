"""What hardware makes of zeros: EIE, cycle by cycle, and energy at published constants.

Everything here is a model of published machines. What a model takes on the machine at hand is
measured, by `prunus bench`.
"""

from prunus.hardware.eie import Execution, Machine, run, run_all, snake_order
from prunus.hardware.energy import LABEL, EventEnergy, eie_energy, layer_energy
from prunus.hardware.estimate import Estimate, LayerEstimate, estimate
from prunus.hardware.sharing import (
    CompressedSize,
    SharedWeight,
    Sharing,
    compressed_size,
    share_weights,
)

__all__ = [
    "LABEL",
    "CompressedSize",
    "Estimate",
    "EventEnergy",
    "Execution",
    "LayerEstimate",
    "Machine",
    "SharedWeight",
    "Sharing",
    "compressed_size",
    "eie_energy",
    "estimate",
    "layer_energy",
    "run",
    "run_all",
    "share_weights",
    "snake_order",
]
