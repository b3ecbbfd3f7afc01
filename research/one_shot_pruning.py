"""Prune a trained vision model to several sparsities at once, and say what each costs.

    python -m research.one_shot_pruning --sparsities 0.5 0.75 0.9

prunes a small transformer on scikit-learn's digits, which is trained first; ``--model`` takes any
name of timm, ``--data-dir`` a folder of images. One set of statistics serves all sparsities. What
is done is kept in ``results.csv``; the same command again does only what is left. Options are those
of the program of the CAP paper, with dashes or underscores.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timm.data import resolve_data_config
from timm.utils import ParseKwargs
from torch import nn

import prunus
from prunus.cli.preview import table_of
from prunus.core.files import atomic_write
from prunus.core.patterns import parse_pattern
from prunus.core.ranks import Ranks
from prunus.core.selection import select
from prunus.modifiers import PruningModifier
from prunus.report.records import is_main

from research.common import vision_data, vision_models
from research.common.processes import dashed, default_device, processes, read_csv, write_csv

console = Console()
RECIPE = Path(__file__).parent.parent / "recipes" / "vit" / "cap-one-shot-50.yaml"
SPARSITIES = (0.5, 0.6, 0.75, 0.9)
SETTINGS = ("model", "checkpoint", "dataset", "data_dir", "seed", "grad_sampler_batch_size")
SETTINGS += ("train_split", "val_split", "recalibrate", "gs_aug", "model_kwargs", "num_classes")
SETTINGS += ("img_size", "crop_pct", "mean", "std", "interpolation")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data-dir", help="a folder or tar of images; default: digits")
    add("--dataset", default="", help="timm's name, such as torch/cifar10; default: image folder")
    add("--train-split", default="train")
    add("--val-split", default="validation")
    add("--model", help="any name of timm; default: digits_vit")
    add("--model-folder", default=vision_models.FOLDER, help="where digits models are kept")
    checkpoints = ("--checkpoint", "--checkpoint-path")
    add(*checkpoints, default="", help="weights; default: timm's pretrained ones")
    add("--num-classes", type=int, help="of the checkpoint; default: the model's own")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    add("--img-size", type=int, help="of the images, like the next ones; default: the model's own")
    add("--crop-pct", type=float)
    add("--mean", type=float, nargs="+")
    add("--std", type=float, nargs="+")
    add("--interpolation", default="")
    add("--recipe", "--sparseml-recipe", default=str(RECIPE), help="what to prune, and how")
    add("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    batch = ("-gb", "--grad-sampler-batch-size", "--gs-batch-size")
    add(*batch, type=int, default=16, help="images in a calibration batch; one gradient each")
    add("--gs-loader", action="store_true", help="accepted: data is read where a recipe needs it")
    add("--gs-aug", action="store_true", help="calibrate on images changed as for training")
    add("--recalibrate", action="store_true", help="estimate BatchNorm statistics anew")
    add("-vb", "--val-batch-size", "--validation-batch-size", type=int, default=128)
    add("-j", "--workers", type=int, default=4, help="processes that load images")
    add("--memory", help="for statistics, such as 8GiB")
    add("--device", default=default_device())
    add("--timeout", type=float, default=18000, help="seconds that processes wait for another")
    add("--seed", type=int, default=42)
    add("--output-dir", default="runs/one-shot")
    add("--experiment", default="", help="name of a folder within --output-dir")
    add("--save-model", action="store_true", help="keep the pruned models, with masks")
    add("--log-wandb", action="store_true")
    for given in ("--no-prefetcher", "--pin-mem"):
        add(given, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args([dashed(argument) for argument in argv])
    if bad := [s for s in args.sparsities if not 0 <= s <= 1]:
        parser.error(f"--sparsities: {bad[0]:g} is not between 0 and 1")
    if args.data_dir is None and not args.dataset:
        args.data_dir = "digits"
    args.model = args.model or ("digits_vit" if args.data_dir == "digits" else None)
    if args.model is None:
        parser.error("--model is needed with --data-dir; any name of timm")
    if args.data_dir == "digits":
        args.workers = 0  # the images are in memory
    return args


class Results:
    """``results.csv`` and what is drawn from it; only the first process writes."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.path = folder, folder / "results.csv"
        self.rows = read_csv(self.path)
        self.settings = json.loads(json.dumps(settings))  # tuples are lists, as in the file
        self.said = folder / "settings.json"
        binding = bool(self.rows) and self.said.is_file()
        old = json.loads(self.said.read_text()) if binding else self.settings
        if changed := [k for k in self.settings if old.get(k) != self.settings[k]]:
            raise ValueError(
                f"{folder} holds results with another {', '.join(changed)}; "
                "give another --experiment, or remove it"
            )

    def has(self, sparsity: float) -> bool:
        return any(row["sparsity"] == sparsity for row in self.rows)

    def add(self, sparsity: float, model: nn.Module, metrics: dict[str, float]) -> None:
        """``sparsity`` is that of the layers that the recipe prunes; replaces a row of the same."""
        row = {"sparsity": sparsity, "model_sparsity": float(prunus.sparsity(model)), **metrics}
        others = [old for old in self.rows if old["sparsity"] != sparsity]
        self.rows = sorted([*others, row], key=lambda row: row["sparsity"])
        if is_main():
            with atomic_write(self.said) as draft:  # with a row: what fails before binds none
                draft.write_text(json.dumps(self.settings, indent=1) + "\n")
            write_csv(self.path, self.rows)
            console.print(f"sparsity {sparsity:.4f}: top-1 {metrics['top1']:.2f} %")

    def show(self) -> None:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        table = table_of(*columns)
        for row in self.rows:
            shown = (row.get(name, "") for name in columns)
            table.add_row(*("" if value == "" else f"{value:.4f}" for value in shown))
        console.print(table)
        self.plot()
        console.print(f"{self.path}, {self.folder / 'results.png'}")

    def plot(self) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.2), layout="constrained")
        for axis, name in zip(figure.subplots(1, 2), ("top1", "loss"), strict=True):
            axis.plot([r["sparsity"] for r in self.rows], [r[name] for r in self.rows], "o-")
            axis.set(xlabel="sparsity", ylabel="top-1, %" if name == "top1" else name)
            axis.grid(alpha=0.3)
        figure.savefig(self.folder / "results.png", dpi=150)


def pruning_of(recipe: prunus.Recipe) -> PruningModifier:
    """The one ``prune`` entry. Raises ValueError if there are others, or it goes block by block."""
    found = [m for m in recipe.modifiers if isinstance(m, PruningModifier)]
    if trained := [m.name for m in found if type(m) is not PruningModifier]:
        raise ValueError(f"the entry {trained[0]!r} needs training: use sparse_training.py")
    if len(found) != 1:
        raise ValueError(f"the recipe has {len(found)} 'prune' entries; use one with exactly one")
    if found[0].sequential and parse_pattern(found[0].pattern).fixed is None:
        raise ValueError("a 'sequential' recipe has one sparsity at a time; use prunus.prune")
    return found[0]


class Program:
    def __init__(self, args: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
        self.args, self.ranks = args, ranks
        self.recipe = prunus.Recipe.load(args.recipe)
        self.entry = pruning_of(self.recipe)
        settings = {name: getattr(args, name) for name in SETTINGS}
        settings |= {"recipe": self.recipe.to_yaml(), "processes": ranks.world_size}
        if args.recalibrate:
            settings["val_batch_size"] = args.val_batch_size
        self.folder = Path(args.output_dir) / args.experiment
        self.results = Results(self.folder, settings)
        vision_data.seed_all(args.seed)
        chosen = {} if args.num_classes is None else {"num_classes": args.num_classes}
        self.model = vision_models.create(
            args.model,
            pretrained=True,
            checkpoint=args.checkpoint,
            option="--checkpoint",
            folder=args.model_folder,
            ranks=ranks,
            **{**args.model_kwargs, **chosen},
        )
        self.model.to(device).eval()
        config = resolve_data_config(vars(args), model=self.model)
        self.settings = {**config, "num_workers": args.workers, "device": device}
        images = self.images(args.val_split)
        vision_data.check_classes(images, self.model)
        self.test = vision_data.evaluation_loader(
            images, ranks, batch_size=args.val_batch_size, **self.settings
        )

    def images(self, split: str) -> Any:
        args, chans = self.args, self.settings["input_size"][0]
        return vision_data.open_dataset(args.data_dir, args.dataset, split, chans, args.train_split)

    def calibration(self, batch_size: int) -> prunus.Calibration:
        args, images = self.args, self.images(self.args.train_split)
        order = vision_data.Order(len(images), batch_size, args.seed, self.ranks)
        batches = vision_data.training_loader(
            images,
            order,
            batch_size=batch_size,
            is_training=args.gs_aug,
            persistent_workers=False,
            **self.settings,
        )
        return prunus.Calibration(batches, nn.functional.cross_entropy, memory=args.memory)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return vision_data.evaluate(model, self.test, contextlib.nullcontext, self.ranks)

    def run(self) -> None:
        args, results = self.args, self.results
        fixed = parse_pattern(self.entry.pattern).fixed
        wanted = sorted(set(args.sparsities)) if fixed is None else [fixed]
        left = [s for s in wanted if not self.done(s)]
        before = self.before()
        if before not in left and not results.has(before):
            results.add(before, self.model, self.evaluate(self.model))
        if left:
            self.prune(left, fixed is not None)
        if is_main():
            results.show()
            if args.log_wandb:
                self.log()

    def before(self) -> float:
        """The sparsity of the recipe's layers: a checkpoint may be sparse already."""
        layers = select(self.model, self.entry.layers, self.entry.exclude).layers
        zeros = sum(int((layer.local == 0).sum()) for layer in layers)
        return zeros / sum(layer.local.numel() for layer in layers)

    def file(self, sparsity: float) -> Path:
        return self.folder / f"{self.args.model}_sparsity={sparsity:g}.safetensors"

    def done(self, sparsity: float) -> bool:
        """Whether there is nothing left to do; with --save-model, the file has to be there, too."""
        kept = not self.args.save_model or self.file(sparsity).is_file()
        return kept and self.results.has(sparsity)

    def prune(self, left: Sequence[float], fixed: bool) -> None:
        """Each sparsity is on disk before the next begins."""
        entry, data = self.entry, self.calibration(self.args.grad_sampler_batch_size)
        norms = self.calibration(self.args.val_batch_size) if self.args.recalibrate else False
        if fixed:
            prunus.prune(self.model, self.recipe, calibration=data, recalibrate=norms)
            self.keep(left[0])
            return
        targets: Iterator[float] = iter(left)
        prunus.sweep(
            self.model,
            entry.pruner,
            left,
            lambda _: self.keep(next(targets)),
            pattern=entry.pattern,
            layers=entry.layers,
            exclude=entry.exclude,
            allocator=entry.allocator,
            calibration=data,
            recalibrate=norms,
        )

    def keep(self, target: float) -> dict[str, float]:
        metrics = self.evaluate(self.model)
        if self.args.save_model:
            prunus.save(self.model, self.file(target))
        self.results.add(target, self.model, metrics)
        return metrics

    def log(self) -> None:
        import wandb

        run = wandb.init(config=vars(self.args))
        for row in self.results.rows:
            run.log({"sparsity": row["sparsity"], "val/acc": row["top1"], "val/loss": row["loss"]})
        run.finish()


def main(argv: Sequence[str]) -> None:
    args = parse(argv)
    if args.log_wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--log-wandb needs: pip install 'prunus[wandb]'")
    with processes(args.device, args.timeout) as (ranks, device):
        level = logging.INFO if ranks.rank == 0 else logging.WARNING
        logging.basicConfig(format="%(message)s", level=level)
        Program(args, ranks, device).run()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
