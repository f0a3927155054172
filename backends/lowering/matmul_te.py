"""Matrix products and attention as sums: for the dtypes and shapes that no kernel takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from tvm import te, tirx

from ...passes import dialect, dialect_mixed
from . import expressions as ex
from .epilogue import activate
from .expressions import Scalar, pointwise
from .index_math import ravel, unravel
from .reduction import max_of, plus, reduce, shape_of, sum_of
from .registry import Out, lowers

aten = torch.ops.aten

Index = Sequence[Any]


def _sum_of_products(
    shape: Sequence[int], depth: int, dtype: str, left: Callable[..., Any], right: Callable[..., Any]
) -> te.Tensor:
    """result[i] = sum over k of left(i, k) * right(i, k), accumulated in `dtype`."""
    if depth == 0:
        return ex.filled(Out(tuple(shape), dtype), 0)
    k = te.reduce_axis((0, depth), name="k")

    def element(*index: Any) -> Any:
        return te.sum(ex.cast(left(index, k.var), dtype) * ex.cast(right(index, k.var), dtype), axis=k)

    return te.compute(shape, element, name="matmul")


def product(a: te.Tensor, b: te.Tensor, transpose_a: bool = False, transpose_b: bool = False) -> te.Tensor:
    """a @ b with torch.matmul's rules for 1-dim operands and leading dims, in the dtype torch accumulates in."""
    dtype = ex.compute_dtype(str(a.dtype))
    a_shape, b_shape = shape_of(a), shape_of(b)
    vector_a, vector_b = len(a_shape) == 1, len(b_shape) == 1
    depth = a_shape[-2] if transpose_a else a_shape[-1]
    rows = () if vector_a else (a_shape[-1] if transpose_a else a_shape[-2],)
    columns = () if vector_b else (b_shape[-2] if transpose_b else b_shape[-1],)
    lead = tuple(torch.broadcast_shapes(a_shape[:-2], b_shape[:-2]))  # type: ignore[no-untyped-call]

    def left(index: Index, k: Any) -> Any:
        if vector_a:
            return a(k)
        row = index[len(lead)]
        return ex.read(a, (*index[: len(lead)], *((k, row) if transpose_a else (row, k))))

    def right(index: Index, k: Any) -> Any:
        if vector_b:
            return b(k)
        column = index[-1]
        return ex.read(b, (*index[: len(lead)], *((column, k) if transpose_b else (k, column))))

    return _sum_of_products((*lead, *rows, *columns), depth, dtype, left, right)


@lowers(
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    aten.mv.default,
    aten.dot.default,
    aten.vdot.default,
)
def matmul(out: Out, a: te.Tensor, b: te.Tensor) -> te.Tensor:
    if 0 in shape_of(a):  # a sum of nothing
        return ex.filled(out, 0)
    total = product(a, b)
    return total if str(total.dtype) == out.dtype else ex.copy(out, total)


@lowers(aten.addmm.default, aten.addmv.default, aten.baddbmm.default)
def addmm(out: Out, x: te.Tensor, a: te.Tensor, b: te.Tensor, *, beta: Scalar = 1, alpha: Scalar = 1) -> te.Tensor:
    return _combined(out, x, product(a, b), beta, alpha)


@lowers(aten.addbmm.default)
def addbmm(out: Out, x: te.Tensor, a: te.Tensor, b: te.Tensor, *, beta: Scalar = 1, alpha: Scalar = 1) -> te.Tensor:
    products = product(a, b)
    total = reduce(products, (0,), plus, 0, str(products.dtype), keepdim=False)
    return _combined(out, x, total, beta, alpha)


def _combined(out: Out, x: te.Tensor, total: te.Tensor, beta: Scalar, alpha: Scalar) -> te.Tensor:
    """beta * x + alpha * total; x is not read when beta is 0, so that its NaN do not count."""

    def scaled(value: Any, factor: Scalar) -> Any:
        return value if factor == 1 else ex.multiply(value, ex.constant(factor, ex.dtype_of(value)))

    if beta == 0:
        return pointwise(out, lambda t: scaled(t, alpha), total)
    return pointwise(out, lambda t, v: ex.add(scaled(v, beta), scaled(t, alpha)), total, x)


def _finish(
    out: Out,
    total: te.Tensor,
    bias: te.Tensor | None,
    residual: te.Tensor | None,
    activation: str,
    args: Sequence[float],
) -> te.Tensor:
    addends = [addend for addend in (bias, residual) if addend is not None]
    wide = Out(out.shape, str(total.dtype))
    if addends:
        total = pointwise(wide, lambda t, *rest: sum(rest, start=t), total, *addends)
    if activation != "none":
        return activate(out, total, activation, args)
    return total if wide == out else ex.copy(out, total)


@lowers(aten.linear.default)
def linear(out: Out, x: te.Tensor, weight: te.Tensor, bias: te.Tensor | None = None) -> te.Tensor:
    return fused_linear(out, x, weight, bias, None, "none", ())


@lowers(dialect.linear, dialect_mixed.linear_f16, dialect_mixed.linear_bf16)
def fused_linear(
    out: Out,
    x: te.Tensor,
    weight: te.Tensor,
    bias: te.Tensor | None,
    residual: te.Tensor | None,
    activation: str,
    activation_args: Sequence[float],
    round_input: bool = False,
    narrow: bool = False,
) -> te.Tensor:
    """activation(x weight^T + bias + residual); x is not rounded where no kernel serves products of 16 bits."""
    total = product(x, weight, transpose_b=len(weight.shape) > 1)
    return _finish(out, total, bias, residual, activation, activation_args)


@lowers(dialect.matmul)
def fused_matmul(
    out: Out,
    a: te.Tensor,
    b: te.Tensor,
    bias: te.Tensor | None,
    residual: te.Tensor | None,
    transpose_a: bool,
    transpose_b: bool,
    activation: str,
    activation_args: Sequence[float],
) -> te.Tensor:
    return _finish(out, product(a, b, transpose_a, transpose_b), bias, residual, activation, activation_args)


@lowers(dialect.attention, dialect_mixed.attention_f16, dialect_mixed.attention_bf16)
def attention(
    out: Out,
    q: te.Tensor,
    k: te.Tensor,
    v: te.Tensor,
    mask: te.Tensor | None,
    is_causal: bool,
    scale: float,
    fill: float | None = None,
    narrow: bool = False,
) -> te.Tensor:
    """softmax(q k^T scale + mask) v; a row the mask leaves nothing of is zeros, as torch has it, NaN with `fill`.

    Those of 16 bits are not rounded where no kernel serves them.
    """
    dtype = ex.compute_dtype(out.dtype)
    lead = out.shape[:-2]
    queries, keys, depth = shape_of(q)[-2], shape_of(k)[-2], shape_of(q)[-1]
    minus_infinity = tirx.const(-math.inf, dtype)

    def of_group(x: te.Tensor, index: Index) -> Any:
        """The element of k or v, whose heads may each serve several of q's."""
        shape = shape_of(x)
        if len(shape) > 2 and len(lead) > 0 and shape[-3] not in (1, lead[-1]):
            head = len(index) - 3
            index = (*index[:head], tirx.floordiv(index[head], lead[-1] // shape[-3]), *index[head + 1 :])
        return ex.read(x, index)

    scores = _sum_of_products(
        (*lead, queries, keys),
        depth,
        dtype,
        lambda i, e: ex.read(q, (*i[:-1], e)),
        lambda i, e: of_group(k, (*i[:-2], i[-1], e)),
    )

    def masked(*index: Any) -> Any:
        score = scores(*index) * ex.constant(scale, dtype)
        if mask is not None:
            value = ex.read(mask, index)
            if str(mask.dtype) == "bool":
                score = tirx.Select(value, score, minus_infinity if fill is None else ex.constant(fill, dtype))
            else:
                score = score + ex.cast(value, dtype)
        return tirx.Select(index[-1] <= index[-2], score, minus_infinity) if is_causal else score

    allowed = te.compute((*lead, queries, keys), masked, name="masked")
    last = (len(lead) + 1,)
    largest = max_of(allowed, last, dtype)

    def power(*index: Any) -> Any:
        top = ex.read(largest, index)
        nothing = top <= minus_infinity
        return tirx.Select(nothing, ex.constant(0, dtype), tirx.exp(allowed(*index) - top))

    powers = te.compute((*lead, queries, keys), power, name="powers")
    total = sum_of(powers, last, dtype)
    sums = _sum_of_products(
        out.shape, keys, dtype, lambda i, t: powers(*i[:-1], t), lambda i, t: of_group(v, (*i[:-2], t, i[-1]))
    )

    def finished(*index: Any) -> Any:
        whole = total(*index[:-1], 0)
        empty = whole.equal(ex.constant(0, dtype))
        one = ex.constant(1 if fill is None or not keys else math.nan, dtype)  # a sum of no keys is 0
        return ex.cast(sums(*index) / tirx.Select(empty, one, whole), out.dtype)

    return te.compute(out.shape, finished, name="attention")


def _dense_rows(node: fx.Node) -> str | None:
    return None if len(node.args) <= 10 and not node.kwargs else "attention of rows that a table numbers"


@lowers(dialect.strided_attention, can=_dense_rows)
def strided_attention(
    out: Out,
    q: te.Tensor,
    k: te.Tensor,
    v: te.Tensor,
    mask: te.Tensor | None,
    is_causal: bool,
    scale: float,
    extents: Sequence[int],
    places: Sequence[int],
    out_shape: Sequence[int],
    fill: float | None = None,
) -> te.Tensor:
    """Attention of operands at offset + b, h and s times three strides + d of their buffers."""
    batch, heads, key_heads, queries, keys, depth, value_depth = extents
    shapes = ((heads, queries, depth), (key_heads, keys, depth), (key_heads, keys, value_depth))

    def heads_of(x: te.Tensor, shape: tuple[int, ...], place: Sequence[int]) -> te.Tensor:
        def element(*index: Any) -> Any:
            linear = sum((i * n for i, n in zip(index, (*place[1:], 1), strict=True)), place[0])
            return ex.read(x, unravel(linear, shape_of(x)))

        return te.compute((batch, *shape), element, name="heads")

    operands = [
        heads_of(x, shape, places[4 * i :][:4]) for i, (x, shape) in enumerate(zip((q, k, v), shapes, strict=True))
    ]
    whole = attention(Out((batch, heads, queries, value_depth), out.dtype), *operands, mask, is_causal, scale, fill)

    def element(*index: Any) -> Any:
        linear = ravel(index, out.shape)  # the digits of [b, h, s, d] in another order
        where = zip((batch, heads, queries, value_depth), (*places[13:], 1), strict=True)
        return whole(*[tirx.floormod(tirx.floordiv(linear, step), n) if n > 1 else 0 for n, step in where])

    return te.compute(out.shape, element, name="strided_attention")


def _no_dropout(node: fx.Node) -> str | None:
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    return None if dropout == 0 else "attention with dropout is random"


@lowers(aten.scaled_dot_product_attention.default, can=_no_dropout)
def scaled_dot_product_attention(
    out: Out,
    q: te.Tensor,
    k: te.Tensor,
    v: te.Tensor,
    attn_mask: te.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> te.Tensor:
    factor = 1 / math.sqrt(shape_of(q)[-1] or 1) if scale is None else scale
    return attention(out, q, k, v, attn_mask, is_causal, factor)
