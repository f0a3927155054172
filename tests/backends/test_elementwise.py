"""Elementwise definitions against PyTorch: special values, dtypes, promotion, broadcasting, numbers as operands."""

from __future__ import annotations

import math

import pytest
import torch
import tvm_ffi
from lowering_harness import Checks, check, check_refused
from tvm import tirx

import graphwright
from graphwright.backends.lowering import expressions as ex
from graphwright.backends.lowering.elementwise import COMPARISONS
from graphwright.backends.lowering.registry import LOWERINGS
from graphwright.backends.lowering.unary import REAL_FUNCTIONS, ROUNDINGS

aten = torch.ops.aten

NASTY = torch.tensor(
    [0.0, -0.0, 1, -1, 0.5, -0.5, 2.5, -2.5, 3.5, 1e-8, -1e-8, 1e30, -1e30, math.inf, -math.inf, math.nan, 7, -7.3]
)
INTEGERS = torch.arange(-10, 10)
TRUTHS = torch.tensor([True, False, True, True])


def values(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.cat([NASTY, 3 * torch.randn(13, generator=generator)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functions_of_one_element(dtype: torch.dtype) -> None:
    checks = Checks()
    x = values(dtype)
    for op in (*REAL_FUNCTIONS, *ROUNDINGS):
        checks.add(op, x)
    for op in (aten.neg, aten.abs, aten.sign, aten.signbit, aten.isnan, aten.isinf, aten.relu, aten.nan_to_num):
        checks.add(op.default, x)
    for op in (aten.isfinite, aten.isposinf, aten.isneginf, aten.logical_not, aten.frac):
        checks.add(op.default, x)
    checks.run()


def test_functions_of_integers_and_of_no_dimension() -> None:
    checks = Checks()
    for op in (aten.exp, aten.sqrt, aten.sigmoid, aten.reciprocal, aten.floor, aten.neg, aten.abs, aten.sign):
        checks.add(op.default, INTEGERS)
        checks.add(op.default, torch.tensor(0.3))
        checks.add(op.default, torch.zeros(0, 3))
    checks.add(aten.abs.default, torch.tensor([1, 255], dtype=torch.uint8))
    checks.add(aten.neg.default, torch.tensor([1, 255], dtype=torch.uint8))
    for decimals in (0, 3, -1):
        checks.add(aten.round.decimals, 100 * values(torch.float32)[18:], decimals=decimals)
    checks.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_functions_of_two_elements(dtype: torch.dtype) -> None:
    checks = Checks()
    a, b = values(dtype)[:, None], NASTY[None].to(dtype)
    for op in (aten.add, aten.sub, aten.mul, aten.div, aten.remainder, aten.fmod, aten.copysign):
        checks.add(op.Tensor, a, b)
    for op in (aten.maximum, aten.minimum, aten.fmax, aten.fmin, aten.floor_divide, aten.atan2):
        checks.add(op.default, a, b)
    for name in COMPARISONS:
        checks.add(getattr(aten, name).Tensor, a, b)
    checks.add(aten.pow.Tensor_Tensor, a, b)
    checks.add(aten.xlogy.Tensor, a, b)
    checks.add(aten.heaviside.default, a, b)
    if dtype != torch.bfloat16:
        checks.add(aten.logaddexp.default, a, b)
        checks.add(aten.nextafter.default, a, b)
        checks.add(aten.hypot.default, a, b)
    checks.run()


@pytest.mark.parametrize("number", [0, -1, 2, 0.1, math.nan, math.inf], ids=str)
def test_numbers_as_operands(number: float) -> None:
    checks = Checks()
    for x in (values(torch.float32), values(torch.bfloat16)):
        for op in (aten.add, aten.sub, aten.mul, aten.div):
            checks.add(op.Tensor, x, number)
        for name in (*COMPARISONS, "remainder", "fmod"):
            checks.add(getattr(aten, name).Scalar, x, number)
    checks.add(aten.pow.Tensor_Scalar, values(torch.float32), number)
    checks.add(aten.pow.Scalar, number, values(torch.float32))
    checks.run()


def test_integers_divide_by_constants_only() -> None:
    checks = Checks()
    for divisor in (3, -3, -1):
        for mode in ("floor", "trunc"):
            checks.add(aten.div.Tensor_mode, INTEGERS, divisor, rounding_mode=mode)
            checks.add(aten.div.Tensor_mode, values(torch.float32), divisor, rounding_mode=mode)
        checks.add(aten.remainder.Scalar, INTEGERS, divisor)
        checks.add(aten.fmod.Scalar, INTEGERS, divisor)
        checks.add(aten.floor_divide.default, INTEGERS, divisor)
    checks.run()
    for op in (aten.floor_divide.default, aten.remainder.Tensor, aten.fmod.Tensor):
        check_refused(op, INTEGERS, INTEGERS.abs() + 1, because="a zero must raise")
    check_refused(
        aten.div.Tensor_mode, INTEGERS, INTEGERS.abs() + 1, rounding_mode="floor", because="a zero must raise"
    )


def test_integer_powers() -> None:
    checks = Checks()
    for exponent in (0, 1, 2, 3, 5, 9):
        checks.add(aten.pow.Tensor_Scalar, INTEGERS, exponent)
    checks.run()
    check_refused(aten.pow.Tensor_Tensor, INTEGERS, INTEGERS.abs(), because="not a constant")


def test_promotion_and_wrapping() -> None:
    checks = Checks()
    for op in (aten.add.Tensor, aten.mul.Tensor):
        checks.add(op, TRUTHS, ~TRUTHS)
        checks.add(op, TRUTHS, INTEGERS[:4])
        checks.add(op, TRUTHS, 2.5)
        checks.add(op, INTEGERS.int(), 2**40)
    checks.add(aten.add.Tensor, INTEGERS, INTEGERS, alpha=3)
    checks.add(aten.sub.Tensor, NASTY, 2, alpha=0.5)
    checks.add(aten.rsub.Scalar, NASTY, 2)
    for name in COMPARISONS:
        packet = getattr(aten, name)
        checks.add(packet.Tensor, TRUTHS, ~TRUTHS)
        checks.add(packet.Scalar, INTEGERS, 2.5)
        checks.add(packet.Tensor, INTEGERS, torch.tensor(2.5, dtype=torch.float64))
    checks.run()


def test_integers_wrap_whatever_the_simplifier_thinks_of_them() -> None:
    dtype = torch.int32
    info = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(0)
    edges = [info.max, info.min, -1, 0, 1, info.max - 1, info.min + 1, 1 << 16, (1 << 31) - 1]
    drawn = torch.randint(info.min // 2, info.max // 2, (16,), generator=generator, dtype=dtype) * 2
    x = torch.cat([torch.tensor(edges, dtype=dtype), drawn])
    y = torch.cat([torch.tensor(edges[::-1], dtype=dtype), drawn.flip(0) + 1])

    def model(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        zeros = torch.zeros_like(x)
        return (
            *((x + 1) > x, (x * 2) // 2, (x - y) < x, x * x >= 0, x.abs() >= 0, (x + x) % 2, (x + y) - y),
            *(x + y, x - y, x * y, -x, x.abs(), x**3, 5 - x, x // -1, torch.add(x, y, alpha=3)),
            *(torch.addcmul(x, x, y), (x * 3) >> 1, (x + 1).long(), (x + 1).double(), (zeros + 0) * zeros),
            *(x.sum(), x.cumsum(0), x @ y),
        )

    compiled = graphwright.compile(model, (x, y), verify=False, cache=False)
    assert not compiled.report().eager
    for result, expected in zip(compiled(x, y), model(x, y), strict=True):
        assert torch.equal(result, expected)
        assert result.dtype == expected.dtype


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_chains_of_integers_stay_linear(dtype: str) -> None:
    """A dozen operators, each of which used its operands several times, took minutes and gigabytes to compile."""
    x = chain = tirx.Var("x", dtype)
    for number in range(20):
        chain = (ex.add, ex.multiply, ex.subtract)[number % 3](chain, x)
    used: list[object] = []
    tvm_ffi.structural_walk(chain, ((tirx.Var,), used.append))
    assert len(used) == 21


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_zero_added_to_minus_zero_is_zero(dtype: torch.dtype) -> None:
    x, zeros = torch.tensor([-0.0, 0.0, 1.0, math.inf, math.nan], dtype=dtype), torch.zeros(5, dtype=dtype)

    def model(x: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x + 0.0, 0.0 + x, x - 0.0, 0.0 - x, x - (-0.0), x + (-0.0), torch.add(x, zeros, alpha=0.0), x + zeros

    compiled = graphwright.compile(model, (x, zeros), verify=False, cache=False)
    for result, expected in zip(compiled(x, zeros), model(x, zeros), strict=True):
        assert torch.equal(result.nan_to_num(7), expected.nan_to_num(7))
        assert torch.equal(result.signbit(), expected.signbit())


def test_bits() -> None:
    checks = Checks()
    counts = torch.tensor([0, 1, 31, 32, 33, 63, 64, -1])
    for op in (aten.bitwise_and, aten.bitwise_or, aten.bitwise_xor):
        checks.add(op.Tensor, TRUTHS, ~TRUTHS)
        checks.add(op.Scalar, INTEGERS, 6)
        checks.add(op.Tensor, INTEGERS.int(), INTEGERS.int())
    for op in (aten.bitwise_left_shift, aten.bitwise_right_shift):
        checks.add(op.Tensor_Scalar, INTEGERS, 3)
        for dtype in (torch.int64, torch.int32, torch.uint8):
            checks.add(op.Tensor, (counts - 5).to(dtype), counts.to(dtype))
    checks.add(aten.bitwise_not.default, INTEGERS)
    checks.add(aten.bitwise_not.default, TRUTHS)
    for op in (aten.logical_and, aten.logical_or, aten.logical_xor):
        checks.add(op.default, NASTY, NASTY.flip(0))
        checks.add(op.default, INTEGERS, INTEGERS.flip(0))
    checks.run()


def test_choices() -> None:
    checks = Checks()
    x = values(torch.float32)
    checks.add(aten.clamp.default, x, -1, 1)
    checks.add(aten.clamp.default, x, math.nan, 1.0)
    checks.add(aten.clamp.default, INTEGERS, -2.5, 3)
    checks.add(aten.clamp.default, x, None, 1)
    checks.add(aten.clamp.Tensor, x[:, None], NASTY[None], None)
    checks.add(aten.where.self, x > 0, x, torch.tensor(0.0))
    checks.add(aten.where.self, x > 0, torch.tensor(1), torch.tensor(0.0))
    checks.add(aten.masked_fill.Scalar, x, x > 0, -math.inf)
    for weight in (0.3, 0.7):
        checks.add(aten.lerp.Scalar, x, x.flip(0), weight)
    checks.add(aten.addcmul.default, x, x, x, value=0.5)
    checks.add(aten.addcdiv.default, x, x, x.flip(0), value=2)
    checks.run()


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.float16, torch.int64, torch.bool], ids=str)
def test_casts(source: torch.dtype) -> None:
    checks = Checks()
    x = (100 * values(torch.float32)[18:]).to(source)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        checks.add(aten._to_copy.default, x, dtype=dtype)
        if source.is_floating_point:
            checks.add(aten._to_copy.default, NASTY.to(source), dtype=dtype)
    for dtype in (torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        checks.add(aten._to_copy.default, x, dtype=dtype)
    checks.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations(dtype: torch.dtype) -> None:
    checks = Checks()
    x = torch.cat([5 * values(torch.float32)[18:], torch.tensor([math.nan, 0.0, 30.0, -30.0])]).to(dtype)
    for op in (aten.relu, aten.relu6, aten.hardtanh, aten.leaky_relu, aten.silu, aten.gelu, aten.hardsigmoid):
        checks.add(op.default, x)
    for op in (aten.hardswish, aten.elu, aten.celu, aten.selu, aten.softplus, aten.mish):
        checks.add(op.default, x)
    checks.add(aten.gelu.default, x, approximate="tanh")
    checks.add(aten.elu.default, x, 0.5)
    checks.add(aten.softplus.default, x, 2, 3)
    checks.run()


def test_comparisons_survive_fusion_with_not() -> None:
    """TVM's simplifier would turn `not (x < y)` into `y <= x`, which is another answer for NaN."""

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.where(~(x < y), x + 1, ~((x != x) | (x >= y)) * 2.0)

    x, y = NASTY[:, None].expand(-1, 18).contiguous(), NASTY[None].expand(18, -1).contiguous()
    compiled = graphwright.compile(Model(), (x, y), cache=False, verify=False)
    torch.testing.assert_close(compiled(x, y), Model()(x, y), equal_nan=True)


def test_a_wrong_definition_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOWERINGS, aten.mul.Tensor, LOWERINGS[aten.add.Tensor])
    with pytest.raises(AssertionError, match="not close"):
        check(aten.mul.Tensor, NASTY[2:6], 3.0)


ROUNDED = {
    "what is added is taken away": lambda a, b: (a + b) - b,
    "the first is taken away": lambda a, b: (b + a) - b,
    "nothing is left, but of infinities": lambda a, b: a - a,
    "NaN is not itself": lambda a, b: torch.where(a == a, a, b),
    "the error of a sum": lambda a, b: a - ((a + b) - b),
}


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_what_rounds_is_not_simplified(name: str, dtype: torch.dtype) -> None:
    """Identities of real numbers do not hold for floats, and TVM's simplifier knows some of them."""
    a = torch.tensor([9.21, -2.59, 1e-3, 0.0, 7e4, math.inf, -math.inf, math.nan], dtype=dtype)
    b = 1.5 / torch.finfo(dtype).eps * torch.tensor([1, 1, 1, 1, 1, 0, 1, 1])  # adding it rounds to whole numbers
    compiled = graphwright.compile(ROUNDED[name], (torch.randn(8).to(dtype), b.to(dtype)), cache=False, verify=False)
    assert compiled.report().kernels
    result, expected = compiled(a, b.to(dtype)), ROUNDED[name](a, b.to(dtype))
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shift", [12582912.0, 0.0, -0.0, 1.0])
def test_numbers_added_and_taken_away(shift: float) -> None:
    x = torch.cat([values(torch.float32), torch.tensor([9.21, -2.59])])
    compiled = graphwright.compile(lambda x: (x + shift) - shift, (torch.randn_like(x),), cache=False, verify=False)
    torch.testing.assert_close(compiled(x), (x + shift) - shift, rtol=0, atol=0, equal_nan=True)
