"""What the machine code of three models for GPUs says, against bars: no GPU is needed, and no time is in it.

    python benchmarks/gpu_static.py                                       all, about a minute of CPU each
    python benchmarks/gpu_static.py --only bert --target mi250x

Models in float16, 8 inputs at a time, for sm_80 (a100) and gfx90a (mi250x). Writes docs/measurements/gpu_static.json.
Needs a CUDA compiler, nvdisasm and llvm-objdump. A kernel counts once a call.

    kernels/op    launches for each fused operator (a product in parts and the kernel that adds them are one)
    spilled       kernels with bytes of a thread in memory
    matrix        products (convolutions, matrix products, attention; sums of 64 and more in all three models) that
                  hold instructions for matrix units
    wide          loads from memory of 128 bits, of those in hot kernels: products and attention
    async         products with copies to shared memory past the registers (cp.async)
    occupancy     of hot kernels, the median
    in flight     hot kernels whose loads on the way cover latency x bandwidth of memory (Little's law): resident
                  threads x bytes that a thread loads between two barriers, against LATENCY cycles of a unit's share
    units         hot kernels with blocks for 90 % of the units, of one die where a GPU has several
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import graphwright
from graphwright.backends.gpu.evidence import Evidence, evidence
from graphwright.backends.gpu.launches import DEVICE_NAME, Description, Launch
from graphwright.compiler.benchmarking import zoo
from graphwright.hwdb.accelerators import Gpu
from graphwright.hwdb.planning import one_die

RESULT = Path(__file__).parents[1] / "docs" / "measurements" / "gpu_static.json"
MODELS, TARGETS, BATCH = ("resnet50", "bert", "gpt2-decode"), ("a100", "mi250x"), 8
LATENCY = 600  # cycles from a request to memory to its answer: a rule of thumb, as in backends/gpu/tile.py
FETCHES = 3  # times that a tile's loads stand in the text of a product: before the loop, and two in it
PRODUCTS = ("product", "conv", "attention", "matrix times vector", "rows")


@dataclass(frozen=True)
class Call:
    """A launch of the model, with the rule that made its kernel."""

    algorithm: str
    launch: Launch
    evidence: Evidence


@dataclass(frozen=True)
class Row:
    """The figures of one model. Shares are of 1."""

    model: str
    target: str
    kernels: int
    kernels_per_operator: float
    spilled: int
    products: int
    matrix: float
    wide: float
    asynchronous: float
    occupancy: float
    in_flight: float
    units: float
    cpu_seconds: float
    by_rule: dict[str, dict[str, float]]


def main() -> None:
    """Build, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--target", nargs="*", default=TARGETS)
    options = parser.parse_args()
    stored = {(row["model"], row["target"]): row for row in json.loads(RESULT.read_text())} if RESULT.exists() else {}
    names = ("kernels", "kernels/op", "spilled", "matrix", "wide", "async", "occupancy", "in flight", "units", "CPU s")
    print(f"{'model':13}{'target':9}" + "".join(f"{name:>11}" for name in names))
    for model in options.only:
        for target in options.target:
            row = measured(model, target)
            shares = (row.matrix, row.wide, row.asynchronous, row.occupancy, row.in_flight, row.units)
            print(
                f"{model:13}{target:9}{row.kernels:11}{row.kernels_per_operator:11.2f}{row.spilled:11}"
                + "".join(f"{share:11.0%}" for share in shares)
                + f"{row.cpu_seconds:11.0f}",
                flush=True,
            )
            for rule, counted in row.by_rule.items():
                print(f"    {rule:36}" + ", ".join(f"{name} {value:g}" for name, value in counted.items()))
            stored[model, target] = asdict(row)
            RESULT.write_text(json.dumps(list(stored.values()), indent=1) + "\n")


def measured(model: str, target: str) -> Row:
    """Compile and count."""
    started = cpu_seconds()
    module, inputs = zoo.build(model, batch=BATCH)
    compiled = graphwright.compile(module, inputs, target=target, precision="fp16", verify=False, cache=False)
    device = graphwright.hwdb.lookup(target)
    assert isinstance(device, Gpu)
    hw = one_die(device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(compiled.save(Path(scratch, "out")))
        described = Description.read(folder / DEVICE_NAME)
        image = (folder / described.image).read_bytes()
    seconds = cpu_seconds() - started
    found = evidence(image, described.kernels, hw)
    rows = compiled.report().kernels
    calls = [
        Call(row.algorithm, launch, found[launch.name])
        for row in rows
        for launch in described.kernels
        if launch.name.removesuffix("_kernel").rsplit("_kernel_", 1)[0] == row.name
    ]
    hot = [call for call in calls if any(name in call.algorithm for name in PRODUCTS)]
    counts = [call.evidence.counts for call in hot]
    if None in counts:
        raise SystemExit(
            "this counts instructions: install nvdisasm (pip install nvidia-cuda-nvdisasm) or llvm-objdump"
        )
    return Row(
        model,
        target,
        kernels=len(calls),
        kernels_per_operator=len(calls) / sum(row.algorithm != "sums of parts" for row in rows),
        spilled=sum(call.evidence.spilled > 0 for call in calls),
        products=len(hot),
        matrix=share([c.matrix > 0 for c in counts]),
        wide=sum(c.wide_loads for c in counts) / sum(c.loads for c in counts),
        asynchronous=share([c.asynchronous > 0 for c in counts]),
        occupancy=statistics.median(call.evidence.occupancy or 0.0 for call in hot),
        in_flight=share([covered(call, hw) for call in hot]),
        units=share([call.launch.blocks >= 0.9 * hw.cores for call in hot]),
        cpu_seconds=seconds,
        by_rule=by_rule(hot, hw),
    )


def by_rule(hot: Sequence[Call], hw: Gpu) -> dict[str, dict[str, float]]:
    """The same by the rule that made the kernels: where the gaps are."""
    found = {}
    for rule in sorted({call.algorithm for call in hot}):
        mine = [call for call in hot if call.algorithm == rule]
        counts = [call.evidence.counts for call in mine]
        found[rule] = {
            "calls": len(mine),
            "matrix": sum(c.matrix > 0 for c in counts),
            "loads": sum(c.loads for c in counts),
            "wide": sum(c.wide_loads for c in counts),
            "units": sum(call.launch.blocks >= 0.9 * hw.cores for call in mine),
            "in_flight": sum(covered(call, hw) for call in mine),
        }
    return found


def covered(call: Call, hw: Gpu) -> bool:
    """Whether what is on its way to a unit covers latency x bandwidth."""
    found = call.evidence
    bandwidth = hw.bandwidth_gbs(0)
    if not bandwidth or not hw.clock_mhz or found.occupancy is None or found.counts is None:
        return False
    needed = LATENCY * bandwidth * 1e3 / hw.clock_mhz / hw.cores
    threads = found.occupancy * (hw.max_warps_per_unit or 0) * (hw.warp_threads or 0)
    held = 16 * found.counts.wide_loads + 4 * (found.counts.loads - found.counts.wide_loads)
    return threads * held / FETCHES >= needed


def share(of: Sequence[bool]) -> float:
    """How many are True."""
    return sum(of) / max(1, len(of))


def cpu_seconds() -> float:
    """Of this process and the compilers it called."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


if __name__ == "__main__":
    main()
