"""The patches of its input that a convolution multiplies with its weight."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def patches(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """(samples, channels * kernel positions) of an input (examples, channels, *space).

    Columns are in the order of ``weight.flatten(1)``, samples in that of the output's positions.
    An input without the axis of examples is taken for a single one.
    """
    space = len(kernel)
    if x.dim() == space + 1:
        x = x.unsqueeze(0)
    x = nn.functional.pad(x, [p for pad in reversed(padding) for p in (pad, pad)])
    for i in range(space):
        reach = dilation[i] * (kernel[i] - 1) + 1
        x = x.unfold(2 + i, reach, stride[i])[..., :: dilation[i]]
    positions = [2 + i for i in range(space)]
    x = x.permute(0, *positions, 1, *(2 + space + i for i in range(space)))
    return x.reshape(x.shape[: 1 + space].numel(), -1)
