"""A Hypothesis strategy for random well-typed models: chains and joins of tensor operations over one or two inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "relu6": F.relu6,
    "exp": lambda x: x.clamp(-5, 5).exp(),
    "log": lambda x: (x.abs() + 0.5).log(),
    "sqrt": lambda x: (x.abs() + 0.1).sqrt(),
    "sin": torch.sin,
    "neg": torch.neg,
    "square": lambda x: x.clamp(-9, 9).square(),
    "scale": lambda x: x * 0.5 + 1,
    "where": lambda x: torch.where(x > 0, x, -0.1 * x),
    "cast": lambda x: (x > 0.25).to(torch.float32) - x,
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "clone": torch.clone,
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": lambda a, b: torch.sub(a, b, alpha=2),
    "mul": torch.mul,
    "div": lambda a, b: a / (b.abs() + 1),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}


@dataclass(frozen=True)
class Step:
    """One operation: a name to print, the values it reads, and what it does with them."""

    name: str
    operands: tuple[int, ...]
    apply: Callable[..., Tensor]


class Model(torch.nn.Module):
    """Runs the steps; results are the last value and one from the middle."""

    def __init__(self, steps: list[Step], weights: list[Tensor], inputs: int, second: int) -> None:
        super().__init__()
        self.steps, self.inputs, self.second = steps, inputs, second
        for i, weight in enumerate(weights):
            self.register_buffer(f"weight_{i}", weight)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        values: list[Tensor] = list(inputs)
        for step in self.steps:
            values.append(step.apply(self, *[values[i] for i in step.operands]))
        return values[-1], values[self.second]

    def __repr__(self) -> str:
        return "; ".join(f"v{i + self.inputs} = {s.name}{s.operands}" for i, s in enumerate(self.steps))


@st.composite
def models(draw: st.DrawFn, most: int = 8) -> tuple[Model, tuple[Tensor, ...]]:
    """A model and its inputs."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    sizes = st.lists(st.integers(1, 7), min_size=1, max_size=4)
    inputs = [torch.randn(draw(sizes), generator=rng) for _ in range(draw(st.integers(1, 2)))]
    values, steps, weights = list(inputs), [], []
    for _ in range(draw(st.integers(1, most))):
        # Later values more often: chains are where fusion happens.
        index = draw(st.sampled_from([*range(len(values)), len(values) - 1, len(values) - 1]))
        kind = draw(st.sampled_from(["unary", "unary", "binary", "binary", "weighted", "move", "move", "reduce"]))
        maker = {"unary": _unary, "binary": _binary, "weighted": _weighted, "move": _move, "reduce": _reduce}[kind]
        step = maker(draw, values, index, weights, rng)
        holder = Model([], weights, 0, 0)
        values.append(step.apply(holder, *[values[i] for i in step.operands]))
        steps.append(step)
    second = draw(st.integers(0, len(values) - 1))
    return Model(steps, weights, len(inputs), second), tuple(inputs)


def _unary(draw: st.DrawFn, values: list[Tensor], index: int, weights: list[Tensor], rng: Any) -> Step:
    name = draw(st.sampled_from(sorted(UNARY)))
    return Step(name, (index,), lambda m, x: UNARY[name](x))


def _binary(draw: st.DrawFn, values: list[Tensor], index: int, weights: list[Tensor], rng: Any) -> Step:
    name = draw(st.sampled_from(sorted(BINARY)))
    fits = [i for i, v in enumerate(values) if _broadcasts(v, values[index])]
    other = draw(st.sampled_from(fits))
    return Step(name, (index, other), lambda m, a, b: BINARY[name](a, b))


def _weighted(draw: st.DrawFn, values: list[Tensor], index: int, weights: list[Tensor], rng: Any) -> Step:
    x = values[index]
    options = ["linear", "scale_shift", "layer_norm", "gram"]
    if x.dim() == 4:
        options += ["conv", "conv", "depthwise", "batch_norm", "max_pool", "avg_pool"]
    name = draw(st.sampled_from(options))
    last, at = x.shape[-1], len(weights)

    def weight(*shape: int) -> None:
        weights.append(torch.randn(*shape, generator=rng) / math.sqrt(max(1, math.prod(shape[1:]))))

    def w(m: Model, i: int) -> Tensor:
        return getattr(m, f"weight_{at + i}")  # type: ignore[no-any-return]

    if name == "linear":
        out = draw(st.integers(1, 9))
        weight(out, last)
        weight(out)
        return Step(name, (index,), lambda m, x: F.linear(x, w(m, 0), w(m, 1)))
    if name == "scale_shift":
        weight(last)
        return Step(name, (index,), lambda m, x: x * w(m, 0) + w(m, 0))
    if name == "layer_norm":
        weight(last)
        return Step(name, (index,), lambda m, x: F.layer_norm(x, (last,), w(m, 0), w(m, 0), 0.1))
    if name == "gram":
        if x.dim() < 2:
            return Step("outer", (index,), lambda m, x: x.unsqueeze(-1) @ x.unsqueeze(0))
        return Step(name, (index,), lambda m, x: x @ x.transpose(-1, -2))
    channels = x.shape[1]
    if name in ("conv", "depthwise"):
        groups = channels if name == "depthwise" else 1
        out = channels if name == "depthwise" else draw(st.integers(1, 9))
        kernel, stride, padding = draw(st.sampled_from([(1, 1, 0), (3, 1, 1), (3, 2, 1), (5, 1, 2)]))
        weight(out, channels // groups, kernel, kernel)
        weight(out)
        return Step(name, (index,), lambda m, x: F.conv2d(x, w(m, 0), w(m, 1), stride, padding, 1, groups))
    if name == "batch_norm":
        weight(channels)
        return Step(
            name, (index,), lambda m, x: F.batch_norm(x, w(m, 0), w(m, 0).abs() + 0.5, w(m, 0), None, False, 0.0, 1e-3)
        )
    if name == "max_pool":
        return Step(name, (index,), lambda m, x: F.max_pool2d(x, 3, 2, 1))
    return Step(name, (index,), lambda m, x: F.avg_pool2d(x, 3, 1, 1))


def _move(draw: st.DrawFn, values: list[Tensor], index: int, weights: list[Tensor], rng: Any) -> Step:
    x = values[index]
    shape, dims = list(x.shape), x.dim()
    name = draw(st.sampled_from(["permute", "flatten", "split", "slice", "cat", "unsqueeze", "flip", "expand", "pad"]))
    if name == "permute":
        order = draw(st.permutations(range(dims)))
        return Step(f"permute{order}", (index,), lambda m, x: x.permute(order))
    if name == "flatten":
        start = draw(st.integers(0, dims - 1))
        return Step(f"flatten[{start}]", (index,), lambda m, x: x.flatten(start))
    if name == "split":
        dim = draw(st.integers(0, dims - 1))
        factor = draw(st.sampled_from([f for f in range(1, shape[dim] + 1) if shape[dim] % f == 0]))
        new = [*shape[:dim], factor, shape[dim] // factor, *shape[dim + 1 :]]
        return Step(f"reshape{new}", (index,), lambda m, x: x.reshape(new))
    if name == "slice":
        dim = draw(st.integers(0, dims - 1))
        start = draw(st.integers(-shape[dim], shape[dim] - 1)) % shape[dim]
        stop, step = draw(st.integers(start + 1, shape[dim])), draw(st.integers(1, 2))
        cut = (*[slice(None)] * dim, slice(start, stop, step))
        return Step(f"slice[{dim}, {start}:{stop}:{step}]", (index,), lambda m, x: x[cut])
    if name == "cat":
        dim = draw(st.integers(0, dims - 1))
        return Step(f"cat[{dim}]", (index, index), lambda m, a, b: torch.cat([a, b.neg()], dim))
    if name == "unsqueeze" and dims < 4:
        dim = draw(st.integers(0, dims))
        return Step(f"unsqueeze[{dim}]", (index,), lambda m, x: x.unsqueeze(dim))
    if name == "flip":
        return Step("flip", (index,), lambda m, x: x.flip(-1))
    if name == "expand" and dims < 4:
        return Step("expand", (index,), lambda m, x: x.expand(2, *x.shape))
    return Step("pad", (index,), lambda m, x: F.pad(x, (1, 2), value=0.5))


def _reduce(draw: st.DrawFn, values: list[Tensor], index: int, weights: list[Tensor], rng: Any) -> Step:
    dim = draw(st.integers(0, values[index].dim() - 1))
    name = draw(st.sampled_from(["sum", "mean", "amax", "softmax", "cumsum", "var", "log_softmax"]))
    keep = True
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda x: x.sum(dim, keepdim=keep),
        "mean": lambda x: x.mean(dim, keepdim=keep),
        "amax": lambda x: x.amax(dim, keepdim=keep),
        "softmax": lambda x: x.softmax(dim),
        "log_softmax": lambda x: x.clamp(-20, 20).log_softmax(dim),
        "cumsum": lambda x: x.cumsum(dim),
        "var": lambda x: x.var(dim, correction=0, keepdim=keep),
    }
    return Step(f"{name}[{dim}]", (index,), lambda m, x: functions[name](x))


def _broadcasts(a: Tensor, b: Tensor) -> bool:
    pairs = zip(reversed(a.shape), reversed(b.shape), strict=False)
    return max(a.dim(), b.dim()) <= 5 and all(x == y or 1 in (x, y) for x, y in pairs)
