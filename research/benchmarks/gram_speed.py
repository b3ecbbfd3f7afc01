"""Gram matrices of layers' inputs by halves, beside the whole product.

Both add the same inputs up; the halves are mirrored once, as before a layer is solved. The results
differ by rounding only, which is checked.

    python -m research.benchmarks.gram_speed [--threads 1]
"""

from __future__ import annotations

import argparse

import torch

from prunus.solvers.gram import SMALLEST, add_gram, mirror

from research.benchmarks.measure import Row, add_options, compare, hardware, print_table

COLUMNS = (SMALLEST, 1024, 2048, 4096)
SAMPLES, PARTS = 2048, 8


def rows(columns: int, args: argparse.Namespace) -> Row:
    xs = [torch.randn(SAMPLES, columns) for _ in range(PARTS)]

    def halves() -> torch.Tensor:
        total = torch.zeros(columns, columns)
        for x in xs:
            add_gram(total, x)
        mirror(total)
        return total

    def whole() -> torch.Tensor:
        total = torch.zeros(columns, columns)
        for x in xs:
            total.addmm_(x.T, x)
        return total

    a, b = halves(), whole()
    assert float((a - b).norm() / b.norm()) < 1e-6
    goal = {2048: "1.5", 4096: "1.9"}.get(columns, "")
    return compare(f"{PARTS} x {SAMPLES} inputs, {columns} columns", halves, whole, args, goal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(hardware(args), "\n")
    table = [rows(columns, args) for columns in COLUMNS]
    print_table(("Gram matrix", "halves, s", "whole, s", "ratio", "goal"), table)


if __name__ == "__main__":
    main()
