"""Measure this machine with small kernels of ours: multiply-adds, bytes from each level, parallel regions, waking.

Rates are the best of many short runs: what disturbs a run on a shared machine only ever makes it slower. What a
parallel region costs is a median.
The kernels go the way every model goes: TIR, LLVM, a library that Python loads.
"""

from __future__ import annotations

import datetime
import logging
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tvm.tirx.script import builder as T

from ...backends.aot import library, weights
from ...backends.aot.library import Library
from ...backends.aot.program import Buffer, Program, Step
from ...backends.kernels.loops import constant, flat, kernel_function, span
from ...backends.kernels.register_tile import prefetch
from ...hwdb import Hardware
from ...hwdb.measured import Measured, identity

log = logging.getLogger(__name__)

SECONDS = 0.6  # for each figure
_REGIONS = 64  # parallel regions of one call, so that entering from Python does not count
_REGION_US = 10.0  # of work for each core between two of them: of less the caller does all before others are there
_TASKS_PER_CORE = 16
_MEMORY_TIMES = 4  # the last cache, so that it holds next to nothing of what is read again


@dataclass(frozen=True)
class _Probe:
    """A kernel on its own: the library's region, and its buffers."""

    region: int
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]

    def run(self, code: Library) -> None:
        code.run(self.region, [x.data_ptr() for x in self.inputs], [y.data_ptr() for y in self.outputs])


class Timer(Protocol):
    """Runs the programs of `programs` by their number and says how many seconds a run takes."""

    def best(self, program: int, paused: bool = False) -> float:
        """Of the shortest run, on all cores; `paused`: its threads had gone to sleep."""

    def typical(self, program: int, threads: int) -> float:
        """Of the median run: what threads wait for each other is no disturbance."""


def measure(hw: Hardware, seconds: float = SECONDS, say: Callable[[str], None] = log.info) -> Measured:
    """Measure this machine, which `hw` describes; about `seconds` for each figure. `say` is told what comes next."""
    with tempfile.TemporaryDirectory(prefix="graphwright-calibrate-") as scratch:
        say("building the kernels")
        made = programs(hw)
        info = library.build(made, hw, Path(scratch))
        weights.write(Path(scratch, library.WEIGHTS_NAME), info.weights, {})
        code = Library(info.library, threads=hw.cores)
        try:
            return figures(hw, _Here(code, [_probe(i, program) for i, program in enumerate(made)], seconds), say)
        finally:
            code.close()


def programs(hw: Hardware) -> list[Program]:
    """Multiply-adds, parallel regions, and the bytes of each level of `level_footprints`."""
    chains = _chains(hw)
    made = [_multiply_adds(hw, chains, _steps(hw), _TASKS_PER_CORE * hw.cores), _regions(hw, chains)]
    for level, floats in level_footprints(hw).items():
        made.append(_sums(hw, f"level_{level}", floats, _passes(hw, level, floats)))
    return made


def figures(hw: Hardware, timer: Timer, say: Callable[[str], None]) -> Measured:
    """What the times of `programs(hw)` say of a machine that `hw` describes. `say` is told what comes next."""
    say("multiply-adds")
    busy = timer.best(0)
    flops = 2.0 * hw.lanes("float32") * _chains(hw) * _steps(hw) * _TASKS_PER_CORE * hw.cores / busy
    say("parallel regions")
    together, alone = timer.typical(1, hw.cores), timer.typical(1, 1)
    launch = (together - alone / hw.cores) / _REGIONS
    woken = timer.best(0, paused=True)
    rates = {}
    for number, (level, floats) in enumerate(level_footprints(hw).items()):
        say(f"bytes from level {level}" if level else "bytes from memory")
        rates[level] = 4.0 * floats * hw.cores * _passes(hw, level, floats) / timer.best(2 + number) / 1e9
    # Of the work of all cores the caller does w seconds alone, and the rest is shared: lowering/waking.py.
    waking = (woken - busy) / (1 - 1 / hw.cores) if hw.cores > 1 else 0.0
    today = datetime.date.today().isoformat()
    return Measured(identity(hw), today, flops, rates, max(launch, 1e-8) * 1e6, max(waking, 1e-6) * 1e6)


@dataclass(frozen=True)
class _Here:
    """Times programs in this process."""

    code: Library
    probes: Sequence[_Probe]
    seconds: float

    def best(self, program: int, paused: bool = False) -> float:
        return min(_runs(lambda: self.probes[program].run(self.code), self.seconds, _idle if paused else None))

    def typical(self, program: int, threads: int) -> float:
        before, self.code.threads = self.code.threads, threads
        found = statistics.median(_runs(lambda: self.probes[program].run(self.code), self.seconds, None))
        self.code.threads = before
        return found


def _probe(number: int, program: Program) -> _Probe:
    shapes = [program.buffers[name].shape for name in program.outputs]
    rows, *columns = program.buffers["x"].shape
    given = _zeros(rows, columns[0]) if columns else torch.full((rows,), 0.5)
    return _Probe(number, (given,), tuple(torch.empty(shape) for shape in shapes))


def level_footprints(hw: Hardware) -> dict[int, int]:
    """Floats a core reads again and again to measure each level: well within it, well beyond the one before.

    A level whose share of a core is not twice that of the level before is left out. Memory is level 0.
    """
    found: dict[int, int] = {}
    inner = 0
    for cache in hw.caches:
        own = cache.size_bytes // min(cache.shared_by_cores, hw.cores)
        target = max(2 * inner, own // 2)
        if target <= own * 3 // 4:
            found[cache.level] = _whole(hw, target)
        inner = max(inner, own)
    last = sum(cache.size_bytes for cache in hw.caches[-1:])
    found[0] = _whole(hw, max(32 << 20, _MEMORY_TIMES * last) // hw.cores)
    return found


def _zeros(rows: int, floats: int) -> torch.Tensor:
    """Zeros in large pages where the system has them, as the weights of a model are."""
    size = 4 * rows * floats
    memory = mmap.mmap(-1, size + (2 << 20))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:  # a kernel without them
            log.debug("no large pages: %s", error)
    return torch.frombuffer(memory, dtype=torch.float32, count=rows * floats).zero_().view(rows, floats)


_AHEAD = 2048  # floats read between two looks ahead
_SUMS = 8  # vectors added up side by side, so that no addition waits for the one before


def _whole(hw: Hardware, size: int) -> int:
    """`size` bytes as floats, in whole blocks of the summing loop."""
    step = _SUMS * hw.lanes("float32")
    block = step * max(1, _AHEAD // step)
    return max(1, size // 4 // block) * block


def _passes(hw: Hardware, level: int, floats: int) -> int:
    """Times a footprint is read in one call: about a millisecond, from memory once."""
    return max(1, (4 << 20) * level // (4 * floats)) if level else 1


def _chains(hw: Hardware) -> int:
    """Multiply-adds in flight: twice what the latency asks for, as far as there are registers."""
    wanted = 2 * hw.fma_latency_cycles * max(1.0, hw.fma_per_cycle)
    return int(max(1, min(wanted, hw.vector_registers - 3)))


def _steps(hw: Hardware) -> int:
    """Steps of one task: all tasks of a core together about a millisecond."""
    per_task = 1000.0 / _TASKS_PER_CORE * hw.cycles_per_us * hw.fma_per_cycle
    return max(16, int(per_task / _chains(hw)))


def _multiply_adds(hw: Hardware, chains: int, steps: int, tasks: int) -> Program:
    """Tasks of multiply-adds in registers."""
    kernel = _chained(hw, chains, steps, tasks)
    return _alone("multiply_adds", kernel, (hw.lanes("float32"),), (tasks, chains * hw.lanes("float32")))


def _chained(hw: Hardware, chains: int, steps: int, tasks: int) -> Any:
    """The kernel of so many chains of a = a * x + x in each task."""
    lanes = hw.lanes("float32")

    def body(x: Any, out: Any) -> None:
        with T.parallel(0, tasks) as task:
            acc = T.alloc_buffer((chains * lanes,), "float32", scope="local")
            for c in range(chains):
                T.buffer_store(acc, constant(0.0, lanes), [span(c * lanes, lanes)])
            factor = T.bind(x[span(0, lanes)])
            with T.serial(0, steps):
                for c in range(chains):
                    at = span(c * lanes, lanes)
                    T.buffer_store(acc, acc[at] * factor + factor, [at])
            for c in range(chains):
                T.buffer_store(out, acc[span(c * lanes, lanes)], [task, span(c * lanes, lanes)])

    return kernel_function("multiply_adds", [(lanes,)], [(tasks, chains * lanes)], body)


def _sums(hw: Hardware, name: str, floats: int, passes: int) -> Program:
    """Every core adds up its own row; of what is read once, it asks for the lines ahead, as kernels do."""
    lanes = hw.lanes("float32")
    step = _SUMS * lanes
    block = step * max(1, _AHEAD // step) if passes == 1 else floats

    def body(x: Any, out: Any) -> None:
        everything = flat(x)
        with T.parallel(0, hw.cores) as core:
            acc = T.alloc_buffer((step,), "float32", scope="local")
            for c in range(_SUMS):
                T.buffer_store(acc, constant(0.0, lanes), [span(c * lanes, lanes)])
            with T.serial(0, passes), T.serial(0, floats // block) as part:
                first = core * floats + part * block
                if passes == 1:
                    prefetch(everything, first + 2 * block, block)
                with T.serial(0, block // step) as row:
                    for c in range(_SUMS):
                        at = span(c * lanes, lanes)
                        T.buffer_store(acc, acc[at] + everything[span(first + row * step + c * lanes, lanes)], [at])
            for c in range(_SUMS):
                T.buffer_store(out, acc[span(c * lanes, lanes)], [core, span(c * lanes, lanes)])

    shape, result = (hw.cores, floats), (hw.cores, step)
    return _alone(name, kernel_function(name, [shape], [result], body), shape, result)


def _regions(hw: Hardware, chains: int) -> Program:
    """Parallel regions one after another, each with the same work for every core."""
    steps = max(1, int(_REGION_US * hw.cycles_per_us * hw.fma_per_cycle / chains))
    kernel = _chained(hw, chains, steps, hw.cores)
    lanes = hw.lanes("float32")
    outputs = tuple(f"y{i}" for i in range(_REGIONS))
    buffers = {"x": Buffer("x", (lanes,), "float32", "input")}
    buffers |= {name: Buffer(name, (hw.cores, chains * lanes), "float32", "output") for name in outputs}
    steps_of = tuple(Step("region", ("x", name)) for name in outputs)
    return Program("regions", {"region": kernel}, buffers, steps_of, ("x",), outputs, {})


def _alone(name: str, kernel: Any, given: tuple[int, ...], result: tuple[int, ...]) -> Program:
    buffers = {"x": Buffer("x", given, "float32", "input"), "y": Buffer("y", result, "float32", "output")}
    return Program(name, {name: kernel}, buffers, (Step(name, ("x", "y")),), ("x",), ("y",), {})


def _runs(run: Callable[[], None], seconds: float, before: Callable[[], None] | None) -> list[float]:
    """Seconds of each run, five at least."""
    run()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < 5 or time.perf_counter() < end:
        if before is not None:
            before()
        start = time.perf_counter_ns()
        run()
        found.append((time.perf_counter_ns() - start) / 1e9)
    return found


def _idle() -> None:
    """Long enough that the other threads sleep, while this one stays awake."""
    end = time.perf_counter() + 2e-3
    while time.perf_counter() < end:
        pass
