"""Elementwise and reduction graphs: kernels, bytes that kernels read and write, and time against eager and Inductor.

    python benchmarks/regions.py [--only rope,swiglu] [--json F] [--artifacts DIR] [--before DIR] [--compile-only]

Medians of interleaved calls with equal threads. Where a call takes less than 60 us, `kernels_ms` says what of ours is
in kernels: the rest is the way through Python. `bytes` counts the operands and results of every kernel; those of eager
are of every operator it runs. With --json the graphs already measured are kept. --artifacts keeps what was compiled,
and --before takes the artifacts that another version left into the same rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from region_graphs import Graph, graphs
from torch.utils._python_dispatch import TorchDispatchMode

import graphwright
from graphwright.compiler.benchmarking import bench
from graphwright.compiler.reference import relative_l2

Inputs = tuple[torch.Tensor, ...]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--artifacts", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    wanted = [name for name in options.only.split(",") if name]
    rows = {}
    if options.json and options.json.exists():
        rows = {row["name"]: row for row in json.loads(options.json.read_text())["rows"]}
    for name, (model, inputs) in graphs().items():
        if wanted and name not in wanted:
            continue
        row = measure(name, model, inputs, options)
        if row is None:
            continue
        rows[name] = row
        print(json.dumps(row), flush=True)
        if options.json:
            ordered = [rows[known] for known in graphs() if known in rows]
            options.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": ordered}, indent=1) + "\n")
    if rows and not options.compile_only:
        report(list(rows.values()))
    return 0


def measure(name: str, model: Graph, inputs: Inputs, options: argparse.Namespace) -> dict[str, Any] | None:
    """Counts and times of one graph; None where it was only to be compiled."""
    ours = _compiled(name, model, inputs, options.artifacts)
    from torch._inductor import metrics

    metrics.reset()
    inductor = bench.inductor(model, inputs)
    kernels = {"ours": len(ours.report().kernels), "inductor": metrics.generated_kernel_count}
    moved = {"ours": ours_bytes(model, inputs)}
    if options.compile_only:
        return None
    eager = bench.eager(model, inputs)
    kernels["eager"], moved["eager"] = eager_work(model, inputs)
    runners = {"ours": lambda: ours(*inputs), "eager": eager, "inductor": inductor}
    if options.before is not None:
        before = graphwright.load(options.before / name)
        runners["before"] = lambda: before(*inputs)
        kernels["before"] = len(before.report().kernels)
    times = bench.interleave(runners, options.rounds)
    row: dict[str, Any] = {"name": name, "kernels": kernels, "bytes": moved}
    row["ms"] = {runner: round(ms, 4) for runner, ms in times.items()}
    row["kernels_ms"] = {"ours": round(ours.profile(*inputs, rounds=50).total_us / 1e3, 4)}
    if options.before is not None:
        row["kernels_ms"]["before"] = round(before.profile(*inputs, rounds=50).total_us / 1e3, 4)
    row["error"], row["eager_error"] = errors(model, inputs, ours)
    return row


def _compiled(name: str, model: Graph, inputs: Inputs, artifacts: Path | None) -> graphwright.Compiled:
    kept = artifacts / name if artifacts is not None else None
    if kept is not None and kept.exists():
        return graphwright.load(kept)
    compiled = graphwright.compile(model, inputs, cache=False)
    assert isinstance(compiled, graphwright.Compiled)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        compiled.save(kept)
    return compiled


def ours_bytes(model: Graph, inputs: Inputs) -> int:
    """Bytes of the operands and results of our kernels."""
    from graphwright.backends.lowering.graph import Region, lower
    from graphwright.backends.lowering.supported import why_not
    from graphwright.compiler import capture, pipeline
    from graphwright.compiler.build import default_passes
    from graphwright.compiler.partition import partition
    from graphwright.hwdb import lookup

    hw = lookup("native")
    captured = capture.capture(capture.export(model, inputs), ())
    graph, _ = pipeline.run(captured.graph, hw, default_passes(hw))
    total = 0
    for i, part in enumerate(partition(graph, lambda node: why_not(node, hw)).parts):
        assert part.compiled, part
        program = lower(Region(f"region_{i}", part.nodes, part.inputs, part.outputs), graph, hw).program
        for step in program.steps:
            total += sum(program.buffers[argument].nbytes for argument in step.args)
    return total


class _Counted(TorchDispatchMode):
    """Counts operators that compute, and the bytes of the tensors they read and write; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves
        read = [t for t in leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        written = [t for t in leaves(result) if isinstance(t, torch.Tensor)]
        known = {t.untyped_storage().data_ptr() for t in read}
        if any(t.untyped_storage().data_ptr() not in known for t in written):
            self.calls += 1
            self.bytes += sum(_footprint(t) for t in (*read, *written))
        return result


def _footprint(tensor: torch.Tensor) -> int:
    """Distinct bytes: what is expanded is read once."""
    return math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step) * tensor.element_size()


def eager_work(model: Graph, inputs: Inputs) -> tuple[int, int]:
    """Operators that eager runs, and the bytes they read and write."""
    with torch.inference_mode(), _Counted() as counted:
        model(*inputs)
    return counted.calls, counted.bytes


def errors(model: Graph, inputs: Inputs, ours: graphwright.Compiled) -> tuple[float, float]:
    """The largest relative L2 error of any result against float64: ours, and eager's own."""
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    with torch.inference_mode():
        exact, eager = _listed(model(*wide)), _listed(model(*inputs))
        results = _listed(ours(*inputs))
    return _largest(results, exact), _largest(eager, exact)


def _largest(results: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    return max(
        relative_l2(a.double().nan_to_num(neginf=0), b.double().nan_to_num(neginf=0))
        for a, b in zip(results, exact, strict=True)
    )


def _listed(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def report(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each graph, then the geometric means of our time against the others'."""
    for row in rows:
        ms, ratios = row["ms"], []
        for other in ("before", "eager", "inductor"):
            if other in ms:
                ratios.append(f"{ms['ours'] / ms[other]:5.2f} of {other}")
        counts = "/".join(str(row["kernels"].get(who, "")) for who in ("ours", "before", "eager", "inductor"))
        print(f"{row['name']:20s} {ms['ours']:8.3f} ms  {', '.join(ratios)}  kernels {counts}")
    for other in ("before", "eager", "inductor"):
        logs = [math.log(row["ms"]["ours"] / row["ms"][other]) for row in rows if other in row["ms"]]
        if logs:
            print(f"geometric mean {math.exp(statistics.mean(logs)):.2f} of {other}")


if __name__ == "__main__":
    raise SystemExit(main())
