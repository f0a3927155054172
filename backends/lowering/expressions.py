"""What TE definitions share: casts, promotion and broadcasting as torch does them, comparisons that keep NaN.

TVM's simplifier reasons about floats as if NaN did not exist: it turns `not (a < b)` into `b <= a`, `a != a`
into False and `a * 0` into 0, and its code for `!=` is the ordered comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tvm import te, tirx

from . import wrapping
from .imperative import Elements, grid, loop_nest
from .registry import Out

Scalar = bool | int | float

_TORCH: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "bool",
    )
}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of TVM's name."""
    return _TORCH[name]


def is_float(dtype: str) -> bool:
    """Whether a TVM dtype name is a floating-point one."""
    return dtype.startswith(("float", "bfloat"))


def bits(dtype: str) -> int:
    """Bits of an element; 8 for bool, as stored."""
    return 8 if dtype == "bool" else int("".join(c for c in dtype if c.isdigit()))


def dtype_of(value: Any) -> str:
    """The dtype of a tensor or of an expression."""
    return str(value.dtype if isinstance(value, te.Tensor) else value.ty.dtype)


def compute_dtype(dtype: str) -> str:
    """The dtype torch computes in: float32 for the halves. For bool int32, since LLVM cannot add booleans."""
    return {"float16": "float32", "bfloat16": "float32", "bool": "int32"}.get(dtype, dtype)


def constant(value: Scalar, dtype: str) -> Any:
    """`value` rounded or wrapped to `dtype` as torch converts a Python number."""
    if dtype == "bool":
        return tirx.const(bool(value), "bool")
    if is_float(dtype):
        if dtype != "float64":  # rounded here, since TVM prints a float32 constant through the double
            value = torch.tensor(float(value), dtype=torch_dtype(dtype)).item()
        return tirx.const(float(value), dtype)
    width = bits(dtype)
    wrapped = int(value) & ((1 << width) - 1)
    if dtype.startswith("int") and wrapped >> (width - 1):
        wrapped -= 1 << width
    return tirx.const(wrapped, dtype)


def cast(value: Any, dtype: str) -> Any:
    """`value` (an expression or a Python number) as `dtype`, by C++'s rules; to bool means "is not zero"."""
    if isinstance(value, (bool, int, float)):
        return constant(value, dtype)
    source = dtype_of(value)
    if source == dtype:
        return value
    if dtype == "bool":
        return is_true(value)
    if source in ("float16", "bfloat16") and dtype != "float32":
        return cast(value.astype("float32"), dtype)
    if is_float(source) and dtype == "uint8":
        return value.astype("int64").astype("uint8")  # negative numbers wrap
    if is_float(source) and dtype in ("int8", "int16"):
        return value.astype("int32").astype(dtype)
    if dtype in ("float16", "bfloat16") and source != "float32":
        return value.astype("float32").astype(dtype)
    return value.astype(dtype)


def rounded(value: Any, dtype: str) -> Any:
    """`value`, when it is a Python number, as `dtype` holds it: where torch's kernel does not take it in full."""
    return constant(value, dtype).value if isinstance(value, (int, float)) and is_float(dtype) else value


def is_nan(value: Any) -> Any:
    """Whether the expression is NaN; False for integers."""
    if not is_float(dtype_of(value)):
        return tirx.const(False, "bool")
    return tirx.isnan(cast(value, compute_dtype(dtype_of(value))))  # bfloat16 has no isnan


def is_inf(value: Any) -> Any:
    """Whether the expression is plus or minus infinity."""
    if not is_float(dtype_of(value)):
        return tirx.const(False, "bool")
    infinity = tirx.const(math.inf, dtype_of(value))
    return tirx.any(value >= infinity, value <= -infinity)


def is_true(value: Any) -> Any:
    """Whether the expression is not zero (NaN is not)."""
    dtype = dtype_of(value)
    if dtype == "bool":
        return value
    return not_equal(value, tirx.const(0, dtype))


def negate(condition: Any) -> Any:
    """Logical not of a condition, in a form whose comparison of floats the simplifier does not invert."""
    return tirx.Select(condition, tirx.const(False, "bool"), tirx.const(True, "bool"))


def not_equal(a: Any, b: Any) -> Any:
    """Whether a != b, true where either is NaN."""
    dtype = dtype_of(a)
    if dtype == "bool":
        return tirx.NE(cast(a, "int8"), cast(b, "int8"))
    if not is_float(dtype):
        return tirx.NE(a, b)
    return tirx.any(a < b, b < a, is_nan(a), is_nan(b))


def maximum(a: Any, b: Any) -> Any:
    """The larger of two expressions, NaN if either is."""
    if dtype_of(a) == "bool":
        return tirx.any(a, b)
    if not is_float(dtype_of(a)):
        return tirx.max(a, b)
    if isinstance(b, tirx.FloatImm) and not math.isnan(b.value):
        return tirx.Select(a < b, b, a)  # one maxps: it yields its second operand when unordered
    return tirx.Select(tirx.any(b < a, is_nan(a)), a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two expressions, NaN if either is."""
    if dtype_of(a) == "bool":
        return tirx.all(a, b)
    if not is_float(dtype_of(a)):
        return tirx.min(a, b)
    if isinstance(b, tirx.FloatImm) and not math.isnan(b.value):
        return tirx.Select(b < a, b, a)
    return tirx.Select(tirx.any(a < b, is_nan(a)), a, b)


def add(a: Any, b: Any) -> Any:
    """a + b: 32-bit integers wrap, and zero added to -0.0 is 0.0, where the simplifier would leave it out."""
    dtype = dtype_of(a)
    if dtype == "int32":
        return wrapping.add(a, b)
    return _kept_zero(a) + _kept_zero(b)


def subtract(a: Any, b: Any) -> Any:
    """a - b, of floats as a sum: TVM's simplifier takes (a + b) - b for a, and a - a for 0, whatever was rounded.

    Machine code has one subtraction again: LLVM knows that a product with -1 is exact.
    """
    dtype = dtype_of(a)
    if dtype == "int32":
        return wrapping.subtract(a, b)
    return add(a, b * tirx.const(-1.0, dtype)) if is_float(dtype) else a - b


def negative(a: Any) -> Any:
    """-a; the smallest integer is its own."""
    return -a if is_float(dtype_of(a)) else subtract(tirx.const(0, dtype_of(a)), a)


def multiply(a: Any, b: Any) -> Any:
    """a * b, also where `b` is the constant zero and `a` infinite or NaN; 32-bit integers wrap."""
    dtype = dtype_of(a)
    if dtype == "int32":
        return wrapping.multiply(a, b)
    if isinstance(b, tirx.FloatImm) and b.value == 0:
        # TVM would make a zero of it, which loses NaN and the sign.
        if math.copysign(1, b.value) < 0:
            a, b = a * tirx.const(-1.0, dtype), tirx.const(0.0, dtype)
        return a * _kept_zero(b)
    return a * b


def _kept_zero(value: Any) -> Any:
    """A constant 0.0 in a form that only LLVM knows, which adds it; any other value as it is."""
    if isinstance(value, tirx.FloatImm) and value.value == 0 and math.copysign(1, value.value) > 0:
        dtype = dtype_of(value)
        return tirx.call_intrin(dtype, "tirx.fabs", tirx.const(-0.0, dtype))
    return value


def equal(a: Any, b: Any) -> Any:
    """Whether a == b, False where either is NaN: the simplifier takes a == a for True."""
    return tirx.all(a <= b, b <= a) if is_float(dtype_of(a)) else a.equal(b)


def divide(a: Any, b: Any) -> Any:
    """a / b for floats, also where `b` is the constant zero (which TVM refuses to fold)."""
    if isinstance(b, tirx.FloatImm) and b.value == 0:
        return a * tirx.const(math.copysign(math.inf, b.value), dtype_of(a))
    return a / b


def libm(name: str, *args: Any) -> Any:
    """A call of C's mathematical library, `name` being the double version; computed in float32 or float64."""
    dtype = dtype_of(args[0])
    assert dtype in ("float32", "float64"), dtype
    return tirx.call_pure_extern(dtype, name + ("f" if dtype == "float32" else ""), *args)


def read(operand: Any, index: Sequence[Any]) -> Any:
    """The element of `operand` at `index` of a tensor it broadcasts to; a number is returned as it is."""
    if not isinstance(operand, te.Tensor):
        return operand
    offset = len(index) - len(operand.shape)
    return operand(*(_position(extent, index[offset + d]) for d, extent in enumerate(operand.shape)))


def _position(extent: Any, index: Any) -> Any:
    return tirx.const(0, dtype_of(index)) if isinstance(extent, tirx.IntImm) and extent.value == 1 else index


def result_type(*operands: Any) -> str:
    """The dtype torch promotes tensors and numbers to; tensors with dimensions go before those without."""
    levels: list[torch.dtype | None] = [None, None, None]
    for operand in operands:
        if operand is None:
            continue
        tensor = isinstance(operand, te.Tensor)
        level = (0 if operand.ndim else 1) if tensor else 2
        dtype = torch_dtype(dtype_of(operand)) if tensor else torch.tensor(operand).dtype
        known = levels[level]
        levels[level] = dtype if known is None else torch.promote_types(known, dtype)
    result = _dominant(levels[0], _dominant(levels[1], levels[2]))
    assert result is not None
    return str(result).removeprefix("torch.")


def _dominant(higher: torch.dtype | None, lower: torch.dtype | None) -> torch.dtype | None:
    """The lower level counts only where it is of a higher kind: bool < integer < float."""
    if higher is None or lower is None:
        return lower if higher is None else higher
    if not higher.is_floating_point and (higher == torch.bool or lower.is_floating_point):
        return torch.promote_types(higher, lower)
    return higher


def pointwise(out: Out, function: Callable[..., Any], *operands: Any, dtype: str | None = None) -> te.Tensor:
    """The tensor of `function` of the operands' elements, cast to `dtype` (default: as torch computes)."""
    working = dtype or compute_dtype(out.dtype)

    def element(*index: Any) -> Any:
        return cast(function(*(cast(read(operand, index), working) for operand in operands)), out.dtype)

    return te.compute(out.shape, element, name="pointwise")


def copy(out: Out, operand: te.Tensor) -> te.Tensor:
    """`operand` broadcast to the shape and cast to the dtype of `out`."""
    return te.compute(out.shape, lambda *index: cast(read(operand, index), out.dtype), name="copy")


def filled(out: Out, value: Scalar) -> te.Tensor:
    """A tensor of one value."""
    if (
        out.dtype == "bfloat16" and 0 not in out.shape
    ):  # stored element by element: TVM cannot store a vector of one bfloat16 constant
        return loop_nest([out], [], lambda _, outs: _fill(outs[0], constant(value, out.dtype)), "full")[0]
    return te.compute(out.shape, lambda *_: constant(value, out.dtype), name="full")


def _fill(target: Elements, value: Any) -> None:
    with grid(target.shape or (1,), parallel=True) as index:
        target[index if target.shape else ()] = value
