"""How sparse weights compute: the forms of finished models, and 2:4 while training."""

from prunus.execution.inference import restore

__all__ = ["restore"]
