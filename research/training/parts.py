"""What `sparse_training.py` trains with: timm's models, losses, mixup, optimizers and schedules."""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.data import Mixup, resolve_data_config
from timm.data.random_erasing import RandomErasing
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import load_checkpoint, model_parameters
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import Tensor, nn

import prunus
from prunus.core.ranks import Ranks
from prunus.modifiers import LearningRate
from prunus.modifiers.timing import parse_duration
from prunus.report.records import is_main

from research.common import vision_data, vision_models

log = logging.getLogger("prunus")
Args = argparse.Namespace


def build_model(args: Args, ranks: Ranks, device: torch.device) -> Any:
    """The dense model, on its device."""
    chans = args.in_chans or (args.input_size[0] if args.input_size else None)
    options = {"in_chans": chans, "num_classes": args.num_classes, "global_pool": args.gp}
    options |= {"drop_rate": args.drop, "drop_path_rate": args.drop_path}
    options |= {"drop_block_rate": args.drop_block}
    options |= {"bn_momentum": args.bn_momentum, "bn_eps": args.bn_eps, **args.model_kwargs}
    model = vision_models.create(
        args.model,
        pretrained=args.pretrained,
        checkpoint=args.initial_checkpoint,
        folder=args.model_folder,
        ranks=ranks,
        **{name: value for name, value in options.items() if value is not None},
    )
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model.to(device=device, memory_format=layout)
    return convert_sync_batchnorm(model) if args.sync_bn and ranks.world_size > 1 else model


def build_teacher(args: Args, model: nn.Module) -> nn.Module | None:
    """The dense model to learn from: as it begins, or with the weights of a file."""
    if args.distill is None:
        return None
    teacher = copy.deepcopy(model)
    if args.distill == "dense" and not (args.pretrained or args.initial_checkpoint) and is_main():
        log.warning("--distill: the dense model is untrained; give --pretrained or --distill FILE")
    if args.distill != "dense":
        load_checkpoint(teacher, args.distill)
    return teacher.eval().requires_grad_(False)


def autocast_of(args: Args, device: torch.device) -> Callable[[], Any]:
    if not args.amp:
        return contextlib.nullcontext
    return functools.partial(torch.autocast, device.type, getattr(torch, args.amp_dtype))


class Loaders:
    """Images to train on, to evaluate on, and to calibrate on, as the model wants them."""

    def __init__(self, args: Args, model: Any, ranks: Ranks, device: torch.device) -> None:
        config = resolve_data_config(vars(args), model=model)
        common = {**config, "num_workers": args.workers, "device": device}
        common["pin_memory"] = args.pin_mem
        chans = config["input_size"][0]
        how = {"in_chans": chans, "train": args.train_split}
        source = functools.partial(vision_data.open_dataset, args.data_dir, args.dataset, **how)
        train, test = source(args.train_split), source(args.val_split)
        vision_data.check_classes(test, model)
        batch, calibrating = args.batch_size, args.gs_batch_size
        self.order = vision_data.Order(len(train), batch, args.seed, ranks, args.aug_repeats)
        changes = {**common, **augmentation(args, config)}
        self.train = vision_data.training_loader(
            train, self.order, batch_size=batch, is_training=True, **changes
        )
        self.test = vision_data.evaluation_loader(
            test, ranks, batch_size=args.validation_batch_size or batch, **common
        )
        self.calibration_order = vision_data.Order(len(train), calibrating, args.seed + 1, ranks)
        self.calibration = vision_data.training_loader(
            source(args.train_split),  # a loader gives its images their changes
            self.calibration_order,
            batch_size=calibrating,
            is_training=args.gs_aug,
            **{**(changes if args.gs_aug else common), "persistent_workers": False},
        )


def augmentation(args: Args, config: dict[str, Any]) -> dict[str, Any]:
    names = ("no_aug", "scale", "ratio", "hflip", "vflip", "color_jitter")
    chosen = {name: getattr(args, name) for name in names}
    plain = args.no_aug or not args.train_interpolation
    interpolation = config["interpolation"] if plain else args.train_interpolation
    return {**chosen, "auto_augment": args.aa, "interpolation": interpolation}


class Change:
    """What is done to a batch as a whole: mixup or cutmix, and then random erasing."""

    def __init__(self, args: Args, num_classes: int, device: torch.device) -> None:
        self.off_epoch, self.mixup, self.erase = args.mixup_off_epoch, None, None
        if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None:
            self.mixup = Mixup(
                mixup_alpha=args.mixup,
                cutmix_alpha=args.cutmix,
                cutmix_minmax=args.cutmix_minmax,
                prob=args.mixup_prob,
                switch_prob=args.mixup_switch_prob,
                mode=args.mixup_mode,
                label_smoothing=args.smoothing,
                num_classes=num_classes,
            )
        if args.reprob > 0 and not args.no_aug:
            how = {"mode": args.remode, "max_count": args.recount, "device": device}
            self.erase = RandomErasing(args.reprob, **how)

    def __call__(self, images: Tensor, labels: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        if self.mixup is not None:
            self.mixup.mixup_enabled = not self.off_epoch or epoch < self.off_epoch
            images, labels = self.mixup(images, labels)
        return self.erase(images) if self.erase is not None else images, labels


class Loss:
    """timm's loss for hard or mixed labels and, with a teacher, the distance from its answer.

    The distance is the Kullback-Leibler divergence at a temperature, times its square, so that its
    gradients are as large as the labels' (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).
    """

    def __init__(self, args: Args, mixes: bool, teacher: nn.Module | None) -> None:
        self.teacher, self.weight = teacher, args.distill_weight
        self.temperature = args.distill_temperature
        self.labels: nn.Module
        if args.bce_loss:
            smoothing = 0.0 if mixes else args.smoothing
            threshold = args.bce_target_thresh
            self.labels = BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold)
        elif mixes:
            self.labels = SoftTargetCrossEntropy()  # Mixup has smoothed them
        elif args.smoothing:
            self.labels = LabelSmoothingCrossEntropy(smoothing=args.smoothing)
        else:
            self.labels = nn.CrossEntropyLoss()

    def __call__(self, output: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        loss: Tensor = self.labels(output, labels)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            answer = (self.teacher(images) / self.temperature).log_softmax(1)
        mine = (output / self.temperature).log_softmax(1)
        distance = nn.functional.kl_div(mine, answer, reduction="batchmean", log_target=True)
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * distance


class Update:
    """Gradients, clipping and the optimizer's step, scaled where half precision needs it."""

    def __init__(self, args: Args, model: nn.Module, device: torch.device) -> None:
        self.clip, self.mode, self.model = args.clip_grad, args.clip_mode, model
        half = args.amp and args.amp_dtype == "float16"
        self.scaler = NativeScaler(device.type) if half else None

    def __call__(self, loss: Tensor, optimizer: torch.optim.Optimizer, last: bool) -> None:
        """``last`` of the batches whose gradients are added up."""
        parameters = model_parameters(self.model, exclude_head="agc" in self.mode)
        if self.scaler is not None:
            self.scaler(loss, optimizer, self.clip, self.mode, parameters, need_update=last)
            return
        loss.backward()
        if last:
            if self.clip is not None:
                dispatch_clip_grad(parameters, self.clip, mode=self.mode)
            optimizer.step()


def set_learning_rate(args: Args, ranks: Ranks) -> None:
    """timm's rule for ``--lr-base`` where ``--lr`` was not given."""
    if args.lr is None:
        images = args.batch_size * ranks.world_size * args.grad_accum_steps
        adaptive = any(name in args.opt.lower() for name in ("ada", "lamb"))
        scale = args.lr_base_scale or ("sqrt" if adaptive else "linear")
        ratio = images / args.lr_base_size
        args.lr = args.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def build_optimizer(args: Args, model: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)


def _ends(modifiers: Iterable[Any]) -> list[tuple[float, str]]:
    """When the windows end that say so."""
    windows = [getattr(m, "window", None) for m in modifiers]
    return [parse_duration(w.to) for w in windows if w is not None and w.to]


def plan(
    args: Args, recipe: prunus.Recipe, optimizer: torch.optim.Optimizer, updates: int
) -> tuple[Any, int]:
    """The schedule of the learning rate (None where the recipe sets it), and the epochs.

    A recipe says how many there are by its ``epochs``, or by a learning rate that ends after some
    (then training lasts until the last window that ends after epochs), unless ``--epochs`` was
    typed.
    """
    rates = [m for m in recipe.modifiers if isinstance(m, LearningRate)]
    ends = _ends(rates)
    known = bool(ends) and all(unit == "ep" for _, unit in ends)
    said = [value for value, unit in _ends(recipe.modifiers) if unit == "ep"]
    length = recipe.epochs or (max(said) if known else None)
    if length is not None and not args.said_epochs:
        args.epochs, args.cooldown_epochs = math.ceil(length), 0
        log.info("the recipe's training ends after %d epochs, and so does this one", args.epochs)
    if rates:
        return None, args.epochs
    scheduler, epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=updates
    )
    return scheduler, epochs
