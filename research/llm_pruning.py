"""Prune a language model and say what it costs in perplexity.

    python -m research.llm_pruning --prune-method ria --sparsity-type 2:4 --reallocation --lsa \
        --save runs/sparse

prunes a small Llama that is trained first, in minutes on a CPU, on the text that comes with Python;
``--model`` takes a hub id or a local folder instead. N of N:M is the number of weights *kept* of
every M inputs. Options are those of the program of the RIA paper, with dashes or underscores.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunus
import prunus.cli.preview
from prunus.core.patterns import NM, parse_pattern

from research.common import language_model

console = Console()
ALLOCATORS = ("uniform", "owl", "alphapruning", "erk")
METHODS = ("magnitude", "ri", "wanda", "ria", "sparsegpt", "alps")
TASKS = ("boolq", "rte", "hellaswag", "arc_challenge", "mnli")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", help="hub id or local folder; default: a small Llama that is trained first")
    add("--model-folder", default="runs/language-model", help="where that one is kept")
    add("--prune-method", choices=METHODS, default="ria")
    add("--sparsity-ratio", type=float, default=0.5, help="share of the weights removed")
    add("--sparsity-type", default="unstructured", help="unstructured, or N:M with N *kept* of M")
    add("--calib-dataset", default="python", help="a text file, DATASET/CONFIG, or 'python'")
    add("--eval-dataset", help="the same; default: the test part of --calib-dataset")
    add("--nsamples", type=int, default=128, help="calibration windows")
    add(
        "--seqlen",
        type=int,
        help="tokens in a window; default: what the model was made for, 2048 at most",
    )
    add("--seed", type=int, default=0)
    add("--a", type=float, default=0.5, help="exponent of the input norms, for ria")
    add("--per-outneuron", action="store_true", help="the same sparsity for every output")
    add("--allocator", choices=ALLOCATORS, default="uniform", help="how layers share the sparsity")
    add("--reallocation", action="store_true", help="N:M: deal the input channels to groups")
    add("--lsa", action="store_true", help="N:M: and assign them by linear sum assignments")
    add("--fast", action="store_true", help="search on 1,024 rows of scores only")
    add(
        "--shared",
        choices=("leave", "residual", "gather"),
        default="residual",
        help="channels that several layers read: leave, permute the residual stream, or gather",
    )
    add("--refit", action="store_true", help="solve for the weights that stay")
    add("--swap", action="store_true", help="refine masks by exchanging weights")
    add("--semi-sparse-acc", action="store_true", help="run 2:4 on sparse tensor cores and time it")
    add("--eval-zero-shot", action="store_true", help=f"lm-eval on {', '.join(TASKS)}")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where one block at a time is pruned",
    )
    add("--eval-device", help="where the whole model is evaluated; default: --device")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="auto", help="of the loaded model")
    add("--memory", help="for statistics, such as 8GiB")
    add("--save", help="folder for the pruned model, which from_pretrained opens")
    args = parser.parse_args([dashed(argument) for argument in argv])
    check(parser, args)
    args.eval_device = args.eval_device or args.device
    return args


def dashed(argument: str) -> str:
    """An option with dashes for underscores, its value as it is."""
    option, equals, value = argument.partition("=")
    return option.replace("_", "-") + equals + value if option.startswith("--") else argument


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """What is wrong is said before a model is loaded."""
    try:
        pattern = parse_pattern(args.sparsity_type)
    except ValueError as error:
        parser.error(str(error))
    if (args.reallocation or args.lsa) and not isinstance(pattern, NM):
        parser.error("--reallocation and --lsa are for N:M; give --sparsity-type 2:4")
    if (args.reallocation or args.lsa) and args.shared == "gather" and args.save:
        parser.error(
            "--shared gather leaves layers with an index that from_pretrained does not know, so "
            "the model in --save would compute something else; use --shared residual or leave"
        )
    if args.allocator != "uniform" and pattern.fixed is not None:
        parser.error(f"{pattern} fixes every layer's share; drop --allocator")
    if (args.swap and args.prune_method not in ("wanda", "ri", "ria")) or (
        args.refit and args.prune_method == "magnitude"
    ):
        parser.error(
            f"--swap and --refit look at inputs, which {args.prune_method} does not; "
            "--swap is for wanda, ri and ria"
        )
    if args.semi_sparse_acc and (args.sparsity_type != "2:4" or not args.device.startswith("cuda")):
        parser.error("--semi-sparse-acc needs --sparsity-type 2:4 and a CUDA device")
    if args.eval_zero_shot and importlib.util.find_spec("lm_eval") is None:
        parser.error("--eval-zero-shot needs lm-eval: pip install 'lm_eval[hf]'")


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model on the CPU, and tokenizer."""
    if args.model is None:
        return language_model.train(args.model_folder)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, torch_dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(args.model)


def pruner(args: argparse.Namespace) -> Any:
    options: dict[str, Any] = {}
    if args.prune_method in ("ri", "wanda", "ria"):
        options = {"swap": args.swap, "refit": args.refit}
    if args.prune_method == "sparsegpt":
        options = {"refit": args.refit}
    if args.prune_method == "ria":
        options["a"] = args.a
    return prunus.pruners.PRUNERS[args.prune_method](**options)


def prune(model: nn.Module, batches: Any, args: argparse.Namespace) -> prunus.api.results.Result:
    fixed = parse_pattern(args.sparsity_type).fixed is not None
    by_row = args.per_outneuron or args.prune_method == "wanda"  # as its paper compares
    by_row = by_row and args.sparsity_type == "unstructured"
    permute = None
    if args.reallocation or args.lsa:
        search = "lsa" if args.lsa else "reallocate"
        permute = prunus.Permute(search, args.shared, 1024 if args.fast else None)
    return prunus.prune(
        model,
        pruner(args),
        sparsity=None if fixed else args.sparsity_ratio,
        pattern="row" if by_row else args.sparsity_type,
        allocator=None if fixed else args.allocator,
        calibration=prunus.Calibration(batches, memory=args.memory),
        sequential=prunus.Sequential(device=args.device),
        permute=permute,
    )


def semi_sparse(model: nn.Module, result: Any, batch: dict[str, torch.Tensor]) -> None:
    """Put the pruned layers on sparse tensor cores, and say what that brings."""
    from torch.sparse import to_sparse_semi_structured

    model.half()

    def milliseconds() -> float:
        times = []
        for _ in range(12):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            model(**batch)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return 1e3 * sorted(times)[len(times) // 2]

    with torch.inference_mode():
        dense = milliseconds()
        for row in result.rows:
            layer = model.get_submodule(row.name)
            layer.weight = nn.Parameter(to_sparse_semi_structured(layer.weight.detach()), False)
        sparse = milliseconds()
    console.print(
        f"one window of {batch['input_ids'].numel()} tokens in half precision: dense "
        f"{dense:.2f} ms, 2:4 {sparse:.2f} ms, {dense / sparse:.2f} times as fast"
    )


def zero_shot(model: nn.Module, tokenizer: Any) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    found = simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(TASKS))
    console.print(make_table(found))


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    torch.manual_seed(args.seed)
    model, tokenizer = load(args)
    limit = getattr(model.config, "max_position_embeddings", None) or 2048
    args.seqlen = args.seqlen or min(limit, 2048)
    text = language_model.load_text(args.calib_dataset, "train")
    batches = language_model.batches(tokenizer, text, args.nsamples, args.seqlen, args.seed)
    held_out = language_model.load_text(args.eval_dataset or args.calib_dataset, "test")

    def perplexity() -> float:
        home = next(model.parameters()).device
        model.to(args.eval_device)
        found = language_model.perplexity(model, tokenizer, held_out, args.seqlen)
        model.to(home)
        return found

    before, begin = perplexity(), time.perf_counter()
    result = prune(model, batches, args)
    seconds = time.perf_counter() - begin
    console.print(result)
    table = prunus.cli.preview.table_of("model", "method", "pattern", "sparsity", "perplexity")
    kind = type(model).__name__
    table.add_row(kind, "dense", "", f"{0:.4f}", f"{before:.3f}")
    name = args.prune_method + " + refit" * args.refit + " + permutation" * bool(result.permuted)
    table.add_row("", name, result.rows[0].pattern, f"{result.sparsity:.4f}", f"{perplexity():.3f}")
    console.print(table, f"pruned in {seconds:.1f} s", sep="\n")
    if args.save:
        model.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)
        console.print(f"saved to {Path(args.save)}")
    if args.eval_zero_shot:
        zero_shot(model.to(args.eval_device), tokenizer)
    if args.semi_sparse_acc:
        window = torch.randint(model.config.vocab_size, (1, args.seqlen), device=args.device)
        semi_sparse(model.to(args.device), result, {"input_ids": window})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
