"""Integers of 32 bits that wrap around, as torch's do.

TVM takes such numbers for indices, which never overflow: its simplifier makes True of a + 1 > a and a of a * 2 // 2,
and its LLVM instructions are marked accordingly (nsw). So they are added and multiplied in 64 bits, where nothing
overflows, and the lower half is kept; LLVM finds the one instruction that does it. Each operand is used once: chains of
operators stay as long as they are.

Not so 64 bits, for which there is nothing wider: by halves, every operand is used several times, and an expression of a
dozen operators is too large to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx


def add(a: Any, b: Any) -> Any:
    """a + b."""
    return _narrowed(lambda x, y: x + y, a, b)


def subtract(a: Any, b: Any) -> Any:
    """a - b."""
    return _narrowed(lambda x, y: x - y, a, b)


def multiply(a: Any, b: Any) -> Any:
    """a * b."""
    return _narrowed(lambda x, y: x * y, a, b)


def _narrowed(combine: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
    # -2^31 times itself is 2^62: 64 bits hold every result. A shift to the left may lose bits, which is what wraps; the
    # simplifier knows nothing of it.
    half = tirx.const(32, "int64")
    wide = combine(a.astype("int64"), b.astype("int64"))
    return tirx.shift_right(tirx.shift_left(wide, half), half).astype("int32")
