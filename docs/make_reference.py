"""Write reference.md from the docstrings of the public names."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from pathlib import Path

import prunus
from prunus.allocators import ALLOCATORS
from prunus.api.checkpoint import Checkpoint
from prunus.api.results import Result
from prunus.api.sweep_result import SweepResult
from prunus.modifiers import MODIFIERS
from prunus.pruners import PRUNERS

EXTENDING = (
    *("register_pruner", "register_allocator", "register_modifier", "register_statistic"),
    *("Pruner", "ScorePruner", "JointPruner", "Layer", "Pattern", "Ranks"),
    *("Statistic", "Sampling", "InputNorm", "InputGram", "BlockFisher", "SharedFisher"),
    *("Allocator", "SignalAllocator", "Problem", "Unit", "Allocation", "filled"),
    *("Modifier", "Context", "Run", "Window"),
)
HOW_TO = ", ".join(
    f"[{thing}](how-to/{page}.md)"
    for thing, page in (
        ("How to add a pruner", "add-a-pruner"),
        ("an allocator", "add-an-allocator"),
        ("a modifier", "add-a-modifier"),
        ("a statistic", "add-a-statistic"),
        ("a plugin", "make-a-plugin"),
    )
)


def code(text: str) -> str:
    """A docstring's ``literals`` and `names` as Markdown code, its examples as blocks."""
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    parts = [
        f"```text\n{part}\n```" if part.startswith(">>>") else part
        for part in re.split(r"\n\s*\n", text)
    ]
    return "\n\n".join(parts)


def signature(name: str, thing: object) -> str:
    """One line, or one line for each argument where that is too long."""
    sign = inspect.signature(thing)  # type: ignore[arg-type]
    text = re.sub(r"['\"]([^'\"]*)['\"]", r"\1", f"{name}{sign}")
    if len(text) <= 100:
        return text
    lines, starred = [], False
    for parameter in sign.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            lines.append("*")
            starred = True
        lines.append(re.sub(r"['\"]([^'\"]*)['\"]", r"\1", str(parameter)))
    returns = "" if sign.return_annotation is sign.empty else f" -> {sign.return_annotation}"
    return f"{name}(\n" + "".join(f"    {line},\n" for line in lines) + f"){returns}"


def field_docs(cls: type) -> dict[str, str]:
    """The docstrings beneath the fields of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if c.__module__.startswith("prunus.")]):
        tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for field, said in zip(tree.body, tree.body[1:], strict=False):  # type: ignore[attr-defined]
            text = getattr(getattr(said, "value", None), "value", None)
            if isinstance(field, ast.AnnAssign) and isinstance(text, str):
                found[field.target.id] = " ".join(text.split())  # type: ignore[union-attr]
    return found


def attributes(cls: type) -> list[str]:
    """What a base class says of the attributes that are no settings."""
    return [f"- `{name}`: {code(text)}" for name, text in field_docs(cls).items()]


def fields(cls: type) -> list[str]:
    """The fields of a dataclass with their defaults and meanings."""
    docs, lines = field_docs(cls), []
    for field in dataclasses.fields(cls):
        default = field.default
        hidden = default is dataclasses.MISSING or callable(default)  # which has no text to show
        shown = "" if hidden else f" (default `{default!r}`)"
        said = f": {code(docs[field.name])}" if field.name in docs else ""
        lines.append(f"- `{field.name.rstrip('_')}`{shown}{said}")
    return lines


def section(name: str, thing: object, level: int = 3) -> list[str]:
    lines = [f"{'#' * level} {name}", ""]
    if not dataclasses.is_dataclass(thing) and thing is not prunus.Session:
        lines += ["```text", signature(name, thing), "```", ""]
    lines += [code(inspect.getdoc(thing) or ""), ""]
    if dataclasses.is_dataclass(thing) and isinstance(thing, type):
        lines += [*fields(thing), ""]
    elif inspect.isclass(thing) and (found := attributes(thing)):
        lines += [*found, ""]
    if inspect.isclass(thing):
        for method, function in vars(thing).items():
            function = getattr(function, "__func__", function)
            if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
                lines += [f"**`{signature(method, function)}`**", ""]
                lines += [code(inspect.getdoc(function) or ""), ""]
    return lines


def page() -> str:
    lines = [
        "# Reference",
        "",
        "Made from the docstrings by `docs/make_reference.py`.",
        "",
        "## Public names",
        "",
    ]
    for name in prunus.__all__:
        if name not in EXTENDING:
            lines += section(f"prunus.{name}", getattr(prunus, name))
    lines += ["## What they return", ""]
    for thing in (Result, SweepResult, Checkpoint):
        lines += section(thing.__name__, thing)
    lines += ["## To extend prunus", "", f"{HOW_TO}.", ""]
    for name in EXTENDING:
        lines += section(f"prunus.{name}", getattr(prunus, name))
    lines += [
        "## What recipes can name",
        "",
        "Keys are the fields below; `prunus show NAME` prints the same.",
        "",
    ]
    for kind, registry in (("pruner", PRUNERS), ("allocator", ALLOCATORS), ("modifier", MODIFIERS)):
        for name in registry:
            if registry[name].__module__.startswith("prunus."):
                lines += [
                    f"### {kind} `{name}`",
                    "",
                    code(inspect.getdoc(registry[name]) or ""),
                    "",
                ]
                lines += [*fields(registry[name]), ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n").strip() + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "reference.md").write_text(page())
