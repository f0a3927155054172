"""What a call costs when it is not alone on the machine: `python benchmarks/busy_neighbour.py [MODEL ...]`.

Prints JSON: median milliseconds of a quiet call and, as ratios to it, of a call beside a process that spins (wherever
the system puts it, and held on the first core), right after a PyTorch operator whose threads still spin, of two models
called at once from two threads, with one thread, and with twice as many threads as cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

import graphwright
from graphwright.compiler.benchmarking import zoo
from graphwright.compiler.benchmarking.bench import settle

SPIN = "import os, sys; len(sys.argv) > 1 and os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
CALLS = 20


def median_ms(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """Of CALLS calls, each after `before`."""
    call()
    samples = []
    for _ in range(CALLS):
        before()
        started = time.perf_counter()
        call()
        samples.append((time.perf_counter() - started) * 1e3)
    return statistics.median(samples)


@contextmanager
def neighbour(*core: int) -> Iterator[None]:
    """A process that spins, on one core where it is given."""
    process = subprocess.Popen([sys.executable, "-c", SPIN, *map(str, core)])
    time.sleep(0.3)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def at_once(calls: list[Callable[[], object]]) -> None:
    """Each call in a thread of its own."""
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def measure(name: str) -> dict[str, float]:
    """The figures of one model."""
    model, inputs = zoo.build(name)
    compiled, other = (graphwright.compile(model, inputs, verify=False) for _ in range(2))
    cores = compiled.threads

    def call(it: Any = compiled) -> Any:
        return it(*inputs)

    matrix = torch.randn(600, 600)
    settle()
    quiet = median_ms(call)
    found = {"quiet_ms": quiet, "after_torch": median_ms(call, lambda: matrix @ matrix) / quiet}
    settle()
    with neighbour():
        found["busy_neighbour"] = median_ms(call) / quiet
    with neighbour(min(os.sched_getaffinity(0))):
        found["busy_neighbour_on_first_core"] = median_ms(call) / quiet
    found["two_models_at_once"] = median_ms(lambda: at_once([call, lambda: call(other)])) / quiet
    for threads, label in ((1, "one_thread"), (2 * cores, "twice_the_cores")):
        compiled.threads = threads
        found[label] = median_ms(call) / quiet
    return {label: round(value, 2) for label, value in found.items()}


if __name__ == "__main__":
    print(json.dumps({name: measure(name) for name in sys.argv[1:] or ("resnet50", "bert")}, indent=1))
