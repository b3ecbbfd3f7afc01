"""What the layerwise methods cost in perplexity, and what refitting does to every layer.

`perplexity`: the built-in language model (`research/common/language_model.py`, trained first if its
folder is empty) pruned block by block, over draws of the calibration windows; or any other model.
`errors`: squared error of each layer's outputs, for SparseGPT alone and with the refit, on that
model and on the demo's vision transformer; all layers see the inputs of the dense model.

    python -m research.benchmarks.layerwise_accuracy --folder runs/language-model
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import prunus
from prunus import ALPS, RIA, Magnitude, Permute, SparseGPT, Wanda

from research import demo
from research.benchmarks.measure import add_options, hardware, print_table
from research.common import language_model

SETTINGS = ("2:4", "0.6", "0.7")
NSAMPLES, SEQLEN = 128, 128
RESIDUAL = Permute("lsa", "residual")
Run = Mapping[str, Any]


def methods() -> dict[str, Run]:
    """Name in the table -> arguments of `prune`; those with a permutation are for 2:4 alone."""
    return {
        "magnitude": {"pruner": Magnitude(), "allocator": "uniform"},
        "Wanda": {"pruner": Wanda(), "pattern": "row"},
        "RIA": {"pruner": RIA()},
        "SparseGPT": {"pruner": SparseGPT()},
        "RIA + permutation": {"pruner": RIA(), "permute": RESIDUAL},
        "RIA + permutation, free ones": {"pruner": RIA(), "permute": "lsa"},
        "RIA + permutation, gathered": {"pruner": RIA(), "permute": Permute("lsa", "gather")},
        "RIA + refit": {"pruner": RIA(refit=True)},
        "Wanda + swap": {"pruner": Wanda(swap=True), "pattern": "row"},
        "Wanda + swap + refit": {"pruner": Wanda(swap=True, refit=True), "pattern": "row"},
        "SparseGPT + refit": {"pruner": SparseGPT(refit=True)},
        "SparseGPT + refit + permutation": {"pruner": SparseGPT(refit=True), "permute": RESIDUAL},
        "ALPS": {"pruner": ALPS()},
        "ALPS + permutation": {"pruner": ALPS(), "permute": RESIDUAL},
        "Wanda, OWL": {"pruner": Wanda(), "pattern": "row", "allocator": "owl"},
        "Wanda per layer": {"pruner": Wanda(), "allocator": "uniform"},
        "Wanda per layer, OWL": {"pruner": Wanda(), "allocator": "owl"},
        "RIA, OWL": {"pruner": RIA(), "allocator": "owl"},
        "ALPS, OWL": {"pruner": ALPS(), "allocator": "owl"},
        "SparseGPT, OWL": {"pruner": SparseGPT(), "allocator": "owl"},
        "SparseGPT, AlphaPruning": {"pruner": SparseGPT(), "allocator": "alphapruning"},
    }


def fits(run: Run, setting: str) -> bool:
    if setting == "2:4":  # fixes every layer's share
        return run.get("allocator") in (None, "uniform")
    return "permute" not in run


def pruned(model: nn.Module, run: Run, setting: str, data: prunus.Calibration) -> nn.Module:
    model, run = copy.deepcopy(model), dict(run)
    if setting == "2:4":
        run |= {"pattern": setting, "allocator": None}
    else:
        run["sparsity"] = float(setting)
    prunus.prune(model, run.pop("pruner"), calibration=data, sequential=True, **run)
    return model


def perplexity(args: argparse.Namespace) -> None:
    model, tokenizer = load(args)
    train, held_out = (language_model.load_text(args.text, split) for split in ("train", "test"))
    if args.eval_text:
        held_out = language_model.load_text(args.eval_text)

    def evaluate(model: nn.Module) -> float:
        return language_model.perplexity(model, tokenizer, held_out, SEQLEN)

    print(f"dense: {evaluate(model):.2f}\n", flush=True)
    found: dict[tuple[str, str], list[float]] = {}
    times: dict[str, list[float]] = {}
    for seed in range(args.seeds):
        data = language_model.batches(tokenizer, train, NSAMPLES, SEQLEN, seed)
        data = prunus.Calibration([{"input_ids": b["input_ids"].to(args.device)} for b in data])
        for setting in SETTINGS:
            for name, run in methods().items():
                if not fits(run, setting) or args.only not in name:
                    continue
                begin = time.perf_counter()
                sparse = pruned(model, run, setting, data)
                times.setdefault(name, []).append(time.perf_counter() - begin)
                found.setdefault((name, setting), []).append(evaluate(sparse))
                print(seed, setting, name, found[name, setting][-1], file=sys.stderr, flush=True)
    rows = [
        (name, *(said(found.get((name, s), [])) for s in SETTINGS), f"{median:.1f}")
        for name in methods()
        if name in times and (median := statistics.median(times[name])) is not None
    ]
    print_table(("method", *SETTINGS, "s"), rows)


def said(values: list[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values)
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def load(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    if args.model is None:
        model, tokenizer = language_model.train(args.folder)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    return model.eval().to(args.device), tokenizer


def errors(args: argparse.Namespace) -> None:
    model, tokenizer = load(args)
    text = language_model.load_text(args.text, "train")
    data = language_model.batches(tokenizer, text, NSAMPLES, SEQLEN)
    batches = [{"input_ids": b["input_ids"].to(args.device)} for b in data]
    (x, _), _ = pair = demo.digits()
    torch.manual_seed(0)
    vit = demo.build()
    demo.train_dense(vit, pair[0], 30)
    tasks = {"language model": (model, batches), "demo's ViT": (vit.eval(), list(x.split(64)))}
    rows = []
    for name, (dense, inputs) in tasks.items():
        for setting in ("2:4", "0.5", "0.7"):
            alone, refitted = (
                layer_errors(dense, SparseGPT(refit=refit), setting, prunus.Calibration(inputs))
                for refit in (False, True)
            )
            ratios = sorted(b / a for a, b in zip(alone, refitted, strict=True))
            lower = f"{sum(r < 1 for r in ratios)} of {len(ratios)}"
            middle = f"{statistics.median(ratios):.3f}"
            rows.append((name, setting, lower, middle, f"{ratios[0]:.3f}", f"{ratios[-1]:.3f}"))
    print_table(("model", "pattern", "layers lowered", "median ratio", "least", "most"), rows)


def layer_errors(
    model: nn.Module, pruner: Any, setting: str, data: prunus.Calibration
) -> list[float]:
    how = {"pattern": "2:4"} if setting == "2:4" else {"sparsity": float(setting)}
    result = prunus.prune(copy.deepcopy(model), pruner, calibration=data, **how)
    return [row.error for row in result.rows]


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "perplexity": perplexity,
    "errors": errors,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", default="runs/language-model", help="of the built-in model")
    parser.add_argument("--model", help="another model: a hub id or local folder")
    parser.add_argument("--text", default="python", help="to calibrate and evaluate on")
    parser.add_argument("--eval-text", help="to evaluate on, if another one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="methods with this in their name")
    args = parser.parse_args()
    print(hardware(args), "\n")
    for part in args.parts:
        PARTS[part](args)


if __name__ == "__main__":
    main()
