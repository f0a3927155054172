"""The dialect's product of bytes whose inputs are rounded at run time, each row by its own largest value.

    q = round(x * (127 / max |x|))                  of a row, in [-127, 127], half to even; unit = max |x| * (1 / 127)
    sum = sum over k q w8                           exact in int32
    y = fma(float(sum) * scale[n], unit, bias[n] + residual)
    out = act(y)                                    float32

Rows without a value of LEAST are zeros, so that 127 / max |x| is finite. A row that holds an infinity or NaN gives NaN.
Every operation is rounded to float32 as kernels round it (activations that are polynomials in machine code aside).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dialect, mixed

LEAST_EXPONENT = -120
LEAST = 2.0**LEAST_EXPONENT


def _linear_rows(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    x = input.float()
    largest = x.abs().amax(-1, keepdim=True)  # NaN where there is one
    finite = largest.isfinite()
    inverse = 127.0 / torch.where(finite & (largest >= LEAST), largest, 127.0)
    steps = torch.where(finite, x * inverse, 0.0).round()
    sums = F.linear(steps.double(), weight.double()).float()  # whole numbers: exact in any order
    unit = torch.where(finite, largest * torch.tensor(1 / 127, dtype=torch.float32), torch.nan)
    y = (sums * scale.float()).double() * unit.double()
    addends = [t.float() for t in (bias, residual) if t is not None]
    if addends:
        y = y + sum(addends[1:], addends[0]).double()
    return dialect.ACTIVATIONS[activation](y.float(), list(activation_args)).contiguous()


def _linear_rows_fake(
    input: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=torch.float32)


linear_rows = dialect.define(
    "linear_rows",
    mixed.LINEAR_SCALED,
    _linear_rows,
    _linear_rows_fake,
)
