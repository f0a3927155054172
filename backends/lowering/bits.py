"""Bitwise logic and shifts of integers; on booleans the logic is that of truth values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from tvm import te, tirx

from . import expressions as ex
from .expressions import pointwise
from .registry import Out, lowers

aten = torch.ops.aten


def _bitwise(on_integers: Callable[..., Any], on_bools: Callable[..., Any], out: Out, *operands: Any) -> te.Tensor:
    return pointwise(out, on_bools if out.dtype == "bool" else on_integers, *operands, dtype=out.dtype)


BITWISE: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "bitwise_and": (tirx.bitwise_and, tirx.all),
    "bitwise_or": (tirx.bitwise_or, tirx.any),
    "bitwise_xor": (tirx.bitwise_xor, ex.not_equal),
}
for _name, _functions in BITWISE.items():
    _packet = getattr(aten, _name)
    lowers(_packet.Tensor, _packet.Scalar, _packet.Scalar_Tensor)(functools.partial(_bitwise, *_functions))
lowers(aten.bitwise_not.default)(functools.partial(_bitwise, tirx.bitwise_not, ex.negate))


def _shift(shift: Callable[..., Any], beyond: Callable[..., Any], out: Out, x: Any, by: Any) -> te.Tensor:
    """Shifts of more bits than there are (or fewer than 0) are defined by torch, not by the machine."""
    width = ex.bits(out.dtype)

    def shifted(value: Any, count: Any) -> Any:
        inside = tirx.all(count >= tirx.const(0, out.dtype), count < tirx.const(width, out.dtype))
        safe = tirx.Select(inside, count, tirx.const(0, out.dtype))
        return tirx.Select(inside, shift(value, safe), beyond(value))

    return pointwise(out, shifted, x, by, dtype=out.dtype)


def _sign_fill(value: Any) -> Any:
    zero = tirx.const(0, ex.dtype_of(value))
    if ex.dtype_of(value) == "uint8":
        return zero
    return tirx.Select(value < zero, zero - tirx.const(1, ex.dtype_of(value)), zero)


def _nothing(value: Any) -> Any:
    return tirx.const(0, ex.dtype_of(value))


lowers(
    aten.bitwise_left_shift.Tensor,
    aten.bitwise_left_shift.Tensor_Scalar,
    aten.bitwise_left_shift.Scalar_Tensor,
    aten.__lshift__.Tensor,
    aten.__lshift__.Scalar,
)(functools.partial(_shift, tirx.shift_left, _nothing))
lowers(
    aten.bitwise_right_shift.Tensor,
    aten.bitwise_right_shift.Tensor_Scalar,
    aten.bitwise_right_shift.Scalar_Tensor,
    aten.__rshift__.Tensor,
    aten.__rshift__.Scalar,
)(functools.partial(_shift, tirx.shift_right, _sign_fill))
