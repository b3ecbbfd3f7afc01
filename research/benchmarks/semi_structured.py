"""2:4 on a GPU, for inference: dense against torch's two kernels, by shape and input rows.

A square Linear in half precision, 2:4 by magnitude: dense, CUTLASS, cuSPARSELt, and cuSPARSELt
with the algorithm that its search finds. Median microseconds, in turn. Not measured yet: this was
written without a GPU at hand.

    python -m research.benchmarks.semi_structured [--sizes 1024 4096] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from prunus.core.patterns import NM
from prunus.execution.inference import timings
from prunus.execution.inference.modules import run
from prunus.execution.inference.semi_structured import NAMES, candidates
from prunus.execution.inference.stored import Stored

from research.benchmarks.measure import add_options, hardware, print_table

SIZES = (1024, 2048, 4096, 8192, 16384)
ROWS = (1, 16, 128, 1024, 4096)


def layer(size: int, rows: int, dtype: torch.dtype) -> list[str]:
    """Microseconds of the dense layer and of each kernel, with its gain; or why there are none."""
    w = torch.randn(size, size, device="cuda")
    w = (w * NM(2, 4).mask(w.abs(), 0)).to(dtype)
    x, bias = torch.randn(rows, size, device="cuda", dtype=dtype), w.new_zeros(size)
    specs, refused = candidates(w, rows)
    calls = {"dense": lambda: nn.functional.linear(x, w, bias)}
    for spec in specs:
        try:
            form = Stored.of(w, spec).form
            run(form, x, bias)
        except RuntimeError as error:
            refused[spec.name] = str(error).split("\n")[0]
            continue
        calls[spec.name] = lambda form=form: run(form, x, bias)
    times = {name: 1e6 * t.median for name, t in timings(calls, w.device).items()}
    gains = [
        f"{times[n]:.0f} ({times['dense'] / times[n]:.2f})" if n in times else refused[n]
        for n in NAMES
    ]
    return [str(size), str(rows), f"{times['dense']:.0f}", *gains]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.set_defaults(device="cuda")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    print(hardware(args), "\n")
    with torch.no_grad():
        rows = [layer(n, m, getattr(torch, args.dtype)) for n in args.sizes for m in args.rows]
    print_table(("size", "rows", "us dense", *(f"us {name} (gain)" for name in NAMES)), rows)


if __name__ == "__main__":
    main()
