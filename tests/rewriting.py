"""Before/after tests of passes: both sides are plain functions, captured as the compiler captures a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphwright import hwdb, testing
from graphwright.compiler.pipeline import copy_graph
from graphwright.compiler.reference import run_eager, run_float64
from graphwright.passes.printer import format_graph

HW = hwdb.lookup("x86-64-v3")
Pass = Callable[[fx.GraphModule, Any], int]


def trace(model: Any, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
    """The graph that passes get: captured, without the constants that nobody reads, spelt canonically."""
    return testing.trace(model, inputs, HW)


def trace_core(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], pre_dispatch: bool = False
) -> fx.GraphModule:
    """The graph of a function in core ATen, composites broken up; quick, for tests of many graphs.

    With `pre_dispatch`, operators are those the function calls, none broken up.
    """
    return testing.trace_quickly(function, inputs, pre_dispatch, HW)


def assert_rewrite(
    before: Any,
    after: Any,
    inputs: Sequence[torch.Tensor],
    rewrite: Pass,
    count: int = 1,
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    wide: float | None = None,
) -> fx.GraphModule:
    """Demand that `rewrite` turns `before` into `after` in `count` rewrites, keeps the numbers, and is then done.

    `after` may be None where only the count and the numbers are of interest.
    """
    graph = trace(before, inputs)
    original = copy_graph(graph)
    assert rewrite(graph, HW) == count
    check_graph(graph)
    if after is not None:
        assert text_of(graph) == text_of(trace_core(after, inputs, pre_dispatch=True))
    assert_same_numbers(original, graph, inputs, rtol=rtol, atol=atol, wide=wide)
    assert rewrite(graph, HW) == 0
    return graph


def assert_kept(model: Any, inputs: Sequence[torch.Tensor], rewrite: Pass) -> fx.GraphModule:
    """Demand that `rewrite` refuses: it counts nothing and changes nothing."""
    graph = trace(model, inputs)
    text = format_graph(graph)
    assert rewrite(graph, HW) == 0
    assert format_graph(graph) == text
    return graph


def assert_same_numbers(
    before: fx.GraphModule,
    after: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    wide: float | None = None,
) -> None:
    """Compare two graphs: bit for bit where rtol and atol are 0, otherwise in their own dtypes and in float64.

    In float64 a wrong rewrite cannot hide behind float32's rounding. `wide` is the tolerance there, 1e-9 unless the
    rewrite rounds constants.
    """
    for old, new in zip(run_eager(before, inputs), run_eager(after, inputs), strict=True):
        assert old.dtype == new.dtype
        assert old.shape == new.shape
        if rtol or atol:
            torch.testing.assert_close(new, old, rtol=rtol, atol=atol, equal_nan=True)
        else:
            assert _bits_equal(old, new)
    if rtol or atol:
        tolerance = 1e-9 if wide is None else wide
        for old, new in zip(run_float64(before, inputs), run_float64(after, inputs), strict=True):
            torch.testing.assert_close(new, old, rtol=tolerance, atol=tolerance, equal_nan=True)


def check_graph(graph: fx.GraphModule) -> None:
    """Demand what the graph contract promises: valid fx, and values of the shape and dtype that running gives."""
    graph.graph.lint()
    for node in graph.graph.nodes:
        if node.op != "output":
            assert node.meta.get("val") is not None, f"{node} has no value"


def check_values(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> None:
    """Demand that every node gives the shape and dtype its meta["val"] promises."""

    class Checker(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.op != "output" and isinstance(result, torch.Tensor):
                promised = n.meta["val"]
                assert (promised.shape, promised.dtype) == (result.shape, result.dtype), n.format_node()
            return result

    with torch.no_grad():
        Checker(graph).run(*inputs)


def _bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_floating_point():
        same = (a == b) & (torch.signbit(a) == torch.signbit(b))
        return bool((same | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def text_of(graph: fx.GraphModule) -> str:
    """The graph as text, every constant just before its first reader: where a tracer puts it says nothing."""
    graph = copy_graph(graph)
    placed = set()
    for node in list(graph.graph.nodes):
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in placed:
                placed.add(source)
                node.prepend(source)
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.graph.erase_node(node)
    return format_graph(graph, constant_names=False)
