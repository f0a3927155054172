"""Are the numbers of two graphs the same, but for rounding? What rounding explains is measured, not guessed.

A graph is run again with every result moved by a random unit in the last place, and with them the operands of every
sum, for the rounding inside; the error that makes is what rounding differently may make as well. Sums that cancel, and
rows that a norm divides by almost nothing, widen it by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..compiler.reference import Float64, Keeping, relative_l2, run_eager, run_float64

# Two orders of summation differ by a few times what one random rounding does.
FACTOR = 8.0
_SAMPLES = 2


aten = torch.ops.aten
# What adds many numbers up, and so may cancel inside.
_SUMS = {
    *(aten.sum, aten.mean, aten.var, aten.var_mean, aten.std, aten.std_mean, aten.cumsum, aten.logsumexp),
    *(aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.addmv, aten.mv, aten.dot, aten.matmul, aten.linear),
    *(aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, aten.einsum, aten.scaled_dot_product_attention),
    *(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d),
    *(aten.layer_norm, aten.native_layer_norm, aten.group_norm, aten.native_group_norm),
    *(aten.instance_norm, aten.batch_norm, aten.rms_norm),
    *(aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d),
}


class _Noise:
    """Moves every result that was computed by up to `share` of itself."""

    def __init__(self, share: float | None, seed: int) -> None:
        self._share = share
        self._generator = torch.Generator().manual_seed(seed)

    def moved(self, node: fx.Node, value: Any, operands: Sequence[Any]) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(self.moved(node, v, operands) for v in value)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or node.op != "call_function":
            return value
        if _moves(node) or any(_shares(value, o) for o in operands):
            return value
        return self._near(value)

    def operands(self, target: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The operands of a call; those of a sum moved, since what it rounds is as large as they are."""
        if getattr(target, "overloadpacket", None) not in _SUMS:
            return args
        return tuple(self._near(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)

    def _near(self, value: torch.Tensor) -> torch.Tensor:
        share = torch.finfo(value.dtype).eps if self._share is None else self._share
        signs = torch.randint(0, 2, value.shape, generator=self._generator) * 2 - 1
        return (value.double() * (1.0 + share * signs.double())).to(value.dtype)


class _Noisy(Keeping):
    """Runs a graph in its own dtypes, every result rounded in another way."""

    def __init__(self, graph: fx.GraphModule, seed: int) -> None:
        super().__init__(graph)
        self.noise = _Noise(None, seed)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, self.noise.operands(target, args), kwargs)

    def run_node(self, n: fx.Node) -> Any:
        operands = [self.env[i] for i in n.all_input_nodes]
        return self.noise.moved(n, super().run_node(n), operands)


class _Noisy64(Float64):
    """Runs a graph in float64, every result moved by a share of itself."""

    def __init__(self, graph: fx.GraphModule, share: float, seed: int) -> None:
        super().__init__(graph)
        self.noise = _Noise(share, seed)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, self.noise.operands(target, args), kwargs)

    def run_node(self, n: fx.Node) -> Any:
        operands = [self.env[i] for i in n.all_input_nodes]
        return self.noise.moved(n, super().run_node(n), operands)


@dataclass(frozen=True)
class Expected:
    """What a graph gives for some inputs, and how far rounding may move each output."""

    exact: list[torch.Tensor]
    eager: list[torch.Tensor]
    moved: list[list[torch.Tensor]]  # runs in the graph's own dtypes, rounded in other ways
    moved64: list[list[torch.Tensor]]  # runs in float64, moved by the share asked for

    def difference(self, results: Sequence[torch.Tensor]) -> str:
        """What is wrong with results in the graph's own dtypes, or nothing."""
        for i, (result, eager, exact) in enumerate(zip(results, self.eager, self.exact, strict=True)):
            if (result.dtype, result.shape) != (eager.dtype, eager.shape):
                return f"result {i} is {_kind(result)}, not {_kind(eager)}"
            others = [moved[i] for moved in self.moved]
            if reason := _far(result, exact, eager, [eager, *others], _floor(eager.dtype)):
                return f"result {i}: {reason}"
        return ""

    def difference64(self, results: Sequence[torch.Tensor]) -> str:
        """What is wrong with results in float64, or nothing."""
        for i, (result, exact) in enumerate(zip(results, self.exact, strict=True)):
            if result.shape != exact.shape:
                return f"result {i} in float64 is {_kind(result)}, not {_kind(exact)}"
            if reason := _far(result, exact, exact, [moved[i] for moved in self.moved64], 1e-13):
                return f"result {i} in float64: {reason}"
        return ""


def expected(
    graph: fx.GraphModule, inputs: Sequence[torch.Tensor], share: float, known: Expected | None = None
) -> Expected:
    """Run a graph in float64 and in its own dtypes, as it is and rounded in other ways.

    known: what was expected for another `share`; only what depends on it is computed again.
    """
    with torch.no_grad():
        moved64 = [list(_Noisy64(graph, share, seed).run(*inputs)) for seed in range(_SAMPLES)]
        if known is not None:
            return replace(known, moved64=moved64)
        moved = [list(_Noisy(graph, seed).run(*inputs)) for seed in range(_SAMPLES)]
    return Expected(run_float64(graph, inputs), run_eager(graph, inputs), moved, moved64)


def _far(
    result: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, others: Sequence[torch.Tensor], floor: float
) -> str:
    if not result.numel():
        return ""
    if not result.is_floating_point():
        if torch.equal(result, eager) or any(not torch.equal(o, eager) for o in others):
            return ""
        return f"{int((result != eager).sum())} of {result.numel()} elements differ"
    target = exact
    finite = exact.isfinite()
    if not torch.equal(finite, eager.isfinite()):
        target = eager  # PyTorch overflows here: the rewritten graph has to do just that
    allowed = FACTOR * max([floor, *(e for o in others if (e := relative_l2(o, target)) != float("inf"))])
    error = relative_l2(result, target)
    if error <= allowed or _left_over(result, target, others):
        return ""
    return f"relative L2 error {error:.2e}, rounding explains {allowed:.2e}"


def _left_over(result: torch.Tensor, target: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    """Whether the target cancels to nothing, and the result is what rounding larger numbers leaves of that."""
    if not torch.equal(result.isfinite(), target.isfinite()) or _size(target):
        return False
    return _size(result) <= FACTOR * max(_size(o) for o in others)


def _size(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor[tensor.isfinite()].double()))


def _floor(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _shares(a: torch.Tensor, b: Any) -> bool:
    if not isinstance(b, torch.Tensor) or not a.numel():
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


_MOVES = {
    torch.ops.aten.cat.default,
    torch.ops.aten.stack.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.contiguous.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.view.default,
    torch.ops.aten.flip.default,
    torch.ops.aten.roll.default,
    torch.ops.aten.repeat.default,
    torch.ops.aten.constant_pad_nd.default,
    torch.ops.aten.index_select.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.gather.default,
    torch.ops.aten.embedding.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.expand.default,
    torch.ops.aten.slice.Tensor,
}


def _moves(node: fx.Node) -> bool:
    """Whether the node only moves elements: the same element stays the same number wherever it is."""
    return node.target in _MOVES
