"""What SparseML's loggers are told: the sparsity of each layer when it has been pruned."""

from __future__ import annotations

from typing import Any

TAG = "ParamPruning"


class Loggers:
    """Passes events on to loggers that may change at any time."""

    def __init__(self) -> None:
        self.all: list[Any] = []

    def set(self, loggers: Any) -> None:
        """None, one logger, or an iterable of them. Raises ValueError for what cannot log."""
        loggers = [] if loggers is None else loggers if _many(loggers) else [loggers]
        for logger in loggers:
            if not (callable(logger) or _scalars(logger)):
                kind = type(logger).__name__
                raise ValueError(f"{kind} cannot log; give it log_scalar(tag=, value=, step=)")
        self.all = list(loggers)

    def __call__(self, event: dict[str, Any]) -> None:
        for logger in self.all:
            if hasattr(logger, "log_scalars"):
                if event["event"] == "prune":
                    logger.log_scalars(tag=TAG, values=dict(event["layers"]), step=event["step"])
            elif hasattr(logger, "log_scalar"):
                for name, value in event.get("layers", {}).items():
                    logger.log_scalar(tag=f"{TAG}/{name}", value=value, step=event["step"])
            else:
                logger(event)


def _scalars(logger: Any) -> bool:
    return hasattr(logger, "log_scalars") or hasattr(logger, "log_scalar")


def _many(loggers: Any) -> bool:
    return hasattr(loggers, "__iter__") and not (callable(loggers) or _scalars(loggers))
