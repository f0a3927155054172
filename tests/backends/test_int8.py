"""int8 products are exact: bit for bit the integer reference, on AVX2, through VNNI's twin and on the emulator."""

from __future__ import annotations

import dataclasses
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow_harness import TORCH, integers, loops_with, one_core, requantized, run, run_emulated

from graphwright.backends.kernels.bf16_matmul import FloatFinish, bf16_matmul
from graphwright.backends.kernels.conv_plan import Conv
from graphwright.backends.kernels.dot_conv import choose_dot_conv
from graphwright.backends.kernels.dot_product import Dot, choose_dot_tiling, int8_dot, int8_weights
from graphwright.backends.kernels.int8_product import (
    RANGES,
    Requantize,
    Residual,
    has_offsets,
    int8_conv,
    int8_matmul,
    offsets,
    pack_conv,
    pack_matmul,
)
from graphwright.hwdb import Hardware, detect, lookup
from graphwright.passes import dialect

EXTENT = st.one_of(st.integers(1, 20), st.sampled_from([31, 64, 97, 130]))


def machine(kind: str) -> tuple[Hardware, Dot]:
    hw = detect()
    if kind.endswith("512"):
        hw = dataclasses.replace(hw, vector_bits=512, vector_registers=32)
        if kind == "vnni 512":
            return hw, int8_dot(hw, emulated=True)
        # vpmaddwd of 512 bits is AVX-512: the form without intrinsics stands for it here.
        return hw, int8_dot(dataclasses.replace(hw, isa="aarch64"))
    return hw, int8_dot(hw, emulated=kind == "vnni")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(["avx2", "vnni", "vnni 512", "pairs 512"]),
    st.tuples(st.integers(1, 20), EXTENT, EXTENT),
    st.sampled_from(["uint8", "int8"]),
    st.sampled_from(["uint8", "int8", "float32"]),
    st.integers(-128, 255) | st.just(0),
    st.booleans(),
    st.sampled_from([None, "uint8", "int8", "float32"]),
    st.sampled_from([("none", ()), ("relu", ()), ("clamp", (-3.0, 5.5)), ("leaky_relu", (0.1,))]),
)
def test_matmul_bit_for_bit(
    kind: str,
    extents: tuple[int, int, int],
    source: str,
    result: str,
    zero: int,
    has_bias: bool,
    residual: str | None,
    activation: tuple[str, tuple[float, ...]],
) -> None:
    (M, K, N), (hw, dot) = extents, machine(kind)
    zero = max(RANGES[source][0], min(RANGES[source][1], zero))
    a, w = integers(source, M, K), integers("int8", N, K, seed=1)
    scale = torch.rand(N, generator=torch.Generator().manual_seed(2)) * 1e-3 + 1e-5
    added_too = has_offsets(zero, source, dot)
    whole = torch.arange(N, dtype=torch.int32) * 37 - 500 if added_too else torch.zeros(N, dtype=torch.int32)
    bias = torch.linspace(-2, 2, N) if has_bias else None
    added = None
    if residual is not None:
        added = integers(residual, M, N, seed=3) if residual != "float32" else torch.randn(M, N)
    zero_out = 3 if result == "int8" else 110
    kept = Residual(residual, 0.037, 5) if residual else None
    how = Requantize(M, N, result, zero_out if result != "float32" else 0, 9.7, has_bias, kept, *activation,
                     offset=added_too)  # fmt: skip
    tiling = choose_dot_tiling(hw, dot, M, N, K)
    out = torch.zeros(M, N, dtype=TORCH[result])
    extra = [t for t in (bias, added) if t is not None]
    func = int8_matmul(M, K, N, hw, source, how, dot=dot, tiling=tiling)
    constant = [offsets(w, zero, source, dot, whole)] * added_too
    run(func, detect(), a, pack_matmul(w, dot, tiling.columns), *constant, scale, *extra, out)
    sums = (a.int() - zero) @ w.int().t() + whole
    assert torch.equal(out, requantized(sums, scale, bias, added, how))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 9), EXTENT, EXTENT, st.booleans())
def test_weights_alone_in_int8(M: int, K: int, N: int, has_bias: bool) -> None:
    hw = detect()
    dot = int8_weights(hw)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(0))
    w, scale, bias = integers("int8", N, K, seed=1), torch.linspace(1e-3, 1e-2, N), torch.linspace(-1, 1, N)
    tiling = choose_dot_tiling(hw, dot, M, N, K)
    out = torch.full((M, N), float("nan"))
    func = bf16_matmul(M, K, N, hw, FloatFinish(M, N, has_bias, scale=True), dot=dot, tiling=tiling)
    run(func, hw, x, pack_matmul(w, dot, tiling.columns), scale, *[bias] * has_bias, out)
    exact = x.double() @ w.double().t() * scale.double()
    magnitude = x.double().abs() @ w.double().abs().t() * scale.double()
    if has_bias:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    # Any order of float32 sums (Higham, section 4.2), the product with the scale and the bias.
    assert torch.all((out.double() - exact).abs() <= (K + 3) * 2.0**-24 * magnitude + 1e-30)


@st.composite
def problems(draw: st.DrawFn) -> Conv:
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(4))
    height, width = kernel[0] + draw(st.integers(0, 8)), kernel[1] + draw(st.integers(0, 8))
    stride, dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2))), (1, 1)
    channels, filters = draw(st.sampled_from([1, 3, 8, 17, 64])), draw(st.sampled_from([1, 8, 20, 33]))
    return Conv(draw(st.integers(1, 2)), height, width, channels, filters, kernel, stride, padding, dilation)


def conv_sums(conv: Conv, x: torch.Tensor, w: torch.Tensor, zero: int) -> torch.Tensor:
    sizes = (list(conv.stride), list(conv.padding), list(conv.dilation), 1)
    exact = dialect.conv2d((x.int() - zero).double(), w.double(), None, None, *sizes, "none", [], "NHWC")
    return exact.to(torch.int32)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    problems(),
    st.sampled_from(["avx2", "vnni", "vnni 512"]),
    st.sampled_from(["uint8", "int8"]),
    st.integers(-128, 255),
)
def test_convolution_bit_for_bit(conv: Conv, kind: str, source: str, zero: int) -> None:
    hw, dot = machine(kind)
    zero = max(RANGES[source][0], min(RANGES[source][1], zero))
    x, w = integers(source, *conv.input_shape), integers("int8", conv.filters, conv.channels, *conv.kernel, seed=1)
    scale = torch.linspace(1e-4, 1e-3, conv.filters)
    how = Requantize(prod(conv.output_shape[:3]), conv.filters, "uint8", 100, 5.0, output_shape=conv.output_shape)
    plan = choose_dot_conv(conv, dot, hw)
    out = torch.zeros(conv.output_shape, dtype=torch.uint8)
    func = int8_conv(conv, hw, source, how, dot=dot, zero=zero, plan=plan)
    run(func, detect(), x, pack_conv(w, dot, plan), offsets(w, zero, source, dot), scale, out)
    assert torch.equal(out, requantized(conv_sums(conv, x, w, zero), scale, None, None, how))


@pytest.mark.parametrize(
    ("name", "instruction", "register"),
    [("znver4", "vpdpbusd", "zmm"), ("x86-64-v4", "vpmaddwd", "zmm"), ("x86-64-v3", "vpmaddwd", "ymm")],
)
@pytest.mark.parametrize("M", [1, 128])
def test_the_instruction_is_there_and_nothing_spills(name: str, instruction: str, register: str, M: int) -> None:
    hw = lookup(name)
    dot = int8_dot(hw)
    tiling = choose_dot_tiling(hw, dot, M, 512, 512)
    func = int8_matmul(M, 512, 512, hw, "uint8", Requantize(M, 512, "uint8"), dot=dot, tiling=tiling)
    loops = loops_with(func, hw, instruction)
    assert loops
    assert all(loop.spills == 0 and register in loop.text for loop in loops)


@pytest.mark.parametrize(
    ("name", "source"), [("sapphirerapids", "uint8"), ("sapphirerapids", "int8"), ("x86-64-v4", "int8")]
)
def test_on_the_emulated_processor(name: str, source: str, tmp_path: Path) -> None:
    """vpdpbusd, and vpmaddwd of 512 bits."""
    hw = one_core(lookup(name))
    dot = int8_dot(hw)
    M, K, N = 3, 70, 37
    a, w, scale = integers(source, M, K), integers("int8", N, K, seed=1), torch.linspace(1e-4, 1e-3, N)
    how = Requantize(M, N, "int8", 3, 2.0)
    tiling = choose_dot_tiling(hw, dot, M, N, K)
    out = torch.zeros(M, N, dtype=torch.int8)
    func = int8_matmul(M, K, N, hw, source, how, dot=dot, tiling=tiling)
    run_emulated(func, hw, tmp_path, a, pack_matmul(w, dot, tiling.columns), offsets(w, 7, source, dot), scale, out)
    assert torch.equal(out, requantized((a.int() - 7) @ w.int().t(), scale, None, None, how))


@pytest.mark.parametrize("M", [1, 9])
@pytest.mark.parametrize("kind", ["avx2", "vnni", "vnni 512"])
def test_the_last_panel_is_no_wider_than_its_columns(M: int, kind: str) -> None:
    hw, dot = machine(kind)
    K, N = 24, 1000
    tiling = choose_dot_tiling(hw, dot, M, N, K)
    assert tiling.panels > 1
    a, w = integers("int8", M, K), integers("int8", N, K, seed=1)
    packed = pack_matmul(w, dot, tiling.columns)
    assert packed.nbytes == K * -(-N // dot.lanes) * dot.lanes
    how, scale = Requantize(M, N, "float32", activation="relu"), torch.linspace(1e-3, 1e-2, N)
    out = torch.full((M, N), torch.nan)
    func = int8_matmul(M, K, N, hw, "int8", how, dot=dot, tiling=tiling)
    run(func, detect(), a, packed, offsets(w, 3, "int8", dot), scale, out)
    assert torch.equal(out, requantized((a.int() - 3) @ w.int().t(), scale, None, None, how))
