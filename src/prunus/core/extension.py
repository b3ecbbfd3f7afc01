"""Classes that extend the package: they derive from a base class here, or have what it asks for."""

from __future__ import annotations

import dataclasses
from abc import ABC, ABCMeta
from collections.abc import Sequence
from typing import ClassVar


def check_parts(cls: type, base: type, kind: str, needs: Sequence[str], one: object = None) -> None:
    """Raises ValueError that names the class and what it lacks of ``needs``."""
    owner, abstract = cls if one is None else one, getattr(cls, "__abstractmethods__", ())
    lacking = [part for part in needs if part in abstract or not hasattr(owner, part)]
    if lacking:
        raise ValueError(
            f"{kind} {cls.__name__} lacks {', '.join(lacking)}; derive it from "
            f"prunus.{base.__name__} and define {' and '.join(lacking)} in it"
        )


class Extensible(ABC):  # noqa: B024 (its heirs have the methods)
    """A base class that counts classes as its own which derive from nothing and have all `PARTS`.

    Those of version 0.1 are such; they get the defaults of what came since.
    """

    PARTS: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        parts = vars(cls).get("PARTS")  # not those of a base class
        if not parts or not all(hasattr(other, part) for part in parts):
            return NotImplemented  # type: ignore[no-any-return]
        _give_defaults(other, cls)
        return True


def _give_defaults(cls: type, base: type) -> None:
    for parent in base.__mro__[:-1]:
        for name, default in vars(parent).items():
            if not name.startswith("_") and not hasattr(cls, name):
                setattr(cls, name, default)


def complete(cls: type, base: ABCMeta, kind: str, needs: Sequence[str], one: object = None) -> None:
    """Give a class that does not derive from `base` its defaults; it then counts as one that does.

    ``one`` is an instance, of which attributes count too. Raises ValueError as `check_parts`.
    """
    check_parts(cls, base, kind, needs, one)
    if not issubclass(cls, base):
        base.register(cls)
        _give_defaults(cls, base)


def check_settings(cls: type, kind: str, plain: Sequence[str]) -> None:
    """Raises ValueError unless the class is a frozen dataclass in which `plain` are no fields."""
    params = getattr(cls, "__dataclass_params__", None)
    if params is None or not params.frozen:
        raise ValueError(
            f"{kind} {cls.__name__} must be a frozen dataclass: write @dataclass(frozen=True) "
            "above the class, below the register_ line"
        )
    fields = [field.name for field in dataclasses.fields(cls) if field.name in plain]
    if fields:
        raise ValueError(
            f"{kind} {cls.__name__}: {fields[0]} is a setting, and should be the same for all; "
            f"write {fields[0]}: ClassVar[...] = ..., or no type"
        )
