"""What each aten operation does to labels. An operation without a handler freezes its operands."""

from prunus.channels.ops import contractions, layout, normalization, pointwise, reductions

__all__ = ["contractions", "layout", "normalization", "pointwise", "reductions"]
