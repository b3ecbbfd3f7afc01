"""Networks drawn at random: whatever is offered for removal can be removed, exactly."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prunus.channels import channels, shrink

from tests.channels.channel_oracles import error, masked_copy, randomized

STEPS = (
    "dense",
    "residual",
    "gated",
    "forked",
    "scaled",
    "repeated",
    "shuffled",
    "halves",
    "attend",
)


def made(kind, size, width):
    """The modules of a step."""
    new = 2 * size
    return {
        "dense": lambda: [nn.Linear(width, new)],
        "residual": lambda: [nn.Linear(width, new), nn.Linear(new, width)],
        "gated": lambda: [nn.Linear(width, 2 * new)],
        "forked": lambda: [nn.Linear(width, size), nn.Linear(width, new)],
        "scaled": lambda: [nn.BatchNorm1d(width)],
        "repeated": lambda: [nn.Identity()],
        "shuffled": lambda: [nn.Linear(width, new)],
        "halves": lambda: [nn.Linear(width, new), nn.Linear(size, size)],
        "attend": lambda: [nn.Linear(width, 3 * new), nn.Linear(new, width)],
    }[kind]()


class Drawn(nn.Module):
    """Steps on (batch, tokens, width), each with weights of its own; the width is even."""

    def __init__(self, steps):
        super().__init__()
        self.steps, width = steps, 4
        self.parts = nn.ModuleList()
        for kind, size in steps:
            new = 2 * size
            part = made(kind, size, width)
            self.parts.append(nn.ModuleList(part))
            width = {
                "residual": width,
                "forked": size + new,
                "scaled": width,
                "repeated": 2 * width,
                "attend": width,
            }.get(kind, new)
            if width % 2:
                self.parts[-1].append(nn.Linear(width, width + 1))
                width += 1
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        for (kind, _), part in zip(self.steps, self.parts, strict=True):
            x = getattr(self, kind)(x, *part)
        return self.last(x)

    def even(self, x, rest):
        return rest[0](x) if rest else x

    def dense(self, x, linear, *rest):
        return self.even(linear(x).relu(), rest)

    def residual(self, x, up, down, *rest):
        return self.even(x + down(up(x).tanh()), rest)

    def gated(self, x, up, *rest):
        gate, value = up(x).chunk(2, -1)
        return self.even(gate.sigmoid() * value, rest)

    def forked(self, x, a, b, *rest):
        return self.even(torch.cat([a(x), b(x).relu()], -1), rest)

    def scaled(self, x, norm, *rest):
        return self.even(norm(x.transpose(1, 2)).transpose(1, 2).relu(), rest)

    def repeated(self, x, _, *rest):
        return self.even(x.repeat_interleave(2, -1), rest)

    def shuffled(self, x, linear, *rest):
        x = linear(x)
        b, n, c = x.shape
        return self.even(x.view(b, n, 2, c // 2).transpose(2, 3).reshape(b, n, c), rest)

    def halves(self, x, linear, inner, *rest):
        a, b = linear(x).chunk(2, -1)
        return self.even(torch.cat([a, a + inner(b).relu()], -1), rest)

    def attend(self, x, qkv, proj, *rest):
        b, n, _ = x.shape
        q, k, v = qkv(x).view(b, n, 3, -1, 2).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return self.even(x + proj((weights @ v).transpose(1, 2).reshape(b, n, -1)), rest)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(2, 4)), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.floats(0.1, 0.9),
)
def test_every_unit_that_is_offered_can_be_removed(steps, seed, share):
    model, x = randomized(Drawn(steps), seed), torch.randn(2, 3, 4).double()
    found = channels(model, x)
    if not found.groups:
        return
    assert not found.trace.unknown
    generator = torch.Generator().manual_seed(seed)
    table = {g.name: share * float(torch.rand(1, generator=generator)) for g in found.groups}
    dense = copy.deepcopy(model)
    result = shrink(model, x, "random", allocator=table, measure=False, verify=False)
    assert error(masked_copy(dense, found, result.gone), model, x) < 1e-9
    assert sum(p.numel() for p in model.parameters()) == result.after.params
    again = channels(model, x)
    assert again.costs.total("macs") == result.after.macs
