"""Pruned models against the same models dense, both compiled by us in float32.

    python benchmarks/sparsity.py prepare DIR [MODEL:PATTERN:SPARSITY ...]      compiles into DIR
    python benchmarks/sparsity.py measure DIR [MODEL:PATTERN:SPARSITY ...] [--json F]

Without rows those of ROWS. Weights are pruned by magnitude, a share of every layer; those of the zoo are random, so
that figures say what a pattern gains and nothing of accuracy. Milliseconds are medians of rounds in turns; `products`
counts the products that skip blocks; `relative_l2` is the error of the pruned build against its model in float64. The
seconds of the pass are of compiling the dense model, which has nothing to skip.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

import graphwright
from graphwright.compiler.benchmarking import zoo
from graphwright.compiler.benchmarking.bench import Runner, interleave
from graphwright.compiler.compiled import Compiled

ROWS = ("bert:16x16:0.75", "bert:4x16:0.75", "bert:1x16:0.75", "bert:16x16:0.5", "llama-decode:16x16:0.75")
ROUNDS = 15
THREADS = torch.get_num_threads()


def prepare(rows: Sequence[str], work: Path) -> None:
    """Leave the dense build of each model and the pruned one of each row in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    for row in rows:
        name, pattern, sparsity = row.split(":")
        model, inputs = zoo.build(name)
        dense = work / f"{name}.gw"
        started = time.perf_counter()
        if not dense.exists():
            graphwright.compile(model, inputs, threads=THREADS).save(dense)
        pruned = graphwright.prune(model, pattern, float(sparsity))
        compiled = graphwright.compile(pruned, inputs, threads=THREADS)
        compiled.save(work / f"{name}-{pattern}-{sparsity}.gw")
        print(f"{row}: {time.perf_counter() - started:.0f} s", file=sys.stderr)


def measure(row: str, work: Path) -> dict[str, Any]:
    """One row."""
    name, pattern, sparsity = row.split(":")
    _, inputs = zoo.build(name)
    builds = {
        "dense": graphwright.load(work / f"{name}.gw", threads=THREADS),
        "sparse": graphwright.load(work / f"{name}-{pattern}-{sparsity}.gw", threads=THREADS),
    }
    milliseconds = interleave({key: _runner(build, inputs) for key, build in builds.items()}, ROUNDS)
    reports = {key: build.report() for key, build in builds.items()}
    return {
        "model": name,
        "pattern": pattern,
        "sparsity": float(sparsity),
        "threads": THREADS,
        "milliseconds": milliseconds,
        "ratio": milliseconds["dense"] / milliseconds["sparse"],
        "products": sum(k.algorithm == "block-sparse matmul" for k in reports["sparse"].kernels),
        "weights_bytes": {key: report.weights_bytes for key, report in reports.items()},
        "relative_l2": max(e.relative_l2 for e in reports["sparse"].errors),
        "pass_seconds_dense": sum(p.seconds for p in reports["dense"].passes if p.name == "skip_zero_blocks"),
        "compile_seconds_dense": reports["dense"].compile_seconds,
    }


def _runner(build: Compiled, inputs: Sequence[torch.Tensor]) -> Runner:
    args, kwargs = build.arguments(list(copy.copy(inputs)))
    return lambda: build(*args, **kwargs)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "measure"))
    parser.add_argument("work", type=Path)
    parser.add_argument("rows", nargs="*", default=ROWS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.command == "prepare":
        prepare(given.rows, given.work)
        return
    known = {} if given.json is None or not given.json.exists() else json.loads(given.json.read_text())
    found = {f"{r['model']}:{r['pattern']}:{r['sparsity']:g}": r for r in known}
    for row in given.rows:
        found[row] = measure(row, given.work)
        print(json.dumps(found[row], indent=1))
    if given.json is not None:
        given.json.write_text(json.dumps(list(found.values()), indent=1) + "\n")


if __name__ == "__main__":
    main()
