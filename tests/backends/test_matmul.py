"""Packed and batched matrix products: any shape against float64, epilogues, refusals, and the machine code."""

from __future__ import annotations

import dataclasses
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import UNIT, Constant, inner_loops, kernel_of, refusal, run_kernel

from graphwright.backends.kernels.batch_matmul import batch_index, broadcast_batch
from graphwright.backends.kernels.gemv import MOST_ROWS
from graphwright.backends.kernels.matmul import matmul, pack_weight
from graphwright.backends.lowering.registry import KernelCall
from graphwright.backends.tiling import choose_tiling, vectors_limit
from graphwright.hwdb import Hardware, detect, lookup
from graphwright.passes import dialect

aten = torch.ops.aten

# The steepest of the activations is gelu, 1.13; each adds a few roundings of its own.
SLOPE = 1.2
ACTIVATIONS: list[tuple[str, list[float]]] = [
    *((name, []) for name in dialect.ACTIVATIONS if name not in ("clamp", "leaky_relu", "swish")),
    ("clamp", [-0.5, 0.75]),
    ("leaky_relu", [0.1]),
    ("swish", [1.702]),
]
EXTENT = st.one_of(st.integers(1, 20), st.sampled_from([23, 24, 25, 31, 47, 48, 64, 97, 128, 131]))
DEPTH = st.one_of(st.integers(0, 9), st.sampled_from([16, 31, 64, 100, 257]))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(
    got: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    args: list[float] | None = None,
) -> None:
    """Assert that `got` is act(a . b + bias + residual), up to the error that float32 sums can have.

    Any order of summation errs by at most n u sum |a||b| (Higham, Accuracy and Stability, section 4.2).
    """
    exact, magnitude, terms = a.double() @ b.double(), a.double().abs() @ b.double().abs(), a.shape[-1]
    for extra in (bias, residual):
        if extra is not None:
            exact, magnitude, terms = exact + extra.double(), magnitude + extra.double().abs(), terms + 1
    exact = dialect.ACTIVATIONS[activation](exact, args or [])
    allowed = SLOPE * (terms + 1) * UNIT * magnitude + 16 * UNIT * exact.abs() + 1e-30
    if activation != "none":
        allowed += 16 * UNIT  # the polynomials' own error, of values of order one
    error = (got.double() - exact).abs()
    assert not torch.isnan(got).any()
    assert torch.all(error <= allowed), f"{(error / allowed).max().item():.1f} times the bound"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 20), DEPTH, EXTENT, st.sampled_from(ACTIVATIONS), st.booleans(), st.booleans())
def test_linear_with_constant_weight(
    M: int, K: int, N: int, activation: tuple[str, list[float]], has_bias: bool, has_residual: bool
) -> None:
    x, w = random(M, K), random(N, K, seed=1)
    bias = random(N, seed=2) if has_bias else None
    residual = random(M, N, seed=3) if has_residual else None
    name, args = activation
    got = run_kernel(
        detect(), dialect.linear, x, Constant(w), bias if bias is None else Constant(bias), residual, name, args
    )
    check(got, x, w.t(), bias, residual, name, args)


@pytest.mark.parametrize(
    ("M", "K", "N"),
    [(127, 300, 130), (200, 64, 8), (3, 4096, 5), (1, 777, 1000), (16, 12000, 40), (150, 1024, 24)],
)
def test_linear_of_large_extents(M: int, K: int, N: int) -> None:
    x, w, bias = random(M, K), random(N, K, seed=1), random(N, seed=2)
    check(run_kernel(detect(), dialect.linear, x, Constant(w), bias, None, "none", []), x, w.t(), bias)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(1, 40), st.sampled_from([16, 31, 64, 65, 999]), st.integers(1, 3), st.sampled_from(ACTIVATIONS),
    st.booleans(),
)  # fmt: skip
def test_few_columns_are_dot_products(M: int, K: int, N: int, activation: tuple[str, list[float]], extra: bool) -> None:
    hw, (name, args) = lookup("x86-64-v3"), activation
    x, w = random(M, K), random(N, K, seed=1)
    bias, residual = (random(N, seed=2), random(M, N, seed=3)) if extra else (None, None)
    operands = (x, Constant(w), bias if bias is None else Constant(bias), residual, name, args)
    call = kernel_of(hw, dialect.linear, *operands)
    assert isinstance(call, KernelCall)
    assert call.algorithm == "dot products"
    check(run_kernel(hw, dialect.linear, *operands), x, w.t(), bias, residual, name, args)
    check(run_kernel(hw, aten.mm.default, x, Constant(w.t().contiguous())), x, w.t())


def test_depth_blocks_and_row_chunks_are_exercised() -> None:
    hw = detect()
    blocked, chunked = choose_tiling(hw, 16, 40, 60000), choose_tiling(hw, 2048, 64, 4096)
    assert blocked.depth_blocks > 1
    assert chunked.row_chunks > 1
    small = dataclasses.replace(choose_tiling(hw, 21, 40, 50), depth_blocks=3, row_chunks=2, tasks=2)
    x, w = random(21, 50), random(40, 50, seed=1)
    check(_run_tiled(small, hw, x, w), x, w.t())


@pytest.mark.parametrize(("chunks", "tasks", "sums"), [(4, 2, 1), (2, 2, 3), (1, 2, 5), (3, 2, 2), (5, 1, 4)])
def test_rows_shared_out_and_sums_in_blocks(chunks: int, tasks: int, sums: int) -> None:
    hw = detect()
    found = choose_tiling(hw, 45, 40, 50)
    tiling = dataclasses.replace(found, row_chunks=min(chunks, found.row_tiles), tasks=tasks, sum_blocks=sums)
    x, w = random(45, 50), random(40, 50, seed=1)
    check(_run_tiled(tiling, hw, x, w), x, w.t())


def test_many_rows_are_shared_out_by_rows_and_many_weights_by_panels() -> None:
    hw = lookup("x86-64-v3")
    cores = hw.cores
    assert cores > 1
    pixels = choose_tiling(hw, 3136, 64, 256, packed=True)
    assert pixels.row_chunks % cores == 0
    token = choose_tiling(hw, 1, 4096, 4096, packed=True)
    assert token.row_chunks == 1
    assert token.tasks == cores


def test_long_sums_err_less_than_one_chain() -> None:
    """Sums of positive numbers: the error of a chain grows with its length, that of blocks with theirs."""
    hw = detect()
    x, w = random(8, 12288).abs(), random(16, 12288, seed=1).abs()
    exact = x.double() @ w.double().t()
    tiling = choose_tiling(hw, 8, 16, 12288, packed=True)
    chain = dataclasses.replace(tiling, sum_blocks=1, depth_blocks=1)
    errors = [((_run_tiled(t, hw, x, w) - exact).abs() / exact).max().item() for t in (tiling, chain)]
    assert tiling.sum_blocks * tiling.depth_blocks > 10
    assert errors[0] < 0.5 * errors[1]


def _run_tiled(tiling: Any, hw: Hardware, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    import tvm
    from kernel_harness import compile_kernel

    func = matmul(x.shape[0], x.shape[1], w.shape[0], hw, tiling=tiling)
    out = torch.full((x.shape[0], w.shape[0]), float("nan"))
    packed = pack_weight(w, tiling.columns)
    compile_kernel(func, hw)["main"](*map(tvm.runtime.from_dlpack, (x, packed, out)))
    return out


@pytest.mark.parametrize("shape", [(70,), (2, 3, 70), (1, 70), (4, 1, 1, 70)])
def test_linear_keeps_leading_dimensions(shape: tuple[int, ...]) -> None:
    x, w = random(*shape), random(33, 70, seed=1)
    for weight in (Constant(w), w):  # packed; and, where it is computed, batched
        got = run_kernel(detect(), aten.linear.default, x, weight, None)
        assert got.shape == (*shape[:-1], 33)
        check(got, x, w.t())


BATCHES = [((), ()), ((3,), (3,)), ((2, 1), (3,)), ((2, 3), ()), ((), (4,)), ((2, 1, 3), (4, 1)), ((1,), (2, 1))]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(BATCHES),
    st.integers(1, 20),
    DEPTH,
    st.one_of(st.integers(1, 20), st.sampled_from([24, 31, 64, 105])),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([*ACTIVATIONS[:2], ("gelu", [])]),
)
def test_batched_matmul(
    batch: tuple[tuple[int, ...], tuple[int, ...]],
    M: int,
    K: int,
    N: int,
    transpose_a: bool,
    transpose_b: bool,
    extra: bool,
    activation: tuple[str, list[float]],
) -> None:
    a, b = random(*batch[0], M, K), random(*batch[1], K, N, seed=1)
    out = torch.broadcast_shapes(*batch)
    bias, residual = (random(N, seed=2), random(*out, M, N, seed=3)) if extra else (None, None)
    got = run_kernel(
        detect(),
        dialect.matmul,
        a.mT.contiguous() if transpose_a else a,
        b.mT.contiguous() if transpose_b else b,
        bias,
        residual,
        transpose_a,
        transpose_b,
        *activation,
    )
    check(got, a, b, bias, residual, *activation)


@pytest.mark.parametrize(("M", "N"), [(128, 96), (70, 130), (2, 300)])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_batched_matmul_of_large_extents(M: int, N: int, transpose_b: bool) -> None:
    a, b = random(3, M, 80), random(3, 80, N, seed=1)
    given_b = b.mT.contiguous() if transpose_b else b
    check(run_kernel(detect(), dialect.matmul, a, given_b, None, None, False, transpose_b, "none", []), a, b)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.sampled_from(BATCHES),
    st.integers(1, 4),
    st.one_of(st.integers(8, 40), st.sampled_from([100, 257])),
    st.one_of(st.integers(8, 30), st.sampled_from([64, 131])),
    st.booleans(),
    st.sampled_from([128, 256]),
    st.sampled_from([*ACTIVATIONS[:2], ("gelu", [])]),
)
def test_few_rows_against_rows_are_dot_products(
    batch: tuple[tuple[int, ...], tuple[int, ...]],
    M: int,
    K: int,
    N: int,
    extra: bool,
    bits: int,
    activation: tuple[str, list[float]],
) -> None:
    hw = dataclasses.replace(detect(), vector_bits=bits)
    a, b = random(*batch[0], M, K), random(*batch[1], N, K, seed=1)
    out = torch.broadcast_shapes(*batch)
    bias, residual = (random(N, seed=2), random(*out, M, N, seed=3)) if extra else (None, None)
    arguments = (dialect.matmul, a, b, bias, residual, False, True, *activation)
    call = kernel_of(hw, *arguments)
    assert isinstance(call, KernelCall)
    if prod(a.shape[:-1]) <= MOST_ROWS:
        assert call.algorithm == "dot products"
    check(run_kernel(hw, *arguments), a, b.mT, bias, residual, *activation)


def test_products_are_predicted_by_their_own_models() -> None:
    hw, b = lookup("zen4"), random(4, 300, 64, seed=1)
    times = []
    for rows in (1, 64, 512):
        call = kernel_of(hw, dialect.matmul, random(4, rows, 64), b, None, None, False, True, "none", [])
        assert isinstance(call, KernelCall)
        assert call.predicted_seconds is not None
        times.append(call.predicted_seconds)
    assert times == sorted(times)
    narrow = kernel_of(hw, dialect.linear, random(64, 512), Constant(random(1, 512)), None, None, "none", [])
    assert isinstance(narrow, KernelCall)
    assert narrow.predicted_seconds is not None


def test_core_operators() -> None:
    hw, a, b, bias = detect(), random(33, 70), random(70, 45, seed=1), random(45, seed=2)
    check(run_kernel(hw, aten.mm.default, a, b), a, b)
    check(run_kernel(hw, aten.mm.default, a, Constant(b)), a, b)
    check(run_kernel(hw, aten.bmm.default, a.expand(2, 33, 70), b.expand(2, 70, 45)), a.expand(2, 33, 70), b)
    check(run_kernel(hw, aten.matmul.default, a.view(3, 11, 70), Constant(b)), a.view(3, 11, 70), b)
    check(run_kernel(hw, aten.addmm.default, bias, a, Constant(b)), a, b, bias)
    check(run_kernel(hw, aten.addmm.default, bias.view(1, 45), a, b), a, b, bias)
    full = random(33, 45, seed=3)
    check(run_kernel(hw, aten.addmm.default, full, a, b), a, b, None, full)


def test_packed_only_where_the_right_operand_is_constant() -> None:
    a, b = random(8, 16), random(16, 24)
    constant, computed = (kernel_of(detect(), aten.mm.default, a, x) for x in (Constant(b), b))
    assert isinstance(constant, KernelCall)
    assert isinstance(computed, KernelCall)
    assert (constant.algorithm, computed.algorithm) == ("packed matmul", "batched matmul")


def test_refusals_say_why() -> None:
    hw, a, b = detect(), random(4, 5), random(5, 6)
    assert "float64" in refusal(hw, aten.mm.default, a.double(), b.double())
    assert "scaled" in refusal(hw, aten.addmm.default, random(6), a, b, beta=2)
    assert "one value a column" in refusal(hw, aten.addmm.default, random(4, 1), a, b)
    assert "a vector" in refusal(hw, aten.matmul.default, a, random(5))
    assert "a vector" in refusal(hw, aten.matmul.default, random(5), random(3, 5, 6))
    assert "no elements" in refusal(hw, aten.mm.default, random(0, 5), b)
    assert "residual" in refusal(hw, dialect.linear, a, Constant(random(6, 5)), None, random(6), "none", [])


def test_infinity_and_nan_pass_through() -> None:
    x, w = torch.ones(9, 3), torch.ones(5, 3)
    x[0, 0], x[1, 1], w[4, 2] = float("inf"), float("nan"), -float("inf")
    got = run_kernel(detect(), dialect.linear, x, Constant(w), None, None, "relu", [])
    assert torch.equal(got.isnan(), torch.relu(x @ w.t()).isnan())
    assert torch.equal(got.isinf(), torch.relu(x @ w.t()).isinf())


def test_pack_weight_pads_with_zeros() -> None:
    w = random(5, 3)
    packed = pack_weight(w, 4)
    assert packed.shape == (2, 3, 4)
    assert torch.equal(packed[0], w[:4].t())
    assert torch.equal(packed[1], torch.cat([w[4:].t(), torch.zeros(3, 3)], dim=1))


@pytest.mark.parametrize(("a", "b"), BATCHES)
def test_batch_index_follows_broadcasting(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    batch = broadcast_batch((*a, 1, 1), (*b, 1, 1))
    assert batch == tuple(torch.broadcast_shapes(a, b))
    for operand in (a, b):
        numbers = torch.arange(torch.Size(operand).numel()).view(operand).expand(batch).reshape(-1)
        assert [int(batch_index(i, batch, operand)) for i in range(len(numbers))] == numbers.tolist()


TARGETS = {"x86-64-v3": "ymm", "x86-64-v4": "zmm", "raspberry-pi-4": ".4s"}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("M", [1, 5, 128])
def test_accumulators_stay_in_registers(name: str, M: int) -> None:
    hw = lookup(name)
    tiling = choose_tiling(hw, M, 768, 768)
    vectors = tiling.columns // hw.lanes("float32")
    assert vectors <= vectors_limit(hw, tiling.rows)
    assert tiling.rows * vectors >= min(8, M * 8)
    loops = inner_loops(matmul(M, 768, 768, hw, bias=True, activation="relu", tiling=tiling), hw)
    main = next(loop for loop in loops if loop.multiply_adds % (tiling.rows * vectors) == 0)
    assert main.stack == 0, main.text
    assert TARGETS[name] in main.text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(TARGETS)), st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 20000))
def test_tilings_cover_and_fit(name: str, rows: int, columns: int, depth: int) -> None:
    hw = lookup(name)
    tiling = choose_tiling(hw, rows, columns, depth)
    small, larger = divmod(rows, tiling.row_tiles)
    assert tiling.rows == small + bool(larger)
    assert (tiling.panels - 1) * tiling.columns < columns <= tiling.panels * tiling.columns
    assert tiling.columns % hw.lanes("float32") == 0
    assert 1 <= tiling.row_chunks <= tiling.row_tiles
    assert 1 <= tiling.tasks <= min(hw.cores, tiling.panels * tiling.row_chunks)
    assert 1 <= tiling.depth_blocks <= max(1, depth)
    assert tiling.columns // hw.lanes("float32") <= vectors_limit(hw, tiling.rows)
    assert str(tiling.rows) in tiling.reason
