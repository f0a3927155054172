"""Tensors made from numbers alone: constants, ranges, identity and triangle masks."""

from __future__ import annotations

from typing import Any

import torch
from tvm import te, tirx

from . import expressions as ex
from .expressions import Scalar
from .registry import Out, lowers

aten = torch.ops.aten
prims = torch.ops.prims


@lowers(aten.full.default, aten.full_like.default, aten.new_full.default)
def full(out: Out, _: Any, value: Scalar, **__: Any) -> te.Tensor:
    return ex.filled(out, value)


@lowers(aten.scalar_tensor.default)
def scalar_tensor(out: Out, value: Scalar, **_: Any) -> te.Tensor:
    return ex.filled(out, value)


@lowers(
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
    # Memory whose content nobody may rely on: zeros are as good as any and make results repeatable.
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_permuted.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)
def zeros(out: Out, *_: Any, **__: Any) -> te.Tensor:
    return ex.filled(out, 0)


@lowers(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def ones(out: Out, *_: Any, **__: Any) -> te.Tensor:
    return ex.filled(out, 1)


def _range(out: Out, start: Scalar, step: Scalar) -> te.Tensor:
    # torch computes start + step * i in double for floats (rounding once) and in int64 for integers.
    working = "float64" if ex.is_float(out.dtype) else "int64"

    def element(i: Any) -> Any:
        value = ex.constant(start, working) + ex.cast(i, working) * ex.constant(step, working)
        return ex.cast(value, out.dtype)

    return te.compute(out.shape, element, name="arange")


@lowers(aten.arange.default)
def arange(out: Out, end: Scalar, **_: Any) -> te.Tensor:
    return _range(out, 0, 1)


@lowers(aten.arange.start)
def arange_start(out: Out, start: Scalar, end: Scalar, **_: Any) -> te.Tensor:
    return _range(out, start, 1)


@lowers(aten.arange.start_step)
def arange_start_step(out: Out, start: Scalar, end: Scalar, step: Scalar = 1, **_: Any) -> te.Tensor:
    return _range(out, start, step)


@lowers(prims.iota.default)
def iota(out: Out, length: int, *, start: int, step: int, **_: Any) -> te.Tensor:
    return _range(out, start, step)


@lowers(aten.eye.default, aten.eye.m)
def eye(out: Out, *_: Any, **__: Any) -> te.Tensor:
    return te.compute(out.shape, lambda i, j: ex.cast(i.equal(j), out.dtype), name="eye")


def _triangle(lower: bool, out: Out, x: te.Tensor, diagonal: int) -> te.Tensor:
    def element(*index: Any) -> Any:
        i, j = index[-2:]
        inside = j - i <= diagonal if lower else j - i >= diagonal
        return tirx.Select(inside, x(*index), ex.constant(0, out.dtype))

    return te.compute(out.shape, element, name="triangle")


@lowers(aten.tril.default)
def tril(out: Out, x: te.Tensor, diagonal: int = 0) -> te.Tensor:
    return _triangle(True, out, x, diagonal)


@lowers(aten.triu.default)
def triu(out: Out, x: te.Tensor, diagonal: int = 0) -> te.Tensor:
    return _triangle(False, out, x, diagonal)
