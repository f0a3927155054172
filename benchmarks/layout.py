"""Layout and fusion passes on against off, all kernels equal: latency, activation memory, copies and their bytes.

    python benchmarks/layout.py [--only swin,bert-eager] [--json F] [--artifacts DIR] [--compile-only] [--rounds N]

Off: `compile(passes=OFF, kernel_fusion=["conv+bn"])`. Products, convolutions, pools, norms, softmax and
scaled_dot_product_attention run in the same kernels, each by itself: convolutions and pools, whose kernels are in NHWC,
have a permute on each side (a value that several of them read is permuted once). Batch norm goes into convolutions,
constants are folded, dead and duplicate nodes removed, on both sides.

Left out by OFF: layouts, moves, epilogues (bias of convolutions, activations, residuals), transposes into products,
attention recognised from its parts, products merged. What lowering does behind the passes, regions of elementwise
operators and reductions in one kernel and results in the place of operands, it does in OFF as well.

Apart: OFF without these two, every operator in a kernel with a result of its own: the graph as it was captured.

Medians of interleaved calls in one process with equal threads. `copies` are the moves in the graph that lowering gets
(`graphwright.passes.moves.copies`), `captured_copies` those in the model's own graph; `arena_bytes` is the activation
memory of a call. `equal_kernels` is the share of OFF's kernel time in kernels that are the same on all sides.
--artifacts keeps what was compiled, to time it later.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import fx

import graphwright
from graphwright.backends import regions
from graphwright.backends.aot.program import Program
from graphwright.backends.lowering import arrange, fusion
from graphwright.backends.region_kernel import Problem, Region
from graphwright.compiler.benchmarking import bench, zoo
from graphwright.compiler.capture import arguments, capture, export
from graphwright.compiler.functions import parameters_of
from graphwright.compiler.reference import relative_l2
from graphwright.hwdb import Hardware
from graphwright.passes import dialect, rewrite
from graphwright.passes.default import PASSES
from graphwright.passes.layout.nhwc_rules import RULES, Images
from graphwright.passes.moves.copies import count_copies

MODELS = ("swin", "shufflenetv2", "bert-eager")
# The claim that users come with, and the bars: at least so much less latency and activation memory.
BARS = {"latency": 1 - 0.22, "memory": 1 - 0.37}
SIDES = ("apart", "off", "on")
aten = torch.ops.aten


def kernels_alone(graph: fx.GraphModule, hw: Hardware) -> int:
    """Let every convolution and pool run in NHWC, where its kernel is, between permutes of its own."""
    count = 0
    pools = (aten.max_pool2d.default, aten.avg_pool2d.default)
    for node in list(graph.graph.nodes):
        if rewrite.calls(node, *pools) or (rewrite.calls(node, dialect.conv2d) and node.args[-1] == "NCHW"):
            images = Images(graph, frozenset(graph.graph.nodes))
            twin = RULES[node.target](node, images)
            if twin is not None:
                images.nhwc[node] = twin
                rewrite.replace(node, images.back(node))
                count += 1
    return rewrite.finish(graph, count)


def off() -> tuple[Callable[[fx.GraphModule, Hardware], int], ...]:
    """The default passes with `kernels_alone` in the place of layouts; families are left out by name."""
    from graphwright.passes.assign_layout import assign_layout

    return tuple(kernels_alone if one is assign_layout else one for one in PASSES)


@contextlib.contextmanager
def every_operator_apart() -> Iterator[None]:
    """No regions of several operators and no result in the place of an operand, in what is compiled within."""

    def alone(problem: Problem, refuse: Any = None) -> list[Region]:
        with mock.patch.object(regions, "_MOST_NODES", 1):
            return regions.form_regions(problem)

    def no_reuse(program: Program, proofs: Any = None) -> tuple[Program, int]:
        return program, 0

    with mock.patch.object(fusion, "form_regions", alone), mock.patch.object(arrange, "reuse_operands", no_reuse):
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--artifacts", type=Path)
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["models"]
    for name in [n for n in options.only.split(",") if n] or MODELS:
        row = measure(name, options)
        if row is None:
            continue
        rows[name] = row
        print(name, json.dumps(row), flush=True)
        if options.json:
            data = {"threads": torch.get_num_threads(), "bars": BARS, "models": {n: rows[n] for n in sorted(rows)}}
            options.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0


def measure(name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """The figures of one model, or None where it was only to be compiled."""
    model, inputs = zoo.build(name)
    described, compiled = _compiled(name, model, inputs, options.artifacts)
    if options.compile_only:
        return None
    with torch.no_grad():
        expected = _first(model(*inputs))
        wide = _first(model.double()(*[x.double() if x.is_floating_point() else x for x in inputs]))
    milliseconds = bench.interleave({n: lambda c=c: c(*inputs) for n, c in compiled.items()}, rounds=options.rounds)
    row: dict[str, Any] = {"captured_copies": described["captured"]}
    for side, one in compiled.items():
        row[side] = {
            "ms": round(milliseconds[side], 3),
            "arena_bytes": one.report().arena_bytes,
            "kernels": len(one.report().kernels),
            **described[side],
            "relative_l2": relative_l2(_first(one(*inputs)), wide),
        }
    row["equal_kernels"] = round(equal_kernels(compiled["off"], inputs), 3)
    row["eager_relative_l2"] = relative_l2(expected, wide)
    for side in ("off", "apart"):
        row[f"latency_{side}"] = round(row["on"]["ms"] / row[side]["ms"], 3)
        row[f"memory_{side}"] = round(row["on"]["arena_bytes"] / row[side]["arena_bytes"], 3)
    return row


def equal_kernels(compiled: Any, inputs: tuple[torch.Tensor, ...]) -> float:
    """The share of measured kernel time in products, convolutions, norms and attention, which all sides have alike."""
    profile = compiled.profile(*inputs, rounds=15)
    return sum(r.measured_us for r in profile.rows if r.kernel.algorithm != "generic") / profile.total_us


def _compiled(
    name: str, model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], directory: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is known of the graphs, and both sides, from the directory where they are there."""
    paths = {side: directory / f"{name}-{side}.gw" for side in SIDES} if directory else {}
    notes = directory / f"{name}.json" if directory else None
    if notes is not None and notes.exists():
        return json.loads(notes.read_text()), {side: graphwright.load(path) for side, path in paths.items()}
    program = export(model, *arguments(inputs))
    captured = capture(program, parameters_of(model)).graph
    rest: dict[str, Any] = {"cache": False, "verify": False}  # `measure` has the error of both
    less: dict[str, Any] = {"passes": off(), "kernel_fusion": ["conv+bn"], **rest}
    with every_operator_apart():
        compiled = {"apart": graphwright.compile(program, inputs, **less)}
    compiled["off"] = graphwright.compile(program, inputs, **less)
    compiled["on"] = graphwright.compile(program, inputs, **rest)
    described = {"captured": _copies(captured)} | {side: _copies(one.graph) for side, one in compiled.items()}
    if directory is not None and notes is not None:
        directory.mkdir(parents=True, exist_ok=True)
        for side, one in compiled.items():
            one.save(paths[side])
        notes.write_text(json.dumps(described))
    return described, compiled


def _copies(graph: fx.GraphModule) -> dict[str, int]:
    found = count_copies(graph)
    return {"copies": found.count, "copied_bytes": found.bytes}


def _first(result: Any) -> torch.Tensor:
    while not isinstance(result, torch.Tensor):
        result = result[0] if isinstance(result, (tuple, list)) else next(iter(result.values()))
    return result


if __name__ == "__main__":
    raise SystemExit(main())
