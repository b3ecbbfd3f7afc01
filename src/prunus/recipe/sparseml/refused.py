"""SparseML's modifiers that have no counterpart here, and what to do instead."""

from __future__ import annotations

_QUANTIZE = "prunus does not quantize; quantize the pruned model with torchao or llm-compressor"
_DISTILL = "distillation belongs to the loss of your loop; add the teacher's term there"
_STRUCTURED = "prunus removes weights, not channels or layers; use !GMPruningModifier on them"
_DENSER = (
    "weights that come back are not known here; use !GMPruningModifier or !ACDCPruningModifier"
)
_LOSS = "regularizers belong to the loss of your loop"
_VALUES = "parameters are yours to set, before training or in your loop"

REFUSED = {
    "MFACPruningModifier": "M-FAC is not known here; use !OBSPruningModifier with "
    "fisher_block_size: 192, or !CAPruningModifier",
    "GWProdPruningModifier": "products of gradient and weight are not known here; use "
    "!OBSPruningModifier with fisher_block_size: 1, which also scores by gradients",
    "QuantizationModifier": _QUANTIZE,
    "LegacyQuantizationModifier": _QUANTIZE,
    "DistillationModifier": _DISTILL,
    "PerLayerDistillationModifier": _DISTILL,
    "LayerThinningModifier": _STRUCTURED,
    "LayerPruningModifier": _STRUCTURED,
    "StructuredPruningModifier": _STRUCTURED,
    "RigLPruningModifier": _DENSER,
    "TopKASTPruningModifier": _DENSER,
    "PowerpropagationModifier": _VALUES,
    "ASRegModifier": _LOSS,
    "SetParamModifier": _VALUES,
    "GradualParamModifier": _VALUES,
}
