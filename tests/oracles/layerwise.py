"""Slow and obvious answers for the methods that look at one layer's inputs."""

import itertools
import math

import numpy as np
import torch
from torch import nn

from prunus.core.layers import all_layers


def _pairs(conv):
    """Kernel, stride, padding and dilation as (rows, columns); a Conv1d has one row."""
    sizes = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    ones = (1, 1, 0, 1) if isinstance(conv, nn.Conv1d) else (None,) * 4
    return [size if one is None else (one, *size) for size, one in zip(sizes, ones, strict=True)]


def _patch(image, top, left, kernel, dilation, channels_inner):
    """What a kernel at (top, left) of a (channels, rows, columns) image sees, as one row."""
    seen = {}
    for c, i, j in itertools.product(range(len(image)), range(kernel[0]), range(kernel[1])):
        y, x = top + i * dilation[0], left + j * dilation[1]
        inside = 0 <= y < image.shape[1] and 0 <= x < image.shape[2]
        seen[(i, j, c) if channels_inner else (c, i, j)] = image[c, y, x] if inside else 0.0
    return [float(seen[key]) for key in sorted(seen)]


def input_rows(module, x, channels_inner=False):
    """(samples, columns) float64: what each output position of a layer sees, one by one."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        return x.double().reshape(-1, x.shape[-1])
    images = x.unsqueeze(2) if isinstance(module, nn.Conv1d) else x
    kernel, stride, padding, dilation = _pairs(module)
    counts = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            images.shape[2:], kernel, stride, padding, dilation, strict=True
        )
    ]
    rows = []
    for image, y, z in itertools.product(images, range(counts[0]), range(counts[1])):
        top, left = y * stride[0] - padding[0], z * stride[1] - padding[1]
        rows.append(_patch(image, top, left, kernel, dilation, channels_inner))
    return torch.tensor(rows, dtype=torch.float64)


def gram(rows):
    """``sum x x^T`` over the rows x."""
    return sum(torch.outer(row, row) for row in rows)


def damped(total, count, damp):
    """``2/n X^T X`` with dead columns at 1, and the damp on its diagonal."""
    h = 2 / count * total
    for j in range(len(h)):
        if h[j, j] == 0:
            h[j, j] = 1
    return h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def relative_importance(w):
    size = w.abs()
    scores = torch.zeros_like(w)
    for i, j in itertools.product(*map(range, w.shape)):
        for whole in (size[:, j].sum(), size[i].sum()):
            if whole > 0:
                scores[i, j] += size[i, j] / whole
    return scores


def best_row_mask(row, total, keep):
    """The keep-mask of so many weights whose zeros cost least, by trying all."""
    best, least = None, math.inf
    for kept in itertools.combinations(range(len(row)), keep):
        mask = torch.tensor([j in kept for j in range(len(row))])
        gap = torch.where(mask, 0, row)
        if float(gap @ total @ gap) < least:
            best, least = mask, float(gap @ total @ gap)
    return best


def inputs_of(model, batches):
    """name -> (samples, columns) of all that a layer is given, beside the model as it is."""
    layers, seen = list(all_layers(model)), {}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda m, args, layer=layer: seen.setdefault(layer.name, []).append(
                input_rows(m, args[0])
            )
        )
        for layer in layers
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def output_error(rows, old, new):
    """``||X (new - old)^T||^2 / ||X old^T||^2``."""
    old, new = old.double().flatten(1), new.double().flatten(1)
    return float((rows @ (new - old).T).square().sum() / (rows @ old.T).square().sum())


def outliers(weights, norms, times):
    """The share of ``|w_ij| ||X_j||`` above so many times the mean of the block."""
    scores = [
        abs(float(w[i, j])) * float(norm[j])
        for w, norm in zip(weights, norms, strict=True)
        for i, j in itertools.product(*map(range, w.shape))
    ]
    mean = sum(scores) / len(scores)
    return sum(score > times * mean for score in scores) / len(scores)


def hill(w):
    """The exponent of the tail beyond the fullest of 100 bins of the eigenvalues' logarithms."""
    logs = sorted(math.log(x) for x in np.linalg.eigvalsh((w.T @ w).numpy()))
    width = (logs[-1] - logs[0]) / 100
    bins = [min(int((x - logs[0]) / width), 99) for x in logs]
    fullest = max(range(100), key=lambda b: (bins.count(b), -b))
    tail = logs[sum(b < fullest for b in bins) :]
    return 1 + (len(tail) - 1) / sum(x - tail[0] for x in tail)
