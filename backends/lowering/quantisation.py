"""Quantize and dequantize as tensor expressions, so that they join the kernels around them.

The order of operations is that of the requantize in backends/kernels/int8_product.py: the same bits.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from ...passes import dialect_int8
from . import expressions as ex
from .registry import Out, lowers


@lowers(dialect_int8.quantize)
def quantize(out: Out, x: te.Tensor, scale: float, zero: int, dtype: object) -> te.Tensor:
    """clamp(round(x / scale) + zero) in 8 bits."""
    low, high = dialect_int8.RANGES[ex.torch_dtype(out.dtype)]
    factor = ex.constant(dialect_int8.inverse(scale), "float32")

    def steps(v: Any) -> Any:
        y = ex.cast(v, "float32") * factor
        y = tirx.max(y, tirx.const(float(low - zero), "float32"))
        y = tirx.min(y, tirx.const(float(high - zero), "float32"))
        return (tirx.nearbyint(y).astype("int32") + tirx.const(zero, "int32")).astype(out.dtype)

    return te.compute(out.shape, lambda *i: steps(x(*i)), name="quantize")


@lowers(dialect_int8.dequantize)
def dequantize(out: Out, x: te.Tensor, scale: float, zero: int) -> te.Tensor:
    """(q - zero) * scale in float32."""
    factor = ex.constant(scale, "float32")

    def real(v: Any) -> Any:
        return (v.astype("int32") - tirx.const(zero, "int32")).astype("float32") * factor

    return te.compute(out.shape, lambda *i: real(x(*i)), name="dequantize")


@lowers(dialect_int8.dequantize_rows)
def dequantize_rows(out: Out, x: te.Tensor, scales: te.Tensor, zeros: te.Tensor | None, axis: int) -> te.Tensor:
    """(q - zero) * scale in float32, both of the element's row."""

    def real(*i: Any) -> Any:
        row = i[axis] if int(scales.shape[0]) > 1 else 0
        steps = x(*i).astype("float32")
        steps = steps if zeros is None else steps - zeros(row).astype("float32")
        return steps * scales(row).astype("float32")

    return te.compute(out.shape, real, name="dequantize_rows")
