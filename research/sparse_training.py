"""Train a vision model while it is pruned by recipe, or fine-tune it after it was pruned at once.

    python -m research.sparse_training                                (digits, two minutes on a CPU)
    torchrun --nproc-per-node 8 -m research.sparse_training DATA --config research/configs/deit.yaml
        --model deit_small_patch16_224 --pretrained --recipe recipes/vit/cap-gradual-90.yaml

Models, data, losses, optimizers and schedules are timm's; options are those of its train.py and of
the program of the CAP paper, with dashes or underscores. Every random number is a function of the
seed, the epoch and the batch, so that a run that was killed and goes on (``--resume``) ends with
the same weights, bit for bit. `training_files.py` says which files there are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import prunus
from prunus.core.ranks import Ranks

from research.common.processes import processes
from research.common.vision_data import broken_images, evaluate, seed_all
from research.training import options as training_options
from research.training import parts
from research.training.files import RunFolder, checkpoint_of, folder_of

log = logging.getLogger("prunus")


class Training:
    """One run: the objects, where it stands, and the loop."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks, device: torch.device) -> None:
        self.args, self.ranks, self.device = args, ranks, device
        folder = folder_of(args)
        recipe = prunus.Recipe.load(args.recipe, **args.set)
        seed_all(args.seed)
        self.plain = parts.build_model(args, ranks, device)
        self.loaders = parts.Loaders(args, self.plain, ranks, device)
        self.upe = -(-len(self.loaders.train) // args.grad_accum_steps)
        parts.set_learning_rate(args, ranks)
        self.optimizer = parts.build_optimizer(args, self.plain)
        self.scheduler, self.epochs = parts.plan(args, recipe, self.optimizer, self.upe)
        self.change = parts.Change(args, self.plain.num_classes, device)
        teacher = parts.build_teacher(args, self.plain)
        self.loss = parts.Loss(args, self.change.mixup is not None, teacher)
        self.update = parts.Update(args, self.plain, device)
        self.autocast = parts.autocast_of(args, device)
        self.ema = self._ema()
        self.model = self._wrapped()
        # whole epochs done, batches of the next one, and updates in all
        self.epoch, self.batch, self.updates = 0, 0, 0
        self.losses = torch.zeros(2, dtype=torch.float64, device=device)
        """sum over the batches of this epoch, and their number"""
        self.before: dict[str, float] = {}
        self.pruned: dict[str, Any] = {}
        """what the last pruning step did: its step, and metrics before and after"""
        state = checkpoint_of(args, folder, ranks.world_size)
        self.files = RunFolder(folder, args)
        self.session = self._attach(recipe)
        self.session.on_prune(self._before_pruning, self._after_pruning)
        self.loaders.order.epoch = lambda: self.epoch
        self.loaders.calibration_order.epoch = lambda: self.session.step
        if state is not None:
            self._load(state)
        self.files.begin(state and state["folder"])

    def _ema(self) -> ModelEmaV3 | None:
        args = self.args
        if not args.model_ema:
            return None
        return ModelEmaV3(self.plain, args.model_ema_decay, use_warmup=args.model_ema_warmup)

    def _wrapped(self) -> nn.Module:
        model: Any = self.plain
        if self.ranks.world_size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            model = DistributedDataParallel(model, device_ids=devices)
        backend = self.args.torchcompile
        return torch.compile(model, backend=backend) if backend else model

    def _attach(self, recipe: prunus.Recipe) -> prunus.Session:
        loss = nn.functional.cross_entropy
        return prunus.attach(
            self.model,
            self.optimizer,
            recipe,
            steps_per_epoch=len(self.loaders.train),
            epochs=self.epochs,
            gradient_accumulation_steps=self.args.grad_accum_steps,
            calibration=prunus.Calibration(self.loaders.calibration, loss, memory=self.args.memory),
            output_dir=self.files.folder,
        )

    def run(self) -> None:
        """Train to the end. What is due is pruned; then the model is saved."""
        with self.session:
            while self.epoch < self.epochs:
                begin = time.monotonic()
                self._train_epoch()
                self._end_epoch(time.monotonic() - begin)
        prunus.save(self.plain, self.files.folder / "model.safetensors", pruning=self.session)
        if self.args.report:
            self.session.report(self.files.folder)
        self.files.close()

    def _train_epoch(self) -> None:
        self.model.train()
        self.loaders.order.begin = self.batch * self.args.batch_size
        for images, labels in self.loaders.train:
            # in place of the random state a checkpoint would have to hold, on every process
            seed_all(self.args.seed, 1, self.epoch, self.batch, self.ranks.rank)
            self._step(images, labels)

    def _step(self, images: Tensor, labels: Tensor) -> None:
        """One batch; an update with the last of those whose gradients are added up."""
        count, total = self.args.grad_accum_steps, len(self.loaders.train)
        first = self.batch - self.batch % count
        size = min(count, total - first)
        last = self.batch == first + size - 1
        images, labels = self.change(images, labels, self.epoch)
        if self.args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        wait = isinstance(self.model, DistributedDataParallel) and not last
        with self.model.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
            with self.autocast():
                loss = self.loss(self.model(images), labels, images)
            self.update(loss / size, self.optimizer, last)
        self.losses += torch.stack([loss.detach().double(), self.losses.new_ones(())])
        self.batch += 1
        if last:
            self._end_update()

    def _end_update(self) -> None:
        self.optimizer.zero_grad()
        self.updates += 1
        if self.ema is not None:
            self.ema.update(self.plain, step=self.updates)
        if self.scheduler is not None:
            self.scheduler.step_update(self.updates)
        done, every = self.updates % self.upe, self.args.checkpoint_steps
        if self.updates % self.args.log_interval == 0:
            mean = (self.losses[0] / self.losses[1]).item()
            log.info(
                "epoch %d, update %d of %d: loss %.4f", self.epoch, done or self.upe, self.upe, mean
            )
        if every and self.updates % every == 0 and done:
            self._save()

    def _end_epoch(self, seconds: float) -> None:
        total, count = self.ranks.all_reduce(self.losses).tolist()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        row: dict[str, Any] = {"epoch": self.epoch, "step": self.session.step}
        row |= {"lr": sum(rates) / len(rates), "train_loss": total / max(1, count)}
        if self.pruned.get("step") == self.session.step:  # what the epoch has learnt, then the cost
            after = {f"pruned_{k}": v for k, v in self.pruned["after"].items()}
            row |= {**self.pruned["before"], **after}
        else:
            row |= self._measure()
        if broken := broken_images(self.loaders.train, self.ranks):
            row["train_broken"] = broken
        self.files.add({**row, "seconds": seconds}, self.plain)
        log.info("epoch %d: top-1 %.2f %%, sparsity %.4f", *_told(row))
        self.session.log(**{k: row[k] for k in ("train_loss", "eval_loss", "eval_top1")})
        if self.scheduler is not None:
            self.scheduler.step(self.epoch + 1)
        self.epoch, self.batch = self.epoch + 1, 0
        self.losses.zero_()
        self._save()
        self.files.keep(self.epoch)

    def _measure(self) -> dict[str, float]:
        """Metrics of the model and of its average; if the better of them is best, it is saved."""
        models = {"eval": self.plain} | ({"ema": self.ema.module} if self.ema is not None else {})
        with self._as_pruned(models):
            sparse = float(prunus.sparsity(self.plain))
            row = {"sparsity": self.session.sparsity, "model_sparsity": sparse}
            for name, model in models.items():
                if self.ranks.world_size > 1 and self.args.dist_bn:
                    distribute_bn(model, self.ranks.world_size, self.args.dist_bn == "reduce")
                found = evaluate(model, self.loaders.test, self.autocast, self.ranks)
                row |= {f"{name}_{key}": value for key, value in found.items()}
                self.files.keep_best(model, self.session, found)
        return row

    @contextlib.contextmanager
    def _as_pruned(self, models: Mapping[str, nn.Module]) -> Iterator[None]:
        """What is pruned is zero; afterwards the weights in training are as they were.

        They are not in between an optimizer's step and pruning, nor are soft masks ever.
        """
        weights = [p.detach() for p in self.plain.parameters()]
        trained = [w.clone() for w in weights]
        for model in models.values():
            self.session.project(model)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, trained)

    def _before_pruning(self) -> None:
        """Each sparsity is measured when it has been trained longest: just before the next one."""
        self.before = self._measure()

    def _after_pruning(self) -> None:
        before, after, step = self.before, self._measure(), self.session.step
        self.pruned = {"step": step, "before": before, "after": after}
        self.files.distribution(step // self.upe, self.session, before, after)
        log.info("pruned after step %d: top-1 %.2f %%, sparsity %.4f", step, *_told(after)[1:])

    def _save(self) -> None:
        if self.ema is not None and self.ranks.world_size > 1:
            for buffer in self.ema.module.buffers():  # a resumed run has rank 0's on all
                torch.distributed.broadcast(buffer, 0)
        state = {
            "arch": self.args.model,
            "next_epoch": self.epoch,
            "next_batch": self.batch,
            "batches": len(self.loaders.train),
            "updates": self.updates,
            "losses": self.ranks.all_reduce(self.losses),
            "state_dict": self.plain.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "prunus": self.session.state_dict(),
            "processes": self.ranks.world_size,
        }
        if self.update.scaler is not None:
            state["amp_scaler"] = self.update.scaler.state_dict()
        if self.ema is not None:
            state["state_dict_ema"] = self.ema.module.state_dict()
        self.files.save(state)

    def _load(self, state: dict[str, Any]) -> None:
        if state["batches"] != (now := len(self.loaders.train)):
            was = state["batches"]
            raise ValueError(f"the run had {was} batches in an epoch, this data makes {now}")
        self.epoch, self.batch = state["next_epoch"], state["next_batch"]
        self.updates = state["updates"]
        if self.ranks.rank == 0:  # they are the sums over all ranks
            self.losses.copy_(state["losses"])
        self.plain.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.session.load_state_dict(state["prunus"])
        if self.update.scaler is not None:
            self.update.scaler.load_state_dict(state["amp_scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["state_dict_ema"])
        log.info("going on at epoch %d, batch %d", self.epoch, self.batch)


def _told(row: dict[str, Any]) -> tuple[Any, ...]:
    return row.get("epoch"), row["eval_top1"], row["sparsity"]


def main(argv: Sequence[str]) -> None:
    args = training_options.parse(argv)
    if args.report and importlib.util.find_spec("jinja2") is None:
        raise ValueError("--report needs: pip install 'prunus[report]'")
    if args.log_wandb:
        try:
            importlib.import_module("wandb")
        except ImportError:
            raise ValueError("--log-wandb needs: pip install wandb") from None
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    with processes(args.device, args.timeout) as (ranks, device):
        level = logging.INFO if ranks.rank == 0 else logging.WARNING
        logging.basicConfig(format="%(message)s", level=level)
        Training(args, ranks, device).run()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
