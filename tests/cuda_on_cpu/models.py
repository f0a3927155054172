"""Small models that together reach every rule of backends/gpu/schedule.py."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A transformer block: layer norm, attention in heads, a residual, a feed-forward part."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        shape = (batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norm(x)).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Several(nn.Module):
    """Operators that rows, loops in an order of their own and reductions with NaN are made of."""

    def forward(self, x: Tensor, index: Tensor) -> dict[str, Tensor]:
        """x [rows, columns], index of rows."""
        ordered = torch.sort(x, dim=-1).values
        gathered = x[index] * torch.softmax(x, -1)[index]
        sums = ordered.cumsum(-1) + gathered.amax(-1, keepdim=True)
        return {"sums": sums, "means": x.mean(0), "same": x, "largest": x.argmax(-1), "smallest": x.argmin(0)}


class Edges(nn.Module):
    """Moves of 16-bit numbers with constants among them, results without elements, and a scatter of one."""

    def forward(self, x: Tensor, half: Tensor, empty: Tensor) -> dict[str, Tensor]:
        """x in bfloat16 and half in float16 [rows, columns], empty [0, columns]."""
        return {
            "flipped": x.flip(0),
            "blocks": torch.block_diag(x, x),
            "halves": torch.block_diag(half, half),
            "padded": F.pad(x, (1, 2), value=3.0),
            "none": torch.sort(empty).values,
            "shaped": empty.reshape(2, 0, 2),
            "sum": empty.sum(0) + 1,
            "reshaped": x[:0].reshape(2, 0, 3),
            "gone": torch.diff(half.float(), n=5),
            "one": torch.scatter_add(half[0, 0].float(), 0, torch.zeros((), dtype=torch.int64), half[0, 1].float()),
        }


class Long(nn.Module):
    """Few, long sums: their parts are added up by blocks of their own, then by a kernel with the epilogue."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.odd, self.conv = nn.Linear(1096, 96), nn.Linear(1033, 45), nn.Conv2d(128, 64, 3, padding=1)
        self.last = nn.Linear(96, 64)

    def forward(self, x: Tensor, image: Tensor) -> dict[str, Tensor]:
        """x [rows, 1096], image [images, 128, height, width]."""
        y = self.last(F.relu(self.long(x)))
        filtered = F.relu(self.conv(image) + image[:, :64])
        return {"product": y, "odd": self.odd(x[:, :1033]), "conv": filtered}


class Cached(nn.Module):
    """Few queries over the keys of a cache, in float32 and in 16 bits, heads of queries in groups and masked."""

    def forward(self, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> dict[str, Tensor]:
        """q [1, 4, 2, 64], keys and values [1, 2, many, 64], seen [2, many] of bool."""
        result = {"all": F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)}
        result["masked"] = F.scaled_dot_product_attention(q, keys, values, seen, enable_gqa=True)
        halves = (x.half() for x in (q[:, :2], keys, values))
        return result | {"halves": F.scaled_dot_product_attention(*halves).float()}


class Sparse(nn.Module):
    """Products whose weights are 2 of 4: a long sum in parts, a residual, convolutions of a pixel, one of a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.last = nn.Linear(1096, 96), nn.Linear(96, 52)
        self.conv, self.strided = nn.Conv2d(256, 96, 1), nn.Conv2d(128, 256, 1, stride=2)
        for layer in self.children():
            groups = layer.weight.data.view(-1, 4)  # type: ignore[union-attr, operator]
            groups[torch.arange(len(groups))[:, None], groups.abs().argsort(1)[:, :2]] = 0

    def forward(self, x: Tensor, image: Tensor) -> dict[str, Tensor]:
        """x [rows, 1096], image [images, height, width, 128]."""
        y = F.relu(self.long(x))
        filtered = self.conv(F.relu(self.strided(image.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        return {"product": self.last(y) + x[:, :52], "conv": filtered}


class Single(nn.Module):
    """Reductions over one element, each with work behind it that a schedule may put into the same loop."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.pixel = nn.Linear(1, 5), nn.Conv2d(1, 3, 1)
        self.each = nn.Conv2d(4, 4, 1, groups=4)

    def forward(self, x: Tensor, image: Tensor) -> list[Tensor]:
        """x [rows, 1], image [images, 4, height, width]."""
        outs = [self.line(x), self.pixel(image[:, :1]) + 1, self.each(image) + image]
        return [F.relu(out) for out in outs] + [x.std(1, correction=0) + 2, x.sum(1) * 2 + 1, x.amax(1) - 3]


class Returned(nn.Module):
    """Results that no kernel makes: an input, a weight twice, and a result that is one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 24))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [rows, 20]."""
        y = x @ self.weight
        return x, self.weight, y, y, self.weight


class Transposed(nn.Module):
    """Transposed convolutions of drawn strides, dilations, paddings, kernels and groups; a result each."""

    def __init__(self, count: int = 8) -> None:
        super().__init__()
        draw = random.Random(0)
        # The second has filters shorter than their stride: phases without a tap, and a tile that is filled up.
        ones = [nn.ConvTranspose2d(6, 9, 3, stride=2, dilation=2), nn.ConvTranspose2d(16, 12, 2, stride=3, groups=2)]
        for _ in range(count):
            stride, dilation, kernel = ([draw.randint(1, 3) for _ in "yx"] for _ in range(3))
            stride[0], dilation[1] = max(stride[0], 2), max(dilation[1], 2)
            padding = [draw.randint(0, 2) for _ in "yx"]
            extra = [draw.randrange(max(pair)) for pair in zip(stride, dilation, strict=True)]
            groups, bias = draw.choice((1, 1, 2)), draw.random() < 0.5
            channels = draw.choice((4, 6, 16)), draw.choice((6, 10, 16))
            ones.append(nn.ConvTranspose2d(*channels, kernel, stride, padding, extra, groups, bias, dilation))
        self.ones = nn.ModuleList(ones)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x [images, 16, height, width], of which each reads its first channels."""
        return {str(n): one(x[:, : one.in_channels]) for n, one in enumerate(self.ones)}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model in eval mode and its inputs; names that are not here are those of graphwright's zoo, shrunk."""
    torch.manual_seed(0)
    if name == "block":
        return Block().eval(), (torch.randn(2, 24, 64),)
    if name == "long":
        return Long().eval(), (torch.randn(40, 1096), torch.randn(2, 128, 9, 7))
    if name == "cached":
        cache = torch.randn(2, 1, 2, 2100, 64)
        return Cached().eval(), (torch.randn(1, 4, 2, 64), *cache, torch.rand(2, 2100) < 0.5)
    if name == "sparse":
        from graphwright.backends.gpu import sparse_weights

        sparse_weights.PAYS = 2.0  # products so small wait for memory, with zeros or without
        return Sparse().eval(), (torch.randn(40, 1096), torch.randn(2, 9, 7, 128))
    if name == "several":
        return Several().eval(), (torch.randn(5, 70), torch.tensor([4, 0, 3, 3, 1]))
    if name == "single":
        return Single().eval(), (torch.randn(3, 1), torch.randn(2, 4, 3, 5))
    if name == "returned":
        return Returned().eval(), (torch.randn(18, 20),)
    if name == "edges":
        x = torch.randn(3, 5).bfloat16()
        return Edges().eval(), (x, x.half(), torch.zeros(0, 4))
    if name == "transposed":
        return Transposed().eval(), (torch.randn(2, 16, 5, 6),)
    from graphwright.compiler.benchmarking import zoo

    return zoo.build(name, small=True)
