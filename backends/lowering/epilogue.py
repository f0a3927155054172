"""The dialect's activation as one more tensor expression after the sums, for the forms no kernel takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

from . import activations as act
from . import expressions as ex
from .elementwise import clamp
from .registry import Out

_ACTIVATIONS: dict[str, Callable[..., te.Tensor]] = {
    "none": lambda out, x: ex.copy(out, x),
    "relu": act.relu,
    "relu6": act.relu6,
    "silu": act.silu,
    "gelu": act.gelu,
    "gelu_tanh": lambda out, x: act.gelu(out, x, approximate="tanh"),
    "hardswish": act.hardswish,
    "hardsigmoid": act.hardsigmoid,
    "sigmoid": lambda out, x: ex.pointwise(out, _sigmoid, x),
    "tanh": lambda out, x: ex.pointwise(out, tirx.tanh, x),
    "clamp": clamp,
    "leaky_relu": act.leaky_relu,
    "swish": act.swish,
}


def _sigmoid(v: Any) -> Any:
    one = ex.constant(1, str(v.ty))
    return one / (one + tirx.exp(-v))


def activate(out: Out, x: te.Tensor, activation: str, args: Sequence[float]) -> te.Tensor:
    """`activation(x)` in the dtype of `out`; args as in the dialect."""
    return _ACTIVATIONS[activation](out, x, *args)
