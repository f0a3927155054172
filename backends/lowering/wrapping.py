"""Integers of 32 and 64 bits that wrap around, as torch's do.

TVM takes such numbers for indices, which never overflow: its simplifier makes True of a + 1 > a and a of a * 2 // 2,
and its LLVM instructions are marked accordingly (nsw for signed numbers, nuw for unsigned ones). So nothing is added or
multiplied here that could overflow:

    32 bits    in 64 bits, of which the lower half is kept; LLVM finds the one instruction that does it
    64 bits    by halves: a = a1 2^32 + a0, where every sum and product of parts is below 2^63

A shift to the left may lose bits, which is what wraps; the simplifier knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

WIDE = frozenset({"int32", "int64"})  # narrower numbers are no indices, and their instructions are not marked


def add(a: Any, b: Any, dtype: str) -> Any:
    """a + b."""
    return _narrowed(lambda x, y: x + y, a, b) if dtype == "int32" else _add(a, b)


def subtract(a: Any, b: Any, dtype: str) -> Any:
    """a - b."""
    if dtype == "int32":
        return _narrowed(lambda x, y: x - y, a, b)
    return _add(_add(a, tirx.bitwise_xor(b, _number(-1))), _number(1))


def multiply(a: Any, b: Any, dtype: str) -> Any:
    """a * b."""
    if dtype == "int32":
        return _narrowed(lambda x, y: x * y, a, b)
    crossed = _low(_low(a) * _high(b)) + _low(_high(a) * _low(b))
    quarter = tirx.bitwise_and(a, _number(0xFFFF)) * _low(b)
    upper = tirx.shift_left(tirx.shift_right(_low(a), _number(16)) * _low(b), _number(16))
    return _add(_add(upper, quarter), _raised(crossed))


def _narrowed(combine: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    # -2^31 times itself is 2^62: 64 bits hold every result.
    return _high(_raised(combine(a.astype("int64"), b.astype("int64")))).astype("int32")


def _add(x: Any, y: Any) -> Any:
    low = _low(x) + _low(y)
    return tirx.bitwise_or(_raised(_high(x) + _high(y) + _high(low)), _low(low))


def _low(value: Any) -> Any:
    return tirx.bitwise_and(value, _number(0xFFFFFFFF))


def _high(value: Any) -> Any:
    return tirx.shift_right(value, _number(32))


def _raised(value: Any) -> Any:
    return tirx.shift_left(value, _number(32))


def _number(value: int) -> Any:
    return tirx.const(value, "int64")
