"""int8 matrix product and convolution with fused requantize: out = requantize(sum over k (a - zero) * w + bias).

a is uint8 or int8 with one zero point, w is int8 and symmetric (zero point 0), sums are exact in int32:

    sum (a - zero) w  =  sum a w  -  zero * sum w          the second part is a constant of each column

`offsets` computes that constant once, together with an integer bias; where the instruction takes bytes of the other
sign, a is stored as a + 128 or a - 128 (dot_tile.py) and 128 * sum w goes into the constant too. Kernels read
none where it is zero in any case (`has_offsets`). For each element:

    addend = fma(residual - zero, scale, bias)                             bias, residual: where there are such
    y = fma(float(sum + offset), scale[column], addend)
    y = act(y)                                                             in real units
    q = clamp(round_to_even(y * inverse) + zero_out, low, high)            where the result is uint8 or int8

Bit for bit what the reference in tests/backends/test_int8.py computes, on every machine: the fma is explicit, since
whether a compiler fuses is otherwise its own affair. With activation "none", "relu" or a clamp, `inverse` may be 1 and
the output scale folded into `scale`: bounds are then in steps of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import torch
from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ..tiling import Tiling
from .conv_plan import Conv
from .dot_conv import DotConvPlan, choose_dot_conv, dot_conv, pack_conv
from .dot_matmul import Product, dot_matmul, pack_for
from .dot_product import Dot, choose_dot_tiling
from .dot_tile import FLIP, flips
from .epilogue import apply_activation, is_heavy
from .int8_rows import RowFinish
from .loops import Shape, span, spread, view

RANGES = {"uint8": (0, 255), "int8": (-128, 127)}


@dataclass(frozen=True)
class Residual:
    """A quantised tensor added to the result: (value - zero) * scale, in the units of y; float32 has neither."""

    dtype: str
    scale: float = 1.0
    zero: int = 0


@dataclass(frozen=True)
class Requantize:
    """How int32 sums become the result (uint8, int8 or float32). Reads [offset, ]scale[, bias][, residual]."""

    M: int
    N: int
    result: str
    zero: int = 0
    inverse: float = 1.0  # 1 / scale of the result
    bias: bool = False  # a float32 bias, beside the integer one in `offsets`
    residual: Residual | None = None
    activation: str = "none"
    args: tuple[float, ...] = ()
    output_shape: Shape | None = None
    offset: bool = True  # whether there are integers in `offsets` other than zero

    @property
    def operands(self) -> Sequence[tuple[Shape, str]]:
        """Offset and scale of each column, float bias, residual."""
        shapes: list[tuple[Shape, str]] = [((self.N,), "int32")] * self.offset
        shapes += [((self.N,), "float32")] * (1 + self.bias)
        if self.residual is not None:
            shapes.append((self.output_shape or (self.M, self.N), self.residual.dtype))
        return shapes

    @property
    def heavy(self) -> bool:
        """Whether the activation is a polynomial."""
        return is_heavy(self.activation)

    def store(self, value: Any, row: Any, column: Any, lanes: int, read: Sequence[Any], out: Any) -> None:
        """Requantize and store."""
        at = span(column, lanes)
        sums = value + read[0][at] if self.offset else value
        addend: Any = read[self.offset + 1][at] if self.bias else None
        if self.residual is not None:
            addend = self.added(addend, view(read[-1], (self.M, self.N))[row, at], lanes)
        y = self.real(sums, read[self.offset][at], addend, lanes)
        if self.result == "float32":
            T.buffer_store(out, y, [row, at])
            return
        # Clamped first: a float beyond int32 has no integer. The bounds are integers, so the order does not matter.
        least, most = self.bounds() or self.ends
        y = tirx.max(self.scaled(y, lanes), spread(tirx.const(least, "float32"), lanes))
        y = tirx.min(y, spread(tirx.const(most, "float32"), lanes))
        steps = tirx.call_llvm_pure_intrin(_many("int32", lanes), "llvm.lrint", y)  # to nearest, half to even
        q = steps + spread(tirx.const(self.zero, "int32"), lanes)
        T.buffer_store(out, tirx.Cast(_many(self.result, lanes), q), [row, at])

    def real(self, sums: Any, scale: Any, addend: Any, lanes: int) -> Any:
        """Sums (offsets included) in real units; an activation that only clamps is left to `bounds`."""
        y: Any = tirx.Cast(_many("float32", lanes), sums)
        y = y * scale if addend is None else _fma(y, scale, addend, lanes)
        if self.activation != "none" and self.bounds() is None:
            y = apply_activation(T.bind(y), self.activation, self.args)
        return y

    def scaled(self, y: Any, lanes: int) -> Any:
        """`y` in steps of the result."""
        return y if self.inverse == 1.0 else y * spread(tirx.const(self.inverse, "float32"), lanes)

    @property
    def ends(self) -> tuple[float, float]:
        """The range of the result in steps, zero point taken off."""
        low, high = RANGES[self.result]
        return float(low - self.zero), float(high - self.zero)

    def bounds(self) -> tuple[float, float] | None:
        """The range of the result and that of an activation which only clamps, as one, in steps of the result.

        The same bits as one after the other: multiplying by `inverse` keeps the order of floats. None where the
        activation does more.
        """
        clamps = {"none": (-inf, inf), "relu": (0.0, inf), "relu6": (0.0, 6.0), "clamp": self.args}
        if self.result == "float32" or self.activation not in clamps:
            return None
        least, most = self.ends
        ends = torch.tensor(clamps[self.activation], dtype=torch.float32) * torch.tensor(self.inverse)
        start, end = ends.clamp(least, most).tolist()
        return start, end

    def added(self, bias: Any, value: Any, lanes: int) -> Any:
        """bias + (value - zero) * scale, by one fma where there are both."""
        assert self.residual is not None
        if self.residual.dtype == "float32":
            return value if bias is None else bias + value
        whole = tirx.Cast(_many("int32", lanes), value) - spread(tirx.const(self.residual.zero, "int32"), lanes)
        steps = tirx.Cast(_many("float32", lanes), whole)
        scale = spread(tirx.const(self.residual.scale, "float32"), lanes)
        return steps * scale if bias is None else _fma(steps, scale, bias, lanes)


def _many(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _fma(a: Any, b: Any, c: Any, lanes: int) -> Any:
    return tirx.call_llvm_pure_intrin(_many("float32", lanes), "llvm.fma", a, b, c)


def offsets(weight: torch.Tensor, zero: int, source: str, dot: Dot, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What is added to the sums of each row of weight[N, ...] (int8): see the module's head. int32[N]."""
    if flips(source, dot):
        zero += FLIP if source == "int8" else -FLIP
    constant = -zero * weight.flatten(1).to(torch.int64).sum(1)
    return (constant if bias is None else constant + bias).to(torch.int32)


def has_offsets(zero: int, source: str, dot: Dot) -> bool:
    """Whether `offsets` are more than zeros (and a bias)."""
    return zero != 0 or flips(source, dot)


def int8_matmul(
    M: int,
    K: int,
    N: int,
    hw: Hardware,
    source: str,
    finish: Requantize,
    *,
    dot: Dot,
    tiling: Tiling | None = None,
    input_shape: Shape | None = None,
) -> Any:
    """Return the kernel (a, packed weights[, offset], scale[, bias][, residual], out); `source` is a's dtype."""
    t = tiling or choose_dot_tiling(hw, dot, M, N, K)
    return dot_matmul("int8_matmul", Product(M, K, N, source, input_shape, finish.output_shape), dot, t, finish)


def int8_rows_matmul(
    M: int,
    K: int,
    N: int,
    hw: Hardware,
    finish: RowFinish,
    *,
    dot: Dot,
    tiling: Tiling | None = None,
    input_shape: Shape | None = None,
    tokens: bool = False,
) -> Any:
    """Return the kernel (x, packed weights[, offset], scale[, bias][, residual], out), x float32: int8_rows.py."""
    t = tiling or choose_dot_tiling(hw, dot, M, N, K)
    product = Product(M, K, N, "float32", input_shape, finish.output_shape, by_rows=True, tokens=tokens)
    return dot_matmul("int8_rows_matmul", product, dot, t, finish)


def int8_conv(
    conv: Conv,
    hw: Hardware,
    source: str,
    finish: Requantize,
    *,
    dot: Dot,
    zero: int = 0,
    plan: DotConvPlan | None = None,
) -> Any:
    """Return the NHWC kernel, operands as `int8_matmul`; padding counts as `zero`, so that it adds nothing.

    Pointwise convolutions are `int8_matmul` of all pixels.
    """
    assert prod(conv.output_shape[:3]) == finish.M
    return dot_conv("int8_conv", conv, source, dot, plan or choose_dot_conv(conv, dot, hw), finish, fill=zero)


def int8_images_conv(conv: Conv, hw: Hardware, finish: RowFinish, *, dot: Dot, plan: DotConvPlan | None = None) -> Any:
    """Return the kernel (x, packed weights, offset, scale[, bias][, residual], out), x float32: int8_rows.py."""
    pixels = prod(conv.output_shape[1:3])
    assert (finish.M, finish.rows_of_unit) == (conv.batch * pixels, pixels)
    chosen = plan or choose_dot_conv(conv, dot, hw)
    return dot_conv("int8_images_conv", conv, "float32", dot, chosen, finish, by_images=True)


def pack_matmul(weight: torch.Tensor, dot: Dot, columns: int) -> torch.Tensor:
    """Pack weight[N, K] (int8)."""
    return pack_for(weight, dot, columns)


__all__ = [
    "Requantize",
    "Residual",
    "has_offsets",
    "int8_conv",
    "int8_images_conv",
    "int8_matmul",
    "int8_rows_matmul",
    "offsets",
    "pack_conv",
    "pack_matmul",
]
