"""Products of the rows that are left: rows moved to the front, multiplied up to a bound found at run time, moved back.

places   [M + 1]     row i goes to row places[i]; places[M] = count: of rows that are left, and where all others go

x        a . b c .         packed    a b c 0 ? ?        y    f(a) f(b) f(c) f(0) ? ?
                                           ^ count
tasks    of the product: panels alone, since nobody knows which chunks of rows will be empty; chunks are a loop
         inside, so that their rows stay in cache as in `matmul`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..tiling import Tiling
from .loops import Shape, between, constant, share, span, typed_kernel, view
from .matmul import Epilogue, allocate, multiply_chunk

ROWS_OF_A_TASK = 16  # that are moved: fewer are not worth waking a core


def places_of(M: int, threshold: float) -> Any:
    """The kernel (strength [M], places [M + 1])."""

    def body(strength: Any, places: Any) -> None:
        limit = constant(threshold)
        count = T.alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(count, tirx.const(0, "int32"), [0])
        with T.serial(0, M) as i:
            below = strength[i] < limit  # never negated: TVM takes that for >=, and NaN is neither
            T.buffer_store(places, tirx.Select(below, tirx.const(-1, "int32"), count[0]), [i])
            one = tirx.Select(below, tirx.const(0, "int32"), tirx.const(1, "int32"))
            T.buffer_store(count, count[0] + one, [0])
        with T.serial(0, M) as i:
            T.buffer_store(places, tirx.Select(places[i] < 0, count[0], places[i]), [i])
        T.buffer_store(places, count[0], [M])

    return typed_kernel("row_places", [((M,), "float32")], [((M + 1,), "int32")], body)


def tasks_of(M: int, cores: int) -> int:
    """Among how many cores the rows to move are shared."""
    return max(1, min(cores, M // ROWS_OF_A_TASK))


def pack(M: int, K: int, cores: int, input_shape: Shape) -> Any:
    """The kernel (x, places, packed [M + 1, K])."""
    tasks = tasks_of(M, cores)

    def body(x: Any, places: Any, out: Any) -> None:
        x = view(x, (M, K))
        with T.parallel(0, tasks) if tasks > 1 else T.serial(0, 1) as task:
            with T.If(tirx.EQ(task, 0)), T.Then(), T.serial(0, K) as k:
                T.buffer_store(out, constant(0.0), [places[M], k])
            with between(*share(M, tasks, task)) as i, T.If(places[i] < places[M]), T.Then():
                place = T.bind(places[i])
                with T.serial(0, K) as k:
                    T.buffer_store(out, x[i, k], [place, k])

    return typed_kernel("pack_rows", [(input_shape, "float32"), ((M + 1,), "int32")], [((M + 1, K), "float32")], body)


def unpack(M: int, N: int, cores: int) -> Any:
    """The kernel (y [M + 1, N], places, out [M, N])."""
    tasks = tasks_of(M, cores)

    def body(y: Any, places: Any, out: Any) -> None:
        loop = T.parallel(0, tasks) if tasks > 1 else T.serial(0, 1)
        with loop as task, between(*share(M, tasks, task)) as i:
            place = T.bind(places[i])
            with T.serial(0, N) as k:
                T.buffer_store(out, y[place, k], [i, k])

    return typed_kernel("unpack_rows", [((M + 1, N), "float32"), ((M + 1,), "int32")], [((M, N), "float32")], body)


def packed_matmul(t: Tiling, *, bias: bool = False, activation: str = "none", args: Sequence[float] = ()) -> Any:
    """The kernel (x [M + 1, K], packed weight[, bias], places, out) of act(x . w^T + bias), its rows up to `count`."""
    M, N, K = t.total_rows, t.total_columns, t.depth
    operands: list[tuple[Shape, str]] = [((M, K), "float32"), ((t.panels, K, t.columns), "float32")]
    operands += [((N,), "float32")] * bias + [((M,), "int32")]

    def body(x: Any, weight: Any, *rest: Any) -> None:
        places, out = rest[-2:]
        epilogue = Epilogue(rest[0] if bias else None, None, activation, tuple(args))
        tasks = max(1, min(t.tasks, t.panels))
        with T.parallel(0, tasks) if tasks > 1 else T.serial(0, 1) as task:
            scratch = allocate(t, task)
            end = T.bind(places[M - 1] + 1)
            with T.serial(0, t.row_chunks) as chunk, between(*share(t.panels, tasks, task)) as panel:
                multiply_chunk(
                    scratch,
                    t,
                    chunk,
                    panel,
                    lambda row, k, n: x[row, span(k, n)],
                    lambda k, column: weight[panel, k, span(column, t.lanes)],
                    out,
                    epilogue,
                    end=end,
                )

    return typed_kernel("packed_matmul", operands, [((M, N), "float32")], body)
