"""Products that skip blocks of zeros: numbers against float64, balance, registers, what is refused."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from kernel_harness import Constant, inner_loops, kernel_of, refusal, run_kernel
from lowering_harness import check

from graphwright.backends.kernels.block_sparse import block_sparse, pack_index, pack_values, sparse_tiling
from graphwright.backends.lowering import kernels_sparse  # noqa: F401  (fills KERNELS)
from graphwright.backends.lowering.registry import KernelCall
from graphwright.hwdb import detect, lookup
from graphwright.passes.dialect_sparse import sparse_linear
from graphwright.passes.zero_blocks import blocks_of

HW = detect()


def pruned(n: int, k: int, columns: int, depth: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = -(-n // columns)
    mask = torch.rand(rows, k // depth, generator=generator) < density
    whole = mask.repeat_interleave(columns, 0)[:n].repeat_interleave(depth, 1)
    return torch.randn(n, k, generator=generator) * whole


def shape(weight: torch.Tensor, columns: int, depth: int) -> list[int]:
    blocks = blocks_of(weight, columns, depth)
    return [columns, depth, blocks.count, blocks.longest]


@settings(max_examples=14, deadline=None, derandomize=True)
@given(st.data())
def test_any_pattern(data: st.DataObject) -> None:
    draw = data.draw
    rows, columns = draw(st.sampled_from([1, 3, 17, 64])), draw(st.integers(16, 90))
    depth, count = draw(st.sampled_from([1, 4, 16])), draw(st.sampled_from([1, 3, 9, 50]))
    weight = pruned(columns, depth * count, 16, depth, draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])), rows)
    x = torch.randn(2, rows, depth * count)
    bias = torch.randn(columns) if draw(st.booleans()) else None
    residual = torch.randn(2, rows, columns) if draw(st.booleans()) else None
    activation = draw(st.sampled_from(["none", "relu", "gelu"]))
    operands = (x, Constant(weight), bias, residual, activation, [], shape(weight, 16, depth))
    got = run_kernel(HW, sparse_linear, *operands)
    want = sparse_linear(
        *[t.double() if isinstance(t, torch.Tensor) else t for t in (x, weight.double(), *operands[2:])]
    )
    # 384 additions in a chain, each rounded once: far below 1e-5 of the size of what is added up.
    scale = (x.abs().double() @ weight.abs().double().T).max().clamp_min(1.0)
    assert (got.double() - want).abs().max() <= 1e-5 * scale


def test_numbers_are_those_of_the_dense_kernel() -> None:
    """Sums are cut into chains of the same length, so errors are of one size."""
    from graphwright.passes import dialect

    torch.manual_seed(0)
    weight, x = pruned(64, 3072, 16, 16, 0.5), torch.randn(40, 3072)
    exact = x.double() @ weight.double().T
    rest = (Constant(weight), None, None, "none", [])
    dense = run_kernel(HW, dialect.linear, x, *rest)
    sparse = run_kernel(HW, sparse_linear, x, *rest, shape(weight, 16, 16))
    error = [float((y.double() - exact).norm() / exact.norm()) for y in (dense, sparse)]
    assert error[1] <= 1.5 * error[0]


def test_panels_are_cut_where_the_blocks_are() -> None:
    weight = pruned(96, 64, 16, 16, 1.0)
    weight[32:] = 0.0  # all blocks are in the first two of six panels
    index = pack_index(weight, 16, 16, 2).tolist()
    assert index[:7] == [0, 4, 8, 8, 8, 8, 8]
    assert index[7:10] == [0, 1, 6]
    assert index[10:] == [0, 16, 32, 48] * 2
    assert pack_values(weight, 16, 16).shape == (8, 16, 16)


def test_nothing_but_zeros() -> None:
    weight, x = torch.zeros(32, 48), torch.randn(5, 48)
    bias = torch.randn(32)
    got = run_kernel(HW, sparse_linear, x, Constant(weight), bias, None, "none", [], shape(weight, 16, 16))
    assert torch.equal(got, bias.expand(5, 32))


@pytest.mark.parametrize("target", ["x86-64-v3", "znver4", "cortex-a76"])
def test_accumulators_stay_in_registers(target: str) -> None:
    hw = lookup(target)
    weight = pruned(64, 256, 16, 16, 0.25)
    blocks = blocks_of(weight, 16, 16)
    tiling = sparse_tiling(hw, 128, 64, 256, blocks)
    vectors = tiling.columns // tiling.lanes
    assert tiling.rows * vectors + vectors + 1 <= hw.vector_registers
    loops = inner_loops(block_sparse(128, 256, 64, blocks, tiling), hw)
    assert loops
    assert all(loop.stack == 0 for loop in loops), loops[0].text
    assert max(loop.multiply_adds for loop in loops) >= tiling.rows * vectors


def test_what_it_says_of_itself() -> None:
    weight, x = pruned(64, 256, 16, 16, 0.25), torch.randn(128, 256)
    blocks = shape(weight, 16, 16)
    call = kernel_of(HW, sparse_linear, x, Constant(weight), None, None, "none", [], blocks)
    assert isinstance(call, KernelCall)
    assert "16x16 blocks" in call.choice
    assert call.work.flops == {"float32": 2.0 * 128 * 256 * blocks[2]}
    assert call.predicted_seconds is not None


def test_refused() -> None:
    x, w = torch.randn(4, 32), torch.randn(16, 32)
    rest = (None, None, "none", [], shape(w, 16, 16))
    assert "computed" in refusal(HW, sparse_linear, x, w, *rest)
    assert "float64" in refusal(HW, sparse_linear, x.double(), Constant(w.double()), *rest)
    assert "no elements" in refusal(HW, sparse_linear, x[:0], Constant(w), *rest)


def test_the_definition_in_plain_expressions() -> None:
    weight = pruned(16, 32, 16, 16, 0.5)
    check(sparse_linear, torch.randn(3, 32), weight, torch.randn(16), None, "relu", [], shape(weight, 16, 16))
