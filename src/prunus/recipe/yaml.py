"""YAML to plain values, with the line of each; YAML 1.2's idea of numbers, so that ``1e-7`` is a
float, ``2:4`` is text and ``on`` is a word."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from prunus.core.names import did_you_mean
from prunus.recipe.errors import Path, RecipeError, Source

MAX_BYTES, MAX_LINES, MAX_VALUES, MAX_DEPTH = 512 * 1024, 5_000, 20_000, 40


class Loader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's octal, base-60 and timestamp surprises."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own interface)


for _tag, _regex, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
        r"|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_regex})$"), list(_first.replace("\0", ""))
    )
Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"$"), [""])
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


STANDARD = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Tagged:
    """A mapping with a tag, as SparseML writes its modifiers: ``!EpochRangeModifier {...}``."""

    tag: str
    """without the exclamation mark and without a framework's name before it"""
    settings: dict[str, Any]


def _check_size(text: str, name: str) -> None:
    lines = text.count("\n") + 1
    if len(text) > MAX_BYTES or lines > MAX_LINES:
        raise RecipeError(
            f"{name}: {lines:,} lines, {len(text):,} bytes: too long for a recipe "
            f"(at most {MAX_LINES:,} lines); use globs, or a table file"
        )


def read_yaml(text: str, name: str) -> tuple[Any, Source]:
    """The values of a YAML text, and where they stand; SparseML's modifiers as `Tagged`.

    Of keys that stand twice the last counts; `Source.repeated` lists them. Raises RecipeError for
    what is not YAML, and for texts (or expansions of anchors) too large or too deep for a recipe.
    """
    _check_size(text, name)
    try:
        loader = Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{name}:{line}: not YAML: {error.reason}") from None
    try:
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{name}: the recipe is empty")
        reader = _Reader(loader, name)
        return reader.value(node, (), 0), Source(name, reader.lines, reader.repeated)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        message = ", ".join(filter(None, (error.context, error.problem)))
        raise RecipeError(f"{where}: not YAML: {message}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{name}: nested too deeply for a recipe") from None
    finally:
        loader.dispose()


class _Reader:
    """Walks the node tree, counting, so that a bomb of anchors is refused and not built."""

    def __init__(self, loader: Loader, name: str) -> None:
        self.loader, self.name, self.count = loader, name, 0
        self.lines: dict[Path, int] = {}
        self.repeated: dict[Path, int] = {}

    def fail(self, node: yaml.Node, message: str) -> RecipeError:
        return RecipeError(f"{self.name}:{node.start_mark.line + 1}: {message}")

    def value(self, node: yaml.Node, path: Path, depth: int) -> Any:
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            raise self.fail(node, "anchors or lists nested too deeply for a recipe")
        self.lines.setdefault(path, node.start_mark.line + 1)
        if not node.tag.startswith(STANDARD):
            return self.tagged(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, i), depth + 1) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path, depth)
        try:
            return self.loader.construct_object(node)
        except (ValueError, LookupError, AttributeError):  # what PyYAML's constructors let through
            kind = node.tag.removeprefix(STANDARD)
            raise self.fail(node, f"{node.value[:40]!r} cannot be read as {kind}") from None

    def tagged(self, node: yaml.Node, path: Path, depth: int) -> Tagged:
        name = node.tag.strip("!:").rpartition(".")[2]
        if not name.endswith("Modifier"):
            raise self.fail(node, f"unknown tag {node.tag}; native recipes use no tags")
        if isinstance(node, yaml.MappingNode):
            return Tagged(name, self.mapping(node, path, depth))
        if isinstance(node, yaml.ScalarNode) and not node.value:
            return Tagged(name, {})
        raise self.fail(node, f"expected a mapping of the settings of {node.tag}")

    def mapping(self, node: yaml.MappingNode, path: Path, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                raise self.fail(key_node, "keys must be plain words")
            here = (*path, key)
            self.lines[here] = key_node.start_mark.line + 1
            value = self.value(value_node, here, depth + 1)
            if key == "<<":
                for part in value if isinstance(value, list) else [value]:
                    if not isinstance(part, dict):
                        raise self.fail(value_node, "'<<' merges mappings only")
                    merged = {**part, **merged}
            else:
                if key in result:
                    self.repeated.setdefault(here, key_node.start_mark.line + 1)
                result[key] = value
        return {**merged, **result}


_REFERENCE = re.compile(r"\$\{\s*([^}]*?)\s*\}")


def substitute(data: Any, variables: dict[str, Any], source: Source, path: Path = ()) -> Any:
    """Replace ``${name}``: alone, by the variable's value; within text, by its text.

    Raises RecipeError for an unknown variable.
    """
    if isinstance(data, list):
        return [substitute(v, variables, source, (*path, i)) for i, v in enumerate(data)]
    if isinstance(data, dict):
        return {k: substitute(v, variables, source, (*path, k)) for k, v in data.items()}
    if not isinstance(data, str):
        return data

    def look_up(match: re.Match[str]) -> Any:
        if match[1] not in variables:
            hint = did_you_mean(match[1], variables) or "; the recipe has no 'variables'"
            raise source.error(path, f"unknown variable {match[1]!r}{hint}")
        return variables[match[1]]

    if match := _REFERENCE.fullmatch(data.strip()):
        return look_up(match)
    return _REFERENCE.sub(lambda match: str(look_up(match)), data)
