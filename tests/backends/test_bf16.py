"""bfloat16 products: the dot product through a software twin, weights widened, the rounding, and the machine code."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow_harness import loops_with, one_core, random, run, run_emulated

from graphwright.backends.kernels.bf16_matmul import FloatFinish, bf16_matmul, pack_weight
from graphwright.backends.kernels.dot_matmul import pack_words
from graphwright.backends.kernels.dot_product import Dot, bf16_dot, bf16_weights, choose_dot_tiling, f16_weights
from graphwright.hwdb import Hardware, detect, lookup
from graphwright.passes import dialect

UNIT = 2.0**-24
EXTENT = st.one_of(st.integers(1, 20), st.sampled_from([31, 48, 64, 97, 130]))
ACTIVATIONS = st.sampled_from([("none", ()), ("relu", ()), ("gelu", ()), ("clamp", (-0.5, 0.75))])
RESULTS = {"float32": torch.float32, "uint16": torch.bfloat16}


def dots(hw: Hardware) -> dict[str, Dot]:
    emulated = bf16_dot(hw, emulated=True)
    assert emulated is not None
    half = f16_weights(hw)
    assert half is not None
    return {"dot": emulated, "weights": bf16_weights(hw), "half": half}


def rounded(w: torch.Tensor, kind: str) -> torch.Tensor:
    return (w.half() if kind == "half" else w.bfloat16()).double()


def wide(hw: Hardware) -> Hardware:
    """Vectors of 512 bits, which LLVM splits for this machine: the shapes of tiles are those of AVX-512."""
    return dataclasses.replace(hw, vector_bits=512, vector_registers=32)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(["dot", "weights", "half"]),
    st.integers(1, 20),
    EXTENT,
    EXTENT,
    ACTIVATIONS,
    st.booleans(),
    st.sampled_from([None, "float32", "uint16"]),
    st.sampled_from(["float32", "uint16"]),
    st.sampled_from(sorted(RESULTS)),
    st.booleans(),
)
def test_any_shape_against_float64(
    kind: str,
    M: int,
    K: int,
    N: int,
    activation: tuple[str, tuple[float, ...]],
    has_bias: bool,
    residual: str | None,
    source: str,
    result: str,
    avx512: bool,
) -> None:
    hw = wide(detect()) if avx512 else detect()
    dot = dots(hw)[kind]
    source = source if kind == "dot" else "float32"
    x, w = random(M, K), random(N, K, seed=1)
    bias, added = random(N, seed=2), random(M, N, seed=3).to(RESULTS[residual or "float32"])
    x = x.to(RESULTS[source])
    tiling = choose_dot_tiling(hw, dot, M, N, K)
    finish = FloatFinish(M, N, has_bias, residual, *activation, result)
    out = torch.full((M, N), float("nan"), dtype=RESULTS[result])
    func = bf16_matmul(M, K, N, hw, finish, dot=dot, tiling=tiling, source=source)
    run(func, detect(), x, pack_weight(w, dot, tiling.columns), *[bias] * has_bias, *[added] * bool(residual), out)

    a = (x.bfloat16() if kind == "dot" else x).double()
    b = rounded(w, kind)
    exact, magnitude = a @ b.t(), a.abs() @ b.abs().t()
    for extra in (bias if has_bias else None, added if residual else None):
        if extra is not None:
            exact, magnitude = exact + extra.double(), magnitude + extra.double().abs()
    name, args = activation
    exact = dialect.ACTIVATIONS[name](exact, list(args))
    # Any order of float32 sums (Higham, section 4.2), the activation's polynomial, the rounding of a bfloat16 result.
    allowed = 1.2 * (K + 2) * UNIT * magnitude + 32 * UNIT * (1 + exact.abs())
    if result == "uint16":
        allowed = allowed + 2.0**-8 * 1.01 * exact.abs()
    assert torch.all((out.double() - exact).abs() <= allowed)


@pytest.mark.parametrize("kind", ["dot", "weights", "half"])
def test_rows_in_chunks_and_threads(kind: str) -> None:
    hw = detect()
    dot = dots(hw)[kind]
    x, w = random(150, 40), random(90, 40, seed=1)
    tiling = choose_dot_tiling(hw, dot, 150, 90, 40)
    tiling = dataclasses.replace(tiling, row_chunks=3, tasks=2)
    out = torch.full((150, 90), float("nan"))
    func = bf16_matmul(150, 40, 90, hw, FloatFinish(150, 90), dot=dot, tiling=tiling)
    run(func, hw, x, pack_weight(w, dot, tiling.columns), out)
    a = x.bfloat16() if kind == "dot" else x
    torch.testing.assert_close(out, (a.double() @ rounded(w, kind).t()).float(), rtol=1e-5, atol=1e-5)


def test_results_round_like_torch() -> None:
    """Ties to even, overflow to infinity, NaN and infinity kept: 1 * x in float32, stored as bfloat16."""
    hw = detect()
    patterns = torch.arange(0, 2**32, 65521 * 3, dtype=torch.int64).to(torch.int32)
    special = torch.tensor(
        [0x7F800000, -0x800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x3F808000, 0x3F818000, 0x7F7FFFFF]
    )
    x = torch.cat([patterns, torch.tensor(special).to(torch.int32)]).view(torch.float32)
    one, out = torch.ones(1, 1), torch.empty(len(x), 1, dtype=torch.bfloat16)
    dot = bf16_weights(hw)
    tiling = choose_dot_tiling(hw, dot, len(x), 1, 1)
    func = bf16_matmul(len(x), 1, 1, hw, FloatFinish(len(x), 1, result="uint16"), dot=dot, tiling=tiling)
    run(func, hw, x.view(-1, 1), pack_weight(one, dot, tiling.columns), out)
    expected = x.bfloat16()
    assert torch.equal(out[:, 0].isnan(), x.isnan())
    normal = ~x.isnan() & (x.abs() >= torch.finfo(torch.float32).tiny)
    assert torch.equal(out[:, 0][normal], expected[normal])


def test_pack_words() -> None:
    w = torch.arange(15, dtype=torch.int8).view(5, 3)
    packed = pack_words(w, 2, 4)
    assert packed.shape == (2, 2, 8)
    assert packed[0, 0].tolist() == [0, 1, 3, 4, 6, 7, 9, 10]
    assert packed[0, 1].tolist() == [2, 0, 5, 0, 8, 0, 11, 0]
    assert packed[1].flatten()[[0, 1, 8, 9]].tolist() == [12, 13, 14, 0]


@pytest.mark.parametrize("name", ["znver4", "sapphirerapids"])
@pytest.mark.parametrize("M", [1, 7, 128])
def test_the_instruction_is_there_and_nothing_spills(name: str, M: int) -> None:
    hw = lookup(name)
    dot = bf16_dot(hw)
    assert dot is not None
    tiling = choose_dot_tiling(hw, dot, M, 768, 768)
    vectors = tiling.columns // dot.lanes
    assert tiling.rows * vectors + vectors + 1 <= 32 or tiling.rows == 1
    finish = FloatFinish(M, 768, True, None, "relu")
    func = bf16_matmul(M, 768, 768, hw, finish, dot=dot, tiling=tiling, source="uint16")
    loops = loops_with(func, hw, "vdpbf16ps")
    assert loops
    assert all(loop.spills == 0 and "zmm" in loop.text for loop in loops), loops
    assert any(loop.count % (tiling.rows * vectors) == 0 for loop in loops)


def test_float16_weights_of_every_size() -> None:
    """Denormals, the largest, infinities and zeros of both signs, each times 1."""
    dot, hw = f16_weights(detect()), detect()
    assert dot is not None
    w = torch.tensor([[2.0**-24], [-(2.0**-14)], [65504.0], [float("inf")], [-0.0], [6.1e-5], [1 / 3]])
    tiling = choose_dot_tiling(hw, dot, 1, len(w), 1)
    out = torch.empty(1, len(w))
    func = bf16_matmul(1, 1, len(w), hw, FloatFinish(1, len(w)), dot=dot, tiling=tiling)
    run(func, hw, torch.ones(1, 1), pack_weight(w, dot, tiling.columns), out)
    assert torch.equal(out[0], w[:, 0].half().float())


@pytest.mark.parametrize("name", ["x86-64-v3", "sapphirerapids"])
def test_float16_is_converted_by_an_instruction(name: str) -> None:
    hw = lookup(name)
    dot = f16_weights(hw)
    assert dot is not None
    tiling = choose_dot_tiling(hw, dot, 1, 512, 512)
    func = bf16_matmul(1, 512, 512, hw, FloatFinish(1, 512), dot=dot, tiling=tiling)
    assert loops_with(func, hw, "vcvtph2ps")
    assert f16_weights(lookup("x86-64-v2")) is None


@pytest.mark.parametrize(("M", "K", "N"), [(2, 40, 33), (9, 31, 70)])
def test_on_the_emulated_processor(M: int, K: int, N: int, tmp_path: Path) -> None:
    """vdpbf16ps and vcvtneps2bf16 themselves, on a model of Sapphire Rapids.

    Not one row: Bochs scales the short displacement of vdpbf16ps by 4 where the operand is a whole vector in memory.
    """
    hw = one_core(lookup("sapphirerapids"))
    dot = bf16_dot(hw)
    assert dot is not None
    x, w, bias = random(M, K), random(N, K, seed=1), random(N, seed=2)
    tiling = choose_dot_tiling(hw, dot, M, N, K)
    func = bf16_matmul(M, K, N, hw, FloatFinish(M, N, True, None, "gelu", (), "uint16"), dot=dot, tiling=tiling)
    out = torch.full((M, N), float("nan"), dtype=torch.bfloat16)
    run_emulated(func, hw, tmp_path, x, pack_weight(w, dot, tiling.columns), bias, out)
    exact = torch.nn.functional.gelu(x.bfloat16().double() @ w.bfloat16().double().t() + bias)
    torch.testing.assert_close(out.double(), exact, rtol=2.0**-8 * 1.01, atol=1e-5)
