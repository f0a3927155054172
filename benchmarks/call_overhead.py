"""What calling a compiled region costs beside the arithmetic: `python benchmarks/call_overhead.py`.

Prints microseconds, the best of many rounds: two tiny kernels called from Python, what ctypes takes of that for any
call, and a parallel loop over 64 rows with 1 thread and with 2 (started and joined).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from aot_programs import WIDTH, add_one, buffer, double, load, program

from graphwright.backends.aot.program import Step

ROUNDS, CALLS = 60, 2000


def best_us(call: Callable[[], object]) -> float:
    """The fastest round's microseconds per call."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return best / CALLS * 1e6


def main() -> None:
    torch.set_num_threads(1)
    small = (8,)
    buffers = [buffer("x", "input", small), buffer("t", "temporary", small), buffer("y", "output", small)]
    tiny = program({"one": add_one(small)}, buffers, [Step("one", ("x", "t")), Step("one", ("t", "y"))], ["y"])
    wide = [buffer("x", "input"), buffer("y", "output")]
    parallel = program({"double": double()}, wide, [Step("double", ("x", "y"))], ["y"])
    empty = program({}, [], [], [])
    with tempfile.TemporaryDirectory() as directory:
        code = load([tiny, parallel, empty], Path(directory))
        x, y = torch.zeros(WIDTH, WIDTH), torch.zeros(WIDTH, WIDTH)
        inputs, outputs = [x.data_ptr()], [y.data_ptr()]
        two_kernels = best_us(lambda: code.run(0, inputs, outputs))
        nothing = best_us(lambda: code.run(2, inputs, outputs))
        trivial = code._code.gw_get_threads
        raw = best_us(lambda: trivial(code._context))
        print(f"Library.run, two tiny kernels    {two_kernels:6.2f} us")
        print(f"Library.run, no kernel           {nothing:6.2f} us")
        print(f"a C function that does nothing   {raw:6.2f} us")
        for threads in (1, 2):
            code.threads = threads
            print(f"parallel loop, {threads} thread(s)       {best_us(lambda: code.run(1, inputs, outputs)):6.2f} us")
        code.close()


if __name__ == "__main__":
    main()
