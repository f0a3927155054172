"""Check a compilation stage by stage, and find the pass or the operator to blame where the numbers are wrong."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ..errors import InputError, NumericMismatch
from ..hwdb import Hardware, Target, compile_target
from ..passes.families import restrict
from . import loading, pipeline
from .build import build
from .capture import Model, TensorSpec, arguments, capture, example_of, example_tensors, export
from .compare import Reference, compare, errors, reference
from .executor import Run
from .fakes import wrong_fake
from .obstacle import obstacle
from .pass_checks import Pass, is_ours, name_of
from .reference import Float64, relative_l2, run_eager
from .report import ErrorRow
from .selection import select


@dataclass(frozen=True)
class VerifyResult:
    """Every stage of a compilation against float64: the graph after each pass, then the machine code."""

    stages: tuple[tuple[str, tuple[ErrorRow, ...]], ...]

    def text(self) -> str:
        """One line a stage and output."""
        lines = []
        for stage, rows in self.stages:
            for row in rows:
                lines.append(
                    f"{stage:28s} {row.output:24s} relative L2 {row.relative_l2:.2e}  max {row.max_absolute:.2e}"
                    f"  (PyTorch eager {row.eager_relative_l2:.2e}, {row.eager_max_absolute:.2e})"
                )
        if reasons := {row.no_float64 for _, rows in self.stages for row in rows if row.no_float64 is not None}:
            lines.append(f"compared with PyTorch eager, not with float64: {'; '.join(sorted(reasons))}")
        return "\n".join(lines)


def verify_model(
    model: Model,
    example_inputs: Any = None,
    *,
    target: Target = "native",
    tolerance: float | None = None,
    passes: Sequence[Pass] | None = None,
    kernel_fusion: Sequence[str] | None = None,
) -> VerifyResult:
    """Check the numbers of `model` after every pass and of the machine code.

    Arguments as in `graphwright.compile`. Raises NumericMismatch naming the pass or operator that is wrong.
    """
    hw = compile_target(target)
    chosen, fusions = select(passes, kernel_fusion, hw)
    program = export(model, *arguments(example_inputs))
    captured = capture(program)
    restrict(captured.graph, fusions)
    example = example_of(program, example_inputs)
    if example is None:
        raise InputError("the program holds no example inputs to verify with: pass example_inputs")
    inputs = example_tensors(example, captured.signature)
    names = [s.name for s in captured.signature.outputs if isinstance(s, TensorSpec)]
    if (promise := wrong_fake(captured.graph, inputs)) is not None:
        raise NumericMismatch(promise)
    expected = reference(captured.graph, inputs)
    stages: list[tuple[str, tuple[ErrorRow, ...]]] = []

    def check(name: str, current: fx.GraphModule) -> None:
        current.recompile()
        stages.append((name, errors(names, run_eager(current, inputs), expected)))

    rewritten, _ = pipeline.run(captured.graph, hw, chosen, check)

    if obstacle(hw) is not None:
        # Code for another machine cannot be run here: the passes are checked, the machine code is not.
        wrong = compare(run_eager(rewritten, inputs), expected, tolerance)
        if wrong is not None:
            raise blame(captured.graph, hw, inputs, tolerance, hw.cores, chosen)
        return VerifyResult(tuple(stages))
    results = _machine_code(rewritten, hw, hw.cores)(inputs)
    stages.append(("machine code", errors(names, results, expected)))
    if compare(results, expected, tolerance) is not None:
        raise blame(captured.graph, hw, inputs, tolerance, hw.cores, chosen)
    return VerifyResult(tuple(stages))


def blame(
    graph: fx.GraphModule,
    hw: Hardware,
    inputs: Sequence[torch.Tensor],
    tolerance: float | None,
    threads: int,
    passes: Sequence[Pass],
) -> NumericMismatch:
    """Find out what made the numbers wrong: the first of `passes` whose graph differs, else the first compiled node."""
    expected = reference(graph, inputs)
    last = [pipeline.copy_graph(graph)]
    guilty: list[tuple[str, fx.GraphModule, fx.GraphModule]] = []

    def check(name: str, current: fx.GraphModule) -> None:
        if guilty:
            return
        current.recompile()
        if compare(run_eager(current, inputs), expected, tolerance) is not None:
            guilty.append((name, last[0], pipeline.copy_graph(current)))
        last[0] = pipeline.copy_graph(current)

    rewritten, _ = pipeline.run(graph, hw, passes, check)
    if guilty:
        name, before, after = guilty[0]
        node = _first_changed(before, after, inputs)
        error = NumericMismatch(
            f"pass {name} changed the numbers, first at node {node.format_node() if node else 'of the output'}"
            f"{_where(node)}\n{_remedy(name, passes)}"
        )
        error.rewrite = name if _is_ours(name, passes) else None
        return error
    node = _first_wrong(rewritten, hw, inputs, tolerance, threads)
    found = node.format_node() if node is not None else "no single operator: they differ only together"
    error = NumericMismatch(
        f"the machine code differs from PyTorch although every pass kept the numbers; first at {found}{_where(node)}\n"
        "This is a bug of graphwright: report it with the operator and its shapes."
    )
    error.in_machine_code = True
    error.node = None if node is None else node.name
    return error


def _is_ours(name: str, passes: Sequence[Pass]) -> bool:
    return all(is_ours(p) for p in passes if name_of(p) == name)


def _remedy(name: str, passes: Sequence[Pass]) -> str:
    """What to do about a pass that changes numbers."""
    if not _is_ours(name, passes):
        return "The pass was given with passes=[...]: mend it, or leave it out."
    return (
        "This is a bug of graphwright: report it, and leave the pass out meanwhile: "
        f'passes=[p for p in graphwright.passes.default.PASSES if p.__name__ != "{name}"]'
    )


def _first_changed(before: fx.GraphModule, after: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.Node | None:
    """The first node of `after` whose float64 value differs from that of its namesake, or that no node had before."""
    old, new = Float64(before, before.graph.nodes), Float64(after, after.graph.nodes)
    with torch.no_grad():
        old.run(*inputs)
        new.run(*inputs)
    known = {n.name: v for n, v in old.values.items()}
    suspects = []
    for node, value in new.values.items():
        if node.op != "call_function" or not isinstance(value, torch.Tensor):
            continue
        previous = known.get(node.name)
        if isinstance(previous, torch.Tensor):
            if previous.shape == value.shape and relative_l2(value, previous) > 1e-9:
                suspects.append(node)
        elif not _seen(value, known.values()):
            suspects.append(node)
        if suspects:
            return suspects[0]
    return None


def _seen(value: torch.Tensor, values: Any) -> bool:
    return any(
        isinstance(v, torch.Tensor)
        and v.numel() == value.numel()
        and v.dtype == value.dtype
        and abs(float(v.double().sum() - value.double().sum())) <= 1e-9 * (1.0 + float(v.double().abs().sum()))
        for v in values
    )


def _machine_code(graph: fx.GraphModule, hw: Hardware, threads: int) -> Run:
    """A rewritten graph, compiled as it is."""
    with tempfile.TemporaryDirectory(prefix="graphwright-") as directory:
        return loading.runner(Path(directory), build(graph, hw, Path(directory), passes=()).plan, threads)


def _first_wrong(
    graph: fx.GraphModule, hw: Hardware, inputs: Sequence[torch.Tensor], tolerance: float | None, threads: int
) -> fx.Node | None:
    """Compile with every intermediate value as an output, and compare them in order."""
    probe = pipeline.copy_graph(graph)
    nodes: list[fx.Node] = [
        n for n in probe.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)
    ]
    output = next(n for n in probe.graph.nodes if n.op == "output")
    output.args = (tuple(nodes),)
    probe.recompile()
    expected = reference(probe, inputs)
    for i, (result, node) in enumerate(zip(_machine_code(probe, hw, threads)(inputs), nodes, strict=True)):
        single = Reference([expected.exact[i]], [expected.eager[i]])
        if compare([result], single, tolerance) is not None:
            return node
    return None


def _where(node: fx.Node | None) -> str:
    trace = node.meta.get("stack_trace") if node is not None else None
    return f"\nwhere the model says:\n{trace}" if trace else ""
