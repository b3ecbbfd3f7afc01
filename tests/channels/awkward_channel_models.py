"""Small models whose channels are hard to follow, each with example inputs."""

import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A residual convolution, then a flatten that puts 16 positions of each channel in a row."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        return self.fc((x + self.conv(x)).flatten(1))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 4, 1)
        self.c = nn.Conv2d(10, 5, 3)

    def forward(self, x):
        return self.c(F.relu(torch.cat([self.a(x), self.b(x)], 1)))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(12, 3)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class RawScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 3)
        self.scale = nn.Parameter(torch.randn(12))

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)) * self.scale)


class Tied(nn.Module):
    """The width of an embedding that is also the output's weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + torch.relu(self.mix(x)))


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        return torch.einsum("bchw,dc->bdhw", self.conv(x).relu(), self.weight)


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 6), nn.Linear(12, 3)

    def forward(self, x):
        return self.down(self.up(x).relu().repeat_interleave(2, dim=-1))


class PixelShuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.out(F.pixel_shuffle(self.up(x), 2))


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 1), nn.Linear(6 * 16, 4)

    def forward(self, x):
        x = self.conv(x).relu().permute(0, 2, 3, 1)
        return self.fc(x.reshape(len(x), -1))


class ChannelShuffle(nn.Module):
    """The groups are fixed, the channels of each are not."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 12, 1)
        self.b = nn.Conv2d(12, 12, 1, groups=2)
        self.c = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        x = self.b(self.a(x).relu())
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.c(x)


class PatchMerging(nn.Module):
    """As in Swin: four neighbours side by side, no norm between."""

    def __init__(self):
        super().__init__()
        self.embed, self.reduction = nn.Conv2d(3, 6, 1), nn.Linear(24, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.head(self.reduction(x).mean((1, 2)))


class RawLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 8))
        self.bias = nn.Parameter(torch.randn(10))
        self.out = nn.Linear(10, 3)

    def forward(self, x):
        return self.out(F.linear(x, self.weight, self.bias).relu())


class TorchAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x)[0]
        return self.down(self.up(x).relu())


class GroupNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 1), nn.GroupNorm(2, 16)
        self.out = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        return self.out(self.norm(self.conv(x)).relu())


class LayerNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.down(self.norm(self.up(x)))


class RMSNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.RMSNorm(16, eps=1e-2), nn.Linear(16, 3)

    def forward(self, x):
        return self.down(self.norm(self.up(x)))


class Grouped(nn.Module):
    """A depthwise convolution with a multiplier, then one of many narrow groups."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(16, 6, 2, 2)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.grouped(self.depthwise(self.a(x)).relu())
        return self.out(self.up(x).relu())


class Heads(nn.Module):
    """Attention with a fused weight and sizes of its own."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.qkv, self.proj = nn.Linear(8, 48), nn.Linear(16, 8)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, -1))


class PaddedShortcut(nn.Module):
    """The shortcut of a CIFAR ResNet: channels of zeros on both sides."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.a(x).relu()
        return self.c(self.b(x) + F.pad(x, (0, 0, 0, 0, 2, 2)))


class Unknown(nn.Module):
    """Sorting channels is no operation of a table."""

    def __init__(self):
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(8, 12), nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.down(self.mid(self.up(x).sort(-1).values).relu())


class FixedSlice(nn.Module):
    """Positions named in the code cannot move."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(5, 3)

    def forward(self, x):
        return self.down(self.up(x)[..., :5])


def image():
    return torch.randn(2, 3, 4, 4)


def vectors():
    return torch.randn(2, 5, 8)


def tokens():
    return torch.randint(0, 11, (2, 7))


# model, inputs, units in each group
EXACT = {
    "residual and flatten": (Residual, image, [8]),
    "concat": (Concat, image, [6, 4]),
    "gated": (Gated, vectors, [12]),
    "raw scale": (RawScale, vectors, [12]),
    "tied embedding": (Tied, tokens, [8]),
    "einsum": (Einsum, image, [8]),
    "repeat_interleave": (Repeated, vectors, [6]),
    "pixel shuffle": (PixelShuffle, image, [4]),
    "channels last": (ChannelsLast, image, [6]),
    "channel shuffle": (ChannelShuffle, image, [6, 6]),
    "patch merging": (PatchMerging, image, [6, 8]),
    "raw linear": (RawLinear, vectors, [10]),
    "RMSNorm": (RMSNormed, vectors, [16]),
    "grouped convolutions": (Grouped, image, [8, 6]),
    "heads": (Heads, vectors, [4]),
    "padded shortcut": (PaddedShortcut, image, [4]),
    "beside torch's attention": (TorchAttention, vectors, [24]),
    "beside an unknown operation": (Unknown, vectors, [10]),
}
INEXACT = {"GroupNorm": (GroupNormed, image), "LayerNorm": (LayerNormed, vectors)}
REFUSED = {
    "torch's attention": (TorchAttention, vectors, "embed", "nn.MultiheadAttention"),
    "unknown operation": (Unknown, vectors, "up", "unknown operation sort in the model"),
    "fixed slice": (FixedSlice, vectors, "up", "cuts at fixed positions"),
    "padded positions": (PaddedShortcut, image, "b", "positions that stay"),
}
