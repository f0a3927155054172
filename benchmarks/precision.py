"""`precision="auto"` against our own float32: `python benchmarks/precision.py bert`, with --json FILE to keep it.

Both builds are called in turn, one call each, after some that are not counted; figures are medians of milliseconds. The
errors are of the first result against the model in float64. The example has 128 tokens, or an image of 224 x 224.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import graphwright
from graphwright import hwdb
from graphwright.compiler.benchmarking import zoo
from graphwright.compiler.capture import capture, export
from graphwright.compiler.reference import relative_l2, run_float64


def first(result: Any) -> torch.Tensor:
    """The first tensor of what a model returns."""
    return torch.utils._pytree.tree_leaves(result)[0]


def measured(name: str, precisions: list[str], tolerance: float, rounds: int) -> dict[str, Any]:
    """Medians, errors and what was chosen, by precision."""
    model, inputs = zoo.build(name)
    builds = {"fp32": graphwright.compile(model, inputs, verify=False)}
    for precision in precisions:
        builds[precision] = graphwright.compile(model, inputs, precision=precision, tolerance=tolerance)
    with torch.no_grad():
        exact = run_float64(capture(export(model, inputs)).graph, list(inputs))[0]
    times: dict[str, list[float]] = {precision: [] for precision in builds}
    for round_ in range(rounds + 3):
        for precision, compiled in builds.items():
            started = time.perf_counter()
            compiled(*inputs)
            if round_ >= 3:
                times[precision].append((time.perf_counter() - started) * 1e3)
    rows = {}
    for precision, compiled in builds.items():
        median = statistics.median(times[precision])
        rows[precision] = {
            "milliseconds": round(median, 2),
            "quickest": round(min(times[precision]), 2),
            "relative_l2": float(f"{relative_l2(first(compiled(*inputs)), exact):.2e}"),
            "reduced": sum(choice.dtype != "float32" for choice in compiled.report().precisions),
            "operators": len(compiled.report().precisions),
        }
    return {
        "tolerance": tolerance,
        "rounds": rounds,
        "rows": rows,
        "speedup": {p: round(rows["fp32"]["milliseconds"] / rows[p]["milliseconds"], 3) for p in precisions},
    }


def main() -> None:
    """Measure the models named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--precision", action="append", help="auto unless given")
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="put the rows of these models there")
    given = parser.parse_args()
    hw = hwdb.lookup("native")
    found = {m: measured(m, given.precision or ["auto"], given.tolerance, given.rounds) for m in given.models}
    print(json.dumps(found, indent=1))
    if given.json:
        data = json.loads(given.json.read_text()) if given.json.exists() else {"models": {}}
        machine = {"id": hw.id, "cores": hw.cores, "bfloat16": sorted(f for f in hw.features if "bf16" in f)}
        data |= {"date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine}
        data["models"] |= found
        given.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
