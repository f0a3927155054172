"""Parallel loops cut into tasks: every iteration runs once, whatever the number of threads and of iterations."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from aot_programs import buffer, load, program, run
from tvm import tirx
from tvm.script import tirx as T

from graphwright.backends.aot import codegen
from graphwright.backends.aot.announce_loops import announce_loops
from graphwright.backends.aot.library import Library, _callers
from graphwright.backends.aot.program import Step
from graphwright.hwdb import detect


def counting(extent: int) -> Any:
    """y[i] = x[i] + y[i] in a parallel loop: an iteration that ran twice or never shows."""

    @T.prim_func(check_well_formed=False)
    def kernel(x: T.Buffer((extent,), "float32"), y: T.Buffer((extent,), "float32")):
        T.func_attr({"tirx.noalias": True})
        for i in T.parallel(extent):
            y[i] = x[i] + y[i]

    return kernel


def counter(extent: int, directory: Path, threads: int = 2) -> Library:
    buffers = [buffer("x", "input", (extent,)), buffer("y", "output", (extent,))]
    return load(program({"k": counting(extent)}, buffers, [Step("k", ("x", "y"))], ["y"]), directory, threads=threads)


@pytest.mark.parametrize("extent", [1, 2, 3, 31, 32, 33, 65, 1000])
def test_every_iteration_runs_once(tmp_path: Path, extent: int) -> None:
    code = counter(extent, tmp_path)
    x = torch.arange(1.0, extent + 1)
    for threads in (1, 2, 3, 5, 64):
        code.threads = threads
        y = torch.zeros(extent)
        for _ in range(50):
            run(code, 0, [x], [y])
        assert torch.equal(y, 50 * x), threads
    code.close()


def test_the_loop_is_announced_in_front_of_it() -> None:
    body = codegen.lower({"k": counting(7)}, detect().tvm_target())["k"].body
    text = str(body)
    assert text.index('T.call_extern("int32", "gw_extent"') < text.index("T.parallel")
    serial = tirx.Evaluate(0)
    assert announce_loops(serial).same_as(serial)


def processor_seconds(threads: list[str]) -> float:
    """What the threads of this process have used."""
    ticks = 0
    for thread in threads:
        fields = Path(f"/proc/self/task/{thread}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / 100


def test_idle_models_use_no_processor(tmp_path: Path) -> None:
    before = {path.name for path in Path("/proc/self/task").iterdir()}
    models = [counter(64, tmp_path / str(number), threads=4) for number in range(4)]
    x, y = torch.ones(64), torch.zeros(64)
    for code in models:
        run(code, 0, [x], [y])
    workers = sorted({path.name for path in Path("/proc/self/task").iterdir()} - before)
    assert len(workers) >= len(models)
    time.sleep(0.2)
    used = processor_seconds(workers)
    time.sleep(0.5)
    assert processor_seconds(workers) == used
    for code in models:
        code.close()


def test_models_called_from_several_threads_share_one_count(tmp_path: Path) -> None:
    models = [counter(64, tmp_path / str(number)) for number in range(3)]
    x = torch.ones(64)
    results = [torch.zeros(64) for _ in models]
    gate = threading.Barrier(len(models))

    def work(number: int) -> None:
        gate.wait()
        for _ in range(2000):
            run(models[number], 0, [x], [results[number]])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, torch.full((64,), 2000.0)) for result in results)
    assert _callers.value == 0
    for code in models:
        code.close()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="no core is left")
def test_workers_keep_off_the_callers_core(tmp_path: Path) -> None:
    """Woken beside its waker, a worker would wait there while the caller does all the work."""
    before = {path.name for path in Path("/proc/self/task").iterdir()}
    code = counter(64, tmp_path)
    x, y = torch.ones(64), torch.zeros(64)
    mine = os.sched_getaffinity(0)
    for _ in range(100):  # the worker is known once it has run
        time.sleep(0.001)
        run(code, 0, [x], [y])
        (worker,) = {path.name for path in Path("/proc/self/task").iterdir()} - before
        allowed = os.sched_getaffinity(int(worker))
        if allowed != mine:
            break
    code.close()
    assert allowed < mine
    assert len(allowed) == len(mine) - 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="no core is left")
def test_workers_follow_whoever_calls(tmp_path: Path) -> None:
    """A caller of one core leaves them where they were; the next one, on the same core but free, moves them."""
    before = {path.name for path in Path("/proc/self/task").iterdir()}
    code = counter(64, tmp_path)
    x, y = torch.ones(64), torch.zeros(64)
    mine = os.sched_getaffinity(0)
    core_of = ctypes.CDLL(None).sched_getcpu
    for _ in range(100):
        time.sleep(0.001)
        run(code, 0, [x], [y])
        (worker,) = {path.name for path in Path("/proc/self/task").iterdir()} - before
        if os.sched_getaffinity(int(worker)) != mine:
            break
    shared = min(os.sched_getaffinity(int(worker)))
    found: list[set[int]] = []

    def confined() -> None:
        os.sched_setaffinity(0, {shared})
        run(code, 0, [x], [y])

    def free() -> None:
        os.sched_setaffinity(0, {shared})
        os.sched_setaffinity(0, mine)
        for _ in range(1000):
            first = core_of()
            run(code, 0, [x], [y])
            if first == core_of() == shared:
                found.append(os.sched_getaffinity(int(worker)))
                return

    for work in (confined, free):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    code.close()
    if not found:
        pytest.skip("the system never ran the caller there")
    assert found == [mine - {shared}]
