"""Small runs of the vision programs, for their tests."""

import argparse
import csv
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from prunus.core.ranks import all_ranks

from research import one_shot_pruning, sparse_training
from research.common import vision_data
from research.training import options as training_options

RESEARCH = Path(sparse_training.__file__).parent
GRADUAL = """
modifiers:
  - prune:
      sparsity: {from: 0.3, to: 0.8, curve: linear}
      window: {from: 0ep, to: 2ep, every: 1ep}
"""
CAP = GRADUAL.replace(
    "prune:\n", "prune:\n      pruner: {name: cap, block_size: 16, num_grads: 8}\n"
)
TINY = ["embed_dim=16", "depth=2", "num_heads=2"]
PLAIN = ["--no-pretrained", "--sched", "none", "--lr", "1e-2", "--opt", "sgd"]
"""plain gradient descent keeps differences in rounding as small as they are"""
SMALL = ["--no-pretrained", "--epochs", "3", "-b", "16", "-gb", "4", "--model-kwargs", *TINY]


class Killed(BaseException):
    """Nothing in the program catches this."""


def killed_at(update: int) -> Any:
    """The run ends before it can do anything after so many updates."""
    end = sparse_training.Training._end_update

    def end_or_die(training: sparse_training.Training) -> None:
        end(training)
        if training.updates == update:
            raise Killed

    return mock.patch.object(sparse_training.Training, "_end_update", end_or_die)


class Few(vision_data.Digits):
    """Every eighth of the images."""

    def __init__(self, training: bool, mode: str) -> None:
        super().__init__(training, mode)
        self.pixels, self.labels = self.pixels[::8], self.labels[::8]


def flags(folder: Path, recipe: str, *more: str) -> list[str]:
    """The command line of a run in a folder, which it does not share with others."""
    path = folder / "recipe.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe)
    where = ["--output", str(folder), "--experiment", "run", "--model-folder", str(folder)]
    return ["--device", "cpu", *where, "--recipe", str(path), *SMALL, *more]


def main(command: list[str]) -> None:
    with mock.patch.object(vision_data, "Digits", Few):
        sparse_training.main(command)


def train(folder: Path, recipe: str, *more: str) -> Path:
    main(flags(folder, recipe, *more))
    return folder / "run"


def rows(run: Path) -> list[dict[str, str]]:
    """The table of a run but for its times."""
    with (run / "summary.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for row in table:
        del row["seconds"]
    return table


def options(folder: Path, recipe: str, *more: str) -> argparse.Namespace:
    return training_options.parse(flags(folder, recipe, *more))


def train_on_ranks(folder: Path, recipe: str, *more: str) -> dict[str, torch.Tensor]:
    """This rank's weights and buffers after a run on all of them."""
    return run_on_ranks(flags(folder, recipe, *more))


def run_on_ranks(command: list[str], killed: int = 0) -> dict[str, torch.Tensor]:
    """The same; or nothing, killed after so many updates."""
    with mock.patch.object(vision_data, "Digits", Few), killed_at(killed):
        args = training_options.parse(command)
        training = sparse_training.Training(args, all_ranks(), torch.device("cpu"))
        try:
            training.run()
        except Killed:
            return {}
        return training.plain.state_dict()


def prune_on_ranks(command: list[str]) -> torch.Tensor:
    """This rank's weights after one-shot pruning to the last sparsity, before they are put back."""
    seen = []
    evaluate = one_shot_pruning.Program.evaluate

    def watched(program: one_shot_pruning.Program, model: torch.nn.Module) -> dict[str, float]:
        seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return evaluate(program, model)

    with (
        mock.patch.object(vision_data, "Digits", Few),
        mock.patch.object(one_shot_pruning.Program, "evaluate", watched),
    ):
        args = one_shot_pruning.parse(command)
        one_shot_pruning.Program(args, all_ranks(), torch.device("cpu")).run()
    return seen[-1]
