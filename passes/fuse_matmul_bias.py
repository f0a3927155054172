"""A matrix product and what follows it become one graphwright::linear or graphwright::matmul.

    linear(x, W, b), addmm(b, x, W.T), mm(x, W.T)   -> graphwright::linear(x, W, b)       W a constant
    mm(x, C)                                        -> graphwright::linear(x, permute(C))  C a constant
    mm(a, b), bmm(a, b), baddbmm(c, a, b)           -> graphwright::matmul(a, b), residual c
    matmul(a.mT, b), matmul(a, b.mT)                -> graphwright::matmul(a, b, transposed)
    reshape(product(x))                             -> product(reshape(x))   where only leading dims change
    activation(add(add(product, bias), y))          -> the product with bias, residual y and activation

A product that is fused already, without an activation, takes up what follows it now.

Refused for integers and mixed dtypes, vectors, beta or alpha that are not 1, and added values that are
neither one number a column nor of the product's own shape; nothing is taken up behind a value that
somebody else reads.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, dialect_int8, rewrite
from .epilogue import Epilogue, allowed, extend
from .families import fuses
from .fuse_reshape_transpose import map_of
from .moves.index_map import identity
from .refusals import keep
from .rewrite import Operator

log = logging.getLogger(__name__)
aten = torch.ops.aten


@dataclass(frozen=True)
class _Product:
    """a @ b, or act(a @ b + bias + residual) where those are part of it already."""

    a: fx.Node
    b: fx.Node
    bias: fx.Node | None = None
    residual: fx.Node | None = None
    transpose_a: bool = False
    transpose_b: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether b is a constant matrix: weights are packed at compile time."""
        return _is_stored(self.b) and len(rewrite.shape_of(self.b)) == 2 and not self.transpose_a


def fuse_matmul_bias(graph: fx.GraphModule, hw: Hardware) -> int:
    """Fuse matrix products with their transposes and epilogues; returns the number of products changed."""
    count = 0
    # A reshape that one product takes over may end up behind the product in front of it.
    while changed := _round(graph):
        count += changed
    return rewrite.finish(graph, count)


def _round(graph: fx.GraphModule) -> int:
    products = [n for n in graph.graph.nodes if n.op == "call_function" and n.target in _READERS]
    return sum(_fuse(graph, node) for node in products)


def _fuse(graph: fx.GraphModule, node: fx.Node) -> bool:
    changed, kinds, moved = False, allowed(graph, "matmul"), fuses(graph, "matmul+transpose")
    while (read := _READERS[node.target](rewrite.arguments(node), node)) is not None:  # type: ignore[index]
        product = _with_transposes(read) if moved and node.target is not dialect.linear else read
        columns = rewrite.shape_of(node)[-1]
        start = Epilogue(node, read.bias, read.residual)
        found = extend(start, lambda other: _is_bias(other, columns), kinds)  # noqa: B023
        reshape = _reshape_behind(product, found)
        settled = node.target in dialect.OPERATORS and product == read and found.last is node
        if settled and reshape is None:
            break
        last = found.last if reshape is None else reshape
        new = _emit(graph, replace(product, bias=found.bias, residual=found.residual), found, last)
        rewrite.replace_chain(node, last, new)
        node, changed = new, True
        if reshape is None:
            break
    return changed


def _linear(a: dict[str, Any], node: fx.Node) -> _Product | None:
    product = _Product(a["input"], a["weight"], a["bias"], a.get("residual"), transpose_b=True)
    if a.get("activation", "none") != "none":
        return None
    if not rewrite.is_float(node, *[n for n in (product.a, product.b, product.bias) if n is not None]):
        return _refuse(node, "not floating point of one dtype")
    return product if len(rewrite.shape_of(product.a)) >= 2 or product.is_linear else _refuse(node, "a vector")


def _fused(a: dict[str, Any], node: fx.Node) -> _Product | None:
    if a["activation"] != "none":
        return None
    return _Product(a["a"], a["b"], a["bias"], a["residual"], a["transpose_a"], a["transpose_b"])


def _matmul(a: dict[str, Any], node: fx.Node) -> _Product | None:
    left, right = a["self"], a["other"] if "other" in a else a["mat2"]
    if not rewrite.is_float(node, left, right):
        return _refuse(node, "not floating point of one dtype")
    if min(len(rewrite.shape_of(left)), len(rewrite.shape_of(right))) < 2:
        return _refuse(node, "a vector")
    return _Product(left, right)


def _add_matmul(a: dict[str, Any], node: fx.Node) -> _Product | None:
    added, left, right = a["self"], *(a[k] for k in a if k in ("mat1", "mat2", "batch1", "batch2"))
    if a["beta"] != 1 or a["alpha"] != 1:
        return _refuse(node, f"beta is {a['beta']} and alpha is {a['alpha']}")
    if not rewrite.is_float(node, added, left, right):
        return _refuse(node, "not floating point of one dtype")
    if _is_bias(added, rewrite.shape_of(node)[-1]):
        return _Product(left, right, bias=added)
    if rewrite.shape_of(added) == rewrite.shape_of(node):
        return _Product(left, right, residual=added)
    return _refuse(node, "what it adds is neither one number a column nor of its own shape")


_READERS: dict[Operator, Callable[[dict[str, Any], fx.Node], _Product | None]] = {
    aten.linear.default: _linear,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.addmm.default: _add_matmul,
    aten.baddbmm.default: _add_matmul,
    dialect.linear: _linear,
    dialect.matmul: _fused,
}


def _refuse(node: fx.Node, reason: str) -> _Product | None:
    keep(log, node, "%s", reason)
    return None


def _is_stored(node: fx.Node) -> bool:
    """Whether the node is a constant, one in 8 bits, or the transpose of one that fold_constants has not met yet."""
    if node.target is aten.permute.default and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if rewrite.calls(node, *dialect_int8.STORED) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "get_attr"


def _is_bias(other: fx.Node, columns: int) -> bool:
    shape = rewrite.shape_of(other)
    return shape == (columns,) or (other.op == "get_attr" and shape == (*[1] * (len(shape) - 1), columns))


def _with_transposes(product: _Product) -> _Product:
    """The product reading what its operands are transposes of."""
    if (source := _transposed(product.a)) is not None:
        product = replace(product, a=source, transpose_a=not product.transpose_a)
    # A stored matrix is transposed at compile time, the way linear wants it.
    if not (product.is_linear and product.transpose_b) and (source := _transposed(product.b)) is not None:
        product = replace(product, b=source, transpose_b=not product.transpose_b)
    return product


def _transposed(node: fx.Node) -> fx.Node | None:
    """What the node swaps the last two dims of, or None."""
    moved = map_of(node)
    if moved is None or len(moved.source) < 2:
        return None
    rank = len(moved.source)
    swap = identity(moved.source).permute([*range(rank - 2), rank - 1, rank - 2])
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source if moved == swap else None


def _reshape_behind(product: _Product, found: Epilogue) -> fx.Node | None:
    """A reshape behind the product that can be done to its operands instead."""
    user = rewrite.sole_user(found.last)
    if user is None or user.target is not aten.reshape.default or found.activation != "none":
        return None
    old, new = rewrite.shape_of(found.last), rewrite.shape_of(user)
    kept = 1 if product.is_linear else 2
    if len(new) < 2 or new[-kept:] != old[-kept:] or math.prod(new[:-kept]) != math.prod(old[:-kept]):
        return None
    batches = {rewrite.shape_of(n)[:-2] for n in (product.a, product.b)}
    return user if product.is_linear or len(batches) == 1 else None


def _emit(graph: fx.GraphModule, product: _Product, found: Epilogue, last: fx.Node) -> fx.Node:
    shape = rewrite.shape_of(last)

    def reshaped(node: fx.Node | None, wanted: tuple[int, ...]) -> fx.Node | None:
        if node is None or rewrite.shape_of(node) == wanted:
            return node
        return rewrite.call(graph, aten.reshape.default, (node, list(wanted)), before=last)

    a, b = product.a, product.b
    bias = reshaped(product.bias, shape[-1:])
    residual = reshaped(product.residual, shape)
    value, epilogue = rewrite.packed(last.meta["val"]), (found.activation, list(found.args))
    if product.is_linear:
        x = reshaped(a, (*shape[:-1], rewrite.shape_of(a)[-1]))
        if not product.transpose_b:
            b = rewrite.call(graph, aten.permute.default, (b, [1, 0]), before=last)
        args: tuple[Any, ...] = (x, b, bias, residual, *epilogue)
        return rewrite.call(graph, dialect.linear, args, before=last, value=value, source=found.last)
    if last is not found.last:
        a, b = (reshaped(n, (*shape[:-2], *rewrite.shape_of(n)[-2:])) or n for n in (a, b))
    args = (a, b, bias, residual, product.transpose_a, product.transpose_b, *epilogue)
    return rewrite.call(graph, dialect.matmul, args, before=last, value=value, source=found.last)
