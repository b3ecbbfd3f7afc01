"""The options of `sparse_training.py`: names and meanings of timm's train.py, and those of pruning.

``--config FILE.yaml`` holds defaults for them, under the names of the options with underscores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from timm.utils import ParseKwargs

from research.common import vision_models
from research.common.processes import dashed, default_device
from research.training.config import read_config

OUTPUT = "runs/train"
CONFIGS = Path(__file__).parents[1] / "configs"
# what may change between the two parts of a run that is resumed
FREE = ("resume", "config", "data", "data_dir", "model_folder", "workers", "pin_mem", "timeout")
FREE += ("validation_batch_size", "memory", "device", "output", "experiment", "report")
FREE += ("log_interval", "log_wandb", "log_param_histogram", "log_sparsity", "save_last")
FREE += ("checkpoint_freq", "checkpoint_steps", "gs_loader", "said_epochs", "local_rank")
FREE += ("recipe", "set")  # the session compares recipes


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a vision model while it is pruned.",
        allow_abbrev=False,  # what was typed is looked up by its whole name
    )
    parser.add_argument("-c", "--config", help="YAML file of defaults for all other options")
    for add_group in (_pruning, _data, _model, _optimizer, _schedule, _augmentation, _training):
        add_group(parser)
    return parser


def _pruning(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pruning").add_argument
    add("--recipe", "--sparseml-recipe", help="what to prune, how and when")
    add("--set", nargs="*", default={}, action=ParseKwargs, metavar="NAME=VALUE")
    batch = ("-gb", "--gs-batch-size", "--grad-sampler-batch-size")
    add(*batch, type=int, default=16, help="images in a calibration batch; one gradient each")
    add("--gs-loader", action="store_true", help="accepted: data is read where a recipe needs it")
    add("--gs-aug", action="store_true", help="calibrate on images changed as for training")
    add("--memory", help="for statistics, such as 8GiB")
    add("--distill", nargs="?", const="dense", help="learn from the dense model, or a checkpoint")
    add("--distill-weight", type=float, default=0.5, help="share of the loss, from 0 to 1")
    add("--distill-temperature", type=float, default=2.0)
    for given in ("--gs-no-aug", "--gs-no-training", "--gs-aa", "--gs-distributed"):
        add(given, action="store_true", help=argparse.SUPPRESS)
    add("--sparsities", nargs="+", help=argparse.SUPPRESS)


def _data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    parser.add_argument("data", nargs="?", help="the same as --data-dir")
    add("--data-dir", help="a folder or tar of images, or digits")
    add("--dataset", default="", help="timm's name, such as torch/cifar10; default: image folder")
    add("--train-split", default="train")
    add("--val-split", default="validation")
    add("--img-size", type=int)
    add("--in-chans", type=int)
    add("--input-size", nargs=3, type=int)
    add("--crop-pct", type=float)
    add("--mean", type=float, nargs="+")
    add("--std", type=float, nargs="+")
    add("--interpolation", default="")
    add("-b", "--batch-size", type=int, default=128, help="images in a batch of one process")
    add("-vb", "--validation-batch-size", type=int)
    add("-j", "--workers", type=int, default=4, help="processes that load images")
    add("--worker-seeding", default="all", help=argparse.SUPPRESS)
    add("--pin-mem", action="store_true")


def _model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", default="digits_vit", help="any name of timm")
    add("--model-folder", default=vision_models.FOLDER, help="where digits models are kept")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=False)
    add("--initial-checkpoint", default="", help="weights to begin with")
    add("--num-classes", type=int)
    add("--gp", help="global pooling")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    add("--drop", type=float, default=0.0)
    add("--drop-path", type=float)
    add("--drop-block", type=float)
    add("--bn-momentum", type=float)
    add("--bn-eps", type=float)
    add("--sync-bn", action="store_true", help="BatchNorm over the batches of all processes")
    dist_bn = ("reduce", "broadcast", "")
    add("--dist-bn", default="reduce", choices=dist_bn, help="statistics after each epoch")
    add("--channels-last", action="store_true")
    add("--grad-checkpointing", action="store_true")
    add("--torchcompile", nargs="?", const="inductor", help="backend of torch.compile")


def _optimizer(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("optimizer").add_argument
    add("--opt", default="sgd")
    add("--opt-eps", type=float)
    add("--opt-betas", type=float, nargs="+")
    add("--opt-kwargs", nargs="*", default={}, action=ParseKwargs)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=2e-5)
    add("--layer-decay", type=float)
    add("--clip-grad", type=float)
    add("--clip-mode", default="norm", choices=("norm", "value", "agc"))
    add("--grad-accum-steps", type=int, default=1)
    add("--amp", action="store_true")
    add("--amp-dtype", default="float16", choices=("float16", "bfloat16"))
    add("--model-ema", action="store_true", help="average the weights, pruned ones left out")
    add("--model-ema-decay", type=float, default=0.9998)
    add("--model-ema-warmup", action="store_true")


def _schedule(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("learning rate, unless the recipe sets it").add_argument
    add("--epochs", type=int, default=300)
    add("--sched", default="cosine", help="one of timm's schedules, or none")
    add("--sched-on-updates", action="store_true")
    add("--lr", type=float)
    add("--lr-base", type=float, default=0.1, help="for --lr-base-size images in a step")
    add("--lr-base-size", type=int, default=256)
    add("--lr-base-scale", default="", choices=("", "linear", "sqrt"))
    add("--lr-noise", type=float, nargs="+")
    add("--lr-noise-pct", type=float, default=0.67)
    add("--lr-noise-std", type=float, default=1.0)
    add("--lr-cycle-mul", type=float, default=1.0)
    add("--lr-cycle-decay", type=float, default=0.5)
    add("--lr-cycle-limit", type=int, default=1)
    add("--lr-k-decay", type=float, default=1.0)
    add("--warmup-lr", type=float, default=1e-5)
    add("--warmup-epochs", type=int, default=5)
    add("--warmup-prefix", action="store_true")
    add("--min-lr", type=float, default=0.0)
    add("--cooldown-epochs", type=int, default=0)
    add("--patience-epochs", type=int, default=10, help=argparse.SUPPRESS)
    add("--decay-epochs", type=float, default=90)
    add("--decay-milestones", type=int, nargs="+", default=[90, 180, 270])
    add("--decay-rate", "--dr", type=float, default=0.1)


def _augmentation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("augmentation").add_argument
    add("--no-aug", action="store_true")
    add("--scale", type=float, nargs="+", default=[0.08, 1.0])
    add("--ratio", type=float, nargs="+", default=[3 / 4, 4 / 3])
    add("--hflip", type=float, default=0.5)
    add("--vflip", type=float, default=0.0)
    add("--color-jitter", type=float, default=0.4)
    add("--aa", help="automatic augmentation, such as rand-m9-mstd0.5-inc1")
    add("--aug-repeats", type=int, default=0)
    add("--reprob", type=float, default=0.0, help="probability of random erasing")
    add("--remode", default="pixel")
    add("--recount", type=int, default=1)
    add("--train-interpolation", default="random")
    add("--mixup", type=float, default=0.0)
    add("--cutmix", type=float, default=0.0)
    add("--cutmix-minmax", type=float, nargs="+")
    add("--mixup-prob", type=float, default=1.0)
    add("--mixup-switch-prob", type=float, default=0.5)
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"))
    add("--mixup-off-epoch", type=int, default=0)
    add("--smoothing", type=float, default=0.1, help="of labels")
    add("--bce-loss", action="store_true")
    add("--bce-target-thresh", type=float)


def _training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the run").add_argument
    add("--seed", type=int, default=42)
    add("--device", default=default_device())
    add("--deterministic", action="store_true", help="kernels that repeat, bit for bit, on GPUs")
    add("--timeout", type=float, default=18000, help="seconds that processes wait for another")
    add("--output", default=OUTPUT)
    add("--experiment", default="", help="name of a folder within --output; default: the model")
    add("--resume", nargs="?", const="auto", default="", help="a last.pth; default: the run's own")
    add("--checkpoint-steps", type=int, default=0, help="updates between checkpoints in an epoch")
    add("--checkpoint-freq", type=int, default=-1, help="epochs between checkpoints that are kept")
    add("--eval-metric", default="top1", choices=("top1", "top5", "loss"), help="which is best")
    add("--log-interval", type=int, default=50, help="updates between two lines")
    add("--log-wandb", action="store_true")
    add("--log-param-histogram", action="store_true", help="of the weights left, each epoch")
    add("--report", action="store_true", help="write report.html in the end")
    for given in ("--save-last", "--log-sparsity"):  # always so
        add(given, action="store_true", help=argparse.SUPPRESS)
    add("--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # torch.distributed.launch


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; without data and config, those of the digits."""
    parser, argv = build_parser(), [dashed(argument) for argument in argv]
    first = _read(parser, argv)
    data = first.data_dir or first.data or first.dataset
    config = first.config or (CONFIGS / "digits.yaml" if data in ("", "digits") else None)
    variables = {}
    if config is not None:
        defaults = read_config(config, parser)
        own = defaults.pop("set", {})
        variables = {} if first.recipe else own  # they are those of the config's own recipe
        parser.set_defaults(**defaults)
    args = _read(parser, argv)
    args.set = {**variables, **args.set}
    args.data_dir, args.output = args.data_dir or args.data, args.output or OUTPUT
    _check(parser, args)
    args.said_epochs = any(a == "--epochs" or a.startswith("--epochs=") for a in argv)
    return args


def _read(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; data after ``--resume`` or ``--distill`` is data, not their value."""
    args = parser.parse_args(argv)
    if args.resume and (last := Path(args.resume) / "last.pth").is_file():
        args.resume = str(last)
    for name, alone in (("resume", "auto"), ("distill", "dense")):
        given = getattr(args, name)
        is_data = given == "digits" or Path(given or "").suffix == ".tar"
        if given and not args.data and (is_data or Path(given).is_dir()):
            setattr(args, name, alone)
            args.data = given
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.sparsities:
        parser.error("the recipe says the sparsities; for others: --set sparsity=0.9")
    if not args.recipe:
        parser.error("--recipe is needed; recipes/ has some")
    for name in ("epochs", "grad_accum_steps", "log_interval", "batch_size", "gs_batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}; at least 1 is needed")
    if args.sched == "plateau":
        parser.error("--sched plateau depends on what a resumed run forgets; use another")
    if not 0 <= args.distill_weight <= 1:
        parser.error(f"--distill-weight {args.distill_weight:g} is not between 0 and 1")
    if args.data_dir == "digits" or not (args.data_dir or args.dataset):
        args.data_dir, args.workers = "digits", 0  # the images are in memory
