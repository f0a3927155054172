"""Matrix product with very few columns, each a dot product along k: act(x[m, :] . w[n, :] + bias + residual).

    row        k in steps of CHAINS vectors: CHAINS accumulators hide the latency of the multiply-add; then the lanes of
               all are added up, and what k has beyond whole steps one by one
    registers: CHAINS accumulators + one vector of x (w multiplies from memory)
    tasks      equal shares of the rows

A tile of columns would multiply a vector of which all but N lanes are padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from .loops import Shape, between, constant, kernel_function, share, span, view
from .matmul import Epilogue

CHAINS = 4


def is_narrow(hw: Hardware, columns: int, depth: int) -> bool:
    """Whether less than half a vector of columns makes dot products the better way."""
    lanes = hw.lanes("float32")
    return 2 * columns < lanes and depth >= 2 * lanes


def split(hw: Hardware, rows: int, columns: int, depth: int) -> int:
    """Tasks: as many as cores where the rows keep them busy for longer than it takes to start them."""
    clock = hw.clock_mhz or 2000.0
    microseconds = rows * columns * depth / hw.lanes("float32") / clock
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
