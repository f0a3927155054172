"""How single operators compute on images in NHWC, for `assign_layout`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .. import dialect, dialect_int8, rewrite
from ..fuse_reshape_transpose import map_of
from ..recognise_channel_moves import channel_digits
from ..rewrite import Operator

aten = torch.ops.aten

# Where dim d of an NCHW image is in NHWC.
_PLACE = (0, 3, 1, 2)
_TO_NHWC = [0, 2, 3, 1]
_TO_NCHW = [0, 3, 1, 2]


@dataclass
class Images:
    """Which values of the graph have a twin in NHWC."""

    graph: fx.GraphModule
    known: frozenset[fx.Node]  # the nodes that were there before any twin
    nhwc: dict[fx.Node, fx.Node] = field(default_factory=dict)  # NCHW value -> its twin
    computed: dict[fx.Node, None] = field(default_factory=dict)  # those whose twin is computed from other twins
    free: set[fx.Node] = field(default_factory=set)  # those that the model permutes from their twin
    equal: dict[fx.Node, fx.Node] = field(default_factory=dict)  # what is no image -> the same from an image in NHWC

    def has(self, node: object) -> bool:
        """Whether the value can be there in NHWC without a permute."""
        return node in self.computed or node in self.free

    def twin(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The value in NHWC, permuted in front of `before` where nothing computes it."""
        if node not in self.nhwc:
            shape = list(rewrite.shape_of(node))
            arguments = (node, shape, _TO_NHWC, [shape[d] for d in _TO_NHWC])
            self.nhwc[node] = rewrite.call(self.graph, dialect.permute, arguments, before=before)
        return self.nhwc[node]

    def forth(self, node: fx.Node) -> fx.Node:
        """A node that stays in NCHW permuted to NHWC, right behind it."""
        shape = list(rewrite.shape_of(node))
        arguments = (node, shape, _TO_NHWC, [shape[d] for d in _TO_NHWC])
        return rewrite.call(self.graph, dialect.permute, arguments, before=node.next, source=node)

    def back(self, node: fx.Node) -> fx.Node:
        """A computed twin permuted to NCHW, at the place of `node`."""
        shape = list(rewrite.shape_of(node))
        arguments = (self.nhwc[node], [shape[d] for d in _TO_NHWC], _TO_NCHW, shape)
        value = rewrite.packed(node.meta["val"])
        return rewrite.call(self.graph, dialect.permute, arguments, before=node, value=value)

    def call(self, node: fx.Node, target: Operator, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert the twin of an image `node`."""
        shape = rewrite.shape_of(node)
        value = rewrite.packed(node.meta["val"], [shape[d] for d in _TO_NHWC])
        return rewrite.call(self.graph, target, args, kwargs, before=node, value=value)


Rule = Callable[[fx.Node, Images], "fx.Node | None"]


def is_image(node: object) -> bool:
    """Whether the node is a tensor of rank 4."""
    value = rewrite.value_of(node) if isinstance(node, fx.Node) else None
    return value is not None and value.dim() == 4


def pointwise(node: fx.Node, images: Images) -> fx.Node | None:
    """Element by element: operands of lower rank are spread to rank 4 first."""
    target = node.target
    if not isinstance(target, Operator) or not (torch.Tag.pointwise in target.tags or target in _POINTWISE):
        return None
    operands = node.all_input_nodes
    if not is_image(node) or not rewrite.is_pure(node) or not any(_is_computed(n) for n in operands):
        return None
    if any(isinstance(a, (list, tuple)) for a in node.args) or any(rewrite.value_of(n) is None for n in operands):
        return None
    twins = {n: _spread(n, node, images) for n in operands}
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), twins.__getitem__)
    kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
    return images.call(node, target, *args, **kwargs)


def _spread(operand: fx.Node, node: fx.Node, images: Images) -> fx.Node:
    shape = rewrite.shape_of(operand)
    if math.prod(shape) == 1 and len(shape) <= 4:
        return operand
    if len(shape) < 4:
        full = [1] * (4 - len(shape)) + list(shape)
        operand = rewrite.call(images.graph, aten.reshape.default, (operand, full), before=node)
    return images.twin(operand, node)


# Not tagged pointwise by torch, but they are.
_POINTWISE = frozenset(
    {
        *(aten.clone.default, aten._to_copy.default, aten.dropout.default),
        *(dialect_int8.quantize, dialect_int8.dequantize),
    }
)


def _conv2d(node: fx.Node, images: Images) -> fx.Node | None:
    a = rewrite.arguments(node)
    if a["layout"] == "NHWC":
        return None
    a["input"] = images.twin(a["input"], node)
    if a["residual"] is not None:
        a["residual"] = images.twin(a["residual"], node)
    a["layout"] = "NHWC"
    assert isinstance(node.target, Operator)
    return images.call(node, node.target, *a.values())


def _max_pool2d(node: fx.Node, images: Images) -> fx.Node | None:
    a = rewrite.arguments(node)
    if not is_image(a["self"]):
        return None
    kernel, dilation = (rewrite.repeated(a[k], 2) for k in ("kernel_size", "dilation"))
    stride, padding = rewrite.repeated(a["stride"] or kernel, 2), _around(a["padding"])
    x = images.twin(a["self"], node)
    return images.call(node, dialect.max_pool2d, x, kernel, stride, padding, dilation, a["ceil_mode"], "NHWC")


def _avg_pool2d(node: fx.Node, images: Images) -> fx.Node | None:
    a = rewrite.arguments(node)
    if not is_image(a["self"]):
        return None
    kernel = rewrite.repeated(a["kernel_size"], 2)
    stride, padding = rewrite.repeated(a["stride"] or kernel, 2), _around(a["padding"])
    counting = (a["ceil_mode"], a["count_include_pad"], a["divisor_override"])
    x = images.twin(a["self"], node)
    return images.call(node, dialect.avg_pool2d, x, kernel, stride, padding, *counting, "NHWC")


def _adaptive_avg_pool2d(node: fx.Node, images: Images) -> fx.Node | None:
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_image(source):
        return None
    before, after = rewrite.shape_of(source)[2:], rewrite.shape_of(node)[2:]
    x = images.twin(source, node)
    if after == (1, 1):
        return images.call(node, aten.mean.dim, x, [1, 2], True)
    if not math.prod(after) or any(b % a for b, a in zip(before, after, strict=True)):
        return None  # windows of several sizes
    window = [b // a for b, a in zip(before, after, strict=True)]
    return images.call(node, dialect.avg_pool2d, x, window, window, [0] * 4, False, True, None, "NHWC")


def _cat(node: fx.Node, images: Images) -> fx.Node | None:
    a = rewrite.arguments(node)
    operands = a["tensors"]
    if not all(is_image(n) for n in operands):
        return None
    return images.call(node, aten.cat.default, [images.twin(n, node) for n in operands], _PLACE[a["dim"]])


def _along_dim(node: fx.Node, images: Images) -> fx.Node | None:
    """Operators with one `dim` that keep the rank."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_image(source) or not is_image(node):
        return None
    a = rewrite.arguments(node)
    a["dim"] = _PLACE[a["dim"]]
    first, *rest = a
    assert isinstance(node.target, Operator)
    return images.call(node, node.target, images.twin(a[first], node), *(a[k] for k in rest))


def _reduction(node: fx.Node, images: Images) -> fx.Node | None:
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_image(source):
        return None
    a = rewrite.arguments(node)
    dims = [d % 4 for d in a["dim"] or range(4)] if not isinstance(a["dim"], int) else [a["dim"] % 4]
    left = [d for d in range(4) if d not in dims]
    if not a["keepdim"] and [_PLACE[d] for d in left] != sorted(_PLACE[d] for d in left):
        return None  # the dims that are left would change places
    assert isinstance(node.target, Operator)
    args = (images.twin(source, node), [_PLACE[d] for d in dims], a["keepdim"])
    kwargs = {"dtype": a["dtype"]} if a.get("dtype") is not None else {}
    if a["keepdim"]:
        return images.call(node, node.target, *args, **kwargs)
    images.equal[node] = rewrite.call(images.graph, node.target, args, kwargs, before=node, value=node.meta["val"])
    return None


def _split(node: fx.Node, images: Images) -> fx.Node | None:
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_image(source):
        return None
    if not all(user.target is operator.getitem for user in node.users):
        return None
    a = rewrite.arguments(node)
    sizes = a["split_size"] if "split_size" in a else a["split_sizes"]
    assert isinstance(node.target, Operator)
    args = (images.twin(source, node), sizes, _PLACE[a["dim"]])
    return rewrite.call(images.graph, node.target, args, before=node)


def _getitem(node: fx.Node, images: Images) -> fx.Node | None:
    source, index = node.args
    if source not in images.computed or not isinstance(source, fx.Node):
        return None
    with images.graph.graph.inserting_before(node):
        new = images.graph.graph.call_function(operator.getitem, (images.nhwc[source], index))
    new.meta["val"] = images.nhwc[source].meta["val"][index]
    return new


def _constant_pad(node: fx.Node, images: Images) -> fx.Node | None:
    a = rewrite.arguments(node)
    if not is_image(a["self"]):
        return None
    pad = [*a["pad"], *[0] * (8 - len(a["pad"]))]
    width, height, channels, batch = (pad[i : i + 2] for i in (0, 2, 4, 6))
    x = images.twin(a["self"], node)
    return images.call(node, aten.constant_pad_nd.default, x, channels + width + height + batch, a["value"])


def _upsample_nearest2d(node: fx.Node, images: Images) -> fx.Node | None:
    """Whole factors only: every pixel is repeated."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_image(source):
        return None
    batch, channels, *before = rewrite.shape_of(source)
    after = rewrite.shape_of(node)[2:]
    a = rewrite.arguments(node)
    factors = a.get("scale_factors") or (a.get("scales_h"), a.get("scales_w"))
    if not math.prod(before) or any(n % o for n, o in zip(after, before, strict=True)):
        return None
    (height, width), (down, across) = before, (n // o for n, o in zip(after, before, strict=True))
    if any(f is not None and f != n for f, n in zip(factors, (down, across), strict=True)):
        return None  # torch then finds the nearest pixel by the factor it was given, not by the sizes
    x = images.twin(source, node)
    split = [batch, height, 1, width, 1, channels]
    x = rewrite.call(images.graph, aten.reshape.default, (x, split), before=node)
    x = rewrite.call(
        images.graph, aten.expand.default, (x, [batch, height, down, width, across, channels]), before=node
    )
    return images.call(node, aten.reshape.default, x, [batch, *after, channels])


def _permute(node: fx.Node, images: Images) -> fx.Node | None:
    """An image that the model itself permutes to NCHW was in NHWC before."""
    source, dims = node.args
    if is_image(node) and list(dims) == _TO_NCHW and isinstance(source, fx.Node):  # type: ignore[arg-type]
        images.nhwc[node] = source
        images.free.add(node)
    return None


def _channel_move(node: fx.Node, images: Images) -> fx.Node | None:
    """Channels change places, and are what lies innermost then."""
    source = node.args[0]
    moved = map_of(node)
    digits = None if moved is None else channel_digits(moved)
    if digits is None or not isinstance(source, fx.Node) or not any(images.has(n) for n in (source,)):
        return None
    batch, channels, height, width = rewrite.shape_of(source)
    order = sorted(range(len(digits)), key=lambda i: -digits[i].stride)
    in_shape = [batch * height * width, *[digits[i].extent for i in order]]
    dims = [0, *[1 + order.index(i) for i in range(len(digits))]]
    twin = images.twin(source, node)
    return images.call(node, dialect.permute, twin, in_shape, dims, [batch, height, width, channels])


def wants_nhwc(node: fx.Node) -> bool:
    """Whether a node that stays as it is reads its image in NHWC at no cost: the model permutes it itself."""
    if rewrite.calls(node, aten.permute.default):
        return list(node.args[1]) == _TO_NHWC  # type: ignore[arg-type]
    source = node.args[0] if node.args else None
    if not rewrite.calls(node, *_RESHAPES) or not isinstance(source, fx.Node) or not is_image(source):
        return False
    batch, channels, *pixels = rewrite.shape_of(source)
    if rewrite.shape_of(node) != (batch, channels, math.prod(pixels)):
        return False
    return all(rewrite.calls(u, aten.permute.default) and list(u.args[1]) == [0, 2, 1] for u in node.users)  # type: ignore[arg-type]


_RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints)


def _is_computed(node: fx.Node) -> bool:
    return is_image(node) and node.op != "get_attr"


def _around(padding: int | Sequence[int]) -> list[int]:
    vertical, horizontal = rewrite.repeated(padding, 2)
    return [vertical, vertical, horizontal, horizontal]


RULES: dict[Any, Rule] = {
    dialect.conv2d: _conv2d,
    dialect.conv_transpose2d: _conv2d,
    aten.max_pool2d.default: _max_pool2d,
    aten.avg_pool2d.default: _avg_pool2d,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten.cat.default: _cat,
    aten.slice.Tensor: _along_dim,
    aten.softmax.int: _along_dim,
    aten.log_softmax.int: _along_dim,
    aten.mean.dim: _reduction,
    aten.sum.dim_IntList: _reduction,
    aten.amax.default: _reduction,
    aten.amin.default: _reduction,
    aten.split_with_sizes.default: _split,
    aten.split.Tensor: _split,
    operator.getitem: _getitem,
    aten.constant_pad_nd.default: _constant_pad,
    aten.permute.default: _permute,
    dialect.permute: _channel_move,
    aten.upsample_nearest2d.default: _upsample_nearest2d,
    aten.upsample_nearest2d.vec: _upsample_nearest2d,
}
