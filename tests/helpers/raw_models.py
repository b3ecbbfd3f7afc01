"""Pairs of models that compute the same: one with weights of its own, one with Linear layers.

Weights are equal, so that whatever prunes the plain one tells what the raw one must become.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _take(plain, raw):
    with torch.no_grad():
        plain.copy_(raw)


class Experts(nn.Module):
    """Three experts in one parameter."""

    def __init__(self, transposed, bmm):
        super().__init__()
        self.num_experts, self.is_transposed, self.bmm = 3, transposed, bmm
        shapes = ((8, 16), (16, 8)) if transposed else ((16, 8), (8, 16))
        self.up_proj, self.down_proj = (nn.Parameter(torch.randn(3, *s) / 3) for s in shapes)

    def forward(self, x):
        route = x.sum(-1).argsort() % 3
        out = torch.zeros_like(x)
        for e in range(3):
            hit = route == e
            out[hit] = self._expert(x[hit], e)
        return out

    def _expert(self, x, e):
        up, down = self.up_proj[e], self.down_proj[e]
        if self.bmm:
            turn = (lambda w: w) if self.is_transposed else (lambda w: w.mT)
            hidden = torch.bmm(x[None], turn(up)[None]).relu()
            return torch.einsum("bti,bio->bto", hidden, turn(down)[None])[0]
        if self.is_transposed:
            return (x @ up).relu() @ down
        return F.linear(F.linear(x, up).relu(), down)


class PlainExperts(nn.Module):
    def __init__(self, raw):
        super().__init__()
        turn = (lambda w: w.T) if raw.is_transposed else (lambda w: w)
        self.up = nn.ModuleList(nn.Linear(8, 16, bias=False) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(16, 8, bias=False) for _ in range(3))
        for e in range(3):
            _take(self.up[e].weight, turn(raw.up_proj[e]))
            _take(self.down[e].weight, turn(raw.down_proj[e]))

    def forward(self, x):
        route = x.sum(-1).argsort() % 3
        out = torch.zeros_like(x)
        for e in range(3):
            hit = route == e
            out[hit] = self.down[e](self.up[e](x[hit]).relu())
        return out


class Heads(nn.Module):
    """Projections to heads and back, as XLNet has them."""

    def __init__(self):
        super().__init__()
        self.d_model, self.n_head, self.d_head = 8, 2, 4
        self.q, self.o = (nn.Parameter(torch.randn(8, 2, 4) / 3) for _ in range(2))

    def forward(self, x):
        return torch.einsum("tnd,hnd->th", torch.einsum("th,hnd->tnd", x, self.q), self.o)


class PlainHeads(nn.Module):
    def __init__(self, raw):
        super().__init__()
        self.q, self.o = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        _take(self.q.weight, raw.q.flatten(1).T)
        _take(self.o.weight, raw.o.flatten(1))

    def forward(self, x):
        return self.o(self.q(x))


class Functional(nn.Module):
    """A weight that the module beside it uses."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(x, self.fc.weight, self.fc.bias)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 1, bias=False, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


class PlainAttention(nn.Module):
    def __init__(self, raw):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8, bias=False) for _ in range(4))
        thirds = raw.mha.in_proj_weight.chunk(3)
        for layer, w in zip((self.q, self.k, self.v), thirds, strict=True):
            _take(layer.weight, w)
        _take(self.out.weight, raw.mha.out_proj.weight)

    def forward(self, x):
        scores = (self.q(x) @ self.k(x).mT / 8**0.5).softmax(-1)
        return self.out(scores @ self.v(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(8, 8, bias=False)

    def forward(self, x):
        return self.rnn(x)[0]


class PlainRecurrent(nn.Module):
    def __init__(self, raw):
        super().__init__()
        self.ih, self.hh = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        _take(self.ih.weight, raw.rnn.weight_ih_l0)
        _take(self.hh.weight, raw.rnn.weight_hh_l0)

    def forward(self, x):
        h, outputs = torch.zeros(1, 8, dtype=x.dtype), []
        for t in x:
            h = torch.tanh(self.ih(t[None]) + self.hh(h))
            outputs.append(h)
        return torch.cat(outputs)


class Pairs(nn.Module):
    """Inputs and their products, as `nn.Bilinear` multiplies its weight with."""

    def __init__(self):
        super().__init__()
        self.b = nn.Bilinear(8, 4, 8, bias=False)

    def forward(self, x):
        return self.b(x, x[:, :4])


class PlainPairs(nn.Module):
    def __init__(self, raw):
        super().__init__()
        self.fc = nn.Linear(32, 8, bias=False)
        _take(self.fc.weight, raw.b.weight.flatten(1))

    def forward(self, x):
        return self.fc((x[:, :, None] * x[:, None, :4]).flatten(1))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 2, groups=2, bias=False, padding=1)

    def forward(self, x):
        return self.conv(x[:, :, None, None]).flatten(1)


class PlainGrouped(nn.Module):
    def __init__(self, raw):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 2, bias=False, padding=1) for _ in range(2))
        for conv, w in zip(self.convs, raw.conv.weight.chunk(2), strict=True):
            _take(conv.weight, w)

    def forward(self, x):
        halves = x[:, :, None, None].chunk(2, 1)
        return torch.cat([c(h) for c, h in zip(self.convs, halves, strict=True)], 1).flatten(1)


class PadsItself(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 2, 1, 1)), self.weight, None, 2)


class SelfPadding(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = PadsItself(8, 8, 2, bias=False)

    def forward(self, x):
        return self.conv(x[:, :, None, None]).flatten(1)


class PlainPadded(nn.Module):
    def __init__(self, raw):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 2, 2, bias=False)
        _take(self.conv.weight, raw.conv.weight)

    def forward(self, x):
        return self.conv(F.pad(x[:, :, None, None], (0, 2, 1, 1))).flatten(1)


class Pair(NamedTuple):
    """``raw_weights`` and ``plain_weights`` give the same matrices, in the same order."""

    raw: Callable[[], nn.Module]
    plain: Callable[[nn.Module], nn.Module]
    raw_weights: Callable[[nn.Module], list[Tensor]]
    plain_weights: Callable[[nn.Module], list[Tensor]]

    def made(self):
        torch.manual_seed(0)
        raw = self.raw().double()
        return raw, self.plain(raw).double()


def _experts(raw):
    turn = (lambda w: w.mT) if raw.is_transposed else (lambda w: w)
    return [w for stack in (raw.up_proj, raw.down_proj) for w in turn(stack)]


def _weights(plain):
    return [p for p in plain.parameters() if p.dim() > 1]


PAIRS = {
    "experts": Pair(lambda: Experts(False, False), PlainExperts, _experts, _weights),
    "experts-bmm": Pair(lambda: Experts(False, True), PlainExperts, _experts, _weights),
    "experts-transposed": Pair(lambda: Experts(True, False), PlainExperts, _experts, _weights),
    "experts-transposed-bmm": Pair(lambda: Experts(True, True), PlainExperts, _experts, _weights),
    "heads": Pair(Heads, PlainHeads, lambda m: [m.q.flatten(1).T, m.o.flatten(1)], _weights),
    "functional": Pair(Functional, copy.deepcopy, _weights, _weights),
    "attention": Pair(
        SelfAttention,
        PlainAttention,
        lambda m: [*m.mha.in_proj_weight.chunk(3), m.mha.out_proj.weight],
        _weights,
    ),
    "recurrent": Pair(Recurrent, PlainRecurrent, _weights, _weights),
    "bilinear": Pair(Pairs, PlainPairs, lambda m: [m.b.weight.flatten(1)], _weights),
    "grouped": Pair(Grouped, PlainGrouped, lambda m: [*m.conv.weight.chunk(2)], _weights),
    "self-padding": Pair(SelfPadding, PlainPadded, _weights, _weights),
}
