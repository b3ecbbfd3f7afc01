"""Variables of SparseML's recipes, and ``eval(...)``: arithmetic over them, and nothing else."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from prunus.core.names import did_you_mean
from prunus.recipe.errors import Path, Source

MAX_CHARACTERS, MAX_EXPONENT = 500, 64
BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "float": float,
    "int": int,
    "max": max,
    "min": min,
    "round": round,
}
GRAMMAR = f"numbers, variables, + - * / // % ** and {', '.join(FUNCTIONS)}"


def equation(value: Any) -> str | None:
    """What stands between ``eval(`` and ``)``, if the value is such a text."""
    text = value.strip() if isinstance(value, str) else ""
    if text.startswith("eval(") and text.endswith(")"):
        return text[5:-1].strip()
    return None


class Variables(Mapping[str, Any]):
    """Values by name; those that are equations are worked out when they are asked for.

    Names that are not here are looked up in ``outer``, so a stage's own variable wins.
    """

    def __init__(
        self, values: Mapping[str, Any], source: Source, path: Path, outer: Variables | None = None
    ) -> None:
        self.values_, self.source, self.path, self.outer = values, source, path, outer
        self.open: list[str] = []
        self.known: dict[str, Any] = {}

    def __iter__(self) -> Any:
        return iter(dict.fromkeys([*self.values_, *(self.outer or ())]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        # Mapping's own would work the value out
        return name in self.values_ or (self.outer is not None and name in self.outer)

    def __getitem__(self, name: str) -> Any:
        """Raises RecipeError for an unknown name, and for variables that refer to each other."""
        if name not in self.values_:
            if self.outer is None:
                raise KeyError(name)
            return self.outer[name]
        if name in self.known:
            return self.known[name]
        if name in self.open:
            chain = " -> ".join([*self.open[self.open.index(name) :], name])
            raise self.source.error((*self.path, name), f"variables form a cycle: {chain}")
        self.open.append(name)
        try:
            return self.known.setdefault(name, self.fill(self.values_[name], (*self.path, name)))
        finally:
            self.open.pop()

    def fill(self, value: Any, path: Path) -> Any:
        """The value with every equation in it worked out, in lists and mappings too."""
        if isinstance(value, list):
            return [self.fill(item, (*path, i)) for i, item in enumerate(value)]
        if isinstance(value, dict):
            return {key: self.fill(item, (*path, key)) for key, item in value.items()}
        text = equation(value)
        return value if text is None else self.evaluate(text, path)

    def evaluate(self, text: str, path: Path) -> Any:
        """The value of an equation; a variable that stands alone may be of any kind.

        Raises RecipeError for anything outside the grammar.
        """
        if text in self:
            return self[text]
        try:
            if len(text) > MAX_CHARACTERS:
                raise ValueError(f"more than {MAX_CHARACTERS} characters")
            result = self._node(ast.parse(text, mode="eval").body, path)
            if not math.isfinite(result):
                raise ValueError(f"the result is {result}")
        except (SyntaxError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            if error.__class__.__name__ == "RecipeError":
                raise
            message = error.msg if isinstance(error, SyntaxError) else error
            raise self.source.error(path, f"eval({text}): {message}; it takes {GRAMMAR}") from None
        return result

    def _node(self, node: ast.expr, path: Path) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return node.value
        if isinstance(node, ast.Name):
            return self._number(node.id, path)
        if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
            return UNARY[type(node.op)](self._node(node.operand, path))
        if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
            left, right = self._node(node.left, path), self._node(node.right, path)
            if isinstance(node.op, ast.Pow) and abs(right) > MAX_EXPONENT:
                raise ValueError(f"the exponent {right} is too large")
            return BINARY[type(node.op)](left, right)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            if node.func.id not in FUNCTIONS:
                raise ValueError(
                    f"no function {node.func.id!r}{did_you_mean(node.func.id, FUNCTIONS)}"
                )
            return FUNCTIONS[node.func.id](*(self._node(a, path) for a in node.args))
        raise ValueError(f"{ast.unparse(node)!r} is not allowed")

    def _number(self, name: str, path: Path) -> float:
        if name not in self:
            hint = did_you_mean(name, self) or "; the recipe has no variables"
            raise self.source.error(path, f"unknown variable {name!r}{hint}")
        value = self[name]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is {value!r}, no number")
        return value
