"""Accuracy of the elementary functions over the float32 bit patterns, against PyTorch's float64.

Every 4099th pattern and a fine grid around 0; benchmarks/vector_math_grid.py takes all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from tvm import te, tirx

from graphwright.backends.cpu.expand_math import expand_math
from graphwright.backends.kernels import vector_math
from graphwright.backends.kernels.epilogue import apply_activation, is_heavy
from graphwright.hwdb import Hardware, detect

STEP = 4099
SMALLEST_NORMAL = 2.0**-126
SQRT_HALF = math.sqrt(0.5)


@dataclasses.dataclass(frozen=True)
class Bound:
    """An exact function and how far ours may be from it."""

    exact: Callable[[torch.Tensor], torch.Tensor]
    ulp: float
    flushed: float = 0.0  # results below this may be anything between 0 and it
    domain: tuple[float, float] = (-math.inf, math.inf)


# The ulp are the largest seen over every 17th float (docs/measurements/vector_math.json), rounded up.
BOUNDS = {
    "exp": Bound(torch.exp, 1.05),
    "exp_nonpositive": Bound(torch.exp, 1.05, SMALLEST_NORMAL, (-math.inf, 0.0)),
    "expm1": Bound(torch.expm1, 1.5),
    "log": Bound(torch.log, 0.9),
    "log1p": Bound(torch.log1p, 1.5),
    "tanh": Bound(torch.tanh, 2.6),
    "sigmoid": Bound(torch.sigmoid, 2.5, SMALLEST_NORMAL),
    "erf": Bound(torch.erf, 1.3),
    "rsqrt": Bound(torch.rsqrt, 1.5),
    "one_plus_erf": Bound(lambda x: torch.special.erfc(-x), 5.0, domain=(-0.7, math.inf)),
    "gelu": Bound(lambda x: x * 0.5 * torch.special.erfc(-x * SQRT_HALF), 6.0, domain=(-1.0, math.inf)),
    "silu": Bound(lambda x: x * torch.sigmoid(x), 2.5, domain=(-80.0, math.inf)),
    "gelu_tanh": Bound(
        lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)), 4.0, domain=(-1.0, math.inf)
    ),
}


def elementwise(function: Callable[[Any], Any], count: int, lanes: int) -> Any:
    """The PrimFunc out[i] = function(in[i]), by vectors of `lanes`."""
    source = tirx.decl_buffer((count,), "float32", "source")
    target = tirx.decl_buffer((count,), "float32", "target")
    i = tirx.Var("i", "int32")
    at = i if lanes == 1 else tirx.Ramp(i * lanes, 1, lanes)
    store = tirx.BufferStore(target, function(tirx.BufferLoad(source, [at])), [at])
    body = tirx.For(i, 0, count // lanes, tirx.ForKind.SERIAL, store)
    return tirx.PrimFunc([source, target], body).with_attr({"tirx.noalias": True, "global_symbol": "main"})


@functools.cache
def native() -> Hardware:
    return detect()


@functools.lru_cache(maxsize=2)
def compiled(function: Callable[[Any], Any], count: int, lanes: int) -> Any:
    func = elementwise(function, count, lanes)
    return tvm.compile(tvm.IRModule({"main": func}), target=tvm.target.Target(native().tvm_target()))["main"]


def run(function: Callable[[Any], Any], values: np.ndarray, lanes: int | None = None) -> np.ndarray:
    """`function` of every value, computed by machine code for this machine."""
    lanes = lanes or native().lanes("float32")
    padded = np.concatenate([values, np.zeros(-len(values) % lanes, np.float32)])
    main = compiled(function, len(padded), lanes)
    result = tvm.runtime.empty(padded.shape, "float32")
    main(tvm.runtime.tensor(padded), result)
    return result.numpy()[: len(values)]


def patterns(step: int) -> np.ndarray:
    """Every step-th float32, the special ones, and a grid over [-20, 20]."""
    bits = np.arange(0, 1 << 32, step, dtype=np.uint64).astype(np.uint32)
    special = [0, 1, 1 << 31, (1 << 31) + 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF]
    special += [0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC00000, 0x3F800000, 0xBF800000]
    grid = np.linspace(-20, 20, 200001).astype(np.float32).view(np.uint32)
    return np.concatenate([bits, np.array(special, np.uint32), grid]).view(np.float32)


def worst(bound: Bound, values: np.ndarray, ours: np.ndarray) -> float:
    """The largest error in ulp; asserts that NaN, infinities and signs are right."""
    exact = bound.exact(torch.from_numpy(values).double()).numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = exact.astype(np.float32)
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(exact))
        infinite = np.isinf(ours) != np.isinf(rounded)
        assert not infinite.any(), (values[infinite][:3], ours[infinite][:3], exact[infinite][:3])
        finite = np.isfinite(exact) & np.isfinite(rounded)
        sign = finite & (exact != 0) & (ours != 0) & (np.signbit(ours) != np.signbit(exact))
        assert not sign.any(), (values[sign][:3], ours[sign][:3])
        ulp = np.spacing(np.maximum(np.abs(rounded[finite]), np.float32(SMALLEST_NORMAL))).astype(np.float64)
        error = np.abs(ours[finite].astype(np.float64) - exact[finite])
        error[np.abs(exact[finite]) < bound.flushed] -= bound.flushed
    return float((error / ulp).max(initial=0.0))


def inside(bound: Bound, values: np.ndarray) -> np.ndarray:
    """The values of the domain, and NaN."""
    low, high = bound.domain
    with np.errstate(invalid="ignore"):
        return values[~(values < low) & ~(values > high)]


@pytest.mark.parametrize("name", BOUNDS)
def test_every_4099th_float_is_within_the_bound(name: str) -> None:
    bound = BOUNDS[name]
    values = inside(bound, patterns(STEP))
    error = worst(bound, values, run(vector_math.INTRINSICS[name], values))
    assert error <= bound.ulp, f"{name}: {error:.3f} ulp"


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "gelu"])
def test_scalars_and_wide_vectors_give_the_same_bits(name: str) -> None:
    values = inside(BOUNDS[name], patterns(STEP * 101))
    function = vector_math.INTRINSICS[name]
    wide = run(function, values, 16)
    np.testing.assert_array_equal(wide.view(np.int32), run(function, values, 1).view(np.int32))


def test_overflow_and_gradual_underflow_of_exp() -> None:
    values = np.array([88.7228, 88.723, 89.0, 1e30, -87.5, -100.0, -103.9, -104.0, -1e30, -np.inf], np.float32)
    ours = run(vector_math.exp, values)
    assert np.isfinite(ours[0])
    assert np.all(np.isinf(ours[1:4]))
    assert np.all(ours[7:] == 0)
    assert np.all(ours[4:7] > 0)
    assert ours[5] < SMALLEST_NORMAL


# The argument of the exponential is rounded: what the result loses grows with that argument.
@pytest.mark.parametrize(
    ("name", "low", "high", "relative"),
    [
        *(("gelu", -3, -1, 1e-6), ("gelu", -5, -3, 2e-6), ("gelu", -8, -5, 5e-6), ("gelu", -13, -8, 6e-5)),
        *(("gelu_tanh", -3, -1, 2e-6), ("gelu_tanh", -5, -3, 4e-6), ("gelu_tanh", -8, -5, 1e-5)),
    ],
)
def test_the_negative_tail_of_gelu_does_not_cancel(name: str, low: float, high: float, relative: float) -> None:
    values = np.linspace(low, high, 100001).astype(np.float32)
    exact = BOUNDS[name].exact(torch.from_numpy(values).double()).numpy()
    normal = np.abs(exact) > 20 * SMALLEST_NORMAL
    ours = run(vector_math.INTRINSICS[name], values)
    np.testing.assert_allclose(ours[normal], exact[normal], rtol=relative)
    assert np.all(ours[~normal] <= 0)


ACTIVATIONS: dict[str, tuple[tuple[float, ...], Callable[[torch.Tensor], torch.Tensor]]] = {
    "none": ((), lambda x: x),
    "relu": ((), torch.relu),
    "relu6": ((), torch.nn.functional.relu6),
    "silu": ((), torch.nn.functional.silu),
    "gelu": ((), torch.nn.functional.gelu),
    "gelu_tanh": ((), lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    "hardswish": ((), torch.nn.functional.hardswish),
    "hardsigmoid": ((), torch.nn.functional.hardsigmoid),
    "sigmoid": ((), torch.sigmoid),
    "tanh": ((), torch.tanh),
    "clamp": ((-0.5, 2.0), lambda x: torch.clamp(x, -0.5, 2.0)),
    "leaky_relu": ((0.1,), lambda x: torch.nn.functional.leaky_relu(x, 0.1)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_torch(name: str) -> None:
    args, reference = ACTIVATIONS[name]
    special = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, -1e-40, 3e38, -3e38, 3.0, -3.0, 6.0]
    values = np.concatenate([np.array(special), np.linspace(-12, 12, 9999)]).astype(np.float32)
    ours = torch.from_numpy(run(lambda x: apply_activation(x, name, args), values).copy())
    exact = reference(torch.from_numpy(values).double()).float()
    if is_heavy(name):
        # torch's float64 GELU cancels at 1e-16.
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-15, equal_nan=True)
    else:  # one rounding of the constant 1/6, one of the product
        torch.testing.assert_close(ours, exact, rtol=2.4e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_floats_are_computed_in_float32(dtype: str) -> None:
    x = torch.linspace(-3, 3, 64).to(getattr(torch, dtype))
    source = te.placeholder((64,), dtype, "source")
    func = te.create_prim_func([source, te.compute((64,), lambda i: tirx.exp(source[i]), "target")])
    expanded = expand_math(func)
    assert "float32" in expanded.script()
    main = tvm.compile(expanded.with_attr("global_symbol", "main"), target="llvm")["main"]
    out = torch.zeros_like(x)
    main(tvm.runtime.from_dlpack(x), tvm.runtime.from_dlpack(out))
    torch.testing.assert_close(out, torch.exp(x.float()).to(x.dtype), rtol=0, atol=0)


def _calls(func: Any) -> Iterator[str]:
    for line in func.script().splitlines():
        for name in ("graphwright.exp", "graphwright.one_plus_erf", "T.exp", "T.erf", "T.sqrt", "T.pow"):
            if f"{name}(" in line:
                yield name


def test_expansion_replaces_what_it_knows_and_nothing_else() -> None:
    def function(dtype: str, formula: Callable[[Any], Any]) -> Any:
        source = te.placeholder((8,), dtype, "source")
        return te.create_prim_func([source, te.compute((8,), lambda i: formula(source[i]), "target")])

    one = tirx.const(1.0, "float32")
    assert list(_calls(expand_math(function("float32", tirx.exp)))) == ["graphwright.exp"]
    assert list(_calls(expand_math(function("float32", lambda x: tirx.erf(x) + one)))) == ["graphwright.one_plus_erf"]
    for formula in (tirx.sqrt, lambda x: tirx.pow(x, x)):
        func = function("float32", formula)
        assert expand_math(func).same_as(func)
    func = function("float64", tirx.exp)
    assert expand_math(func).same_as(func)
    both = expand_math(tvm.IRModule({"main": function("float32", tirx.exp)}))
    assert list(_calls(both["main"])) == ["graphwright.exp"]
