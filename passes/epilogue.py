"""What a product takes up from behind it: a bias, a residual and an activation, as the dialect's operators
have them.

    activation(add(add(product, bias), residual))

Each step is taken only where the value before it is read by nobody else and keeps its shape and dtype; one bias, then
one residual, none of them scaled; and only where `kernel_fusion` has it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from . import dialect, rewrite
from .families import fuses
from .refusals import keep
from .rewrite import Operator

log = logging.getLogger(__name__)
aten = torch.ops.aten

Activation = tuple[str, list[float]]


@dataclass(frozen=True)
class Epilogue:
    """What is fused behind a product, up to and including the node `last`."""

    last: fx.Node
    bias: fx.Node | None = None
    residual: fx.Node | None = None
    activation: str = "none"
    args: tuple[float, ...] = ()


def allowed(graph: fx.GraphModule, product: str) -> frozenset[str]:
    """What `kernel_fusion` lets a "conv" or a "matmul" take up, of "bias", "add" and "relu"."""
    return frozenset(kind for kind in ("bias", "add", "relu") if fuses(graph, f"{product}+{kind}"))


def extend(start: Epilogue, is_bias: Callable[[fx.Node], bool], kinds: frozenset[str]) -> Epilogue:
    """Take up what follows `start.last`, as far as the dialect goes and `kinds` allow."""
    found = start
    while found.activation == "none":
        user = rewrite.sole_user(found.last)
        if user is None:
            keep(log, found.last, "nothing behind it is taken up: read by %d nodes", len(found.last.users))
            break
        step = _add(found, user, is_bias, kinds) if user.target is aten.add.Tensor else _activate(found, user, kinds)
        if step is None:
            break
        found = step
    return found


def activation_of(node: fx.Node) -> Activation | None:
    """The dialect's name and arguments of an activation, or None."""
    if not isinstance(node.target, Operator) or node.target not in _ACTIVATIONS:
        return None
    return _ACTIVATIONS[node.target](rewrite.arguments(node))


def _add(found: Epilogue, add: fx.Node, is_bias: Callable[[fx.Node], bool], kinds: frozenset[str]) -> Epilogue | None:
    a = rewrite.arguments(add)
    other = a["other"] if a["self"] is found.last else a["self"]
    if a["alpha"] != 1:
        keep(log, add, "it scales what it adds by %s", a["alpha"])
        return None
    if not isinstance(other, fx.Node) or other is found.last:
        keep(log, add, "it adds a number, or the product to itself")
        return None
    if not rewrite.is_float(found.last, other, add):
        keep(log, add, "it mixes dtypes")
        return None
    if rewrite.shape_of(add) != rewrite.shape_of(found.last):
        keep(log, add, "it broadcasts the product")
        return None
    if "bias" in kinds and found.bias is None and found.residual is None and is_bias(other):
        return replace(found, last=add, bias=other)
    if "add" in kinds and found.residual is None and rewrite.shape_of(other) == rewrite.shape_of(found.last):
        return replace(found, last=add, residual=other)
    keep(log, add, "what it adds is no free bias or residual, or one that kernel_fusion leaves out")
    return None


def _activate(found: Epilogue, node: fx.Node, kinds: frozenset[str]) -> Epilogue | None:
    if "relu" not in kinds:
        keep(log, found.last, "kernel_fusion leaves activations out")
        return None
    activation = activation_of(node)
    if activation is None:
        keep(log, found.last, "%s behind it is no activation", node.target)
        return None
    return replace(found, last=node, activation=activation[0], args=tuple(activation[1]))


def _clamped(low: object, high: object) -> Activation | None:
    ends = [default if end is None else end for end, default in ((low, -math.inf), (high, math.inf))]
    numbers = [float(end) for end in ends if isinstance(end, (int, float)) and not math.isnan(end)]
    if len(numbers) < 2:
        return None
    if numbers == [0.0, math.inf]:
        return "relu", []
    return ("relu6", []) if numbers == [0.0, 6.0] else ("clamp", numbers)


def _named(name: str) -> Callable[[dict[str, Any]], Activation]:
    return lambda a: (name, [])


_ACTIVATIONS: dict[Operator, Callable[[dict[str, Any]], Activation | None]] = {
    aten.relu.default: _named("relu"),
    aten.relu6.default: _named("relu6"),
    aten.silu.default: _named("silu"),
    aten.gelu.default: lambda a: ("gelu_tanh" if a["approximate"] == "tanh" else "gelu", []),
    aten.hardswish.default: _named("hardswish"),
    aten.hardsigmoid.default: _named("hardsigmoid"),
    aten.sigmoid.default: _named("sigmoid"),
    aten.tanh.default: _named("tanh"),
    aten.hardtanh.default: lambda a: _clamped(a["min_val"], a["max_val"]),
    aten.clamp.default: lambda a: _clamped(a["min"], a["max"]),
    aten.leaky_relu.default: lambda a: ("leaky_relu", [float(a["negative_slope"])]),
    dialect.swish: lambda a: ("swish", [float(a["beta"])]),
}
