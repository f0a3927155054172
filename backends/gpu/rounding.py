"""float32 rounded to 16 bits, in the form that a code generator takes.

TVM makes float32 of bfloat16 in kernels for AMD. There its bits are integers, and rounding is their arithmetic:

    bits + 0x7fff + (bit 16)  >> 16           to nearest, ties to even; the carry goes on into the exponent
    0x7fc0                                    of a NaN, whose bits could become those of a number
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

BITS = "uint16"  # where bfloat16 is meant


def as_kept(dtype: str) -> str:
    """The dtype in registers and memory of `dtype`, bfloat16 as its bits."""
    return BITS if dtype == "bfloat16" else dtype


def rounded(value: Any, dtype: str) -> Any:
    """The float32 `value`, one, as `dtype`: float16, bfloat16, or BITS."""
    if dtype != BITS:
        return tirx.Cast(dtype, value)
    bits = T.bind(T.reinterpret("uint32", value))
    sixteen = tirx.const(16, "uint32")
    even = tirx.bitwise_and(tirx.shift_right(bits, sixteen), tirx.const(1, "uint32"))
    nearest = tirx.shift_right(bits + tirx.const(0x7FFF, "uint32") + even, sixteen)
    magnitude = tirx.bitwise_and(bits, tirx.const(0x7FFFFFFF, "uint32"))
    is_nan = magnitude > tirx.const(0x7F800000, "uint32")
    return tirx.Cast(BITS, tirx.Select(is_nan, tirx.const(0x7FC0, "uint32"), nearest))
