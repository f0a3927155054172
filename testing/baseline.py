"""A graph and what it gives for some inputs, worked out once however many passes are held to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..compiler.pipeline import copy_graph
from ..compiler.reference import Keeping, run_eager, run_float64
from .numbers import Expected, expected

# In float64, how far a pass may move what an operator gives, as a share of it: float64 rounds at 1e-16.
SHARE = 1e-12


class Baseline:
    """A graph as it is before the passes; `broken` says what a rewritten one gives otherwise."""

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> None:
        """graph: every node has meta["val"]; it stays as it is."""
        self.graph, self.inputs = graph, list(inputs)
        self._spare: fx.GraphModule | None = None
        self._expected: dict[bool, Expected] = {}
        self._shared: set[tuple[int, int]] | None = None

    def copy(self) -> fx.GraphModule:
        """A copy that may be rewritten."""
        graph, self._spare = self._spare, None
        return graph or copy_graph(self.graph)

    def unchanged(self, graph: fx.GraphModule) -> None:
        """Give back a copy that nothing was rewritten in: the next `copy` costs nothing."""
        self._spare = graph

    def expected(self, rounds: bool = False) -> Expected:
        """What the graph gives; rounds: how far constants that are rounded anew may move that."""
        if rounds not in self._expected:
            share = _rounding(self.graph) if rounds else SHARE
            known = next(iter(self._expected.values()), None)
            self._expected[rounds] = expected(self.graph, self.inputs, share, known)
        return self._expected[rounds]

    def shared(self) -> set[tuple[int, int]]:
        """Which of inputs, constants and results share memory."""
        if self._shared is None:
            self._shared = sharing_of(self.graph, self.inputs, run_eager(self.graph, self.inputs))
        return self._shared

    def broken(self, graph: fx.GraphModule, exact: bool = False, rounds: bool = False) -> str:
        """The promise that a rewritten graph breaks, or nothing."""
        held = [x.clone() for x in self.inputs]
        constants = {name: tensor.clone() for name, tensor in graph.named_buffers()}
        checker = _Checker(graph)
        with torch.no_grad():
            results = list(checker.run(*self.inputs))
        if checker.reason:
            return checker.reason
        if not all(bits_equal(a, b) for a, b in zip(held, self.inputs, strict=True)):
            return "running it changes the inputs"
        if not all(bits_equal(t, constants[name]) for name, t in graph.named_buffers()):
            return "running it changes a constant"
        wanted = self.expected(rounds)
        if exact:
            for i, (result, eager) in enumerate(zip(results, wanted.eager, strict=True)):
                if (result.dtype, result.shape) != (eager.dtype, eager.shape) or not bits_equal(result, eager):
                    return f"result {i} is not the same bits"
        elif reason := wanted.difference(results) or wanted.difference64(run_float64(graph, self.inputs)):
            return reason
        if sharing_of(graph, self.inputs, results) - self.shared():
            return "a result shares memory with an input, a constant or another result, and did not before"
        return ""


class _Checker(Keeping):
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


def sharing_of(
    graph: fx.GraphModule, inputs: Sequence[torch.Tensor], results: Sequence[torch.Tensor]
) -> set[tuple[int, int]]:
    """Pairs of results that share memory; a constant, or any input, counts as one of a kind with its number."""
    constants = {t.untyped_storage().data_ptr() for _, t in graph.named_buffers() if t.numel()}
    found = set(sharing([*inputs, *results]))
    for i, result in enumerate(results):
        if result.numel() and result.untyped_storage().data_ptr() in constants:
            found.add((-1, len(inputs) + i))
    return found


def sharing(tensors: Sequence[torch.Tensor]) -> set[tuple[int, int]]:
    """Pairs of positions whose tensors share memory."""
    addresses = [t.untyped_storage().data_ptr() if t.numel() else None for t in tensors]
    return {
        (i, j)
        for j, address in enumerate(addresses)
        for i in range(j)
        if address is not None and addresses[i] == address
    }


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all elements are the same, zeros with their signs; any NaN is as good as another."""
    if a.is_floating_point():
        same = (a == b) & (torch.signbit(a) == torch.signbit(b))
        return bool((same | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def _rounding(graph: fx.GraphModule) -> float:
    """The rounding of the narrowest floating point dtype of the graph."""
    values = [n.meta.get("val") for n in graph.graph.nodes]
    narrow = [torch.finfo(v.dtype).eps for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return max([SHARE, *narrow])
