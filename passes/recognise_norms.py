"""Normalisations that were written out become one operator again.

    (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * w + b  -> layer_norm(x, shape, w, b, eps)
    x / sqrt(mean(x^2) + eps) * w                              -> rms_norm(x, shape, w, eps)
    reshape(layer_norm(reshape(x, [N, G, ...]))) * w + b       -> group_norm(x, G, w, b, eps)   w, b: [channels]

The mean is over the last dims; over the channels of an image it becomes that of a permuted image, permuted back after.
The variance may be var(x, correction=0); the root rsqrt, a power of -1/2, or a quotient by a root. Numbers differ by
the rounding of the sums.

Refused where eps stands outside the root; for the variance of a sample (correction=1); where a value in between is read
by anybody else; for dtypes that are not floating point or change. mean(x^2) - mean(x)^2 is no variance here: what it
loses where the mean is large is not what layer_norm loses.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..hwdb import Hardware
from . import rewrite
from .attention_operands import one_number
from .refusals import keep
from .rewrite import Operator

log = logging.getLogger(__name__)
aten = torch.ops.aten


@dataclass(frozen=True)
class _Norm:
    """x normalised over `dims`, up to and including the node `last`."""

    x: fx.Node
    dims: tuple[int, ...]
    eps: float
    centred: bool
    inner: frozenset[fx.Node]  # the nodes in between, which nobody else may read
    last: fx.Node
    weight: fx.Node | None = None
    bias: fx.Node | None = None


def recognise_norms(graph: fx.GraphModule, hw: Hardware) -> int:
    """Replace written-out normalisations by their operators; returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        if node._erased or not rewrite.calls(node, aten.mul.Tensor, aten.div.Tensor):
            continue
        found = _normalised(node)
        if found is None:
            continue
        reason = _refused(found)
        if reason:
            keep(log, node, "%s", reason)
            continue
        _rewrite(graph, found)
        count += 1
    for node in list(graph.graph.nodes):
        if rewrite.calls(node, aten.layer_norm.default):
            count += _group(graph, node)
    return rewrite.finish(graph, count)


def _normalised(node: fx.Node) -> _Norm | None:
    """The normalisation that a product or a quotient ends."""
    for value, inverse, root in _scales(node):
        inner = [*root]
        eps = 0.0
        if rewrite.calls(inverse, aten.add.Tensor) and (number := one_number(inverse.args[1])) is not None:
            inner.append(inverse)
            eps, inverse = number, inverse.args[0]  # type: ignore[assignment]
        found = _moments(value, inverse)
        if found is not None:
            x, dims, centred, moments = found
            return _Norm(x, dims, eps, centred, frozenset([*inner, *moments]), node)
    return None


def _scales(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, list[fx.Node]]]:
    """(value, what the root is taken of, the nodes between) of value / sqrt(...) in its spellings."""
    one, other = node.args[:2]
    pairs = [(one, other)] if node.target is aten.div.Tensor else [(one, other), (other, one)]
    for value, scale in pairs:
        if not isinstance(value, fx.Node) or not isinstance(scale, fx.Node):
            continue
        if node.target is aten.div.Tensor:
            if (under := _root(scale)) is not None:
                yield value, under, [scale]
            continue
        if rewrite.calls(scale, aten.rsqrt.default) or _is_power(scale, -0.5):
            yield value, scale.args[0], [scale]  # type: ignore[misc]
            continue
        root = scale.args[0] if rewrite.calls(scale, aten.reciprocal.default) else None
        if rewrite.calls(scale, aten.div.Tensor) and one_number(scale.args[0]) == 1:
            root = scale.args[1]
        if isinstance(root, fx.Node) and (under := _root(root)) is not None:
            yield value, under, [scale, root]


def _root(node: fx.Node) -> fx.Node | None:
    under = node.args[0] if rewrite.calls(node, aten.sqrt.default) or _is_power(node, 0.5) else None
    return under if isinstance(under, fx.Node) else None


def _is_power(node: fx.Node, exponent: float) -> bool:
    return rewrite.calls(node, aten.pow.Tensor_Scalar) and bool(node.args[1] == exponent)


def _moments(value: fx.Node, spread: fx.Node) -> tuple[fx.Node, tuple[int, ...], bool, list[fx.Node]] | None:
    """(x, dims, whether value is x less its mean, the nodes between) where `spread` is the mean square of `value`."""
    square = _mean(spread)
    centre = value.args[1] if rewrite.calls(value, aten.sub.Tensor) and not value.kwargs else None
    mean = _mean(centre)
    x = value.args[0] if mean is not None and mean[0] is value.args[0] else None
    if square is not None and _squares(square[0], value):
        if isinstance(x, fx.Node) and mean is not None and mean[1] == square[1]:
            return x, square[1], True, [spread, square[0], value, *mean[2]]
        return value, square[1], False, [spread, square[0]]
    variance = _variance(spread)
    if isinstance(x, fx.Node) and mean is not None and variance is not None and variance[:2] == (x, mean[1]):
        return x, mean[1], True, [value, *mean[2], *variance[2]]
    return None


def _mean(node: object) -> tuple[fx.Node, tuple[int, ...], list[fx.Node]] | None:
    """(x, dims, the nodes that make it) of mean(x, dims, keepdim=True), or of the mean beside a variance."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is operator.getitem and node.args[1] == 1:
        spread = _variance_of(node.args[0])
        return None if spread is None else (*spread, [node, node.args[0]])  # type: ignore[list-item]
    if not rewrite.calls(node, aten.mean.dim):
        return None
    a = rewrite.arguments(node)
    if not a["keepdim"] or not a["dim"]:
        return None
    rank = len(rewrite.shape_of(node))
    return a["self"], tuple(sorted(d % rank for d in a["dim"])), [node]


def _variance(node: fx.Node) -> tuple[fx.Node, tuple[int, ...], list[fx.Node]] | None:
    if node.target is operator.getitem and node.args[1] == 0:
        spread = _variance_of(node.args[0])
        return None if spread is None else (*spread, [node, node.args[0]])  # type: ignore[list-item]
    spread = _variance_of(node)
    return None if spread is None else (*spread, [node])


def _variance_of(node: object) -> tuple[fx.Node, tuple[int, ...]] | None:
    if not rewrite.calls(node, aten.var.correction, aten.var_mean.correction):
        return None
    a = rewrite.arguments(node)
    if not a["keepdim"] or not a["dim"]:
        return None
    if a["correction"] != 0:
        keep(log, node, "the variance of a sample: its correction is %s", a["correction"])
        return None
    rank = len(rewrite.shape_of(a["self"]))
    return a["self"], tuple(sorted(d % rank for d in a["dim"]))


def _squares(node: fx.Node, x: fx.Node) -> bool:
    if rewrite.calls(node, aten.mul.Tensor):
        return node.args == (x, x)
    return _is_power(node, 2) and node.args[0] is x


def _refused(norm: _Norm) -> str:
    """Why a normalisation is none of ours, or nothing."""
    if not rewrite.is_float(norm.x, norm.last, *[n for n in norm.inner if rewrite.value_of(n) is not None]):
        return "not floating point of one dtype"
    for node in sorted(norm.inner, key=lambda n: n.name):
        others = [user for user in node.users if user is not norm.last and user not in norm.inner]
        if others:
            return f"{node}, a value in between, is read by {others[0]}"
    shape = rewrite.shape_of(norm.x)
    if not math.prod(shape):
        return "it has no elements"
    if _normalized_shape(norm) is None and not _over_channels(norm):
        return f"a mean over dims {norm.dims} of {len(shape)}, which are not the last"
    return ""


def _normalized_shape(norm: _Norm) -> list[int] | None:
    """The extents of the dims from the first one normalised on, where those are all, but for dims of 1."""
    shape = rewrite.shape_of(norm.x)
    first = next((d for d in norm.dims if shape[d] > 1), norm.dims[-1])
    others = [d for d in range(first, len(shape)) if d not in norm.dims and shape[d] > 1]
    return None if others else list(shape[first:])


def _over_channels(norm: _Norm) -> bool:
    return norm.dims == (1,) and len(rewrite.shape_of(norm.x)) > 2


def _rewrite(graph: fx.GraphModule, norm: _Norm) -> None:
    norm = _with_affine(norm)
    x, shape = norm.x, rewrite.shape_of(norm.x)
    normalized = _normalized_shape(norm)
    order = [0, *range(2, len(shape)), 1]
    if normalized is None:
        x, normalized = rewrite.call(graph, aten.permute.default, (x, order), before=norm.last), [shape[1]]

    def flat(node: fx.Node | None) -> fx.Node | None:
        if node is None or list(rewrite.shape_of(node)) == normalized:
            return node
        return rewrite.call(graph, aten.reshape.default, (node, normalized), before=norm.last)

    weight, bias = flat(norm.weight), flat(norm.bias)
    value = rewrite.packed(norm.last.meta["val"], rewrite.shape_of(x))
    args = (x, normalized, weight, bias, norm.eps) if norm.centred else (x, normalized, weight, norm.eps)
    target = aten.layer_norm.default if norm.centred else aten.rms_norm.default
    new = rewrite.call(graph, target, args, before=norm.last, value=value)
    if x is not norm.x:
        back = [order.index(d) for d in range(len(shape))]
        new = rewrite.call(graph, aten.permute.default, (new, back), before=norm.last)
    norm.last.replace_all_uses_with(new)
    rewrite.erase_cone(norm.last)


def _with_affine(norm: _Norm) -> _Norm:
    """The normalisation with the gain, and behind it the offset, that follow it."""
    shape = rewrite.shape_of(norm.x)
    wanted = _normalized_shape(norm) or [shape[1], *[1] * (len(shape) - 2)]
    weight = _operand(norm.last, aten.mul.Tensor, wanted)
    if weight is not None:
        norm = replace(norm, weight=weight[0], last=weight[1])
    bias = _operand(norm.last, aten.add.Tensor, wanted) if norm.centred else None
    return norm if bias is None else replace(norm, bias=bias[0], last=bias[1])


def _operand(node: fx.Node, target: Operator, wanted: list[int]) -> tuple[fx.Node, fx.Node] | None:
    """(what the sole reader multiplies with or adds, the reader) where that has one number for each of `wanted`."""
    user = rewrite.sole_user(node)
    if user is None or not rewrite.calls(user, target) or user.kwargs:
        return None
    other = user.args[1] if user.args[0] is node else user.args[0]
    if not isinstance(other, fx.Node) or other is node or not rewrite.is_float(node, other, user):
        return None
    shape = list(rewrite.shape_of(other))
    while len(shape) > len(wanted) and shape[0] == 1:
        shape = shape[1:]
    return (other, user) if shape == wanted and rewrite.shape_of(user) == rewrite.shape_of(node) else None


def _group(graph: fx.GraphModule, norm: fx.Node) -> bool:
    """reshape(layer_norm(reshape(x, [N, G, ...]))) -> group_norm(x, G), gain and offset taken up."""
    a = rewrite.arguments(norm)
    inside, behind = a["input"], rewrite.sole_user(norm)
    if a["weight"] is not None or a["bias"] is not None or not rewrite.calls(inside, aten.reshape.default):
        return False
    x = inside.args[0]
    if not rewrite.calls(behind, aten.reshape.default) or not isinstance(x, fx.Node):
        return False
    shape = rewrite.shape_of(x)
    rows = math.prod(rewrite.shape_of(inside)[: -len(a["normalized_shape"])])
    if len(shape) < 3 or rewrite.shape_of(behind) != shape or not rows or rows % shape[0]:
        return False
    groups = rows // shape[0]
    if shape[1] % groups:
        keep(log, norm, "%d rows of an image of shape %s are no groups of channels", rows, shape)
        return False
    channels = [shape[1], *[1] * (len(shape) - 2)]
    last = behind
    weight = _operand(last, aten.mul.Tensor, channels)
    last = weight[1] if weight else last
    bias = _operand(last, aten.add.Tensor, channels)
    last = bias[1] if bias else last
    if len(shape) != 4 and weight is None and bias is None:
        return False
    weight_bias = [
        found and rewrite.call(graph, aten.reshape.default, (found[0], [shape[1]]), before=last)
        for found in (weight, bias)
    ]
    value = rewrite.packed(last.meta["val"])
    args = (x, groups, *weight_bias, a["eps"])
    new = rewrite.call(graph, aten.group_norm.default, args, before=last, value=value)
    last.replace_all_uses_with(new)
    rewrite.erase_cone(last)
    return True
