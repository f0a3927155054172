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
from ..compiler.reference import run_eager, run_float64
from ..hwdb import Hardware, lookup
from ..passes.printer import format_graph
from .numbers import Expected, expected
from .tracing import trace

Pass = Callable[[fx.GraphModule, Hardware], int]

# In float64, how far a pass may move what an operator gives, as a share of it: float64 rounds at 1e-16.
SHARE = 1e-12
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

    settled: the whole sequence, repeated, comes to an end. The other arguments are those of `check_pass`.
    """
    hw = hw or lookup("native")
    graph = copy_graph(model) if isinstance(model, fx.GraphModule) else trace(model, inputs, hw)
    original = copy_graph(graph)
    total = sum(_apply(rewrite, graph, hw) for rewrite in passes)
    if settled:
        total += _settle(passes, original, graph, hw)
    if total:
        wanted = expected(original, inputs, _rounding(original) if rounds else SHARE)
        reason = _broken(original, graph, inputs, wanted, exact)
        if reason and len(passes) > 1:
            _blame(passes, original, inputs, wanted, exact, hw)
        if reason:
            raise _fault(passes, reason, original, graph)
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
    if not reason and not all(_bits_equal(a, b) for a, b in zip(results, again, strict=True)):
        reason = "a second call gives other numbers"
    if not reason and not all(_bits_equal(a, b) for a, b in zip(given, inputs, strict=True)):
        reason = "it changed its inputs"
    if not reason and _sharing([*given, *results]) - _sharing(given):
        reason = "a result shares memory with an input or another result"
    if reason:
        raise PassFault(
            f"compiled: {reason}\n\n{format_graph(graph)}\n\nafter the passes:\n\n{format_graph(compiled.graph)}"
        )
    return compiled


def _apply(rewrite: Pass, graph: fx.GraphModule, hw: Hardware) -> int:
    """Run one pass and check what can be said of the graph alone."""
    before, text = _account(graph), copy_graph(graph)
    count = rewrite(graph, hw)
    if not isinstance(count, int) or count < 0:
        raise _fault([rewrite], f"it returned {count!r}, not how many rewrites it made", text, graph)
    if not count:
        if _account(graph) != before:
            raise _fault([rewrite], "it counted no rewrite and changed the graph", text, graph)
        return 0
    try:
        graph.graph.lint()
    except (RuntimeError, ValueError, AttributeError) as error:
        raise _fault([rewrite], f"it left a malformed graph: {error}", text, graph) from error
    graph.recompile()
    once = copy_graph(graph)
    if again := rewrite(graph, hw):
        raise _fault([rewrite], f"its second run finds {again} more", once, graph)
    return count


def _settle(passes: Sequence[Pass], original: fx.GraphModule, graph: fx.GraphModule, hw: Hardware) -> int:
    """Repeat the sequence until it finds nothing; returns how many rewrites that took."""
    total = 0
    for _ in range(ROUNDS):
        counts = [rewrite(graph, hw) for rewrite in passes]
        if not any(counts):
            graph.recompile()
            return total
        total += sum(counts)
    names = [p.__name__ for p, count in zip(passes, counts, strict=True) if count]
    raise _fault(passes, f"after {ROUNDS} rounds there is still something for {', '.join(names)}", original, graph)


def _rounding(graph: fx.GraphModule) -> float:
    """The rounding of the narrowest floating point dtype of the graph."""
    values = [n.meta.get("val") for n in graph.graph.nodes]
    narrow = [torch.finfo(v.dtype).eps for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return max([SHARE, *narrow])


def _account(graph: fx.GraphModule) -> list[Any]:
    """All that a graph says, for comparing it with itself later."""
    return [(n, n.op, n.target, n.args, n.kwargs) for n in graph.graph.nodes]


def _broken(
    original: fx.GraphModule, graph: fx.GraphModule, inputs: Sequence[torch.Tensor], wanted: Expected, exact: bool
) -> str:
    """The promise that the rewritten graph breaks, or nothing."""
    held = [x.clone() for x in inputs]
    constants = {name: tensor.clone() for name, tensor in graph.named_buffers()}
    checker = _Checker(graph)
    with torch.no_grad():
        results = list(checker.run(*inputs))
    if checker.reason:
        return checker.reason
    if not all(_bits_equal(a, b) for a, b in zip(held, inputs, strict=True)):
        return "running it changes the inputs"
    if not all(_bits_equal(t, constants[name]) for name, t in graph.named_buffers()):
        return "running it changes a constant"
    if exact:
        for i, (result, eager) in enumerate(zip(results, wanted.eager, strict=True)):
            if (result.dtype, result.shape) != (eager.dtype, eager.shape) or not _bits_equal(result, eager):
                return f"result {i} is not the same bits"
    elif reason := wanted.difference(results) or wanted.difference64(run_float64(graph, inputs)):
        return reason
    if _sharing_of(graph, inputs, results) - _sharing_of(original, inputs, run_eager(original, inputs)):
        return "a result shares memory with an input, a constant or another result, and did not before"
    return ""


class _Checker(fx.Interpreter):
    """Runs a graph; `reason` says what first differed from the graph's own account of it."""

    reason = ""

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "output" or self.reason:
            return value
        promised: Any = n.meta.get("val")
        pairs = [(value, promised)]
        if isinstance(value, (tuple, list)) and isinstance(promised, (tuple, list)):
            pairs = list(zip(value, promised, strict=True))
        for real, fake in pairs:
            if not isinstance(real, torch.Tensor):
                continue
            if not isinstance(fake, torch.Tensor):
                self.reason = f"{n.format_node()} has no meta['val']"
            elif (real.shape, real.dtype) != (fake.shape, fake.dtype):
                self.reason = f"{n.format_node()} gives {real.dtype} {list(real.shape)}, its meta['val'] says {fake}"
            elif getattr(n.target, "namespace", "") == "graphwright" and not real.is_contiguous():
                self.reason = (
                    f"{n.format_node()} gives strides {real.stride()}; the dialect promises contiguous results"
                )
        return value


def _blame(
    passes: Sequence[Pass],
    original: fx.GraphModule,
    inputs: Sequence[torch.Tensor],
    wanted: Expected,
    exact: bool,
    hw: Hardware,
) -> None:
    """Raise for the first pass of a sequence whose graph is wrong."""
    graph = copy_graph(original)
    for i, rewrite in enumerate(passes):
        before = copy_graph(graph)
        if rewrite(graph, hw):
            graph.recompile()
            if reason := _broken(original, graph, inputs, wanted, exact):
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


def _sharing_of(
    graph: fx.GraphModule, inputs: Sequence[torch.Tensor], results: Sequence[torch.Tensor]
) -> set[tuple[int, int]]:
    """Pairs of results that share memory; a constant, or any input, counts as one of a kind with its number."""
    constants = {t.untyped_storage().data_ptr() for _, t in graph.named_buffers() if t.numel()}
    found = {(i, j) for i, j in _sharing([*inputs, *results])}
    for i, result in enumerate(results):
        if result.numel() and result.untyped_storage().data_ptr() in constants:
            found.add((-1, len(inputs) + i))
    return found


def _sharing(tensors: Sequence[torch.Tensor]) -> set[tuple[int, int]]:
    """Pairs of positions whose tensors share memory."""
    addresses = [t.untyped_storage().data_ptr() if t.numel() else None for t in tensors]
    return {
        (i, j)
        for j, address in enumerate(addresses)
        for i in range(j)
        if address is not None and addresses[i] == address
    }


def _bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_floating_point():
        same = (a == b) & (torch.signbit(a) == torch.signbit(b))
        return bool((same | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def _flat(results: Any) -> list[torch.Tensor]:
    leaves, _ = torch.utils._pytree.tree_flatten(results)
    return leaves
