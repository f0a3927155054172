"""What a pass promises, checked on one model: the numbers, the graph's own account of itself, aliasing, and an end.

numbers     bit for bit where a pass only moves or deletes; else within what rounding explains, in the graph's
            dtypes and in float64, where a wrong rewrite cannot hide behind float32
graph       valid fx; every node's meta["val"] has the shape and dtype that running it gives; operators of the
            dialect return contiguous tensors
count       0 rewrites change nothing, and a second run makes 0
aliasing    no result shares memory with an input, a constant or another result, where it did not before
mutation    inputs and constants hold what they held
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..compiler.compiled import Compiled
from ..compiler.pipeline import copy_graph
from ..hwdb import Hardware, lookup
from ..passes.printer import format_graph
from .baseline import SHARE, Baseline, bits_equal, sharing
from .numbers import expected
from .tracing import trace

Pass = Callable[[fx.GraphModule, Hardware], int]

# Repetitions of a sequence of passes after which nothing may be left to find.
ROUNDS = 4


class PassFault(AssertionError):
    """A pass broke a promise: which one, and the graph before and after."""


def check_pass(
    rewrite: Pass,
    model: Any,
    inputs: Sequence[torch.Tensor],
    *,
    exact: bool = False,
    rounds: bool = False,
    hw: Hardware | None = None,
) -> fx.GraphModule:
    """Run one pass on one model and demand all it promises; returns the rewritten graph.

    model: a module, a function, or a graph (an fx.GraphModule whose nodes have meta["val"]), which stays as it is.
    exact: the pass only moves or deletes: results are the same bits. rounds: the pass computes new constants and rounds
    them to their dtype, which float64 then sees. hw: the machine; None for this one. Raises PassFault.
    """
    return check_passes([rewrite], model, inputs, exact=exact, rounds=rounds, hw=hw)


def check_passes(
    passes: Sequence[Pass],
    model: Any,
    inputs: Sequence[torch.Tensor],
    *,
    exact: bool = False,
    rounds: bool = False,
    settled: bool = False,
    hw: Hardware | None = None,
) -> fx.GraphModule:
    """Run passes in order on one model and demand all they promise; returns the rewritten graph.

    model: also a `Baseline`, which keeps what it gives for the next call. settled: the whole sequence, repeated, comes
    to an end. The other arguments are those of `check_pass`.
    """
    hw = hw or lookup("native")
    if isinstance(model, Baseline):
        baseline = model
    else:
        given = copy_graph(model) if isinstance(model, fx.GraphModule) else trace(model, inputs, hw)
        baseline = Baseline(given, inputs)
    graph = baseline.copy()
    account, total = _account(graph), 0
    for i in range(len(passes)):
        count, account = _apply(passes, i, baseline, graph, account, hw)
        total += count
    if settled:
        total += _settle(passes, baseline, graph, hw)
    if not total:
        baseline.unchanged(graph)
    elif reason := baseline.broken(graph, exact, rounds):
        if len(passes) > 1:
            _blame(passes, baseline, exact, rounds, hw)
        raise _fault(passes, reason, baseline.graph, graph)
    return graph


def check_compile(model: Any, inputs: Sequence[torch.Tensor], **options: Any) -> Compiled:
    """Compile a model and hold the result to what `Compiled` promises; returns it.

    The numbers are PyTorch's but for rounding, results are fresh tensors, inputs stay as they are, and a second call
    gives the same bits. `options` go to graphwright.compile. Raises PassFault.
    """
    from ..compiler.api import compile as compile_

    given = [x.clone(memory_format=torch.preserve_format) for x in inputs]
    compiled = compile_(model, tuple(given), **{"verify": False, "cache": False, **options})
    assert isinstance(compiled, Compiled)
    graph = trace(model, inputs)
    wanted = expected(graph, inputs, SHARE)
    results = _flat(compiled(*given))
    again = _flat(compiled(*given))
    reason = wanted.difference(results)
    if not reason and not all(bits_equal(a, b) for a, b in zip(results, again, strict=True)):
        reason = "a second call gives other numbers"
    if not reason and not all(bits_equal(a, b) for a, b in zip(given, inputs, strict=True)):
        reason = "it changed its inputs"
    if not reason and sharing([*given, *results]) - sharing(given):
        reason = "a result shares memory with an input or another result"
    if reason:
        raise PassFault(
            f"compiled: {reason}\n\n{format_graph(graph)}\n\nafter the passes:\n\n{format_graph(compiled.graph)}"
        )
    return compiled


def _apply(
    passes: Sequence[Pass], i: int, baseline: Baseline, graph: fx.GraphModule, before: list[Any], hw: Hardware
) -> tuple[int, list[Any]]:
    """Run one pass of a sequence and check what can be said of the graph alone; `before` is its account.

    Returns the rewrites, and the graph's account behind them.
    """
    rewrite = passes[i]
    count = rewrite(graph, hw)
    if not isinstance(count, int) or count < 0:
        reason = f"it returned {count!r}, not how many rewrites it made"
        raise _fault([rewrite], reason, _replayed(passes[:i], baseline, hw), graph)
    after = _account(graph)
    if not count:
        if after != before:
            reason = "it counted no rewrite and changed the graph"
            raise _fault([rewrite], reason, _replayed(passes[:i], baseline, hw), graph)
        return 0, before
    try:
        graph.graph.lint()
    except (RuntimeError, ValueError, AttributeError) as error:
        reason = f"it left a malformed graph: {error}"
        raise _fault([rewrite], reason, _replayed(passes[:i], baseline, hw), graph) from error
    graph.recompile()
    if again := rewrite(graph, hw):
        reason = f"its second run finds {again} more"
        raise _fault([rewrite], reason, _replayed(passes[: i + 1], baseline, hw), graph)
    return count, after


def _replayed(passes: Sequence[Pass], baseline: Baseline, hw: Hardware) -> fx.GraphModule:
    """The graph behind some passes, made again for a message."""
    graph = copy_graph(baseline.graph)
    for rewrite in passes:
        rewrite(graph, hw)
    return graph


def _settle(passes: Sequence[Pass], baseline: Baseline, graph: fx.GraphModule, hw: Hardware) -> int:
    """Repeat the sequence until it finds nothing; returns how many rewrites that took."""
    total = 0
    for _ in range(ROUNDS):
        counts = [rewrite(graph, hw) for rewrite in passes]
        if not any(counts):
            graph.recompile()
            return total
        total += sum(counts)
    names = [p.__name__ for p, count in zip(passes, counts, strict=True) if count]
    raise _fault(
        passes, f"after {ROUNDS} rounds there is still something for {', '.join(names)}", baseline.graph, graph
    )


def _account(graph: fx.GraphModule) -> list[Any]:
    """All that a graph says, for comparing it with itself later."""
    return [(n, n.op, n.target, n.args, n.kwargs) for n in graph.graph.nodes]


def _blame(passes: Sequence[Pass], baseline: Baseline, exact: bool, rounds: bool, hw: Hardware) -> None:
    """Raise for the first pass of a sequence whose graph is wrong."""
    graph = copy_graph(baseline.graph)
    for i, rewrite in enumerate(passes):
        before = copy_graph(graph)
        if rewrite(graph, hw):
            graph.recompile()
            if reason := baseline.broken(graph, exact, rounds):
                raise _fault(passes[: i + 1], reason, before, graph)


def _fault(passes: Sequence[Pass], reason: str, before: fx.GraphModule, after: fx.GraphModule) -> PassFault:
    names = [p.__name__ for p in passes]
    behind = f" after {', '.join(names[:-1])}" if len(names) > 1 else ""
    return PassFault(f"{names[-1]}{behind}: {reason}\n\nbefore:\n\n{format_graph(before)}\n\nafter:\n\n{_text(after)}")


def _text(graph: fx.GraphModule) -> str:
    try:
        return format_graph(graph)
    except KeyError:  # malformed: a node reads a later one
        return str(graph.graph)


def _flat(results: Any) -> list[torch.Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(results)
    return leaves
