"""What is left dense unless asked for: a network's ends, its routers, and what cannot be sparse."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from prunus.core import end_structure
from prunus.core.end_trace import Ends, traced_ends
from prunus.core.layers import Layer, all_layers
from prunus.core.names import few
from prunus.core.ranks import all_ranks
from prunus.core.routers import routers
from prunus.core.transformed import is_transformed
from prunus.core.wrappers import unwrap

log = logging.getLogger("prunus")
READS = "reads the input"
WRITES = "writes the output"
ROUTES = "routes to experts"
ADAPTS = "an adapter or a copy of PEFT"
TRANSFORMED = "its weight is transformed before use, so zeros would be none"
COMPUTED = "its weight is computed by a normalization, not stored"
ADAPTERS = re.compile(r"(^|\.)(lora_\w+|modules_to_save|original_module)(\.|$)")
"""parts of PEFT's modules: adapters begin at zero, and copies are not computed with"""


def left_dense(
    model: nn.Module, layers: Sequence[Layer], run: Callable[[], object] | None = None
) -> dict[str, str]:
    """The names of the layers that the default spares, each with the reason; in their order.

    ``run`` makes a forward pass of the model, in which it is seen what reads the input and what
    writes the output; without it, and for layers that the pass does not reach, the structure of
    the model decides. Any other layer may be pruned.
    """
    reasons: dict[Layer, str] = {}
    for reason, found in _ends(model, layers, run).items():
        reasons |= dict.fromkeys(found, reason)
    reasons |= {layer: ADAPTS for layer in layers if ADAPTERS.search(layer.name)}
    reasons |= {layer: COMPUTED for layer in layers if _is_normalized(layer)}
    reasons |= {layer: TRANSFORMED for layer in layers if is_transformed(layer)}
    return {layer.name: reasons[layer] for layer in layers if layer in reasons}


def _is_normalized(layer: Layer) -> bool:
    """Whether weight or spectral normalization, or another parametrization, makes the weight."""
    name = layer.parameter_name.rpartition(".")[2]
    return is_parametrized(layer.module, name) or f"{name}_g" in layer.module._parameters


def ends(model: nn.Module) -> list[Layer]:
    """The layers that read the input or write the output, as far as the structure says."""
    layers = list(all_layers(model))
    found = _ends(model, layers, None) if layers else {}
    return [layer for layer in layers if layer in found.get(READS, []) + found.get(WRITES, [])]


def dense_line(spared: Mapping[str, str]) -> str:
    """``left dense: stem (reads the input); head_a, head_b (writes the output)``."""
    names: dict[str, list[str]] = {}
    for name, reason in spared.items():
        names.setdefault(reason, []).append(name)
    return "left dense: " + "; ".join(f"{few(x, 8)} ({reason})" for reason, x in names.items())


def left_by_all(entries: Iterable[tuple[Mapping[str, str], Iterable[Layer]]]) -> dict[str, str]:
    """What entries of a recipe spare, given with the layers they prune, and none of them prunes."""
    known = list(entries)
    pruned = {layer.name for _, layers in known for layer in layers}
    return {x: why for spared, _ in known for x, why in spared.items() if x not in pruned}


def _ends(
    model: nn.Module, layers: Sequence[Layer], run: Callable[[], object] | None
) -> dict[str, list[Layer]]:
    """The layers by reason, of which a later one counts more."""
    reading = end_structure.reading(unwrap(model), layers)
    writing = [x for x in end_structure.writing(model, layers) if x not in reading]
    choosing = routers(model, layers)
    seen = None if run is None else _watched(model, layers, run)
    if seen is not None:
        reached = set(seen.reached)
        reading = seen.reading + [x for x in reading if x not in reached]
        if seen.writing and end_structure.own_heads(unwrap(model), layers) is None:
            named = end_structure.output_embeddings(unwrap(model), layers)
            unreached = [x for x in writing if x not in reached]
            writing = [x for x in seen.writing if x not in reading] + named + unreached
        choosing = choosing + seen.choosing
    return {READS: reading, WRITES: writing, ROUTES: choosing}


def _watched(model: nn.Module, layers: Sequence[Layer], run: Callable[[], object]) -> Ends | None:
    """The ends in a forward pass of the first rank, whose data all go by."""
    ranks, found = all_ranks(), None
    try:
        found = traced_ends(model, layers, run) if ranks.rank == 0 else None
    except Exception as error:  # whoever needs the data will run into it, and say so
        log.info("no forward pass shows the ends of the model (%s); its structure says", error)
    named: dict[str, Layer] = {layer.name: layer for layer in layers}
    names = ranks.first(found and [[layer.name for layer in part] for part in found])
    return names and Ends(*([named[name] for name in part] for part in names))
