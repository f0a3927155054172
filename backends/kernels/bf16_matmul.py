"""Matrix product with 16-bit weights and float32 sums: out = act(x . w^T + bias + residual), and its two forms.

dot        x and w rounded to bfloat16, pairs multiplied and added by one instruction: twice the float32 rate
widened    float32 x, bfloat16 or float16 w widened on the way in: float32 arithmetic on half the bytes, for products
           that wait for their weights (one row to a few, weights beyond the last cache)

Bias and activation are float32; residual and result may be bfloat16 (held as uint16) or float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ..tiling import Tiling
from .dot_matmul import Product, dot_matmul, pack_for
from .dot_product import Dot, bf16_dot, bf16_weights, choose_dot_tiling, narrow, narrow_text, widen
from .epilogue import apply_activation, is_heavy
from .loops import Shape, span, view


@dataclass(frozen=True)
class FloatFinish:
    """act(sum + bias + residual), stored as float32 or rounded to bfloat16. Rows and columns are those of [M, N]."""

    M: int
    N: int
    bias: bool = False
    residual: str | None = None  # its dtype in memory
    activation: str = "none"
    args: tuple[float, ...] = ()
    result: str = "float32"
    bias_shape: Shape | None = None
    output_shape: Shape | None = None
    scale: bool = False  # the sum is multiplied by a float32 of its column first: int8 weights

    @property
    def operands(self) -> Sequence[tuple[Shape, str]]:
        """Scale, bias, residual."""
        shapes: list[tuple[Shape, str]] = [((self.N,), "float32")] * self.scale
        if self.bias:
            shapes.append((self.bias_shape or (self.N,), "float32"))
        if self.residual is not None:
            shapes.append((self.output_shape or (self.M, self.N), self.residual))
        return shapes

    @property
    def heavy(self) -> bool:
        """Whether the activation is a polynomial."""
        return is_heavy(self.activation)

    def store(self, value: Any, row: Any, column: Any, lanes: int, read: Sequence[Any], out: Any) -> None:
        """Finish and store."""
        if self.scale:
            value = value * read[0][span(column, lanes)]
        if self.bias:
            value = value + view(read[int(self.scale)], (self.N,))[span(column, lanes)]
        if self.residual is not None:
            residual = view(read[-1], (self.M, self.N))[row, span(column, lanes)]
            value = value + (residual if self.residual == "float32" else widen(residual, lanes))
        if self.activation != "none":
            value = apply_activation(T.bind(value), self.activation, self.args)
        T.buffer_store(out, value if self.result == "float32" else narrow(value, lanes), [row, span(column, lanes)])


def pack_weight(weight: torch.Tensor, dot: Dot, columns: int) -> torch.Tensor:
    """Round weight[N, K] to 16 bits and pack it for `dot`."""
    return pack_for(weight.to(torch.float16 if dot.weight == "float16" else torch.bfloat16), dot, columns)


def choose_bf16(hw: Hardware) -> Dot:
    """The way to multiply on `hw`: by dot products, or by widened weights."""
    return bf16_dot(hw) or bf16_weights(hw)


def bf16_matmul(
    M: int,
    K: int,
    N: int,
    hw: Hardware,
    finish: FloatFinish,
    *,
    dot: Dot,
    tiling: Tiling | None = None,
    source: str = "float32",
    input_shape: Shape | None = None,
) -> Any:
    """Return the kernel (x, packed weights[, bias][, residual], out); `source` is x's dtype in memory."""
    t = tiling or choose_dot_tiling(hw, dot, M, N, K)
    product = Product(M, K, N, source, input_shape, finish.output_shape)
    return dot_matmul("bf16_matmul", product, dot, t, finish, narrow_text(hw))
