"""Rows rounded to bytes at run time: bit for bit the integer reference, by instructions and without."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from boards import run_kernel_on
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow_harness import byte_machine, fma, integers, random, run

from graphwright.backends.kernels.dot_product import choose_dot_tiling, int8_dot
from graphwright.backends.kernels.int8_product import has_offsets, int8_rows_matmul, offsets, pack_matmul
from graphwright.backends.kernels.int8_rows import RowFinish
from graphwright.hwdb import detect, lookup
from graphwright.passes import dialect, dialect_rows

EXTENT = st.one_of(st.integers(1, 20), st.sampled_from([31, 64, 97, 130]))


def product(
    kind: str,
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    finish: RowFinish,
    *added: torch.Tensor,
    tokens: bool = False,
) -> torch.Tensor:
    hw, dot = byte_machine(kind)
    (M, K), N = x.shape, len(w)
    tiling = choose_dot_tiling(hw, dot, M, N, K)
    out = torch.full((M, N), 7.0)
    signed = has_offsets(0, "int8", dot)
    finish = dataclasses.replace(finish, offset=signed)
    func = int8_rows_matmul(M, K, N, hw, finish, dot=dot, tiling=tiling, tokens=tokens)
    constants = [offsets(w, 0, "int8", dot)] * signed + [scale]
    run(func, detect(), x, pack_matmul(w, dot, tiling.columns), *constants, *added, out)
    return out


def reference(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, addend: torch.Tensor | None) -> torch.Tensor:
    """By integers, a row at a time."""
    rows = []
    for row in x:
        largest = row.abs().max()
        inverse = torch.tensor(127.0) / (largest if largest > 0 else torch.tensor(1.0))
        q = (row * inverse).round().to(torch.int64)
        assert int(q.abs().max()) <= 127
        rows.append(((w.to(torch.int64) * q).sum(1).float() * scale, largest * torch.tensor(1 / 127)))
    sums, units = (torch.stack(part) for part in zip(*rows, strict=True))
    return fma(sums, units[:, None], addend)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.sampled_from(["own", "emulated", "512", "pairs"]),
    st.tuples(st.integers(1, 20), EXTENT, EXTENT),
    st.booleans(),
    st.booleans(),
    st.sampled_from([("none", ()), ("relu", ()), ("leaky_relu", (0.1,))]),
)
def test_bit_for_bit(
    kind: str,
    extents: tuple[int, int, int],
    bias: bool,
    residual: bool,
    activation: tuple[str, tuple[float, ...]],
) -> None:
    M, K, N = extents
    x = random(M, K) * torch.logspace(-30, 30, M)[:, None]
    x[M // 2] = 0.0
    x[-1, ::3] = 2.5  # ties and the extremes
    w, scale = integers("int8", N, K, seed=1), torch.linspace(1e-3, 1e-2, N)
    added = [random(N, seed=2)] * bias + [random(M, N, seed=3)] * residual
    out = product(kind, x, w, scale, RowFinish(M, N, bias, residual, *activation), *added)
    addend = sum(added[1:], added[0]) if added else None
    expected = dialect.ACTIVATIONS[activation[0]](reference(x, w, scale, addend), list(activation[1]))
    assert torch.equal(out, expected)
    operands = (added[0] if bias else None, added[-1] if residual else None)
    assert torch.equal(out, dialect_rows.linear_rows(x, w, scale, *operands, activation[0], list(activation[1])))


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.sampled_from(["own", "emulated", "512", "pairs"]), st.tuples(st.integers(1, 12), EXTENT, EXTENT))
def test_tokens_bit_for_bit(kind: str, extents: tuple[int, int, int]) -> None:
    """By torchao's steps of max / 127.5: the largest value is 127.5 of them, rounded to 127, or to -128."""
    M, K, N = extents
    x = random(M, K) * torch.logspace(-12, 30, M)[:, None]
    x[-1, ::3] = -x[-1].abs().max()
    w, scale, bias = integers("int8", N, K, seed=1), torch.linspace(1e-3, 1e-2, N), random(N, seed=2)
    unit = (x.abs().amax(1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    q = (x * (1.0 / unit)).round().clamp(-128, 127)
    assert M == 1 or int(q[-1].min()) in (-127, -128)  # one row alone is below the smallest unit
    sums = (w.to(torch.int64) @ q.to(torch.int64).t()).t().float()
    out = product(kind, x, w, scale, RowFinish(M, N, True), bias, tokens=True)
    assert torch.equal(out, fma(sums * scale, unit, bias))
    assert torch.equal(out, dialect_rows.linear_tokens(x, w, scale, bias, None, "none", []))
    x[0, 0] = torch.nan
    assert product(kind, x, w, scale, RowFinish(M, N, True), bias, tokens=True)[0].isnan().all()
    assert dialect_rows.linear_tokens(x, w, scale, bias, None, "none", [])[0].isnan().all()


@pytest.mark.parametrize("kind", ["own", "emulated", "pairs"])
def test_rows_without_a_scale(kind: str) -> None:
    x = random(7, 37)
    x[0, 3], x[1, 36], x[2, 0] = torch.nan, torch.inf, -torch.inf
    x[3] *= 1e-44
    x[4] = 0.0
    x[5] *= 1e35 / x[5].abs().max()
    w, scale, bias = integers("int8", 20, 37, seed=1), torch.linspace(1e-3, 1e-2, 20), random(20, seed=2)
    out = product(kind, x, w, scale, RowFinish(7, 20, bias=True), bias)
    assert out[:3].isnan().all()  # one value that is no number is in every sum of its row
    assert torch.equal(out[3:5], bias.expand(2, 20))
    assert out[5:].isfinite().all()
    assert torch.equal(out[3:], dialect_rows.linear_rows(x, w, scale, bias, None, "none", [])[3:])
    assert dialect_rows.linear_rows(x, w, scale, bias, None, "none", [])[:3].isnan().all()


@pytest.mark.parametrize(
    ("board", "cpu", "instruction"),
    [
        ("raspberry-pi-5", "cortex-a76", "sdot"),
        ("neoverse-v1", "max", "usdot"),
        ("raspberry-pi-4b", "cortex-a72", "smull and sadalp"),
    ],
)
def test_on_arm(board: str, cpu: str, instruction: str, tmp_path: Path) -> None:
    """The same bits under QEMU; a depth of no whole words, and rows without a scale."""
    hw = lookup(board)
    dot = int8_dot(hw)
    assert dot.name == instruction
    x, w, scale = random(9, 77), integers("int8", 45, 77, seed=1), torch.linspace(1e-3, 1e-2, 45)
    x[0], x[1, 76], x[2, 5], x[3] = 0.0, torch.nan, -torch.inf, 1e-42
    x[8, ::3] = 2.5
    added, residual = random(45, seed=2), random(9, 45, seed=3)
    tiling, finish = choose_dot_tiling(hw, dot, 9, 45, 77), RowFinish(9, 45, True, True, "leaky_relu", (0.1,))
    func = int8_rows_matmul(9, 77, 45, hw, finish, dot=dot, tiling=tiling)
    out = torch.full((9, 45), 7.0)
    packed, offset = pack_matmul(w, dot, tiling.columns), offsets(w, 0, "int8", dot)
    run_kernel_on(func, hw, cpu, tmp_path, x, packed, offset, scale, added, residual, out)
    expected = dialect_rows.linear_rows(x, w, scale, added, residual, "leaky_relu", [0.1])
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().all(1).nonzero().flatten().tolist() == [1, 2]
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def test_the_error_of_rounding_rows() -> None:
    """Steps of max / 127, of about 3.3 standard deviations: 3.3 / 127 / sqrt(12) of a value."""
    x, w = random(64, 512), integers("int8", 100, 512, seed=1)
    exact = x.double() @ w.double().t()
    y = dialect_rows.linear_rows(x * torch.logspace(-3, 3, 64)[:, None], w, torch.ones(100), None, None, "none", [])
    y = y.double() / torch.logspace(-3, 3, 64).double()[:, None]
    assert 4e-3 < float((y - exact).norm() / exact.norm()) < 1.1e-2
