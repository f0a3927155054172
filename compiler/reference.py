"""The float64 reference: a captured graph run with every float32 value and constant widened to float64."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import fx

_WIDER = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64}


class Float64(fx.Interpreter):
    """Runs a graph in float64; `values` keeps what every node gave when `keep` is set."""

    def __init__(self, graph: fx.GraphModule, keep: bool = False) -> None:
        super().__init__(graph, garbage_collect_values=not keep)
        self.keep = keep
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.keep:
            self.values[n] = value
        return value

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return widen(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return widen(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = fx.node.map_aggregate((args, kwargs), _widen_dtype)
        return widen(super().call_function(target, args, kwargs))


def run_float64(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The graph's outputs in float64 (integers and booleans stay what they are)."""
    with torch.no_grad():
        return list(Float64(graph).run(*inputs))


def run_eager(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The graph's outputs in plain PyTorch, in the dtypes it was captured with."""
    with torch.no_grad():
        return list(fx.Interpreter(graph).run(*inputs))


class _Keeping(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, graph: fx.GraphModule, wanted: Set[fx.Node]) -> None:
        super().__init__(graph)
        self.wanted = wanted
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


def run_eager_keeping(
    graph: fx.GraphModule, inputs: Sequence[torch.Tensor], wanted: Set[fx.Node]
) -> tuple[list[torch.Tensor], dict[fx.Node, Any]]:
    """Like `run_eager`, and what the `wanted` nodes gave on the way."""
    interpreter = _Keeping(graph, wanted)
    with torch.no_grad():
        return list(interpreter.run(*inputs)), interpreter.values


def widen(value: Any) -> Any:
    """Floating point tensors as float64; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dtype in _WIDER:
        return value.to(torch.float64)
    return value


def relative_l2(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference| where the reference is finite; inf where the two are not finite alike."""
    value, reference = _comparable(value), _comparable(reference)
    finite = reference.isfinite()
    if not torch.equal(value[~finite].nan_to_num(7.0), reference[~finite].nan_to_num(7.0)):
        return math.inf
    value, reference = value[finite], reference[finite]
    if not value.isfinite().all():
        return math.inf
    scale = float(torch.linalg.vector_norm(reference))
    difference = float(torch.linalg.vector_norm(value - reference))
    if difference == 0.0:
        return 0.0
    return difference / scale if scale else math.inf


def max_absolute(value: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest |value - reference| over the elements where both are finite; 0 for no elements."""
    value, reference = _comparable(value), _comparable(reference)
    both = value.isfinite() & reference.isfinite()
    return float((value[both] - reference[both]).abs().max()) if both.any() else 0.0


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.detach().to(torch.float64).reshape(-1)


def _widen_dtype(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value
