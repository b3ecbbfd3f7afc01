"""Every architecture, by the name that the table has."""

from research.zoo.images import IMAGES
from research.zoo.signals import SIGNALS
from research.zoo.texts import TEXTS
from research.zoo.timms import TIMM

ARCHITECTURES = {**TEXTS, **IMAGES, **SIGNALS, **TIMM}
