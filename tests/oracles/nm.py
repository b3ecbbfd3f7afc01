"""N:M training the slow way: autograd functions that choose their masks in each forward pass."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.func import functional_call

import prunus

from tests.oracles.pruning import nm_keep

DECAY = 2e-4
BEGIN, END, STEPS = 3, 15, 18


class Attention(nn.Module):
    """One head, with q, k and v in one weight."""

    def __init__(self, width=8):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj((q @ k.mT).softmax(-1) @ v)


class Conv1D(nn.Module):
    """As transformers has it: the weight is (inputs, outputs)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)

    def forward(self, x):
        return x @ self.weight


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.attn = Attention(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.attn(self.embed(x))).mean(1))


def linear():
    return nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3))


def conv():
    return nn.Sequential(
        nn.Conv2d(2, 8, 2), nn.Tanh(), nn.Conv2d(8, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)
    ).to(memory_format=torch.channels_last)


def conv1d():
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), Conv1D(8, 16), nn.Tanh(), nn.Linear(8, 3))


class Place(NamedTuple):
    """Where masks lie: a model, how recipes name the layer, and its weight as a matrix."""

    build: Callable[[], nn.Module]
    layers: str
    parameter: str
    shape: tuple[int, ...]  # of an input
    rows: Callable[[torch.Tensor], torch.Tensor] = lambda w: w
    """the weight (or a tensor like it) with rows to be grouped last; a view"""
    along: str = ""
    size: int = 32  # of what groups divide


PLACES = {
    "linear": Place(linear, "2", "2.weight", (5,)),
    "conv": Place(conv, "2", "2.weight", (2, 3, 3), lambda w: w.permute(0, 2, 3, 1), size=8),
    "third": Place(Net, "attn.qkv[k]", "attn.qkv.weight", (4, 5), lambda w: w[8:16], size=8),
    "outputs": Place(linear, "2", "2.weight", (5,), lambda w: w.T, " along outputs", 8),
    "conv1d": Place(conv1d, "2", "2.weight", (5,), lambda w: w.T, size=16),
}
# how recipes write a masking, and its beta `t` of `total` steps into the window
DECAYS = {
    "linear": ("decay: linear", lambda t, total: 1 - t / total),
    "linear-rate": ("decay: linear, rate: 0.2", lambda t, total: max(0, 1 - 0.2 * t)),
    "exponential": ("decay: exponential", lambda t, total: math.exp(-11 * t / total)),
    "step": ("decay: step", lambda t, total: 1 - (4 * t // total) / 4),
    "cosine": ("decay: cosine", lambda t, total: 0.5 + math.cos(math.pi * t / total) / 2),
}


class Rule(NamedTuple):
    masking: str
    beta: Callable[[int, int], float] = lambda t, total: 0
    kind: str = "ste"


RULES = {"ste": Rule("ste"), "sr_ste": Rule("sr_ste", kind="sr_ste")}
for _name, (_text, _beta) in DECAYS.items():
    for _kind in ("scaled", "ste"):
        _masking = f"{{name: mdgf, {_text}, gradient: {_kind}}}"
        RULES[f"mdgf-{_name}-{_kind}"] = Rule(_masking, _beta, _kind)
STRUCTURES = {
    "none": ("", [(1, 4)]),
    "stepwise": ("structure: stepwise,", [(3, 4), (2, 4), (1, 4)]),
    "geometric": ("structure: geometric,", [(8, 32), (4, 16), (2, 8), (1, 4)]),
    "list": ("structure: [3:4, 4:8, 3:4, 1:4],", [(3, 4), (4, 8), (3, 4), (1, 4)]),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
}


def recipe(place, rule, structure, begin=BEGIN, end=END, pattern="1:4", more=""):
    return (
        f"modifiers: [nm_training: {{pattern: '{pattern}{place.along}', masking: {rule.masking}, "
        f"layers: ['{place.layers}'], {STRUCTURES[structure][0]} {more} "
        f"window: {{from: {begin}step, to: {end}step}}}}]\n"
    )


def data(place, steps=STEPS):
    generator = torch.Generator().manual_seed(3)
    xs = torch.randn(steps, 6, *place.shape, generator=generator, dtype=torch.float64)
    return list(zip(xs, torch.randint(3, (steps, 6), generator=generator), strict=True))


def model_of(place):
    torch.manual_seed(1)
    return place.build().double()


def keep_of(place, w, n, m):
    """The slow mask of a weight: all that is not in the place is kept."""
    keep = torch.ones_like(w, dtype=torch.bool)
    rows = place.rows(w.detach().abs())
    part = place.rows(keep)
    part.copy_(nm_keep(rows.reshape(-1, rows.shape[-1]), n, m).reshape(part.shape))
    return keep


class Function(torch.autograd.Function):
    """``(m + (1 - m) beta) w``, with the gradient of each rule."""

    @staticmethod
    def forward(ctx: Any, w, m, beta, kind):
        ctx.save_for_backward(w, m)
        ctx.rule = beta, kind
        return (m + (1 - m) * beta) * w

    @staticmethod
    def backward(ctx: Any, g):
        (w, m), (beta, kind) = ctx.saved_tensors, ctx.rule
        if kind == "sr_ste":
            g = g + DECAY * (1 - m) * w
        if kind == "scaled":
            g = g * (m + (1 - m) * beta)
        return g, None, None, None


def oracle(place, rule, structure, make):
    """What the network computes with before each step and after the last: weights, and the mask."""
    model = model_of(place)
    optimizer = make(model.parameters())
    w = model.get_parameter(place.parameter)
    patterns = [(n, m) for n, m in STRUCTURES[structure][1] if place.size % m == 0]
    frozen, seen = None, []
    for t, (x, y) in enumerate(data(place)):
        if t == END:
            frozen = keep_of(place, w, 1, 4)
            with torch.no_grad():
                for tensor in (w, *optimizer.state[w].values()):
                    if tensor.shape == w.shape:
                        tensor.mul_(frozen)
        used = w
        if BEGIN <= t < END:
            n, m = patterns[(t - BEGIN) * len(patterns) // (END - BEGIN)]
            keep = keep_of(place, w, n, m).double()
            used = Function.apply(w, keep, rule.beta(t - BEGIN, END - BEGIN), rule.kind)
        seen.append(used.detach().clone())
        out = functional_call(model, {place.parameter: used}, (x,))
        nn.functional.cross_entropy(out, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if frozen is not None:
            with torch.no_grad():
                w.mul_(frozen)
    return [*seen, w.detach().clone()], frozen


def step(model, optimizer, x, y):
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def session_of(place, model, optimizer, rule, structure):
    return prunus.attach(model, optimizer, recipe(place, rule, structure))


def is_strict(place, w, n=1, m=4):
    """Whether every group has exactly N weights."""
    return bool(((place.rows(w) != 0).reshape(-1, m).sum(1) == n).all())
