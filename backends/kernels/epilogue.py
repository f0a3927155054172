"""The activation applied to a value before it is stored: one definition for every kernel's epilogue.

The names are those of the dialect (`graphwright::conv2d`, `::linear`, `::matmul`). NaN goes through, as in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from . import vector_math
from .vector_math import maximum, minimum

PrimExpr = Any  # tvm.ir expression of a floating dtype, scalar or vector


def _clamp(x: PrimExpr, low: float, high: float) -> PrimExpr:
    dtype = str(x.ty.dtype)
    return minimum(maximum(x, tirx.const(low, dtype)), tirx.const(high, dtype))


def _relu(x: PrimExpr) -> PrimExpr:
    return maximum(x, tirx.const(0.0, str(x.ty.dtype)))


def _hardsigmoid(x: PrimExpr) -> PrimExpr:
    dtype = str(x.ty.dtype)
    return _clamp(x + tirx.const(3.0, dtype), 0.0, 6.0) * tirx.const(1.0 / 6.0, dtype)


def _hardswish(x: PrimExpr) -> PrimExpr:
    return x * _hardsigmoid(x)


def _leaky_relu(x: PrimExpr, slope: float) -> PrimExpr:
    dtype = str(x.ty.dtype)
    return tirx.Select(x > tirx.const(0.0, dtype), x, x * tirx.const(slope, dtype))


def _swish(x: PrimExpr, beta: float) -> PrimExpr:
    return x * vector_math.sigmoid(x * tirx.const(beta, str(x.ty.dtype)))


_LIGHT: dict[str, Callable[..., PrimExpr]] = {
    "none": lambda x: x,
    "relu": _relu,
    "relu6": lambda x: _clamp(x, 0.0, 6.0),
    "hardswish": _hardswish,
    "hardsigmoid": _hardsigmoid,
    "clamp": _clamp,
    "leaky_relu": _leaky_relu,
}
_HEAVY: dict[str, Callable[..., PrimExpr]] = {
    "silu": vector_math.silu,
    "swish": _swish,
    "gelu": vector_math.gelu,
    "gelu_tanh": vector_math.gelu_tanh,
    "sigmoid": vector_math.sigmoid,
    "tanh": vector_math.tanh,
}


def is_heavy(activation: str) -> bool:
    """Whether the activation is a polynomial of dozens of operations.

    Such a one is faster as a second loop over the stored tile than unrolled over the accumulators: it would spill them.
    """
    return activation in _HEAVY


def apply_activation(x: PrimExpr, activation: str, args: Sequence[float] = ()) -> PrimExpr:
    """`activation(x)` in x's dtype (float32, float32xN; narrower floats are computed in float32).

    `args` is (low, high) for "clamp" and (slope,) for "leaky_relu", (beta,) for "swish". `x` should be a variable or a
    load: the light activations repeat it.
    """
    if activation in _LIGHT:
        return _LIGHT[activation](x, *args)
    dtype = str(x.ty.dtype)
    if "16" in dtype.split("x")[0]:
        wide = dtype.replace("bfloat16", "float32").replace("float16", "float32")
        return tirx.Cast(dtype, _HEAVY[activation](tirx.Cast(wide, x), *args))
    return _HEAVY[activation](x, *args)
