"""sort and topk of long rows: ranks in groups of 32, then merges of neighbouring runs; a thread an element throughout.

    place in a group     how many of its 32 elements come first
    place in a merge     its own place in its run + how many elements of the other run come first (bisection)

With n elements a row that is log2(n) - 5 merges, each one kernel of n log2(n) comparisons a row. Of equal elements the
earlier one comes first: the result is the stable one (after Satish, Harris and Garland, Designing Efficient Sorting
Algorithms for Manycore GPUs, 2009, without its shared memory).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import fx
from tvm import te, tirx
from tvm.script.ir_builder import tirx as T
from tvm.target import Target

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes.rewrite import shape_of
from ..lowering import expressions as ex
from ..lowering.imperative import Elements, grid, local, loop_nest, when
from ..lowering.index_math import Expr, argument, axis_of, replace
from ..lowering.kernels_matmul import refuse_large
from ..lowering.registry import Kernel, KernelCall, Out, Refusal
from ..lowering.sort import comes_first
from .own_order import in_own_order

aten = torch.ops.aten

_SHORT = 64  # elements of a row that one thread sorts
_GROUP = 32  # whose ranks are counted
_ROWS_A_UNIT = 32  # so many rows have a thread each for the few best

Pair = Sequence[Elements]  # values, and the places they come from


def sorting(shape: Sequence[int], dtype: str, axis: int, descending: bool, kept: int) -> Any:
    """The loops: x -> its first `kept` elements in order along `axis`, and their places in int64."""
    x = te.placeholder(tuple(shape), dtype, "x")
    result = replace(tuple(shape), axis, kept)
    first = comes_first(descending)
    outs = [Out(result, dtype), Out(result, "int64"), *(Out(tuple(shape), d) for d in (dtype, "int32") * 2)]

    def body(ins: Sequence[Elements], made: Sequence[Elements]) -> None:
        old, new = made[2:4], made[4:6]
        _rank(ins[0], new, axis, first)
        width = _GROUP
        while width < shape[axis]:
            old, new = new, old
            _merge(old, new, axis, width, first)
            width *= 2
        with grid(result, parallel=True) as i:
            made[0][i] = new[0][i]
            made[1][i] = tirx.Cast("int64", new[1][i])

    values, places, *_ = loop_nest(outs, [x], body, "sort")
    return te.create_prim_func([x, values, places])


def _rank(source: Elements, new: Pair, axis: int, first: Callable[[Expr, Expr], Expr]) -> None:
    """Sort groups of neighbours."""
    length = source.shape[axis]
    with grid(source.shape, parallel=True) as i:
        k, rank = i[axis], local("int32")
        start = tirx.floordiv(k, _GROUP) * _GROUP
        rank[0] = 0
        with T.serial(0, _GROUP) as j, when(start + j < length):
            other = source[replace(i, axis, start + j)]
            tied = tirx.all(ex.negate(first(source[i], other)), start + j < k)
            rank[0] = rank[0] + tirx.Cast("int32", tirx.any(first(other, source[i]), tied))
        target = replace(i, axis, start + rank[0])
        new[0][target] = source[i]
        new[1][target] = k


def _merge(old: Pair, new: Pair, axis: int, width: int, first: Callable[[Expr, Expr], Expr]) -> None:
    """Merge neighbouring sorted runs of `width` elements."""
    values, places = old
    length = values.shape[axis]
    with grid(values.shape, parallel=True) as i:
        k = i[axis]
        start = tirx.floordiv(k, 2 * width) * (2 * width)
        middle, end = tirx.min(start + width, length), tirx.min(start + 2 * width, length)
        low, high = local("int32"), local("int32")
        low[0] = tirx.Select(k < middle, middle, start)
        high[0] = tirx.Select(k < middle, end, middle)
        with T.serial(0, width.bit_length()), when(low[0] < high[0]):
            half = (low[0] + high[0]) >> 1
            other = values[replace(i, axis, half)]
            # Of equals those of the left run come first.
            left = tirx.all(k >= middle, ex.negate(first(values[i], other)))
            with T.If(tirx.any(first(other, values[i]), left)):
                with T.Then():
                    low[0] = half + 1
                with T.Else():
                    high[0] = half
        target = replace(i, axis, k + low[0] - middle)
        new[0][target] = values[i]
        new[1][target] = places[i]


def _call(node: fx.Node, hw: Hardware, descending: bool, kept: int | None) -> KernelCall | Refusal:
    x = argument(node, "self")
    shape = shape_of(x)
    axis = axis_of(argument(node, "dim"), len(shape))
    if not shape or not prod(shape) or shape[axis] < _SHORT:
        return Refusal(f"rows of {x.name} are shorter than {_SHORT}: a thread sorts each")
    if refusal := refuse_large(x):
        return refusal
    rows = prod(shape) // shape[axis]
    if kept is not None and kept <= _GROUP and rows >= _ROWS_A_UNIT * hw.cores:
        return Refusal(f"{rows} rows have a thread each for the best {kept}")
    dtype = str(x.meta["val"].dtype).removeprefix("torch.")
    loops = sorting(shape, dtype, axis, descending, shape[axis] if kept is None else kept)
    func = in_own_order(loops, Target(hw.tvm_target(), host={"kind": "llvm"}), hw.cores)
    launches = 2 + max(0, (shape[axis] - 1).bit_length() - _GROUP.bit_length() + 1)
    moved = float((x.meta["val"].element_size() + 4) * prod(shape) * launches)
    work = Work(bytes_read=moved, bytes_written=moved, launches=launches, tasks=prod(shape))
    return KernelCall(func, (x,), "merges by rank", f"a thread an element, {launches} kernels", work)


def _sort(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    return _call(node, hw, argument(node, "descending"), None)


def _topk(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    kept = argument(node, "k")
    return _call(node, hw, argument(node, "largest"), kept) if kept else Refusal("none of the best are asked for")


SORTS: dict[torch._ops.OpOverload, Kernel] = {
    aten.sort.default: _sort,
    aten.sort.stable: _sort,
    aten.topk.default: _topk,
}
