"""Operators whose operands differ in precision: weights of 16, 8 or 4 bits, float32 sums; attention of 16 bits.

Each is the dialect's operator of the same name on widened operands. `round_input` rounds the input to the precision in
the operator's name first (it may also come in it); `narrow` rounds the result. Bias and activation are float32, or
float64 where one is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dialect
from .precision.int4_groups import unpacked


def _widened(tensors: Sequence[Tensor | None]) -> list[Any]:
    """All as float64 where one is, else as float32."""
    wide = torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
    return [None if t is None else t.to(wide) for t in tensors]


def _linear(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The body of a linear operator that rounds to `dtype`."""

    def body(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
        activation_args: Sequence[float],
        round_input: bool,
        narrow: bool,
    ) -> Tensor:
        x, w, b, r = _widened((input, weight, bias, residual))
        x = x.to(dtype).to(x.dtype) if round_input else x
        result: Tensor = dialect.linear(x, w, b, r, activation, list(activation_args))
        return result.to(dtype) if narrow else result

    return body


def linear_fake(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The fake kernel of a linear operator that rounds to `dtype`."""

    def fake(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
        activation_args: Sequence[float],
        round_input: bool,
        narrow: bool,
    ) -> Tensor:
        return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=dtype if narrow else torch.float32)

    return fake


def _linear_w8(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    """act((x . w8^T) * scale + bias + residual): the scale of a column is applied to its finished sum."""
    x, s, b, r = _widened((input, scale, bias, residual))
    y = torch.nn.functional.linear(x, weight.to(x.dtype)) * s
    y = y if b is None else y + b
    y = y if r is None else y + r
    return dialect.ACTIVATIONS[activation](y, list(activation_args)).contiguous()


def _linear_w8_fake(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _linear_w4(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    """act(y + bias + residual), y[n] = unit * sum over groups of (q . w4[n]) * scale[n]; weights as in int4_groups.py.

    q is the row in steps of unit = max |x| / 127, to nearest; sums of a group are exact, and added up in their order.
    """
    x, s, b, r = _widened((input, scale, bias, residual))
    largest = x.abs().amax(-1, keepdim=True)
    inverse = 127.0 / torch.where(largest > 0.0, largest, torch.ones_like(largest))
    q = (x * inverse).clamp(-127.0, 127.0).round().reshape(*x.shape[:-1], s.shape[1], -1)
    steps = unpacked(weight).to(x.dtype).view(*s.shape, -1)
    total = x.new_zeros((*x.shape[:-1], weight.shape[0]))
    for group in range(s.shape[1]):
        sums = torch.nn.functional.linear(q[..., group, :], steps[:, group])  # whole numbers below 2^24
        total = (sums.double() * s[:, group].double() + total.double()).to(x.dtype)
    unit = largest * torch.tensor(1 / 127, dtype=x.dtype)
    addend = b if r is None else r if b is None else b + r
    y = total * unit if addend is None else (total.double() * unit.double() + addend.double()).to(x.dtype)
    return dialect.ACTIVATIONS[activation](y, list(activation_args)).contiguous()


def _embedding_w8(weight: Tensor, scale: Tensor, indices: Tensor) -> Tensor:
    """Rows of weight[N, K] in int8, each times its own scale[N]."""
    s = scale.float()[indices]
    return (weight[indices].float() * s[..., None]).contiguous()


def _embedding_w8_fake(weight: Tensor, scale: Tensor, indices: Tensor) -> Tensor:
    return scale.new_empty((*indices.shape, weight.shape[1]))


def _conv2d(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The body of a convolution that rounds to `dtype`."""

    def body(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        activation: str,
        activation_args: Sequence[float],
        layout: str,
        round_input: bool,
        narrow: bool,
    ) -> Tensor:
        x, w, b, r = _widened((input, weight, bias, residual))
        x = x.to(dtype).to(x.dtype) if round_input else x
        sizes = (list(stride), list(padding), list(dilation), groups)
        result: Tensor = dialect.conv2d(x, w, b, r, *sizes, activation, list(activation_args), layout)
        return result.to(dtype) if narrow else result

    return body


def conv2d_fake(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The fake kernel of a convolution that rounds to `dtype`."""

    def fake(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        activation: str,
        activation_args: Sequence[float],
        layout: str,
        round_input: bool,
        narrow: bool,
    ) -> Tensor:
        sizes = (list(stride), list(padding), list(dilation), groups)
        shape = dialect.conv2d(input, weight.to(input.dtype), None, None, *sizes, "none", [], layout).shape
        return input.new_empty(shape, dtype=dtype if narrow else torch.float32)

    return fake


def _attention(dtype: torch.dtype) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The body and the fake kernel of an attention that rounds q, k, v and the powers of the scores to `dtype`."""

    def body(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
        fill: float | None = None,
        narrow: bool = False,
    ) -> Tensor:
        q, k, v = (x.to(dtype).to(x.dtype) for x in _widened((q, k, v)))
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = dialect.masked(q @ k.mT * scale, mask, is_causal, -math.inf if fill is None else fill)
        top = scores.amax(-1, keepdim=True)
        powers = (scores - top.masked_fill(top == -math.inf, 0.0)).exp()
        total = powers.sum(-1, keepdim=True)
        total = total.masked_fill(total == 0.0, 1.0) if fill is None else total  # nothing is let through: zeros
        result: Tensor = powers.to(dtype).to(powers.dtype) @ v / total
        return (result.to(dtype) if narrow else result).contiguous()

    def fake(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
        fill: float | None = None,
        narrow: bool = False,
    ) -> Tensor:
        return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=dtype if narrow else torch.float32)

    return body, fake


_EPILOGUE = "str activation, float[] activation_args"
_PRECISION = "bool round_input, bool narrow"

LINEAR = f"(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, {_EPILOGUE}, {_PRECISION}) -> Tensor"

LINEAR_SCALED = f"(Tensor input, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, {_EPILOGUE}) -> Tensor"

linear_bf16 = dialect.define("linear_bf16", LINEAR, _linear(torch.bfloat16), linear_fake(torch.bfloat16))
linear_f16 = dialect.define("linear_f16", LINEAR, _linear(torch.float16), linear_fake(torch.float16))
linear_w8 = dialect.define(
    "linear_w8",
    LINEAR_SCALED,
    _linear_w8,
    _linear_w8_fake,
)
linear_w4 = dialect.define(
    "linear_w4",
    LINEAR_SCALED,
    _linear_w4,
    _linear_w8_fake,
)
embedding_w8 = dialect.define(
    "embedding_w8", "(Tensor weight, Tensor scale, Tensor indices) -> Tensor", _embedding_w8, _embedding_w8_fake
)
CONV2D = (
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    f"int[] dilation, int groups, {_EPILOGUE}, str layout, {_PRECISION}) -> Tensor"
)
conv2d_bf16 = dialect.define("conv2d_bf16", CONV2D, _conv2d(torch.bfloat16), conv2d_fake(torch.bfloat16))
conv2d_f16 = dialect.define("conv2d_f16", CONV2D, _conv2d(torch.float16), conv2d_fake(torch.float16))
_ATTENTION = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale, float? fill=None, bool narrow=False) "
    "-> Tensor"
)
attention_bf16 = dialect.define("attention_bf16", _ATTENTION, *_attention(torch.bfloat16))
attention_f16 = dialect.define("attention_f16", _ATTENTION, *_attention(torch.float16))
