"""Whole blocks out of a model: those that change what passes through them least."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunus.calibration.batches import tensors_in
from prunus.calibration.calibration import Calibration, undisturbed
from prunus.channels.refusals import check_shrinkable
from prunus.channels.shapes import drop, remember_removed
from prunus.core.progress import track
from prunus.report.tables import Printable

LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
By = Literal["influence", "loss"]


@dataclass(frozen=True)
class Block:
    """A module of a list that gives back the shape it was given."""

    container: str
    index: int

    @property
    def name(self) -> str:
        return f"{self.container}.{self.index}"


@dataclass(frozen=True)
class Shallower(Printable):
    """The blocks that went, in order, by their numbers of that moment, and what they scored."""

    removed: Sequence[tuple[str, float]]
    left: int
    by: str

    title = "blocks that are gone"

    def header(self) -> Sequence[str]:
        return ("block", self.by)

    def cells(self) -> Iterable[Sequence[str]]:
        for name, score in self.removed:
            yield name, f"{score:.4g}"

    def notes(self) -> Sequence[str]:
        return [f"blocks left: {self.left}"]


def drop_blocks(
    model: nn.Module,
    count: int,
    calibration: Calibration,
    by: By = "influence",
    layers: Sequence[str] | None = None,
) -> Shallower:
    """Remove ``count`` blocks in place, one after another, each time the least needed one.

    ``influence`` is one minus the mean cosine of a block's input and output (X. Men et al.,
    "ShortGPT", 2024, https://arxiv.org/abs/2403.03853); ``loss`` is the calibration loss without
    the block (as in B.-K. Kim et al., "Shortened LLaMA", 2024, https://arxiv.org/abs/2402.02834).
    ``layers`` names the lists of blocks; default: all. The layer count in a config follows.

    Raises ValueError if fewer than ``count`` blocks could go and one be left in each list; the
    model is then as it was.

    >>> blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(3)]
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*blocks), nn.Linear(8, 2))
    >>> _ = prunus.drop_blocks(model, 1, prunus.Calibration([torch.randn(4, 4)]))
    >>> len(model[1])
    2
    """
    check_shrinkable(model)
    if by not in ("influence", "loss"):
        raise ValueError(f"by={by!r}; use 'influence' or 'loss'")
    undo = contextlib.ExitStack()
    removed: list[tuple[str, float]] = []
    try:
        for _step in track(range(count), "blocks"):
            block, score = _least(model, calibration, by, layers)
            removed.append((block.name, score))
            _take_out(model, block, undo)
    except BaseException:
        undo.close()
        raise
    for name, _score in removed:
        container, _, index = name.rpartition(".")
        remember_removed(model, container, int(index))
    left = sum(
        len(m) for n, m in model.named_modules() if n in {r.rpartition(".")[0] for r, _ in removed}
    )
    return Shallower(removed, left, by)


def _least(
    model: nn.Module, calibration: Calibration, by: By, layers: Sequence[str] | None
) -> tuple[Block, float]:
    influence = block_influence(model, calibration, layers)
    sizes = {b.container: len(model.get_submodule(b.container)) for b in influence}  # type: ignore[arg-type]
    scores = {b: s for b, s in influence.items() if sizes[b.container] > 1}
    if not scores:
        raise ValueError("no block is left that gives back the shape it was given; remove fewer")
    if by == "loss":
        scores = {block: _loss_without(model, block, calibration) for block in scores}
    block = min(scores, key=lambda b: scores[b])
    return block, scores[block]


def _containers(model: nn.Module, layers: Sequence[str] | None) -> dict[str, nn.Module]:
    """Lists of at least two modules of one class."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        children = list(module.children())
        alike = len(children) > 1 and len({type(child) for child in children}) == 1
        if (
            isinstance(module, nn.ModuleList | nn.Sequential)
            and alike
            and any(children[0].children())
        ):
            found[name] = module
    if layers is not None:
        missing = [name for name in layers if name not in found]
        if missing:
            raise ValueError(
                f"layers: {missing[0]!r} is no list of blocks; there are {', '.join(found)}"
            )
        found = {name: found[name] for name in layers}
    return found


def _first_tensor(value: Any) -> Tensor | None:
    items = value if isinstance(value, (tuple, list)) else [value]
    return next((t for t in items if isinstance(t, Tensor) and t.is_floating_point()), None)


def block_influence(
    model: nn.Module, calibration: Calibration, layers: Sequence[str] | None = None
) -> dict[Block, float]:
    """One minus the mean cosine of input and output, for each block that keeps the shape.

    The mean is that over all tokens (or places) of all batches.
    """
    sums: dict[Block, tuple[float, int]] = {}
    unlike: set[Block] = set()
    inputs: dict[Block, Tensor | None] = {}

    def before(block: Block, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = _first_tensor([*args, *kwargs.values()])
        inputs[block] = None if x is None else x.clone()  # which the block may write to

    def after(block: Block, module: nn.Module, args: Any, output: Any) -> None:
        x, y = inputs.pop(block), _first_tensor(output)
        if x is None or y is None or x.shape != y.shape:
            unlike.add(block)
            return
        dim = -1 if x.dim() == 3 else 1
        cosine = torch.cosine_similarity(x.float(), y.float(), dim=dim)
        total, count = sums.get(block, (0.0, 0))
        sums[block] = total + float((1 - cosine).sum()), count + cosine.numel()

    with contextlib.ExitStack() as stack:
        for name, container in _containers(model, layers).items():
            for index, module in enumerate(container.children()):
                block = Block(name, index)
                first = module.register_forward_pre_hook(partial(before, block), with_kwargs=True)
                stack.callback(first.remove)
                stack.callback(module.register_forward_hook(partial(after, block)).remove)
        with undisturbed(model, calibration), torch.no_grad():
            for batch in calibration:
                calibration.run(model, batch)
    known = {block: sums[block] for block in sums if block not in unlike}
    return {block: total / max(1, count) for block, (total, count) in known.items()}


def _loss_without(model: nn.Module, block: Block, calibration: Calibration) -> float:
    with contextlib.ExitStack() as undo, undisturbed(model, calibration), torch.no_grad():
        _take_out(model, block, undo)
        losses = [
            (float(calibration.loss(model, batch)), _examples(batch)) for batch in calibration
        ]
    if not losses:
        raise ValueError("the calibration data is empty; nothing was removed")
    return sum(loss * count for loss, count in losses) / max(1, sum(n for _, n in losses))


def _examples(batch: Any) -> int:
    """How many examples a batch has, so that a last one of few does not count as much; else 1."""
    sizes = (len(t) for t in tensors_in(batch) if t.dim())
    return next(sizes, 1)


def _take_out(model: nn.Module, block: Block, undo: contextlib.ExitStack) -> None:
    owner, before = drop(model, block.container, block.index)
    undo.callback(setattr, owner, "_modules", before)
    config = getattr(model, "config", None)
    for name in LAYERS:
        if getattr(config, name, None) == len(before):
            undo.callback(setattr, config, name, len(before))
            setattr(config, name, len(before) - 1)
            break
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == len(before):
        undo.callback(setattr, config, "layer_types", kinds)
        config.layer_types = kinds[: block.index] + kinds[block.index + 1 :]  # type: ignore[union-attr]
    _renumber(owner, undo)


def _renumber(owner: nn.Module, undo: contextlib.ExitStack) -> None:
    """A layer of transformers knows its number, which is the place of its cache."""
    for index, module in enumerate(owner.children()):
        for inner in module.modules():
            old = vars(inner).get("layer_idx")
            if isinstance(old, int):
                undo.callback(setattr, inner, "layer_idx", old)
                inner.layer_idx = index  # type: ignore[assignment]


def blocks(model: nn.Module) -> Iterator[str]:
    """Names of the lists of blocks."""
    yield from _containers(model, None)
