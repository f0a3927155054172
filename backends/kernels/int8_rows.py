"""int8 matrix product of float32 rounded to bytes row by row at run time; passes/dialect_rows.py bit for bit.

    staging   row of x -> max |x| -> bytes as the dot product takes them (dot_tile.stage), and the row's unit
    sums      those of int8_product.py, whose `offsets` of zero point 0 set signed bytes right
    finish    act(fma(float(sum + offset[n]) * scale[n], unit[row], bias[n] + residual))

Convolutions (dot_conv.py) do so with the largest value of an image, found line by line, and its unit.

The largest value is found among the bits of |x|, which are ordered as their numbers are and hold NaN above infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...passes.dialect_rows import EPSILON, LEAST_EXPONENT, TOKEN_STEPS
from .dot_product import Dot
from .dot_tile import stage
from .epilogue import apply_activation, is_heavy
from .gemv import across
from .loops import Shape, between, constant, span, spread, view

MAGNITUDE = 0x7FFFFFFF
INFINITE = 0x7F800000
LEAST_BITS = (LEAST_EXPONENT + 127) << 23


def round_row(
    load: Callable[[Any, int], Any],
    store: Callable[[Any, Any, int], None],
    depth: int,
    dot: Dot,
    tokens: bool = False,
) -> Any:
    """Store a row of `depth` floats as words of bytes, and return its unit; `load` and `store` are those of `stage`.

    `tokens`: steps are those of `linear_tokens`.
    """
    inverse, unit = (unit_of_token if tokens else unit_of)(largest_bits(load, depth, dot))
    stage(stepping(load, inverse, tokens), store, depth, "int8", dot)
    return unit


def largest_bits(load: Callable[[Any, int], Any], depth: int, dot: Dot) -> Any:
    """The bits of max |x| of `depth` floats."""
    lanes = dot.lanes
    every = span(0, lanes)
    most = T.alloc_buffer((lanes,), "int32", scope="local")
    T.buffer_store(most, spread(tirx.const(0, "int32"), lanes), [every])

    def magnitude(k: Any, width: int) -> Any:
        integers = "int32" if width == 1 else f"int32x{width}"
        mask = spread(tirx.const(MAGNITUDE, "int32"), width)
        return tirx.bitwise_and(T.reinterpret(integers, load(k, width)), mask)

    whole = depth // lanes
    if whole:
        with T.serial(0, whole) as i:
            T.buffer_store(most, tirx.max(most[every], magnitude(i * lanes, lanes)), [every])
    if depth % lanes:
        with between(whole * lanes, depth) as k:
            T.buffer_store(most, tirx.max(most[0], magnitude(k, 1)), [0])
    return T.bind(across([most[every]], tirx.max, lanes))


def unit_of(bits: Any, lanes: int = 1) -> tuple[Any, Any]:
    """What values are multiplied by to become steps, and the unit that a step is, for the bits of the largest."""

    def integer(value: int) -> Any:
        return spread(tirx.const(value, "int32"), lanes)

    floats = "float32" if lanes == 1 else f"float32x{lanes}"
    largest = T.bind(T.reinterpret(floats, bits))
    finite = bits < integer(INFINITE)
    rounds = tirx.all(finite, bits >= integer(LEAST_BITS))
    most_steps = constant(127.0, lanes)
    inverse = T.bind(most_steps / tirx.Select(rounds, largest, most_steps))
    nan = T.reinterpret(floats, integer(INFINITE | 1 << 22))
    return inverse, tirx.Select(finite, largest * constant(1 / 127, lanes), nan)


def unit_of_token(bits: Any) -> tuple[Any, Any]:
    """The same as `linear_tokens` has it."""
    most, finite = tirx.const(TOKEN_STEPS, "float32"), bits < tirx.const(INFINITE, "int32")
    largest = tirx.Select(finite, T.bind(T.reinterpret("float32", bits)), most)
    unit = T.bind(tirx.max(largest / most, tirx.const(EPSILON, "float32")))
    inverse = T.bind(tirx.const(1.0, "float32") / unit)
    return inverse, tirx.Select(finite, unit, T.reinterpret("float32", tirx.const(INFINITE | 1 << 22, "int32")))


def stepping(load: Callable[[Any, int], Any], inverse: Any, tokens: bool = False) -> Callable[[Any, int], Any]:
    """The `load` of floats as one of steps in int8; those of `tokens` may be one too many."""

    def steps(k: Any, width: int) -> Any:
        many = "" if width == 1 else f"x{width}"
        y = load(k, width) * spread(inverse, width)
        q = tirx.call_llvm_pure_intrin(f"int32{many}", "llvm.lrint", y)
        if tokens:
            q = tirx.min(q, spread(tirx.const(127, "int32"), width))
        return tirx.Cast(f"int8{many}", q)

    return steps


@dataclass(frozen=True)
class RowFinish:
    """How int32 sums become float32. Reads [offset, ]scale[, bias][, residual], and behind them the rows' units."""

    M: int
    N: int
    bias: bool = False
    residual: bool = False
    activation: str = "none"
    args: tuple[float, ...] = ()
    output_shape: Shape | None = None
    result: str = "float32"
    offset: bool = True  # whether `offsets` are more than zeros
    rows_of_unit: int = 1  # neighbouring rows that share one: the pixels of an image

    @property
    def operands(self) -> Sequence[tuple[Shape, str]]:
        """Offset and scale of each column, bias, residual."""
        shapes: list[tuple[Shape, str]] = [((self.N,), "int32")] * self.offset
        shapes += [((self.N,), "float32")] * (1 + self.bias)
        return shapes + [(self.output_shape or (self.M, self.N), "float32")] * self.residual

    @property
    def heavy(self) -> bool:
        """Whether the activation is a polynomial."""
        return is_heavy(self.activation)

    def store(self, value: Any, row: Any, column: Any, lanes: int, read: Sequence[Any], out: Any) -> None:
        """Finish and store."""
        at, floats = span(column, lanes), "float32" if lanes == 1 else f"float32x{lanes}"
        *operands, units = read
        sums = value + operands[0][at] if self.offset else value
        y = tirx.Cast(floats, sums) * operands[self.offset][at]
        addend: Any = operands[self.offset + 1][at] if self.bias else None
        if self.residual:
            residual = view(operands[-1], (self.M, self.N))[row, at]
            addend = residual if addend is None else addend + residual
        unit = spread(units[row if self.rows_of_unit == 1 else tirx.floordiv(row, self.rows_of_unit)], lanes)
        y = y * unit if addend is None else tirx.call_llvm_pure_intrin(floats, "llvm.fma", y, unit, addend)
        if self.activation != "none":
            y = apply_activation(T.bind(y), self.activation, self.args)
        T.buffer_store(out, y, [row, at])
