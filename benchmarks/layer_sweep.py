"""Random layers against eager PyTorch: how much slower are we where nothing was tuned?

    python benchmarks/layer_sweep.py [--set kernels|models] [--count 200] [--seed 0] [--only conv1d,linear] [--json F]
                                     [--artifacts DIR] [--seconds S] [--compile-only]

Medians of interleaved calls with equal threads. A call that takes less than 20 us is judged by the time in its kernels:
the rest is the way through Python, which is the same for every layer. With --json the layers already measured are
kept, with --artifacts those already compiled, and with --seconds it stops measuring after S seconds: called again with
the same arguments it goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import model_layers
import torch
from random_layers import Case, draw

import graphwright
from graphwright.compiler.benchmarking.bench import eager, interleave
from graphwright.compiler.reference import relative_l2

SHORT_MS = 0.02
BAR = 1.3
MOST_ERROR = 2e-5  # relative to eager, which errs itself


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", default="kernels", choices=["kernels", "models"], help="which kinds are drawn")
    parser.add_argument("--only", default="", help="kinds, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--artifacts", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--compile-only", action="store_true")
    options = parser.parse_args()
    kinds = model_layers.KINDS if options.set == "models" else None
    cases = [draw(options.seed, i, kinds) for i in range(options.count)]
    if options.only:
        cases = [c for c in cases if c.kind in options.only.split(",")]
    rows: dict[str, dict[str, Any]] = {}
    if options.json and options.json.exists():
        rows = {row["name"]: row for row in json.loads(options.json.read_text())["rows"]}
    if options.compile_only:
        for case in cases:
            _compiled(case, options.artifacts)
        return 0
    end = time.perf_counter() + options.seconds
    for case in cases:
        if case.name in rows:
            continue
        if time.perf_counter() > end:
            break
        row = rows[case.name] = measure(case, options.artifacts)
        print(f"{row['ratio']:5.2f} {row['ours_ms']:8.3f} {row['eager_ms']:8.3f} {row['error']:.0e}  {case.name}")
        if options.json:
            options.json.write_text(json.dumps({"seed": options.seed, "rows": list(rows.values())}, indent=1) + "\n")
    report([rows[c.name] for c in cases if c.name in rows], len(cases))
    return 0


def measure(case: Case, artifacts: Path | None) -> dict[str, Any]:
    """Times and the error of one layer."""
    compiled, model, inputs = _compiled(case, artifacts)
    reference = eager(model, inputs)
    with torch.inference_mode():
        error = relative_l2(compiled(*inputs), reference())
    # About a second in all, whatever the layer takes.
    rounds = max(5, min(25, int(500 / (1 + 4 * case.layer.milliseconds))))
    times = interleave({"ours": lambda: compiled(*inputs), "eager": reference}, rounds)
    ours = times["ours"]
    if ours < SHORT_MS:
        ours = min(ours, compiled.profile(*inputs, rounds=50).total_us / 1e3)
    return {
        "name": case.name,
        "kind": case.kind,
        "ours_ms": ours,
        "eager_ms": times["eager"],
        "ratio": ours / times["eager"],
        "error": error,
        "kernels": [k.algorithm for k in compiled.report().kernels],
    }


def _compiled(case: Case, artifacts: Path | None) -> tuple[Any, torch.nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(case.index)
    model, inputs = case.layer.make().eval(), case.layer.inputs(case.index)
    if artifacts is None:
        return graphwright.compile(model, inputs, cache=False, verify=False), model, inputs
    path = artifacts / f"{re.sub(r'[^0-9a-zA-Z]+', '_', case.name)}.gw"
    if not path.exists():
        artifacts.mkdir(parents=True, exist_ok=True)
        graphwright.compile(model, inputs, cache=False, verify=False).save(path)
    return graphwright.load(path), model, inputs


def report(rows: list[dict[str, Any]], count: int) -> None:
    """Print the worst, and the shares above 1 and above the bar."""
    if not rows:
        return
    print(f"\n{len(rows)} of {count} layers; the worst:")
    for row in sorted(rows, key=lambda r: -r["ratio"])[:10]:
        print(f"{row['ratio']:6.2f}  {row['ours_ms']:8.3f} ms  {row['name']}  [{', '.join(row['kernels'])}]")
    for limit in (1.0, BAR):
        share = sum(row["ratio"] > limit for row in rows) / len(rows)
        print(f"{share:6.1%} are slower than eager by more than {limit}")
    for row in rows:
        if not row["error"] <= MOST_ERROR:
            print(f"ERROR {row['error']:.1e} of {row['name']}")


if __name__ == "__main__":
    raise SystemExit(main())
