"""The float64 reference: a captured graph run with every float32 value and constant widened to float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..passes import dialect
from ..passes.memory import in_order

_WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
}

_SMALL = 2.0**-10  # of the rounding, against which all of it is held
_EVEN = 8.0  # times what is in proportion: draws differ

_ATTENTION = {
    torch.ops.aten.scaled_dot_product_attention.default,
    dialect.attention,
    dialect.strided_attention,
}


class Keeping(fx.Interpreter):
    """Runs a graph; `values` keeps what the `wanted` nodes gave."""

    def __init__(self, graph: fx.GraphModule, wanted: Iterable[fx.Node] = ()) -> None:
        super().__init__(graph)
        self.wanted = set(wanted)
        self.values: dict[fx.Node, Any] = {}
        self.current: fx.Node | None = None  # what runs, or what an error came from

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, tuple(in_order(target, args)), kwargs)

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


class Float64(Keeping):
    """Runs a graph in float64."""

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return widen(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return widen(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = fx.node.map_aggregate((args, kwargs), _widen_dtype)
        result = super().call_function(target, args, kwargs)
        if target in _ATTENTION and bool(result.isnan().any()):
            # The fused kernel scales masked scores too: -inf times 0 is NaN, and times less than 0 hides nothing.
            with sdpa_kernel(SDPBackend.MATH):
                result = super().call_function(target, args, kwargs)
        ours = getattr(target, "namespace", "") == "graphwright"  # bytes of the dialect are steps of a scale
        wider = isinstance(result, torch.Tensor) and result.dtype in _WIDER and not ours
        if wider and _has_integers(args, kwargs):
            # A real function of integers, which PyTorch rounds to its default dtype.
            args, kwargs = fx.node.map_aggregate((args, kwargs), _widen_integers)
            result = super().call_function(target, args, kwargs)
        return widen(result)


class Perturbed(Float64):
    """Runs a graph in float64 with every value off by `share` of what its dtype rounds, at random.

    What comes out differs from the exact results as arithmetic in any order may (Parker, Monte Carlo Arithmetic, 1997).
    """

    def __init__(self, graph: fx.GraphModule, share: float = 1.0) -> None:
        super().__init__(graph)
        self.share = share
        self.draw = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        value, promised = super().run_node(n), n.meta.get("val")
        if not isinstance(value, torch.Tensor) or not isinstance(promised, torch.Tensor):
            return value
        if value.dtype != torch.float64 or not promised.is_floating_point():
            return value
        noise = torch.empty(value.shape, dtype=torch.float64).uniform_(-1, 1, generator=self.draw)
        return value + value * noise * (self.share * torch.finfo(promised.dtype).eps / 2)


def run_float64(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The graph's outputs in float64 (integers and booleans stay what they are)."""
    with torch.no_grad():
        return list(Float64(graph).run(*inputs))


def rounding_noise(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> list[float]:
    """For each output, the norm of what rounding every value of the graph at random changes; 0 for integers.

    Less rounding changes it in proportion, or rounding does not explain it: where it turns a comparison, a floor or an
    index over (x == 3 of an input that is 3), the smallest change is as large as any, and the norm given is 0.
    """
    exact = run_float64(graph, inputs)
    whole, small = (_distances(Perturbed(graph, share), inputs, exact) for share in (1.0, _SMALL))
    return [min(a, b / _SMALL) if b / _SMALL <= _EVEN * a else 0.0 for a, b in zip(whole, small, strict=True)]


def _distances(run: Perturbed, inputs: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> list[float]:
    with torch.no_grad():
        pairs = zip(run.run(*inputs), exact, strict=True)
        return [float(torch.linalg.vector_norm(a - b)) if b.is_floating_point() else 0.0 for a, b in pairs]


def run_eager(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The graph's outputs in plain PyTorch, in the dtypes it was captured with."""
    return run_eager_keeping(graph, inputs, ())[0]


def run_eager_keeping(
    graph: fx.GraphModule, inputs: Sequence[torch.Tensor], wanted: Iterable[fx.Node]
) -> tuple[list[torch.Tensor], dict[fx.Node, Any]]:
    """Like `run_eager`, and what the `wanted` nodes gave on the way."""
    interpreter = Keeping(graph, wanted)
    with torch.no_grad():
        return list(interpreter.run(*inputs)), interpreter.values


def widen(value: Any) -> Any:
    """Floating point tensors as float64, complex ones of two of them; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dtype in _WIDER:
        return value.to(_WIDER[value.dtype])
    return value


def relative_l2(value: torch.Tensor, reference: torch.Tensor) -> float:
    """|value - reference| / |reference| where the reference is finite; inf where the two are not finite alike."""
    value, reference = _comparable(value), _comparable(reference)
    finite = reference.isfinite()
    if not finite.all():
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
    if not both.all():
        value, reference = value[both], reference[both]
    return float((value - reference).abs().max()) if value.numel() else 0.0


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.detach().to(torch.float64).reshape(-1)


def _has_integers(*arguments: Any) -> bool:
    return any(_is_integer(leaf) for leaf in torch.utils._pytree.tree_leaves(arguments))


def _is_integer(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _widen_integers(value: Any) -> Any:
    return value.to(torch.float64) if _is_integer(value) else value


def _widen_dtype(value: Any) -> Any:
    return _WIDER.get(value, value) if isinstance(value, torch.dtype) else value
