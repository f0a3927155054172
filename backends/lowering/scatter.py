"""Writes at computed places: scatter, index_put, index_add and their kin; results of which the shape depends on data.

Writes happen in the order of the index, so of several writes to one place the last stays, as in PyTorch's CPU
kernels (which promise nothing there). Addresses are clamped as in `indexing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from tvm import te, tirx

from . import expressions as ex
from .imperative import Elements, copy, grid, local, loop_nest, when
from .index_math import Expr, Index, address, axis_of, define, replace, sizes, unravel
from .indexing import index_layout, indexed, refuse_masks
from .registry import Out, lowers

aten = torch.ops.aten

Combine = Callable[[Expr, Expr], Expr]


def _assign(old: Expr, new: Expr) -> Expr:
    return new


def _add(old: Expr, new: Expr) -> Expr:
    return tirx.any(old, new) if str(old.ty) == "bool" else old + new


def _multiply(old: Expr, new: Expr) -> Expr:
    return tirx.all(old, new) if str(old.ty) == "bool" else old * new


def _minimum(old: Expr, new: Expr) -> Expr:
    if str(old.ty) == "bool":
        return tirx.all(old, new)
    return tirx.Select(tirx.any(old < new, ex.is_nan(old)), old, new)


def _maximum(old: Expr, new: Expr) -> Expr:
    if str(old.ty) == "bool":
        return tirx.any(old, new)
    return tirx.Select(tirx.any(old > new, ex.is_nan(old)), old, new)


_COMBINE: dict[str, Combine] = {
    "add": _add,
    "multiply": _multiply,
    "sum": _add,
    "mean": _add,
    "prod": _multiply,
    "amin": _minimum,
    "amax": _maximum,
}


def _write_along(
    out: Out,
    source: te.Tensor,
    axis: int,
    index: te.Tensor,
    new: te.Tensor | float,
    combine: Combine,
) -> te.Tensor:
    """`source` with result[.., index[i], ..] = combine(that, new[i]) for every i in the order of `index`."""
    if 0 in sizes(index) or 0 in out.shape:
        return define(out, lambda *i: source(*i), "scatter")
    inputs = [source, index, *([new] if isinstance(new, te.Tensor) else [])]

    def body(ins: Sequence[Elements], outs: Sequence[Elements]) -> None:
        result = outs[0]
        copy(result, ins[0])
        with grid(ins[1].shape, independent=_others(ins[1], axis)) as i:
            value = ex.cast(ins[2][i], out.dtype) if isinstance(new, te.Tensor) else ex.constant(new, out.dtype)
            place = _place(i, axis, ins[1][i], out.shape)
            result[place] = combine(result[place], value)

    return loop_nest([out], inputs, body, "scatter")[0]


def _others(index: Elements, axis: int) -> list[int]:
    """The dims of an index along `axis` by which no two elements have the same place."""
    return [d for d in range(len(index.shape)) if d != axis]


def _place(index: Index, axis: int, which: Expr, shape: Sequence[int]) -> Index:
    # A 0-dim tensor is written by indices of rank 1, and the other way round.
    if not shape:
        return ()
    return replace(index or (0,), axis, address(which, shape[axis]))


@lowers(aten.scatter.src)
def scatter_src(out: Out, source: te.Tensor, dim: int, index: te.Tensor, src: te.Tensor) -> te.Tensor:
    """result[.., index[i], ..] = src[i]."""
    return _write_along(out, source, axis_of(dim, len(out.shape)), index, src, _assign)


@lowers(aten.scatter.value)
def scatter_value(out: Out, source: te.Tensor, dim: int, index: te.Tensor, value: float) -> te.Tensor:
    """result[.., index[i], ..] = value."""
    return _write_along(out, source, axis_of(dim, len(out.shape)), index, value, _assign)


@lowers(aten.scatter.reduce)
def scatter_reduce_src(
    out: Out, source: te.Tensor, dim: int, index: te.Tensor, src: te.Tensor, *, reduce: str
) -> te.Tensor:
    """result[.., index[i], ..] += or *= src[i]."""
    return _write_along(out, source, axis_of(dim, len(out.shape)), index, src, _COMBINE[reduce])


@lowers(aten.scatter.value_reduce)
def scatter_reduce_value(
    out: Out, source: te.Tensor, dim: int, index: te.Tensor, value: float, *, reduce: str
) -> te.Tensor:
    """result[.., index[i], ..] += or *= value."""
    return _write_along(out, source, axis_of(dim, len(out.shape)), index, value, _COMBINE[reduce])


@lowers(aten.scatter_add.default)
def scatter_add(out: Out, source: te.Tensor, dim: int, index: te.Tensor, src: te.Tensor) -> te.Tensor:
    """result[.., index[i], ..] += src[i]."""
    return _write_along(out, source, axis_of(dim, len(out.shape)), index, src, _add)


def _identity(reduce: str, dtype: str) -> Expr:
    if reduce in ("sum", "mean"):
        return ex.constant(0, dtype)
    if reduce == "prod":
        return ex.constant(1, dtype)
    low = reduce == "amax"
    if dtype == "bool":
        return ex.constant(not low, dtype)
    if not dtype.startswith(("int", "uint")):
        return ex.constant(-math.inf if low else math.inf, dtype)
    bounds = torch.iinfo(getattr(torch, dtype))
    return ex.constant(bounds.min if low else bounds.max, dtype)


@lowers(aten.scatter_reduce.two)
def scatter_reduce(
    out: Out,
    source: te.Tensor,
    dim: int,
    index: te.Tensor,
    src: te.Tensor,
    reduce: str,
    *,
    include_self: bool = True,
) -> te.Tensor:
    """Reduce src[i] into result[.., index[i], ..]; include_self says whether the old value takes part."""
    if 0 in sizes(index) or 0 in out.shape:
        return define(out, lambda *i: source(*i), "scatter_reduce")
    axis = axis_of(dim, len(out.shape))
    counted = Out(out.shape, "int32")

    def body(ins: Sequence[Elements], outs: Sequence[Elements]) -> None:
        result, count = outs
        copy(result, ins[0])
        with grid(out.shape, parallel=True) as i:
            count[i] = int(include_self)
        with grid(ins[1].shape, independent=_others(ins[1], axis)) as i:
            place = _place(i, axis, ins[1][i], out.shape)
            first = tirx.all(count[place] == 0)
            old = tirx.Select(first, _identity(reduce, out.dtype), result[place])
            result[place] = _COMBINE[reduce](old, ex.cast(ins[2][i], out.dtype))
            count[place] = count[place] + 1

    result, count = loop_nest([out, counted], [source, index, src], body, "scatter_reduce")
    if reduce != "mean":
        return define(out, lambda *i: result(*i), "scatter_reduce")

    def mean(*i: Expr) -> Expr:
        divisor = ex.cast(tirx.max(count(*i), 1), out.dtype)
        whole = out.dtype.startswith(("int", "uint"))
        return tirx.floordiv(result(*i), divisor) if whole else result(*i) / divisor

    return define(out, mean, "scatter_mean")


@lowers(aten.index_put.default, aten._unsafe_index_put.default, can=refuse_masks)
def index_put(
    out: Out,
    source: te.Tensor,
    indices: Sequence[te.Tensor | None],
    values: te.Tensor,
    accumulate: bool = False,
) -> te.Tensor:
    """Write `values` (broadcast) where advanced indexing would read."""
    axes, place, joint = layout = index_layout(indices, len(out.shape))
    rest = [extent for axis, extent in enumerate(out.shape) if axis not in axes]
    written = (*rest[:place], *joint, *rest[place:])
    if 0 in written:
        return define(out, lambda *i: source(*i), "index_put")
    given = [index for index in indices if index is not None]

    def body(ins: Sequence[Elements], outs: Sequence[Elements]) -> None:
        result, new = outs[0], ins[1]
        copy(result, ins[0])
        read = dict(zip(axes, ins[2:], strict=True))
        apart = [d for d in range(len(written)) if not place <= d < place + len(joint)]
        with grid(written, independent=apart) as i:
            tail = i[len(i) - len(new.shape) :]
            value = ex.cast(new[[0 if n == 1 else k for k, n in zip(tail, new.shape, strict=True)]], out.dtype)
            at = indexed(i, [read.get(axis) for axis in range(len(out.shape))], out.shape, layout)
            result[at] = _add(result[at], value) if accumulate else value

    return loop_nest([out], [source, values, *given], body, "index_put")[0]


@lowers(aten.put.default)
def put(out: Out, source: te.Tensor, index: te.Tensor, src: te.Tensor, accumulate: bool = False) -> te.Tensor:
    """Write src[k] at position index[k] of the tensor read as one row."""
    if 0 in sizes(index) or 0 in out.shape:
        return define(out, lambda *i: source(*i), "put")
    count = math.prod(sizes(index))

    def body(ins: Sequence[Elements], outs: Sequence[Elements]) -> None:
        result = outs[0]
        copy(result, ins[0])
        with grid([count]) as (k,):
            which = ins[1][unravel(k, ins[1].shape)]
            at = unravel(address(which, math.prod(out.shape), wrap=True), out.shape)
            value = ex.cast(ins[2][unravel(k, ins[2].shape)], out.dtype)
            result[at] = _add(result[at], value) if accumulate else value

    return loop_nest([out], [source, index, src], body, "put")[0]


def _write_slices(
    out: Out,
    source: te.Tensor,
    dim: int,
    index: te.Tensor,
    new: Callable[[Index], Expr] | te.Tensor,
    combine: Combine,
) -> te.Tensor:
    """`source` with slice index[k] of dim combined with slice k of `new`, for k in order."""
    if 0 in sizes(index) or 0 in out.shape:
        return define(out, lambda *i: source(*i), "index_write")
    axis = axis_of(dim, len(out.shape))
    count = math.prod(sizes(index))
    inputs = [source, index, *([new] if isinstance(new, te.Tensor) else [])]

    def body(ins: Sequence[Elements], outs: Sequence[Elements]) -> None:
        result, which = outs[0], ins[1]
        copy(result, ins[0])
        shape = (*out.shape[:axis], count, *out.shape[axis + 1 :])
        with grid(shape, independent=[d for d in range(len(shape)) if d != axis]) as i:
            k = i[axis]
            wanted = which[k] if which.shape else which[()]
            if isinstance(new, te.Tensor):
                value = ex.cast(ins[2][i] if len(ins[2].shape) == len(i) else ins[2][()], out.dtype)
            else:
                value = new(i)
            at = replace(i, axis, address(wanted, out.shape[axis], wrap=True)) if out.shape else ()
            result[at] = combine(result[at], value)

    return loop_nest([out], inputs, body, "index_write")[0]


@lowers(aten.index_add.default)
def index_add(
    out: Out, source: te.Tensor, dim: int, index: te.Tensor, src: te.Tensor, *, alpha: float = 1
) -> te.Tensor:
    """result slice index[k] += alpha * src slice k."""

    def add(old: Expr, new: Expr) -> Expr:
        return _add(old, new if alpha == 1 else _multiply(new, ex.constant(alpha, out.dtype)))

    return _write_slices(out, source, dim, index, src, add)


@lowers(aten.index_copy.default)
def index_copy(out: Out, source: te.Tensor, dim: int, index: te.Tensor, src: te.Tensor) -> te.Tensor:
    """result slice index[k] = src slice k."""
    return _write_slices(out, source, dim, index, src, _assign)


@lowers(aten.index_fill.int_Scalar)
def index_fill(out: Out, source: te.Tensor, dim: int, index: te.Tensor, value: float) -> te.Tensor:
    """result slices index[k] = value."""
    return _write_slices(out, source, dim, index, lambda i: ex.constant(value, out.dtype), _assign)


@lowers(aten.index_fill.int_Tensor)
def index_fill_tensor(out: Out, source: te.Tensor, dim: int, index: te.Tensor, value: te.Tensor) -> te.Tensor:
    """result slices index[k] = the 0-dim tensor `value`."""
    filled = te.compute((), lambda *i: ex.cast(value(), out.dtype), name="value")
    return _write_slices(out, source, dim, index, filled, _assign)


@lowers(aten.masked_scatter.default)
def masked_scatter(out: Out, source: te.Tensor, mask: te.Tensor, src: te.Tensor) -> te.Tensor:
    """The elements of `src` in their order, put where the mask holds."""
    supply = math.prod(sizes(src))
    if 0 in out.shape or supply == 0:
        return define(out, lambda *i: source(*i), "masked_scatter")

    def body(ins: Sequence[Elements], outs: Sequence[Elements]) -> None:
        taken = local("int32")
        taken[0] = 0
        with grid(out.shape) as i:
            outs[0][i] = ins[0][_broadcast(i, ins[0].shape)]
            with when(ins[1][_broadcast(i, ins[1].shape)]):
                # Too few elements are an error in torch; the last one is repeated here.
                next_ = unravel(tirx.min(taken[0], supply - 1), ins[2].shape)
                outs[0][i] = ex.cast(ins[2][next_], out.dtype)
                taken[0] = taken[0] + 1

    return loop_nest([out], [source, mask, src], body, "masked_scatter")[0]


def _broadcast(index: Sequence[Expr], shape: Sequence[int]) -> Index:
    tail = index[len(index) - len(shape) :]
    return tuple(0 if extent == 1 else i for i, extent in zip(tail, shape, strict=True))


def _depends_on_data(node: fx.Node) -> str | None:
    return f"{node.target}: the shape of the result depends on data"


@lowers(
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    can=_depends_on_data,
)
def shaped_by_data(out: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in the table for the reason of the refusal."""
    raise AssertionError("refused")
