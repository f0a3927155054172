"""What a model asks of any machine: the operators of its rewritten graph, counted in operations and bytes.

Views cost nothing. A pointwise operator joins the operator that computes its largest operand, where nobody else reads
that; only its other operands are read then. Equal operators are one entry with a count. Elements are counted, not
bytes: what an element weighs depends on the precision a machine is asked to run in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

from ...errors import CaptureError
from ...passes import dialect, dialect_gating, dialect_joined, dialect_pairs, dialect_planar, dialect_sparse
from ...passes.rewrite import arguments, shape_of

aten = torch.ops.aten

# Multiplications and additions of one element of a transcendental or a normalisation, as polynomials compute them.
ELEMENT_FLOPS = 10.0

_FOLDED = {aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default}
# What is read at computed places is no more than what is written.
_GATHERS = {aten.embedding.default, aten.index_select.default, aten.gather.default, aten.index.Tensor}


@dataclass(frozen=True)
class Product:
    """A matrix product [rows x depth] . [depth x columns], `batch` of them; convolutions are counted as one."""

    rows: int
    columns: int
    depth: int
    batch: int = 1

    @property
    def flops(self) -> float:
        """A multiply-add counts two."""
        return 2.0 * self.rows * self.columns * self.depth * self.batch


@dataclass(frozen=True)
class Operation:
    """One operator, in elements and operations; `count` equal ones are in the model."""

    name: str  # the operator's: "conv2d", "linear"
    products: tuple[Product, ...]
    element_flops: float  # arithmetic besides the products
    read: float  # elements of activations that come in
    written: float
    weights: float  # elements of constants
    launches: int  # 0 where it joins the operator before it
    winograd: bool = False  # a 3x3 convolution of stride 1, which takes fewer multiplications than it is counted with
    count: int = 1
    node: fx.Node | None = field(default=None, compare=False, repr=False)  # one of them

    @property
    def product_flops(self) -> float:
        """Of the matrix products."""
        return sum(product.flops for product in self.products)


@dataclass(frozen=True)
class Workload:
    """A model: its operators, and the elements it keeps."""

    operations: tuple[Operation, ...]
    weight_elements: int  # of floating point; constants of other dtypes are small
    activation_elements: int  # the most that are alive at one time, inputs and results included

    @property
    def flops(self) -> float:
        """Of the matrix products of one call."""
        return sum(operation.count * operation.product_flops for operation in self.operations)


def workload(graph: fx.GraphModule) -> Workload:
    """Count a captured graph, rewritten or not. Raises CaptureError where a shape is only known at run time."""
    found: Counter[Operation] = Counter()
    nodes: dict[Operation, fx.Node] = {}
    for node in graph.graph.nodes:
        for tensor in _tensors(node):
            if any(not isinstance(size, int) for size in tensor.shape):
                raise CaptureError(
                    f"{node.name} ({node.target}) has the shape {tuple(tensor.shape)}, which depends on the values of "
                    "the inputs: what follows it cannot be counted; predict the parts before and after it"
                )
        operation = operation_of(node)
        if operation is not None:
            found[operation] += 1
            nodes.setdefault(operation, node)
    operations = tuple(replace(each, count=count, node=nodes[each]) for each, count in found.items())
    weights = {str(n.target): _elements(n) for n in graph.graph.nodes if n.op == "get_attr" and n.users and _floats(n)}
    return Workload(operations, int(sum(weights.values())), _most_alive(graph))


def operation_of(node: fx.Node) -> Operation | None:
    """Count one node; None where it computes nothing of its own."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or node.target.is_view:
        return None
    written = sum(v.numel() for v in _tensors(node))
    operands = [n for n in node.all_input_nodes if _tensors(n)]
    if not written:
        return None
    computed = [n for n in operands if n.op != "get_attr"]
    sizes = sorted((_elements(n) for n in computed), reverse=True)
    weights = float(sum(_elements(n) for n in operands if n.op == "get_attr"))
    name = str(node.target).split(".")[1]
    if node.target in _FOLDED or _joins(node, computed):
        return Operation(name, (), _element_flops(node, written), float(sum(sizes[1:])), 0.0, weights, 0)
    if node.target in _GATHERS:
        return Operation(name, (), 0.0, 2.0 * written, float(written), 0.0, 1)
    products = _products(node)
    elements = 0.0 if products else _element_flops(node, written)
    read = float(sum(sizes))
    return Operation(name, products, elements, read, float(written), weights, 1, _winograd(node))


def _joins(node: fx.Node, computed: Sequence[fx.Node]) -> bool:
    """Whether a pointwise operator is done while its largest operand is written."""
    largest = max(computed, key=_elements, default=None)
    return _pointwise(node) and largest is not None and largest.op == "call_function" and len(largest.users) == 1


def _products(node: fx.Node) -> tuple[Product, ...]:
    count = _COUNTED.get(node.target)
    if count is not None:
        return count(node, arguments(node))
    flops = _flops(node)
    # Of an operator that the table does not know only the operations are known: a product of one row and column.
    return (Product(1, 1, max(1, round(flops / 2))),) if flops else ()


def _conv(node: fx.Node, given: Mapping[str, Any]) -> tuple[Product, ...]:
    weight, groups = shape_of(given["weight"]), int(given.get("groups", 1))
    pixels = math.prod(shape_of(node)) // weight[0]
    return (Product(pixels, weight[0] // groups, math.prod(weight[1:]), groups),)


def _conv_transpose(node: fx.Node, given: Mapping[str, Any]) -> tuple[Product, ...]:
    weight, groups = shape_of(given["weight"]), int(given["groups"])
    pixels = math.prod(shape_of(given["input"])) // weight[0]
    return (Product(pixels, math.prod(weight[1:]), weight[0] // groups, groups),)


def _pair(node: fx.Node, given: Mapping[str, Any]) -> tuple[Product, ...]:
    first, second = shape_of(given["weight"]), shape_of(given["depth_weight"])
    image = shape_of(given["input"])
    height, width = (image[2], image[3]) if given["layout"] == "NCHW" else (image[1], image[2])
    rows = [
        (size + pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            (height, width), _padding(given["padding"]), given["dilation"], first[2:], given["stride"], strict=True
        )
    ]
    outputs = math.prod(shape_of(node)) // second[0]
    return (
        Product(image[0] * math.prod(rows), first[0], math.prod(first[1:])),
        Product(outputs, 1, math.prod(second[1:]), second[0]),
    )


def _padding(padding: Sequence[int]) -> tuple[int, int]:
    """Zeros before and behind together, of rows and of columns."""
    if len(padding) == 4:
        return padding[0] + padding[1], padding[2] + padding[3]
    return 2 * padding[0], 2 * padding[1]


def _linear(node: fx.Node, given: Mapping[str, Any]) -> tuple[Product, ...]:
    columns, depth = shape_of(given["weight"])
    return (Product(math.prod(shape_of(node)) // columns, columns, depth),)


def _sparse(node: fx.Node, given: Mapping[str, Any]) -> tuple[Product, ...]:
    columns, depth = shape_of(given["weight"])
    kept = math.prod(given["blocks"][:3]) / columns  # of the terms of each sum, in the mean
    return (Product(math.prod(shape_of(node)) // columns, columns, min(depth, round(kept))),)


def _packed(node: fx.Node, given: Mapping[str, Any]) -> tuple[Product, ...]:
    columns, depth = shape_of(given["weight"])
    return (Product(max(1, round((1.0 - given["share"]) * shape_of(node)[0])), columns, depth),)


def _matmul(node: fx.Node, given: Mapping[str, Any]) -> tuple[Product, ...]:
    a, out = shape_of(given["a"]), shape_of(node)
    depth = a[-2] if given["transpose_a"] else a[-1]
    b = shape_of(given["b"])
    if math.prod(b[:-2]) == 1:
        return (Product(math.prod(out) // out[-1], out[-1], depth),)
    return (Product(out[-2], out[-1], depth, math.prod(out[:-2])),)


def _attention(node: fx.Node, given: Mapping[str, Any]) -> tuple[Product, ...]:
    q, v = shape_of(given["q"]), shape_of(given["v"])
    return _scores(math.prod(q[:-2]), q[-2], v[-2], q[-1], v[-1])


def _strided(node: fx.Node, given: Mapping[str, Any]) -> tuple[Product, ...]:
    batch, heads, _, queries, keys, depth, value_depth = given["extents"]
    return _scores(batch * heads, queries, keys, depth, value_depth)


def _scores(batch: int, queries: int, keys: int, depth: int, value_depth: int) -> tuple[Product, ...]:
    return Product(queries, keys, depth, batch), Product(queries, value_depth, keys, batch)


_COUNTED: Mapping[Any, Callable[[fx.Node, Mapping[str, Any]], tuple[Product, ...]]] = {
    dialect.conv2d: _conv,
    dialect_planar.planar_conv2d: _conv,
    dialect.conv_transpose2d: _conv_transpose,
    dialect_pairs.conv_depthwise: _pair,
    dialect.linear: _linear,
    dialect_joined.joined_linear: _linear,
    dialect_gating.packed_linear: _packed,
    dialect_sparse.sparse_linear: _sparse,
    dialect.matmul: _matmul,
    dialect.attention: _attention,
    aten.scaled_dot_product_attention.default: lambda node, given: _attention(
        node, {"q": given["query"], "v": given["value"]}
    ),
    dialect.strided_attention: _strided,
}


def _winograd(node: fx.Node) -> bool:
    if node.target not in (dialect.conv2d, dialect_planar.planar_conv2d):
        return False
    given = arguments(node)
    plain = list(given["stride"]) == list(given["dilation"]) == [1, 1] and given.get("groups", 1) == 1
    return plain and shape_of(given["weight"])[2:] == (3, 3)


def _flops(node: fx.Node) -> float:
    """Operations of a product that has no entry of its own, by torch's own counter; 0 for other operators."""
    if _pointwise(node) or _moves(node) or not any(_tensors(n) for n in node.all_input_nodes):
        return 0.0
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    mode = next((v.fake_mode for n in node.all_input_nodes for v in _tensors(n) if isinstance(v, FakeTensor)), None)
    if mode is None or not callable(node.target):
        return 0.0
    with mode, FlopCounterMode(display=False) as counter:
        node.target(*args, **kwargs)
    return float(counter.get_total_flops())


def _pointwise(node: fx.Node) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    return torch.Tag.pointwise in node.target.tags or node.target is dialect.swish


def _element_flops(node: fx.Node, elements: int) -> float:
    return ELEMENT_FLOPS * elements if _floats(node) and not _moves(node) else 0.0


def _moves(node: fx.Node) -> bool:
    return node.target in (dialect.permute, aten.cat.default, aten.clone.default, aten.constant_pad_nd.default)


def _floats(node: fx.Node) -> bool:
    return any(v.is_floating_point() for v in _tensors(node))


def _elements(node: fx.Node) -> int:
    return sum(v.numel() for v in _tensors(node))


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    found = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in found if isinstance(v, torch.Tensor)]


def _most_alive(graph: fx.GraphModule) -> int:
    """The most elements of computed values and inputs that are alive at one time, in the order of the graph.

    A view is its operand; a pointwise operator writes over the operand where nobody reads that again.
    """
    order = list(graph.graph.nodes)
    place = {node: i for i, node in enumerate(order)}
    owner: dict[fx.Node, fx.Node] = {}
    for node in order:
        viewed = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
        operands = node.all_input_nodes
        owner[node] = owner[operands[0]] if viewed and operands else node
    last: dict[fx.Node, int] = {}
    for node in order:
        for user in node.users:
            last[owner[node]] = max(last.get(owner[node], 0), place[user])
    alive = most = 0
    ends: dict[int, int] = {}
    for i, node in enumerate(order):
        if owner[node] is node and node.op in ("call_function", "placeholder"):
            own = _elements(node)
            alive += own
            ends[last.get(node, i)] = ends.get(last.get(node, i), 0) + own
            reused = sum(_elements(n) for n in node.all_input_nodes if last.get(n) == i and n.op == "call_function")
            overwritten = isinstance(node.target, torch._ops.OpOverload) and _pointwise(node)
            most = max(most, alive - min(own, reused) if overwritten else alive)
        alive -= ends.pop(i, 0)
    return most
