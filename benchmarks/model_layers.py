"""More random layers: what models have beside the kinds of `random_layers`, from recurrent cells to sorting.

Drawn like those; the shapes are rather those of models, at the ends of their ranges: vocabularies, long contexts, one
query, huge and tiny rows, large windows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from random_layers import CHANNELS, LENGTHS, SIZES, WIDE, Drawn, Kinds, Layer, Rng, _batch, _conv, _count, _simple
from torch import nn

VOCABULARIES = (30522, 32000, 50257, 128256)
ODD = (1, 2, 3, 5, 17, 31, 63, 65, 127, 129, 255, 257, 511, 513, 1023, 1025)


def _large_kernel(rng: Rng) -> Drawn | None:
    return _conv(rng, 2, (9, 11, 13, 21, 31), rng.choice(("each", "each", "none")))


def _long_conv(rng: Rng) -> Drawn:
    length, kernel = rng.choice((16000, 48000, 160000)), rng.choice((3, 5, 10, 15, 80))
    channels, filters = rng.choice((1, 1, 2, 16, 32)), rng.choice((8, 16, 32, 64))
    stride, dilation = rng.choice((1, 2, 4, 5)), rng.choice((1, 1, 2, 16, 256))
    out = (length - dilation * (kernel - 1) - 1) // stride + 1
    flops = 2.0 * out * channels * filters * kernel
    return Drawn(
        f"{channels}x{length} -> {filters}, kernel {kernel}, stride {stride}, dilation {dilation}",
        ((1, channels, length),),
        lambda: nn.Conv1d(channels, filters, kernel, stride, 0, dilation),
        flops,
        channels * length + filters * out,
    )


def _computed_weights(rng: Rng) -> Drawn:
    channels, filters, size = rng.choice(CHANNELS[4:]), rng.choice(CHANNELS[4:]), rng.choice(SIZES[5:22])
    kernel = rng.choice((1, 3, 3, 5))
    shapes = ((1, channels, size, size), (filters, channels, kernel, kernel))

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w * torch.rsqrt((w * w).sum((1, 2, 3), keepdim=True) + 1e-6), padding=kernel // 2)

    flops = 2.0 * size**2 * channels * filters * kernel**2
    text = f"{channels}x{size}x{size} -> {filters}, kernel {kernel}, demodulated"
    return Drawn(text, shapes, lambda: Layer(run), flops, sum(map(_count, shapes)) + filters * size**2)


def _depthwise_transposed(rng: Rng) -> Drawn:
    channels, size, kernel = rng.choice(CHANNELS[4:]), rng.choice(SIZES[4:23]), rng.choice((2, 3, 4))
    out = (size - 1) * 2 + kernel
    return Drawn(
        f"{channels}x{size}x{size}, kernel {kernel}, stride 2",
        ((1, channels, size, size),),
        lambda: nn.ConvTranspose2d(channels, channels, kernel, 2, groups=channels),
        2.0 * channels * size**2 * kernel**2,
        channels * (size**2 + out**2),
    )


def _recurrent(rng: Rng) -> Drawn:
    kind = rng.choice(("LSTM", "GRU"))
    batch, steps, width, hidden = (
        _batch(rng),
        rng.choice((1, 5, 12)),
        rng.choice((32, 80, 256)),
        rng.choice((64, 256, 512)),
    )
    gates = 4 if kind == "LSTM" else 3

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = getattr(nn, kind)(width, hidden, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.cell(x)[0]
            return out

    weights = gates * hidden * (width + hidden)
    text = f"{kind} {batch}x{steps}x{width} -> {hidden}"
    return Drawn(text, ((batch, steps, width),), Recurrent, 2.0 * batch * steps * weights, steps * weights)


def _embedding_bag(rng: Rng) -> Drawn:
    rows, bag, entries, width = (
        rng.choice((8, 64, 256)),
        rng.choice((5, 20, 100)),
        rng.choice((1009, 30522)),
        rng.choice((16, 64, 300)),
    )
    mode = rng.choice(("sum", "mean", "max"))
    return Drawn(
        f"{rows} bags of {bag} of {entries}x{width}, {mode}",
        ((rows, bag),),
        lambda: nn.EmbeddingBag(entries, width, mode=mode),
        0.0,
        2.0 * rows * bag * width,
        high=entries,
    )


def _vocabulary(rng: Rng) -> Drawn:
    shape = (rng.choice((1, 1, 2, 16, 128)), rng.choice(VOCABULARIES))
    function: Callable[..., Any] = rng.choice((F.softmax, F.log_softmax))
    return _simple(f"{function.__name__}", shape, lambda x: function(x, -1), _count(shape))


def _cumulative(rng: Rng) -> Drawn:
    shape, dim = (_batch(rng), rng.choice(SIZES[4:]), rng.choice(LENGTHS)), rng.choice((-1, -1, 1))
    name = rng.choice(("cumsum", "cumsum", "cumprod"))
    return _simple(f"{name} of dim {dim}", shape, lambda x: getattr(torch, name)(x, dim), _count(shape))


def _order(rng: Rng) -> Drawn:
    shape = (rng.choice((1, 4, 32, 100)), rng.choice((100, 1000, 8400, *VOCABULARIES[:2])))
    k = rng.choice((1, 5, 50, 100))
    if rng.random() < 0.5:
        return _simple(
            f"topk {k}",
            shape,
            lambda x: torch.topk(x, k)[0],
            k,
        )
    return _simple("sort", shape, lambda x: torch.sort(x, dim=-1)[0], 8 * _count(shape))


def _gather(rng: Rng) -> Drawn:
    rows, width, taken = rng.choice((100, 1000, 30522)), rng.choice((1, 16, 64, 256)), rng.choice((100, 1000, 10000))
    name = rng.choice(("index_select", "index_add", "take_along_dim", "scatter_add"))
    shapes: tuple[tuple[int, ...], ...] = ((rows, width), (taken,))
    function: Callable[..., Any] = lambda x, i: x.index_select(0, i)  # noqa: E731
    if name == "index_add":
        shapes = ((rows, width), (taken, width), (taken,))
        function = lambda x, y, i: x.index_add(0, i, y)  # noqa: E731
    elif name == "take_along_dim":
        shapes = ((rows, width), (taken, width))
        function = lambda x, i: x.take_along_dim(i, 0)  # noqa: E731
    elif name == "scatter_add":
        shapes = ((rows, width), (taken, width), (taken, width))
        function = lambda x, y, i: x.scatter_add(0, i, y)  # noqa: E731
    moved = 2.0 * taken * width + (rows * width if name in ("index_add", "scatter_add") else 0)
    text = f"{name} {rows}x{width}, {taken}"
    return Drawn(text, shapes, lambda: Layer(function), 0.0, moved, high=rows, floats=len(shapes) - 1)


def _context(rng: Rng) -> Drawn:
    heads, dim = rng.choice((4, 8, 12, 32)), rng.choice((64, 64, 128))
    keys = rng.choice((2048, 4096, 8192))
    queries = rng.choice((1, 1, 8, keys)) if keys == 2048 else rng.choice((1, 1, 8))
    fewer = rng.choice((heads, max(1, heads // 4)))
    shapes = ((1, heads, queries, dim), (1, fewer, keys, dim), (1, fewer, keys, dim))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries == keys, enable_gqa=fewer != heads)

    flops = 4.0 * heads * queries * keys * dim
    return Drawn(
        f"{heads}x{queries}x{dim}, {keys} keys, {fewer} key heads",
        shapes,
        lambda: Layer(run),
        flops,
        sum(map(_count, shapes)),
    )


def _rows(rng: Rng) -> Drawn:
    shape = rng.choice(((1, 65536), (4, 200000), (16, 8192), (100000, 16), (20000, 33), (300000, 3), (50000, 8)))
    return _simple(
        "layer norm", shape, lambda x, w, b: F.layer_norm(x, shape[1:], w, b), _count(shape), shape[1:], shape[1:]
    )


def _narrow_linear(rng: Rng) -> Drawn:
    m, few, many = (
        rng.choice((1000, 4096, 20000)),
        rng.choice((1, 2, 3, 4, 7, 12, 16)),
        rng.choice((32, 64, 100, 256, 768)),
    )
    k, n = rng.choice(((few, many), (many, few), (few, few)))
    return Drawn(f"{m}x{k} -> {n}", ((m, k),), lambda: nn.Linear(k, n), 2.0 * m * k * n, m * k + k * n + m * n)


def _odd_matmul(rng: Rng) -> Drawn:
    b, m, k, n = rng.choice((1, 1, 3, 16)), rng.choice(ODD), rng.choice(ODD), rng.choice(ODD)
    turned = rng.random() < 0.5
    shapes = ((b, m, k), (b, n, k) if turned else (b, k, n))

    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x @ (y.transpose(1, 2) if turned else y)

    text = f"{b} x {m}x{k}x{n}{', the right one transposed' if turned else ''}"
    return Drawn(text, shapes, lambda: Layer(run), 2.0 * b * m * k * n, b * (m * k + k * n + m * n))


def _activation(rng: Rng) -> Drawn:
    name = rng.choice(("gelu", "silu", "tanh", "mish", "softplus", "elu", "hardswish", "glu"))
    shape = (_batch(rng), rng.choice(LENGTHS), 2 * rng.choice(WIDE))
    return _simple(name, shape, lambda x: getattr(F, name)(x), _count(shape))


def _moves(rng: Rng) -> Drawn:
    channels, size = 4 * rng.choice(CHANNELS[2:12]), 2 * rng.choice(SIZES[4:18])
    shape = (_batch(rng), channels, size, size)
    moves: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
        "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
        "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
        "roll": lambda x: x.roll((3, 3), (2, 3)),
        "flip": lambda x: x.flip(3),
        "reflect": lambda x: F.pad(x, (2, 2, 2, 2), mode="reflect"),
        "unfold": lambda x: F.unfold(x, 3, padding=1),
    }
    name = rng.choice(list(moves))
    return _simple(name, shape, moves[name], _count(shape) * (9 if name == "unfold" else 1))


def _instance_norm(rng: Rng) -> Drawn:
    shape = (_batch(rng), rng.choice(CHANNELS), *[rng.choice(SIZES[4:])] * 2)
    return _simple(
        "instance norm",
        shape,
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
        _count(shape),
        (shape[1],),
        (shape[1],),
    )


def _einsum(rng: Rng) -> Drawn:
    b, i, j, k = _batch(rng), rng.choice(SIZES[4:24]), rng.choice(SIZES[4:24]), rng.choice(SIZES[4:24])
    text, first, second = rng.choice(
        (
            ("bij,bkj->bik", (b, i, j), (b, k, j)),
            ("bij,bjk->bki", (b, i, j), (b, j, k)),
            ("bij,jk->bik", (b, i, j), (j, k)),
        )
    )
    elements = _count(first) + _count(second) + b * i * k
    return Drawn(
        f"{text} {b} {i} {j} {k}",
        (first, second),
        lambda: Layer(lambda x, y: torch.einsum(text, x, y)),
        2.0 * b * i * j * k,
        elements,
    )


KINDS: Kinds = {
    "large_kernel": _large_kernel,
    "long_conv": _long_conv,
    "computed_weights": _computed_weights,
    "depthwise_transposed": _depthwise_transposed,
    "recurrent": _recurrent,
    "embedding_bag": _embedding_bag,
    "vocabulary": _vocabulary,
    "cumulative": _cumulative,
    "order": _order,
    "gather": _gather,
    "context": _context,
    "rows": _rows,
    "narrow_linear": _narrow_linear,
    "odd_matmul": _odd_matmul,
    "activation": _activation,
    "moves": _moves,
    "instance_norm": _instance_norm,
    "einsum": _einsum,
}
