"""What kernels over the rows of a matrix share: vector partial results, tails without scalar code, parallel rows.

    columns   | v0 v1 v2 v3 | v0 v1 v2 v3 | v0 v1 | last |      groups of independent accumulators, then single vectors
The last vector starts `lanes` before the end and overlaps its neighbour; what it counts twice is masked. A row shorter
than a vector is cut into vectors of the largest power of two that fits: any length from 1 on takes the same code.
Registers: one accumulator per group vector, the value, and what its arithmetic needs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ...hwdb.cost import launch_seconds, memory_bandwidth_gbs
from .loops import between, share, span

_IN_FLIGHT_CYCLES = 230.0  # of a row's vectors: fitted to layer norm over 96 to 768 columns on a Zen 4 core


@dataclass(frozen=True)
class Rows:
    """`count` rows of `length` contiguous float32 each, and how they are cut."""

    count: int
    length: int
    lanes: int
    group: int
    tasks: int

    @property
    def reason(self) -> str:
        """The choice in a few words."""
        return f"{self.count} rows of {self.length}, {self.group}x{self.lanes} partial results, {self.tasks} tasks"


def choose_rows(count: int, length: int, cycles: float, hw: Hardware) -> Rows:
    """Cut `count` rows of `length`; `cycles` is what one vector of a row costs over all passes."""
    lanes = hw.lanes("float32")
    while lanes > length:
        lanes //= 2
    group = max(1, min(hw.vector_registers // 4, length // lanes))
    microseconds = count * length / lanes * cycles / hw.cycles_per_us
    tasks = 1
    if hw.cores > 1 and microseconds > 2 * hw.launch_us:
        tasks = even_tasks(microseconds, count, hw)
    return Rows(count, length, lanes, group, tasks)


def even_tasks(microseconds: float, count: int, hw: Hardware) -> int:
    """Into how many tasks `count` pieces of work are worth cutting: as many for every core, up to four."""
    each = max(1, min(4, int(microseconds / (4 * hw.launch_us * hw.cores))))
    return min(count, each * hw.cores)


def predicted_seconds(rows: Rows, cycles: float, row_cycles: float, hw: Hardware) -> float | None:
    """Seconds of a kernel over `rows`: the busiest core's vectors, or all bytes through the cache that holds them.

    A row costs `row_cycles` beside its vectors: folding partial results, and what is computed from them. That is time
    spent waiting, which the next row fills where rows are so short that both are in flight.
    """
    if hw.clock_mhz is None:
        return None
    rounds = -(-rows.tasks // hw.cores)
    share = -(-rows.count // rows.tasks) * rounds
    vectors = -(-rows.length // rows.lanes)
    waiting = row_cycles * min(1.0, vectors * cycles / _IN_FLIGHT_CYCLES) ** 2
    arithmetic = share * (vectors * cycles + waiting) / (hw.clock_mhz * 1e6)
    moved = 8.0 * rows.count * rows.length
    rate = memory_bandwidth_gbs(hw, moved)
    memory = 0.0 if rate is None else moved / (rate * 1e9) * (1 if rows.tasks > 1 else hw.cores)
    return max(arithmetic, memory) + (launch_seconds(hw) if rows.tasks > 1 else 0.0)


@contextmanager
def each_task(rows: Rows) -> Any:
    """The parallel loop; its value is the range (first, last) of rows. Scratch is allocated inside, once a task."""
    loop: AbstractContextManager[Any] = T.parallel(0, rows.tasks) if rows.tasks > 1 else T.serial(0, 1)
    with loop as task:
        first, last = share(rows.count, rows.tasks, task)
        yield T.bind(first), T.bind(last)


@contextmanager
def each_row(rows: Rows, bounds: tuple[Any, Any]) -> Any:
    """The rows of a task; its value is (row, index of the row's first element)."""
    with between(*bounds) as row:
        yield row, T.bind(row * rows.length)


# emit(column, accumulator, mask): one vector from `column` on. In the lanes where `mask` (None: nowhere) is false, the
# elements were already seen.
Emit = Callable[[Any, int, Any], None]


def each_vector(rows: Rows, emit: Emit) -> None:
    """Emit the loops over one row's vectors."""
    lanes, group = rows.lanes, rows.group
    groups, left = divmod(rows.length // lanes, group)
    if groups == 1:
        for u in range(group):
            emit(u * lanes, u, None)
    elif groups:
        with T.serial(0, groups) as i:
            for u in range(group):
                emit(i * (group * lanes) + u * lanes, u, None)
    done = groups * group
    for u in range(left):
        emit((done + u) * lanes, u, None)
    tail = rows.length % lanes
    if tail:
        lane = tirx.Ramp(tirx.const(0, "int32"), tirx.const(1, "int32"), lanes)
        emit(rows.length - lanes, left % group, lane >= tirx.const(lanes - tail, f"int32x{lanes}"))


def accumulators(rows: Rows) -> Any:
    """A register for every vector of a group."""
    return T.alloc_buffer((rows.group * rows.lanes,), "float32", scope="local")


def fill(rows: Rows, acc: Any, value: float) -> None:
    """Set all accumulators."""
    for u in range(rows.group):
        T.buffer_store(acc, vector(value, rows.lanes), [span(u * rows.lanes, rows.lanes)])


def vector(value: float, lanes: int) -> Any:
    """A float32 constant in every lane."""
    return tirx.const(value, "float32" if lanes == 1 else f"float32x{lanes}")


def fold(rows: Rows, acc: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine all accumulators and then their lanes, half with half: a scalar.

    Every step goes through a local buffer, which LLVM keeps in registers: TVM's simplifier would substitute a let, and
    where `combine` names an operand twice the expression would double with each step.
    """
    lanes, count = rows.lanes, rows.group
    while count > 1:
        half = count // 2
        for u in range(half):
            one, other = span(u * lanes, lanes), span((count - half + u) * lanes, lanes)
            T.buffer_store(acc, combine(acc[one], acc[other]), [one])
        count -= half
    if lanes == 1:
        return acc[0]
    halves = T.alloc_buffer((lanes,), "float32", scope="local")
    value, start = acc[span(0, lanes)], 0
    while lanes > 1:
        lanes //= 2
        low = tirx.Shuffle([value], [tirx.const(i, "int32") for i in range(lanes)])
        high = tirx.Shuffle([value], [tirx.const(i + lanes, "int32") for i in range(lanes)])
        T.buffer_store(halves, combine(low, high), [span(start, lanes)])
        value, start = halves[span(start, lanes)], start + lanes
    return value


def masked(mask: Any, value: Any, otherwise: Any) -> Any:
    """`value` where the lane is new, `otherwise` where it was seen."""
    return value if mask is None else tirx.Select(mask, value, otherwise)


def greater(a: Any, b: Any) -> Any:
    """max(a, b); a NaN in `b` is lost, one in `a` too."""
    return tirx.Select(a > b, a, b)
