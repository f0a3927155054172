"""Random layers of every kind there is a kernel for, at shapes nobody tuned for: primes, ones, uneven padding.

`draw(seed, index)` is the index-th layer of a seed, the same in every process. Kinds take turns; shapes are drawn until
an eager call should take between 0.05 and 50 ms.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

LEAST_MS, MOST_MS = 0.05, 50.0
GFLOPS, GBS = 120.0, 15.0  # of eager, for the estimate

CHANNELS = (1, 2, 3, 4, 7, 8, 13, 16, 24, 31, 32, 40, 48, 61, 64, 80, 96, 101, 112, 128, 144, 160, 192, 211, 240, 256)
WIDE = (*CHANNELS[8:], 320, 384, 401, 480, 512, 640, 768, 809, 1024, 1280, 1536, 1601, 2048)
SIZES = (1, 2, 3, 5, 7, 8, 11, 13, 14, 16, 19, 23, 28, 31, 32, 40, 47, 56, 61, 64, 80, 97, 112, 128, 160, 193, 224, 256)
LENGTHS = (*SIZES[4:], 384, 512, 677, 1000, 1024, 1500, 2048, 4000, 8191, 16000)


class Layer(nn.Module):
    """A function of tensors with the parameters it closes over."""

    def __init__(self, function: Callable[..., Any], *parameters: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        self.constants = nn.ParameterList([nn.Parameter(p, requires_grad=False) for p in parameters])

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, *self.constants)


@dataclass(frozen=True)
class Drawn:
    """A layer before its tensors exist: the shapes of its inputs and how to make it."""

    text: str
    shapes: tuple[tuple[int, ...], ...]
    make: Callable[[], nn.Module]
    flops: float
    elements: float  # read and written
    high: int = 0  # inputs are integers below this; 0: floats
    floats: int = 0  # of integer inputs, how many in front are floats all the same

    @property
    def milliseconds(self) -> float:
        """What an eager call should take."""
        return max(self.flops / GFLOPS, 4 * self.elements / GBS) / 1e6

    def inputs(self, seed: int) -> tuple[torch.Tensor, ...]:
        """Random inputs."""
        generator = torch.Generator().manual_seed(seed)
        floats = self.floats if self.high else len(self.shapes)
        made = [torch.randn(s, generator=generator) for s in self.shapes[:floats]]
        return (*made, *[torch.randint(0, self.high, s, generator=generator) for s in self.shapes[floats:]])


@dataclass(frozen=True)
class Case:
    """One layer of the sweep."""

    index: int
    kind: str
    layer: Drawn

    @property
    def name(self) -> str:
        """Unique within a seed."""
        return f"{self.index:03d} {self.kind} {self.layer.text}"


def draw(seed: int, index: int, kinds: Kinds | None = None) -> Case:
    """The index-th layer of `seed`."""
    kinds = kinds or KINDS
    kind = list(kinds)[index % len(kinds)]
    rng = random.Random(seed * 1_000_003 + index)
    while True:
        layer = kinds[kind](rng)
        if layer is not None and LEAST_MS <= layer.milliseconds <= MOST_MS:
            return Case(index, kind, layer)


Rng = random.Random
Kinds = Mapping[str, Callable[[Rng], "Drawn | None"]]


def _count(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _batch(rng: Rng) -> int:
    return rng.choice((1, 1, 1, 2, 3, 4, 8))


def _rows(rng: Rng) -> int:
    return rng.choice((*range(1, 9), 13, 31, 61, 64, 77, 101, 128, 197, 256, 401, 512, 1009))


def _linear(rng: Rng) -> Drawn:
    m, k, n = _rows(rng), rng.choice(WIDE), rng.choice((*WIDE, 3072, 4096, 5003))
    return Drawn(f"{m}x{k} -> {n}", ((m, k),), lambda: nn.Linear(k, n), 2.0 * m * k * n, m * k + k * n + m * n)


def _matmul(rng: Rng) -> Drawn:
    b, m, k, n = rng.choice((1, 2, 7, 12, 16, 48)), _rows(rng), rng.choice(CHANNELS[3:]), rng.choice(LENGTHS[:20])
    return Drawn(
        f"{b} x {m}x{k}x{n}",
        ((b, m, k), (b, k, n)),
        lambda: Layer(torch.matmul),
        2.0 * b * m * k * n,
        b * (m * k + k * n + m * n),
    )


def _padding(rng: Rng, kernel: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Around each dim, innermost first as F.pad wants it: half of the window, or none, or any."""
    pads: list[int] = []
    for k, d in reversed(list(zip(kernel, dilation, strict=True))):
        half = d * (k - 1) // 2
        pads += rng.choice(([half, half], [half, half], [0, 0], [rng.randint(0, half), rng.randint(0, half + 1)]))
    return pads


def _conv(rng: Rng, dims: int, kernels: Sequence[int], grouping: str) -> Drawn | None:
    channels, filters = rng.choice(WIDE if grouping == "none" else CHANNELS[1:]), rng.choice(WIDE)
    if rng.random() < 0.15:
        channels = rng.choice((1, 2, 3))
    groups = 1
    if grouping == "each":
        channels = filters = rng.choice(WIDE)
        groups = channels
        filters *= rng.choice((1, 1, 1, 2))
    elif grouping == "some":
        groups = rng.choice((2, 3, 4, 8, 16, 32))
        channels, filters = groups * rng.choice((1, 2, 4, 7, 8, 16, 24)), groups * rng.choice((1, 2, 4, 7, 8, 16, 24))
    kernel = [rng.choice(kernels)] * dims if rng.random() < 0.8 else [rng.choice(kernels) for _ in range(dims)]
    stride = [rng.choice((1, 1, 1, 2, 2, 3))] * dims
    dilation = [rng.choice((1, 1, 1, 1, 2, 3))] * dims
    size = [rng.choice(LENGTHS if dims == 1 else SIZES)] * dims
    if dims > 1 and rng.random() < 0.3:
        size[0] = rng.choice(SIZES)
    pads = _padding(rng, kernel, dilation)
    out = [
        (n + sum(pads[-2 * i - 2 :][:2]) - d * (k - 1) - 1) // s + 1
        for i, (n, k, s, d) in enumerate(zip(size, kernel, stride, dilation, strict=True))
    ]
    if min(out) < 1:
        return None
    batch, function = _batch(rng), (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    even = [pads[-2 * i - 2] for i in range(dims)] if all(pads[2 * i] == pads[2 * i + 1] for i in range(dims)) else None

    def make() -> nn.Module:
        weight = torch.randn(filters, channels // groups, *kernel) / (channels // groups * _count(kernel)) ** 0.5

        def run(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            if even is None:
                return function(F.pad(x, pads), w, b, stride, 0, dilation, groups)  # type: ignore[no-any-return, operator]
            return function(x, w, b, stride, even, dilation, groups)  # type: ignore[no-any-return, operator]

        return Layer(run, weight, torch.randn(filters))

    flops = 2.0 * batch * _count(out) * filters * channels // groups * _count(kernel)
    text = (
        f"{batch}x{channels}x{'x'.join(map(str, size))} -> {filters}, kernel {kernel}, stride {stride[0]}, "
        f"pad {pads}, dilation {dilation[0]}, groups {groups}"
    )
    elements = batch * (channels * _count(size) + filters * _count(out)) + filters * channels // groups * _count(kernel)
    return Drawn(text, ((batch, channels, *size),), make, flops, elements)


def _conv_transpose(rng: Rng, dims: int) -> Drawn | None:
    channels, filters = rng.choice(WIDE), rng.choice(CHANNELS)
    stride = rng.choice((1, 2, 2, 2, 3, 4))
    kernel = rng.choice((stride, 2 * stride, 3, 4, 5))
    padding = rng.choice((0, max(0, (kernel - stride) // 2)))
    groups = rng.choice((1, 1, 1, 2)) if channels % 2 == filters % 2 == 0 else 1
    size, batch = rng.choice(LENGTHS if dims == 1 else SIZES), _batch(rng)
    out = (size - 1) * stride - 2 * padding + kernel
    if out < 1:
        return None
    function = (F.conv_transpose1d, F.conv_transpose2d)[dims - 1]

    def make() -> nn.Module:
        weight = torch.randn(channels, filters // groups, *[kernel] * dims) / (channels * kernel) ** 0.5
        return Layer(lambda x, w, b: function(x, w, b, stride, padding, 0, groups), weight, torch.randn(filters))

    text = f"{batch}x{channels}x{size} -> {filters}, kernel {kernel}, stride {stride}, pad {padding}, groups {groups}"
    flops = 2.0 * batch * size**dims * channels * filters // groups * kernel**dims
    elements = batch * (channels * size**dims + filters * out**dims) + channels * filters // groups * kernel**dims
    return Drawn(text, ((batch, channels, *[size] * dims),), make, flops, elements)


def _pool(rng: Rng, kind: str) -> Drawn | None:
    batch, channels, size = _batch(rng), rng.choice(WIDE), rng.choice(SIZES[4:])
    shape = (batch, channels, size, size)
    if kind == "adaptive":
        out = rng.choice((1, 1, 2, 3, 5, 6, 7))
        if out > size:
            return None
        return _simple(f"avg to {out}", shape, lambda x: F.adaptive_avg_pool2d(x, out), channels * batch * out**2)
    kernel = rng.choice((2, 3, 3, 5))
    stride, padding = rng.choice((1, 2, 2, kernel)), rng.choice((0, kernel // 2))
    function: Any = F.max_pool2d if kind == "max" else F.avg_pool2d
    return _simple(
        f"kernel {kernel}, stride {stride}, pad {padding}",
        shape,
        lambda x: function(x, kernel, stride, padding),
        batch * channels * (size // stride) ** 2,
    )


def _simple(
    text: str, shape: Sequence[int], function: Callable[..., Any], written: float, *parameters: tuple[int, ...]
) -> Drawn:
    """A layer of one input whose time is that of moving its elements."""
    return Drawn(
        f"{'x'.join(map(str, shape))} {text}",
        (tuple(shape),),
        lambda: Layer(function, *[torch.rand(p) + 0.5 for p in parameters]),
        0.0,
        _count(shape) + written,
    )


def _norm(rng: Rng, kind: str) -> Drawn:
    if kind in ("group", "batch"):
        groups = rng.choice((1, 2, 4, 8, 32))
        channels, size = groups * rng.choice((1, 3, 4, 8, 16)), rng.choice(SIZES[4:])
        shape: tuple[int, ...] = (_batch(rng), channels, size, size)
        if kind == "group":
            return _simple(
                f"{groups} groups",
                shape,
                lambda x, w, b: F.group_norm(x, groups, w, b),
                _count(shape),
                (channels,),
                (channels,),
            )
        return _simple("", shape, lambda x, m, v, w, b: F.batch_norm(x, m, v, w, b), _count(shape), *[(channels,)] * 4)
    shape = (_batch(rng), rng.choice(LENGTHS), rng.choice(WIDE))
    last = (shape[-1],)
    if kind == "rms":
        return _simple("", shape, lambda x, w: F.rms_norm(x, last, w), _count(shape), last)
    return _simple("", shape, lambda x, w, b: F.layer_norm(x, last, w, b), _count(shape), last, last)


def _softmax(rng: Rng) -> Drawn:
    shape = (_batch(rng), rng.choice((1, 8, 12, 21)), rng.choice(SIZES[4:]), rng.choice(LENGTHS))
    dim = rng.choice((-1, -1, 1, 2))
    function = rng.choice((F.softmax, F.log_softmax))
    return _simple(f"{function.__name__} of dim {dim}", shape, lambda x: function(x, dim), _count(shape))


def _attention(rng: Rng) -> Drawn:
    heads, dim = rng.choice((1, 4, 8, 12, 16)), rng.choice((32, 40, 64, 64, 80, 96, 128))
    batch, keys = rng.choice((1, 1, 2, 4)), rng.choice((16, 31, 64, 128, 197, 256, 509, 512, 1024))
    queries = rng.choice((1, keys, keys, keys))
    kind = rng.choice(("plain", "causal", "mask", "bias", "grouped")) if queries == keys else "plain"
    fewer = max(1, heads // 4) if kind == "grouped" else heads
    shapes: tuple[tuple[int, ...], ...] = (
        (batch, heads, queries, dim), (batch, fewer, keys, dim), (batch, fewer, keys, dim),
    )  # fmt: skip
    if kind == "bias":
        shapes = (*shapes, (1, heads, queries, keys))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        mask = rest[0] > 0 if kind == "mask" else rest[0] if rest else None
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal", enable_gqa=kind == "grouped")

    def make() -> nn.Module:
        return Layer(run, torch.randn(queries, keys).abs_().clamp_(max=3).sub_(0.2)) if kind == "mask" else Layer(run)

    return Drawn(
        f"{kind} {batch}x{heads}x{queries}x{dim}, {keys} keys, {fewer} key heads",
        shapes,
        make,
        4.0 * batch * heads * queries * keys * dim,
        sum(map(_count, shapes)) + batch * heads * queries * (dim + keys),
    )


def _reduction(rng: Rng) -> Drawn:
    shape = (_batch(rng), rng.choice(WIDE), rng.choice(SIZES[4:]), rng.choice(SIZES[4:]))
    dims = rng.choice(((-1,), (1,), (2, 3), (0, 1), (0, 1, 2, 3), (2,)))
    name = rng.choice(("sum", "mean", "amax", "var", "argmax", "logsumexp", "norm"))
    function: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "sum": lambda x: x.sum(dims),
        "mean": lambda x: x.mean(dims),
        "amax": lambda x: x.amax(dims),
        "var": lambda x: x.var(dims),
        "argmax": lambda x: x.argmax(dims[0]),
        "logsumexp": lambda x: x.logsumexp(dims),
        "norm": lambda x: torch.linalg.vector_norm(x, dim=dims),
    }
    return _simple(f"{name} of {dims}", shape, function[name], 0.0)


def _permute(rng: Rng) -> Drawn:
    shape = (_batch(rng), rng.choice(CHANNELS), rng.choice(SIZES), rng.choice(CHANNELS))
    order = rng.choice(((0, 2, 3, 1), (0, 3, 1, 2), (0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)))
    return _simple(f"permute {order}", shape, lambda x: x.permute(order).contiguous(), _count(shape))


def _concat(rng: Rng) -> Drawn:
    lead, tail = (_batch(rng), rng.choice(SIZES)), (rng.choice(LENGTHS[:20]),)
    dim, parts = rng.choice((1, 2)), rng.choice((2, 3, 4))
    sizes = [rng.choice(CHANNELS) for _ in range(parts)]
    shapes = tuple((*lead[:1], n, *tail) if dim == 1 else (*lead, n) for n in sizes)
    total = sum(map(_count, shapes))
    text = f"{' + '.join('x'.join(map(str, s)) for s in shapes)} in dim {dim}"
    return Drawn(text, shapes, lambda: Layer(lambda *x: torch.cat(x, dim)), 0.0, 2.0 * total)


def _embedding(rng: Rng) -> Drawn:
    shape, entries, width = (_batch(rng), rng.choice(LENGTHS)), rng.choice((100, 1009, 30522)), rng.choice(WIDE)
    written = _count(shape) * width
    return Drawn(
        f"{'x'.join(map(str, shape))} of {entries}x{width}",
        (shape,),
        lambda: nn.Embedding(entries, width),
        0.0,
        2.0 * written,
        high=entries,
    )


def _interpolate(rng: Rng) -> Drawn:
    size, batch, channels = rng.choice(SIZES[4:]), _batch(rng), rng.choice(CHANNELS)
    factor = rng.choice((0.5, 1.5, 2, 2, 3, 1.7))
    mode = rng.choice(("nearest", "bilinear", "bilinear", "bicubic"))
    aligned = rng.choice((False, True)) if mode != "nearest" else None
    out = int(size * factor)
    return _simple(
        f"{mode} to {out}, aligned {aligned}",
        (batch, channels, size, size),
        lambda x: F.interpolate(x, (out, out), mode=mode, align_corners=aligned),
        batch * channels * out**2,
    )


def _grid_sample(rng: Rng) -> Drawn:
    size, out, batch, channels = rng.choice(SIZES[4:]), rng.choice(SIZES[4:]), _batch(rng), rng.choice(CHANNELS)
    shapes = ((batch, channels, size, size), (batch, out, out, 2))
    mode, padding = rng.choice(("bilinear", "nearest")), rng.choice(("zeros", "border"))

    def run(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return F.grid_sample(x, grid.tanh(), mode, padding, align_corners=False)

    return Drawn(
        f"{batch}x{channels}x{size} at {out}, {mode}, {padding}",
        shapes,
        lambda: Layer(run),
        40.0 * batch * channels * out**2,
        sum(map(_count, shapes)) + batch * channels * out**2,
    )


KINDS: Kinds = {
    "linear": _linear,
    "conv2d": lambda r: _conv(r, 2, (1, 2, 3, 3, 3, 5, 7), "none"),
    "matmul": _matmul,
    "depthwise": lambda r: _conv(r, 2, (3, 3, 5, 7), "each"),
    "conv1d": lambda r: _conv(r, 1, (1, 3, 5, 9, 31), r.choice(("none", "none", "each", "some"))),
    "pointwise": lambda r: _conv(r, 2, (1,), "none"),
    "attention": _attention,
    "grouped": lambda r: _conv(r, 2, (1, 3, 3, 5), "some"),
    "transposed2d": lambda r: _conv_transpose(r, 2),
    "layer_norm": lambda r: _norm(r, "layer"),
    "max_pool": lambda r: _pool(r, "max"),
    "softmax": _softmax,
    "reduction": _reduction,
    "square": lambda r: _conv(r, 2, (3,), "none"),
    "avg_pool": lambda r: _pool(r, "avg"),
    "permute": _permute,
    "interpolate": _interpolate,
    "transposed1d": lambda r: _conv_transpose(r, 1),
    "group_norm": lambda r: _norm(r, "group"),
    "adaptive": lambda r: _pool(r, "adaptive"),
    "concat": _concat,
    "embedding": _embedding,
    "rms_norm": lambda r: _norm(r, "rms"),
    "batch_norm": lambda r: _norm(r, "batch"),
    "conv3d": lambda r: _conv(r, 3, (1, 3), "none"),
    "grid_sample": _grid_sample,
}
