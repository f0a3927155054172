"""The same models compiled for this machine and for AVX2 on it: `python benchmarks/vector_width.py [MODEL ...]`.

Prints JSON: median milliseconds of both builds, called in turns, and the speed of the AVX2 build as a share of the
other's. Needs a machine with 512-bit vectors.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import graphwright
from graphwright.compiler.benchmarking import zoo
from graphwright.compiler.benchmarking.bench import settle
from graphwright.hwdb import Hardware, detect, lookup

MODELS = ("resnet18", "resnet50", "mobilenetv2", "bert")
ROUNDS = 25


def avx2_here() -> Hardware:
    """This machine as if it were an x86-64-v3 one: its cores, caches, clock and memory."""
    here = detect()
    same = ("cores", "clock_mhz", "caches", "dram_gbs", "launch_us", "wake_us")
    return dataclasses.replace(lookup("x86-64-v3"), **{name: getattr(here, name) for name in same})


def measure(name: str) -> dict[str, float]:
    """Both builds of a model, in turns."""
    model, inputs = zoo.build(name)
    builds = {
        "avx512": graphwright.compile(model, inputs, cache=False),
        "avx2": graphwright.compile(model, inputs, cache=False, target=avx2_here()),
    }
    settle()
    samples: dict[str, list[float]] = {which: [] for which in builds}
    for _ in range(ROUNDS):
        for which, compiled in builds.items():
            compiled(*inputs)
            started = time.perf_counter()
            compiled(*inputs)
            samples[which].append((time.perf_counter() - started) * 1e3)
    wide, narrow = (statistics.median(samples[which]) for which in ("avx512", "avx2"))
    return {"avx512_ms": round(wide, 2), "avx2_ms": round(narrow, 2), "avx2_speed": round(wide / narrow, 3)}


def main() -> None:
    if detect().vector_bits < 512:
        sys.exit("this machine has no 512-bit vectors to compare with")
    print(json.dumps({name: measure(name) for name in sys.argv[1:] or MODELS}, indent=1))


if __name__ == "__main__":
    main()
