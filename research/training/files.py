"""The folder of a training run: its table, its checkpoints, and what is logged of its weights.

args.yaml                            all options
summary.csv                          a row for each epoch
records.jsonl                        the session's events
sparsity_distribution_epoch=N.json   layer by layer, for each pruning step
histograms.jsonl                     weights that are left, with --log-param-histogram
best_sparsity=0.7500.safetensors     the best model at each sparsity, with masks
last.pth                             all that --resume needs; timm reads its weights
model.safetensors                    the model in the end, with masks
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

import prunus
from prunus.core.files import atomic_write
from prunus.core.wrappers import clean_parameters
from prunus.report.records import is_main

from research.common.processes import write_csv
from research.training.options import FREE

BINS = 64
KINDS = ("best_sparsity=*", "sparsity_distribution_epoch=*", "checkpoint_epoch=*", "histograms*")
Metrics = Mapping[str, float]


def folder_of(args: argparse.Namespace) -> Path:
    """Where the run is kept: ``output/experiment``, or beside the checkpoint it goes on from."""
    if args.resume not in ("", "auto") and not args.experiment:
        return Path(args.resume).parent
    return Path(args.output) / (args.experiment or args.model.replace("/", "_"))


def checkpoint_of(args: argparse.Namespace, folder: Path, world_size: int) -> dict[str, Any] | None:
    """The state to go on from, or None to begin.

    Raises ValueError if a run would be overwritten, or was made with other options.
    """
    path = folder / "last.pth" if args.resume in ("", "auto") else Path(args.resume)
    if path.parent.resolve() != folder.resolve():
        raise ValueError(
            f"{path} goes on beside its other files; leave out --experiment, or copy the folder "
            f"{path.parent} and resume from the copy"
        )
    if not args.resume and path.is_file():
        raise ValueError(f"{folder} holds a run; give --resume to go on, or another --experiment")
    if not args.resume or (args.resume == "auto" and not path.is_file()):
        return None
    state: dict[str, Any] = read_checkpoint(path)
    if state["processes"] != world_size:
        raise ValueError(
            f"{path} is of {state['processes']} processes, now there are {world_size}, and batches "
            "would be others; start as many"
        )
    mine, theirs = plain(args), state["args"]
    if changed := [k for k in mine if k not in FREE and mine[k] != theirs.get(k)]:
        said = "; ".join(f"{k} was {theirs.get(k)!r} and is {mine[k]!r}" for k in changed)
        raise ValueError(f"{path} is of a run with other options: {said}")
    return state


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Raises ValueError if it is another file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many kinds, by what is in the file
        raise ValueError(f"{path} cannot be read ({error}); give a last.pth to --resume") from None
    if not isinstance(state, dict) or not {"processes", "folder", "args"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of this program; give its last.pth to --resume")
    return state


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The options as a file can hold them."""
    loaded: dict[str, Any] = json.loads(json.dumps(vars(args)))
    return loaded


class RunFolder:
    """Writes the files, on the first process only, and remembers what the next ones depend on."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, float] = {}
        """sparsity -> the best value of the metric there"""
        self.pruned: list[int] = []
        """epochs with a file of their sparsity distribution"""
        self.wandb: Any = None
        self.wandb_id = ""

    def begin(self, state: Mapping[str, Any] | None) -> None:
        if state is not None:
            self.rows, self.best, self.pruned = state["rows"], state["best"], state["pruned"]
            self.wandb_id = state["wandb"]
        if not is_main():
            return
        if state is None:  # left by a run that was killed before its first checkpoint
            for left in (path for kind in KINDS for path in self.folder.glob(kind)):
                left.unlink()
        self._rewind_histograms()
        with atomic_write(self.folder / "args.yaml") as draft:
            draft.write_text(yaml.safe_dump(plain(self.args)))
        if self.args.log_wandb:
            import wandb

            options = {"id": self.wandb_id, "resume": "allow"} if self.wandb_id else {}
            name = self.args.experiment or None
            self.wandb = wandb.init(name=name, config=plain(self.args), **options)
            self.wandb_id = self.wandb.id

    def _rewind_histograms(self) -> None:
        path, known = self.folder / "histograms.jsonl", {row["epoch"] for row in self.rows}
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            lines = [line for line in lines if line.endswith("\n")]
            with atomic_write(path) as draft:
                draft.write_text("".join(x for x in lines if json.loads(x)["epoch"] in known))

    def state_dict(self) -> dict[str, Any]:
        kept = {"rows": self.rows, "best": self.best, "pruned": self.pruned}
        return {**kept, "wandb": self.wandb_id}

    def add(self, row: dict[str, Any], model: nn.Module) -> None:
        """A row of the table, to W&B too, with histograms where asked for."""
        self.rows.append(row)
        if not is_main():
            return
        write_csv(self.folder / "summary.csv", self.rows)
        shapes = histograms(model) if self.args.log_param_histogram else {}
        if shapes:
            line = {"epoch": row["epoch"], "step": row["step"], "layers": shapes}
            with (self.folder / "histograms.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self.wandb is not None:
            self.wandb.log({**row, **self._for_wandb(shapes)}, step=row["step"])

    @staticmethod
    def _for_wandb(shapes: Mapping[str, Any]) -> dict[str, Any]:
        if not shapes:
            return {}
        import numpy as np
        import wandb

        def histogram(shape: Mapping[str, Any]) -> Any:
            edges = np.linspace(shape["low"], shape["high"], BINS + 1)
            return wandb.Histogram(np_histogram=(np.array(shape["counts"]), edges))

        return {f"weights/{name}": histogram(shape) for name, shape in shapes.items()}

    def keep_best(self, model: nn.Module, session: prunus.Session, metrics: Metrics) -> None:
        """Save the model if it is the best that there was at the session's sparsity."""
        name, level = self.args.eval_metric, f"{session.sparsity:.4f}"
        value, old = metrics[name], self.best.get(level)
        if old is None or (value < old if name == "loss" else value > old):
            self.best[level] = value
            path = self.folder / f"best_sparsity={level}.safetensors"
            prunus.save(model, path, pruning=session)

    def distribution(
        self, epoch: int, session: prunus.Session, before: Metrics, after: Metrics
    ) -> None:
        """The sparsity of each layer after the pruning at this step, and what that cost."""
        events = [e for e in session.recorder.events if e["event"] == "prune"]
        layers = {k: v for e in events if e["step"] == session.step for k, v in e["layers"].items()}
        if not layers:  # AC/DC has begun a dense phase
            return
        more = f"_step={session.step}" if epoch in self.pruned else ""
        self.pruned.append(epoch)
        said = {"epoch": epoch, "step": session.step, "sparsity": session.sparsity}
        said |= {"before": dict(before), "after": dict(after), "layers": layers}
        if is_main():
            path = self.folder / f"sparsity_distribution_epoch={epoch}{more}.json"
            with atomic_write(path) as draft:
                draft.write_text(json.dumps(said, indent=1) + "\n")

    def save(self, state: Mapping[str, Any]) -> None:
        """``last.pth``: the old one stays until the new one is complete."""
        if is_main():
            whole = {**state, "folder": self.state_dict(), "args": plain(self.args)}
            path = self.folder / "last.pth"
            try:
                with atomic_write(path) as draft:
                    torch.save(whole, draft)
            except RuntimeError as error:  # which torch makes of a full disk
                raise OSError(
                    f"{path} could not be written, the old one is there: {error}"
                ) from None

    def keep(self, epoch: int) -> None:
        """A copy of ``last.pth`` after so many epochs, which stays."""
        every = self.args.checkpoint_freq
        if is_main() and every > 0 and epoch % every == 0:
            with atomic_write(self.folder / f"checkpoint_epoch={epoch}.pth") as draft:
                shutil.copyfile(self.folder / "last.pth", draft)

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()


def histograms(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Of the weights that are not zero, in `BINS` equal bins from the lowest to the highest."""
    found = {}
    for name, weight in clean_parameters(model).items():
        left = weight.detach()[weight.detach() != 0].float()
        left = left[left.isfinite()]
        if weight.dim() > 1 and len(left):
            low, high = left.min().item(), left.max().item()
            counts = torch.histc(left.cpu(), BINS, low, high).long().tolist()
            found[name] = {"low": low, "high": high, "counts": counts}
    return found
