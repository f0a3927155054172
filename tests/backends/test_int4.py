"""Products with weights of four bits: bit for bit the integer reference, by instructions and without."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow_harness import run

from graphwright.backends.kernels.bf16_matmul import FloatFinish
from graphwright.backends.kernels.int4_product import choose_int4, int4_matmul, pack_halves, pack_scales
from graphwright.hwdb import Hardware, detect
from graphwright.passes import dialect_mixed
from graphwright.passes.precision.int4_groups import GROUPS, halves, rounded, unpacked


def steps(rows: int, depth: int) -> torch.Tensor:
    made = torch.randint(-8, 8, (rows, depth), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    made.view(-1)[::5] = -8
    made.view(-1)[1::7] = 7
    return made


def machine(kind: str) -> tuple[Hardware, bool]:
    """This machine; arithmetic in place of its instructions; the same of another width."""
    hw = detect()
    return (dataclasses.replace(hw, vector_bits=512, vector_registers=32) if kind == "512" else hw), kind != "own"


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.sampled_from(["own", "emulated", "512"]),
    st.integers(1, 6),
    st.integers(1, 150),
    st.sampled_from(GROUPS),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["none", "relu"]),
)
def test_bit_for_bit(
    kind: str, M: int, N: int, group: int, groups: int, bias: bool, residual: bool, activation: str
) -> None:
    K = group * groups
    generator = torch.Generator().manual_seed(M + N)
    x = torch.randn(M, K, generator=generator) * torch.logspace(-3, 3, M)[:, None]
    x[0] = 0.0
    stored, scales = halves(steps(N, K)), torch.rand(N, groups, generator=generator) + 1e-3
    assert torch.equal(unpacked(stored), steps(N, K))
    added = [torch.randn(N, generator=generator)] * bias + [torch.randn(M, N, generator=generator)] * residual
    hw, emulated = machine(kind)
    plan = choose_int4(hw, M, K, N, group, emulated=emulated)
    finish = FloatFinish(M, N, bias, "float32" if residual else None, activation)
    out = torch.full((M, N), float("nan"))
    packed = (pack_halves(stored, plan.columns), pack_scales(scales, plan.columns))
    run(int4_matmul(plan, finish), detect(), x, *packed, *added, out)
    operands = (added[0] if bias else None, added[-1] if residual else None)
    assert torch.equal(out, dialect_mixed.linear_w4(x, stored, scales, *operands, activation, []))


def test_the_reference_is_the_product_of_what_was_rounded() -> None:
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(3, 256, generator=generator), torch.randn(100, 256, generator=generator)
    weight, scales = rounded(w, 32)
    y = dialect_mixed.linear_w4(x, halves(weight), scales, None, None, "none", [])
    wide = weight.double() * scales.double().repeat_interleave(32, 1)
    exact = x.double() @ wide.t()
    # Rows in steps of 1/127 of their largest, of about 3 standard deviations: 3 / 127 / sqrt(12) of a value.
    assert 1e-3 < float((y - exact).norm() / exact.norm()) < 1e-2
    whole = torch.randint(-127, 128, (3, 256), generator=generator).float()
    whole[:, 0] = 127.0  # steps of 1: nothing is rounded but the sums of groups
    y = dialect_mixed.linear_w4(whole, halves(weight), scales, None, None, "none", [])
    torch.testing.assert_close(y.double(), whole.double() @ wide.t(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("group", "least", "most"), [(32, 0.08, 0.10), (128, 0.10, 0.125)])
def test_rounding_of_normal_weights(group: int, least: float, most: float) -> None:
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(4))
    weight, scales = rounded(w, group)
    assert int(weight.min()) >= -7
    assert int(weight.max()) <= 7
    error = (weight.float().view(64, -1, group) * scales[..., None]).flatten(1) - w
    assert least < float(error.norm() / w.norm()) < most


def test_groups_of_zeros_and_of_tiny_weights() -> None:
    w = torch.zeros(2, 64)
    w[1, :32] = 1e-44
    weight, scales = rounded(w, 32)
    assert torch.equal(weight, torch.zeros(2, 64, dtype=torch.int8))
    assert scales.isfinite().all()
    assert torch.equal(scales[0], torch.ones(2))
