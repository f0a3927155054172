"""Programs: sizes, and what `check` refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from aot_programs import buffer, program, two_kernels

from graphwright.backends.aot.program import Buffer, Step, check, item_bytes

DTYPES = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn"]
DTYPES += ["int8", "int16", "int32", "int64", "uint8", "bool"]


@pytest.mark.parametrize(
    "dtype",
    [
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
        "float8_e4m3fn",
    ],
)
def test_item_bytes_are_torchs(dtype: str) -> None:
    assert item_bytes(dtype) == getattr(torch, dtype).itemsize


@pytest.mark.parametrize(("shape", "nbytes"), [((), 4), ((0, 3), 0), ((2, 3), 24)])
def test_nbytes(shape: tuple[int, ...], nbytes: int) -> None:
    assert Buffer("b", shape, "float32", "input").nbytes == nbytes


def test_a_good_program_passes() -> None:
    check(two_kernels())


def test_the_root_of_an_alias_of_an_alias() -> None:
    buffers = [buffer("a", "input"), buffer("b", "temporary", alias="a"), buffer("c", "temporary", alias="b")]
    assert program({}, buffers, [], ["c"]).root("c") == "a"


GOOD = two_kernels()


def with_buffer(made: Buffer):
    return dataclasses.replace(GOOD, buffers={**GOOD.buffers, made.name: made})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (dataclasses.replace(GOOD, outputs=("z",)), "output z is no buffer"),
        (dataclasses.replace(GOOD, inputs=()), "input x is not among"),
        (dataclasses.replace(GOOD, inputs=("x", "x")), "listed twice"),
        (dataclasses.replace(GOOD, weights={}), "weight w is not among"),
        (dataclasses.replace(GOOD, kernels={}), "no such kernel"),
        (dataclasses.replace(GOOD, steps=GOOD.steps[:1]), "nothing writes y"),
        (dataclasses.replace(GOOD, steps=(Step("matmul", ("x", "w")),)), "2 operands for 3 parameters"),
        (dataclasses.replace(GOOD, steps=(Step("matmul", ("x", "w", "q")),)), "operand q is no buffer"),
        (dataclasses.replace(GOOD, steps=(Step(None, ("x", "w", "t")),)), "takes two operands"),
        (dataclasses.replace(GOOD, steps=(Step(None, ("t", "w")),)), "writes to weight w"),
        (dataclasses.replace(GOOD, steps=(Step(None, ("w", "x")),)), "writes to input x"),
        (with_buffer(buffer("t", "temporary", (3,))), "alias of t of 12"),
        (with_buffer(Buffer("t", (64, 64), "float64", "temporary")), "alias of t of 32768"),
        (with_buffer(buffer("u", "temporary", alias="v")), "v, which does not exist"),
        (with_buffer(buffer("t", "temporary", alias="u")), "alias of itself"),
        (with_buffer(buffer("x", "input", (-1, 3))), "has shape"),
        (with_buffer(buffer("x", "input", (5,))), "20 bytes, parameter x 16384"),
    ],
)
def test_a_bad_program_is_named(bad: object, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check(bad)  # type: ignore[arg-type]
