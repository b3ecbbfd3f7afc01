"""Peak memory of pruning a model of 12 blocks, block by block from disk and all at once.

A Llama with random weights (hidden size 1024, single precision) is saved; then, in a fresh process
for each, it is pruned by SparseGPT to 2:4

- block by block, the model on the meta device and each block read from the file in its turn;
- block by block, the whole model in memory;
- all at once, the whole model in memory.

Counted is memory beyond the process with its imports, but for pages of the mapped file; the C
library is told to hand freed memory back, which else keeps as much again for later.

    python -m research.benchmarks.sequential_memory
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch
from accelerate import init_empty_weights
from transformers import LlamaConfig, LlamaForCausalLM

import prunus

from research.benchmarks.measure import PeakMemory, add_options, hardware, print_table

WAYS = ("from disk", "in memory", "at once")
CONFIG = LlamaConfig(
    vocab_size=1024,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=12,
    num_attention_heads=8,
    max_position_embeddings=128,
)
FRUGAL = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
SAMPLES, SEQLEN = 32, 128


def run(way: str, folder: str) -> None:
    """Prune in this process; prints the peak and the seconds."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1024, (1, SEQLEN), generator=generator) for _ in range(SAMPLES)]
    data = prunus.Calibration([{"input_ids": x} for x in ids])
    begin = time.perf_counter()
    with PeakMemory("cpu", anonymous=True) as memory:
        if way == "from disk":
            with init_empty_weights():
                model = LlamaForCausalLM(CONFIG).eval()
            sequential = prunus.Sequential(weights=folder, folder=f"{folder}/pruned")
        else:
            model = LlamaForCausalLM.from_pretrained(folder).eval()
            sequential = way == "in memory"
        prunus.prune(model, "sparsegpt", pattern="2:4", calibration=data, sequential=sequential)
    print(memory.extra, time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--way", choices=WAYS, help="(for the processes that are measured)")
    parser.add_argument("--folder")
    args = parser.parse_args()
    line = hardware(args)
    if args.way:
        run(args.way, args.folder)
        return
    print(line, "\n")
    with tempfile.TemporaryDirectory() as folder:
        model = LlamaForCausalLM(CONFIG)
        block = sum(p.nbytes for p in model.model.layers[0].parameters())
        whole = sum(p.nbytes for p in model.parameters())
        model.save_pretrained(folder)
        del model
        rows = []
        for way in WAYS:
            command = [
                sys.executable,
                "-m",
                "research.benchmarks.sequential_memory",
                "--way",
                way,
                "--folder",
                folder,
            ]
            if args.threads:
                command += ["--threads", str(args.threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=FRUGAL)
            peak, took = map(float, done.stdout.split())
            rows.append((way, f"{peak / 2**20:.0f}", f"{peak / whole:.2f}", f"{took:.0f}"))
    print_table(("pruned", "peak MiB", "over the weights", "s"), rows)
    inputs = SAMPLES * SEQLEN * CONFIG.hidden_size * 4
    gram = CONFIG.intermediate_size**2 * 4
    bound = 2 * block + inputs + gram
    parts = f"two blocks' weights ({2 * block / 2**20:.0f}), cached inputs ({inputs / 2**20:.0f})"
    print(f"Goal, MiB: {parts} and one Gram matrix ({gram / 2**20:.0f}): {bound / 2**20:.0f}")


if __name__ == "__main__":
    main()
