"""Encoding and decoding of 16 million weights in each storage format, in GB/s of dense weights.

A 4096x4096 float32 layer, pruned at random to 10 % (2:4 where the format needs that, and 15 shared
values for EIE's), beside numpy's packbits of the same mask, which is the fastest thing a mask can
do. Bits a weight are exact and counted by the encoder.

    python -m research.benchmarks.formats [--rounds 5] [--density 0.1]
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch
from torch import Tensor

from prunus import formats

from research.benchmarks.measure import add_options, hardware, print_table, seconds

SIZE = 4096
FORMS = ("bitmask", "csr", "csc", "4x4", "2:4", "eie")


def weights(density: float) -> tuple[Tensor, Tensor, Tensor]:
    """Unstructured, 2:4, and unstructured with 15 values."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(SIZE, SIZE, generator=generator)
    sparse = w * (torch.rand(SIZE, SIZE, generator=generator) < density)
    groups = w.view(-1, 4)
    order = groups.abs().argsort(1).argsort(1)
    shared = sparse.sign() * (sparse.abs() * 3).ceil().clamp(max=7)
    return sparse, (groups * (order >= 2)).view(SIZE, SIZE), shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--density", type=float, default=0.1)
    args = parser.parse_args()
    print(hardware(args), "\n")
    sparse, two_of_four, shared = weights(args.density)
    gigabytes = sparse.nbytes / 1e9

    def speed(call: object) -> str:
        times = [seconds(call, args) for _ in range(args.rounds)]  # type: ignore[arg-type]
        middle = statistics.median(times)
        return f"{1e3 * middle:.0f} ms, {gigabytes / middle:.2f} GB/s"

    mask = (sparse != 0).numpy()
    bits = np.packbits(mask)
    rows = [("numpy packbits of the mask", "1", speed(lambda: np.packbits(mask)),
             speed(lambda: np.unpackbits(bits)))]  # fmt: skip
    for form in FORMS:
        w = {"2:4": two_of_four, "eie": shared}.get(form, sparse)
        stored = formats.encode(w, form)
        assert torch.equal(stored.decode(), w)
        each = f"{stored.bits / w.numel():.3f}"
        encoding = speed(lambda w=w, form=form: formats.encode(w, form))
        rows.append((form, each, encoding, speed(stored.decode)))
    half = two_of_four.half()
    rows.append(("2:4 as CUTLASS has it, fp16", "9", speed(lambda: formats.pack_cutlass(half)), ""))
    print_table(("format", "bits a weight", "encode", "decode"), rows)

    tile = formats.encode(two_of_four[:, :8].contiguous(), "2:4")
    print(formats.show_tile(tile))


if __name__ == "__main__":
    main()
