"""Quantisation as PyTorch's own tools leave it in a graph (PT2E, torchao), spelt by operators that we compile.

    quantized_decomposed::quantize_per_tensor(x, s, z)     -> graphwright::quantize(x, s, z), behind a clamp where the
                                                              range is only a part of its dtype's
    quantized_decomposed::dequantize_per_tensor(q, s, z)   -> graphwright::dequantize(q, s, z)
    quantized_decomposed::dequantize_per_channel(q, s, z)  -> graphwright::dequantize_rows(q, s, z)
    scales found at run time, other dtypes than 8 bits     -> arithmetic

`recognise_quantised` looks for the first three around products; the others are operators like any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...passes import dialect_int8

_NAMESPACE = "quantized_decomposed"


def spelt(operators: Iterable[object]) -> Mapping[Any, Callable[..., Any]]:
    """Decompositions of those of a graph's operators that quantise; empty for a graph that has none."""
    found = {op for op in operators if getattr(op, "namespace", "") == _NAMESPACE}
    return {op: _OURS.get(_name(op)) or _torch_s(op) for op in found}


def _name(operator: Any) -> str:
    name = str(operator._schema.name).split("::")[1]
    return name if operator._overloadname in ("default", "") else f"{name}.{operator._overloadname}"


def _torch_s(operator: Any) -> Callable[..., Any]:
    """torch's own definition, which is written in operators of aten."""
    from torch.ao.quantization.fx import _decomposed

    defined: Callable[..., Any] = getattr(_decomposed, _name(operator).split(".")[0], operator)
    return defined


def _rounded(x: Tensor, inverse: Any, zero: Any, low: Any, high: Any, dtype: torch.dtype) -> Tensor:
    steps: Tensor = (torch.round(x * inverse) + zero).clamp(low, high)
    return steps.to(dtype)


def _quantize(x: Tensor, scale: float, zero: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    x = x.to(torch.float32)
    if dtype not in dialect_int8.RANGES:
        return _rounded(x, 1.0 / scale, zero, low, high, dtype)
    if (low, high) != dialect_int8.RANGES[dtype]:
        x = x.clamp((low - zero) * scale, (high - zero) * scale)
    steps: Tensor = dialect_int8.quantize(x, scale, zero, dtype)
    return steps


def _quantize_by(x: Tensor, scale: Tensor, zero: Tensor, low: Any, high: Any, dtype: torch.dtype) -> Tensor:
    inverse = scale.to(torch.float64).reciprocal().to(torch.float32).reshape([])
    return _rounded(x.to(torch.float32), inverse, zero.to(torch.float32).reshape([]), low, high, dtype)


def _dequantize(
    q: Tensor,
    scale: float,
    zero: int,
    low: int,
    high: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if dtype not in dialect_int8.RANGES or out_dtype not in (None, torch.float32):
        return (q.to(out_dtype or torch.float32) - zero) * scale
    real: Tensor = dialect_int8.dequantize(q, scale, zero)
    return real


def _dequantize_by(
    q: Tensor,
    scale: Tensor,
    zero: Tensor,
    low: Any,
    high: Any,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    wide = out_dtype or torch.float32
    if dtype in dialect_int8.RANGES and wide == torch.float32 and q.dim():
        real: Tensor = dialect_int8.dequantize_rows(q, scale.reshape(1), zero.reshape(1), 0)
        return real
    return (q.to(wide) - zero.reshape([])) * scale.reshape([]).to(wide)


def _dequantize_rows(
    q: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    axis: int,
    low: int,
    high: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if dtype in dialect_int8.RANGES and out_dtype in (None, torch.float32):
        real: Tensor = dialect_int8.dequantize_rows(q, scales, zeros, axis % q.dim())
        return real
    shape = [-1 if i == axis % q.dim() else 1 for i in range(q.dim())]
    steps = q if zeros is None else q - zeros.reshape(shape)
    return (steps * scales.reshape(shape)).to(out_dtype or torch.float32)


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    zero = x.new_zeros([])
    return torch.minimum(x.amin(), zero), torch.maximum(x.amax(), zero)


def _choose(x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale (float64) and zero point (int64) that cover x."""
    least, most = _range(x.to(torch.float32))
    scale = ((most - least) / float(high - low)).clamp(min=eps)
    zero = (low - torch.round(least / scale)).clamp(low, high)
    return scale.to(torch.float64).reshape(1), zero.to(torch.int64).reshape(1)


def _choose_symmetric(x: Tensor, low: int, high: int, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    least, most = _range(x.to(torch.float32))
    scale = (torch.maximum(-least, most) / (float(high - low) / 2)).clamp(min=eps)
    middle = 128 if dtype == torch.uint8 else 0
    return scale.to(torch.float64).reshape(1), torch.full([1], middle, dtype=torch.int64)


_OURS: Mapping[str, Callable[..., Any]] = {
    "quantize_per_tensor": _quantize,
    "quantize_per_tensor.tensor": _quantize_by,
    "quantize_per_tensor.tensor2": _quantize_by,
    "dequantize_per_tensor": _dequantize,
    "dequantize_per_tensor.tensor": _dequantize_by,
    "dequantize_per_tensor.tensor2": _dequantize_by,
    "dequantize_per_channel": _dequantize_rows,
    "choose_qparams.tensor": _choose,
    "choose_qparams_symmetric.tensor": _choose_symmetric,
}
