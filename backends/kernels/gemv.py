"""Products as dot products along k, where both operands are contiguous: act(x[m, :] . w[n, :] + bias + residual).

`dot_rows`: few columns.

    row        k in steps of CHAINS vectors: CHAINS accumulators hide the latency of the multiply-add; then the lanes of
               all are added up, and what k has beyond whole steps one by one
    registers: CHAINS accumulators + one vector of x (w multiplies from memory)
    tasks      equal shares of the rows

A tile of columns would multiply a vector of which all but N lanes are padding.

`dot_batch`: few rows against a computed b[N, K], whose panels would be transposed to be read once or twice.

    unit       NR columns of one product: NR accumulators, one vector of a; the lanes of NR sums are folded at once
               into NR / lanes vectors of results. The last columns overlap their neighbours.
    tasks      equal shares of the units
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ...hwdb.cost import launch_seconds, memory_bandwidth_gbs
from .loops import Shape, between, constant, kernel_function, share, span, view
from .matmul import Epilogue
from .packing import batch_index, fold_lanes

CHAINS = 4
MOST_ROWS = 4  # of a product by dots: they read b again from L1
DOT_STEPS = 1.4  # of what the multiply-add pipes can do: 9 loads for 8 multiply-adds, and adding up the lanes


def is_narrow(hw: Hardware, columns: int, depth: int) -> bool:
    """Whether less than half a vector of columns makes dot products the better way."""
    lanes = hw.lanes("float32")
    return 2 * columns < lanes and depth >= 2 * lanes


def split(hw: Hardware, rows: int, columns: int, depth: int) -> int:
    """Tasks: as many as cores where the rows keep them busy for longer than it takes to start them."""
    microseconds = rows * columns * depth / hw.lanes("float32") / hw.cycles_per_us
    return min(hw.cores, rows) if microseconds > 2.0 * hw.launch_us else 1


def dot_rows(
    M: int,
    K: int,
    N: int,
    hw: Hardware,
    *,
    bias: bool = False,
    residual: bool = False,
    activation: str = "none",
    args: Sequence[float] = (),
    input_shape: Shape | None = None,
    bias_shape: Shape | None = None,
    output_shape: Shape | None = None,
) -> Any:
    """Return the kernel (x, weight [N, K][, bias][, residual], out); shapes as in `matmul`."""
    lanes, tasks = hw.lanes("float32"), split(hw, M, N, K)
    out_shape = output_shape or (M, N)
    operands: list[Shape] = [input_shape or (M, K), (N, K)]
    operands += [bias_shape or (N,)] * bias + [out_shape] * residual
    step = CHAINS * lanes

    def body(x: Any, weight: Any, *others: Any) -> None:
        x, out = view(x, (M, K)), view(others[-1], (M, N))
        epilogue = Epilogue(
            view(others[0], (N,)) if bias else None,
            view(others[-2], (M, N)) if residual else None,
            activation,
            tuple(args),
        )
        chains = [span(c * lanes, lanes) for c in range(CHAINS)]
        with T.parallel(0, tasks) if tasks > 1 else T.serial(0, 1) as task:
            acc = T.alloc_buffer((step,), "float32", scope="local")
            tail = T.alloc_buffer((1,), "float32", scope="local")
            with between(*share(M, tasks, task)) as row, T.serial(0, N) as n:
                for at in chains:
                    T.buffer_store(acc, constant(0.0, lanes), [at])
                T.buffer_store(tail, constant(0.0), [0])
                steps, rest = divmod(K, step)
                if steps:
                    with T.serial(0, steps) as block:
                        for c, at in enumerate(chains):
                            k = span(block * step + c * lanes, lanes)
                            T.buffer_store(acc, acc[at] + x[row, k] * weight[n, k], [at])
                if rest:
                    with between(steps * step, K) as k:
                        T.buffer_store(tail, tail[0] + x[row, k] * weight[n, k], [0])
                total = across([acc[at] for at in chains], lambda a, b: a + b, lanes) + tail[0]
                T.buffer_store(out, epilogue.activate(epilogue.add(total, row, n, 1)), [row, n])

    return kernel_function("dot_rows", operands, [out_shape], body)


def suits_dots(hw: Hardware, rows: int, columns: int, depth: int) -> bool:
    """Whether so few rows read b[columns, depth] that packing it costs more than multiplying."""
    lanes = hw.lanes("float32")
    return rows <= MOST_ROWS and columns >= side_by_side(hw) and depth >= lanes


def side_by_side(hw: Hardware) -> int:
    """Dot products at once: whole vectors, and enough chains to hide the multiply-add's latency."""
    lanes = hw.lanes("float32")
    return lanes * max(1, -(-int(hw.fma_latency_cycles * hw.fma_per_cycle) // lanes))


def dots_seconds(hw: Hardware, batch: int, M: int, N: int, K: int) -> float | None:
    """Predicted seconds of dot products of M rows with N: multiply-adds, or moving the matrices."""
    if hw.clock_mhz is None:
        return None
    tasks = split(hw, batch * M, N, K)
    cycles = DOT_STEPS / hw.fma_per_cycle * batch * M * N * K / hw.lanes("float32") / tasks
    moved = 4.0 * batch * (N * K + M * K + M * N)
    rate = memory_bandwidth_gbs(hw, moved)
    memory = 0.0 if rate is None else moved / (rate * 1e9) * hw.cores / tasks
    return max(cycles / (hw.clock_mhz * 1e6), memory) + (launch_seconds(hw) if tasks > 1 else 0.0)


def dot_batch(
    batch: Shape,
    a_batch: Shape,
    b_batch: Shape,
    M: int,
    K: int,
    N: int,
    hw: Hardware,
    *,
    bias_shape: Shape | None = None,
    residual: bool = False,
    activation: str = "none",
    args: Sequence[float] = (),
    buffer_shapes: tuple[Shape, Shape, Shape],
) -> Any:
    """Return the kernel (a[..., M, K], b[..., N, K][, bias][, residual], out) of products that broadcast to `batch`."""
    lanes, width, count = hw.lanes("float32"), side_by_side(hw), prod(batch)
    groups, tasks = -(-N // width), split(hw, prod(batch) * M, N, K)
    a_buffer, b_buffer, out_shape = buffer_shapes
    operands: list[Shape] = [a_buffer, b_buffer]
    operands += ([bias_shape] if bias_shape is not None else []) + [out_shape] * residual

    def body(a: Any, b: Any, *rest: Any) -> None:
        a, b = view(a, (prod(a_batch) * M, K)), view(b, (prod(b_batch) * N, K))
        out = view(rest[-1], (count * M, N))
        epilogue = Epilogue(
            view(rest[0], (N,)) if bias_shape is not None else None,
            view(rest[-2], (count * M, N)) if residual else None,
            activation,
            tuple(args),
        )
        chains = [span(c * lanes, lanes) for c in range(width)]
        with T.parallel(0, tasks) if tasks > 1 else T.serial(0, 1) as task:
            acc = T.alloc_buffer((width * lanes,), "float32", scope="local")
            tail = T.alloc_buffer((width,), "float32", scope="local")
            with between(*share(count * groups, tasks, task)) as unit, T.serial(0, M) as m:
                index = tirx.floordiv(unit, groups)
                first = T.bind(tirx.min(tirx.floormod(unit, groups) * width, N - width))
                row = batch_index(index, batch, a_batch) * M + m
                column = T.bind(batch_index(index, batch, b_batch) * N + first)
                for at in chains:
                    T.buffer_store(acc, constant(0.0, lanes), [at])
                with T.serial(0, K // lanes) as block:
                    k = span(block * lanes, lanes)
                    for c, at in enumerate(chains):
                        T.buffer_store(acc, acc[at] + a[row, k] * b[column + c, k], [at])
                for j in range(0, width, lanes):
                    T.buffer_store(tail, constant(0.0, lanes), [span(j, lanes)])
                if K % lanes:
                    with T.serial(0, width) as c, between(K // lanes * lanes, K) as k:
                        T.buffer_store(tail, tail[c] + a[row, k] * b[column + c, k], [c])
                for j in range(0, width, lanes):
                    total = fold_lanes([acc[at] for at in chains[j : j + lanes]], lambda x, y: x + y)
                    value = epilogue.add(total + tail[span(j, lanes)], index * M + m, first + j, lanes)
                    T.buffer_store(out, epilogue.activate(value), [index * M + m, span(first + j, lanes)])

    return kernel_function("dot_batch", operands, [out_shape], body)


def across(vectors: list[Any], combine: Callable[[Any, Any], Any], lanes: int) -> Any:
    """All lanes of all `vectors` combined into one scalar."""
    value = vectors[0]
    for vector in vectors[1:]:
        value = combine(value, vector)
    width = lanes
    value = T.bind(value)
    while width > 1:
        width //= 2
        halves = [tirx.const((lane + width) % lanes, "int32") for lane in range(lanes)]
        value = T.bind(combine(value, tirx.Shuffle([value], halves)))
    return tirx.Shuffle([value], [tirx.const(0, "int32")])
