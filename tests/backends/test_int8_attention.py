"""Attention in bytes: bit for bit the operator's body, with any shape and mask, and rows that have no scale."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import kernel_of, place, refusal, run_kernel
from narrow_harness import loops_with, random

from graphwright.backends.kernels.attention_plan import dense
from graphwright.backends.lowering.registry import KERNELS, KernelCall
from graphwright.hwdb import Hardware, detect
from graphwright.passes.dialect import attention
from graphwright.passes.dialect_attention import (
    LEAST_SCORE,
    MOST_KEYS,
    attention_int8,
    powers,
    strided_attention_int8,
)


def machine(kind: str) -> Hardware:
    """This machine, with vectors of "256" or "128" bits, or without the instruction."""
    hw = detect()
    if kind.isdecimal():
        return replace(hw, vector_bits=int(kind), vector_registers=16)
    return hw if kind == "own" else replace(hw, features=hw.features - {"avx512vnni", "avxvnni", "i8mm", "dotprod"})


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.nan_to_num(), expected.nan_to_num())


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_bit_for_bit(data: st.DataObject) -> None:
    draw = data.draw
    batch, key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 3]))
    queries = draw(st.one_of(st.integers(1, 20), st.sampled_from([65, 130])))
    keys = draw(st.one_of(st.integers(1, 20), st.sampled_from([33, 128, 200])))
    depth, value_depth = draw(st.sampled_from([1, 3, 20, 64, 100])), draw(st.sampled_from([1, 7, 24, 64]))
    heads = key_heads * group
    q = random(batch, heads, queries, depth) * draw(st.sampled_from([1.0, 20.0]))
    k, v = random(batch, key_heads, keys, depth, seed=1), random(batch, key_heads, keys, value_depth, seed=2)
    k[..., 0, :] = 0.0
    kind = draw(st.sampled_from(["none", "causal", "float", "bool"]))
    mask, causal = None, kind == "causal"
    if kind in ("float", "bool"):
        shape = [draw(st.sampled_from([1, n])) for n in (batch, heads, queries, keys)]
        mask = random(*shape[draw(st.integers(0, 2)) :], seed=3)
        mask = mask > 0 if kind == "bool" else torch.where(mask > 1, -torch.inf, mask)
    scale, fill = draw(st.sampled_from([0.125, 1.0, -0.5])), draw(st.sampled_from([None, None, -torch.inf, -2.0]))
    operands = (q, k, v, mask, causal, scale, fill)
    got = run_kernel(machine(draw(st.sampled_from(["own", "256", "128", "emulated"]))), attention_int8, *operands)
    assert same(got, attention_int8(*operands))


@pytest.mark.parametrize("fill", [None, -torch.inf])
def test_rows_without_a_scale(fill: float | None) -> None:
    """NaN where a query sees a value that is no number, and nowhere else; rows of zeros, and hidden ones, are fine."""
    q, k, v = (random(1, 2, 37, 20, seed=i) for i in range(3))
    q[0, 0, 1, 2], q[0, 0, 2, 0], q[0, 0, 3] = math.nan, -math.inf, 1e-44
    k[0, 1, 4, 1], k[0, 0, 5] = math.inf, 0.0
    v[0, 0, 3, 2] = math.nan
    mask = torch.ones(37, 37, dtype=torch.bool)
    mask[:20, 4] = False
    mask[7] = False
    got = run_kernel(detect(), attention_int8, q, k, v, mask, False, 0.25, fill)
    assert same(got, attention_int8(q, k, v, mask, False, 0.25, fill))
    wrong = torch.zeros_like(got, dtype=torch.bool)
    wrong[0, 0, 1:3] = True  # the queries themselves
    wrong[0, 0, :, 2] = True  # the channel of v
    wrong[0, 1, 20:] = True  # queries that see the key
    wrong[0, :, 7] |= fill is not None  # a row without keys, as softmax has it
    assert torch.equal(got.isnan(), wrong)
    if fill is None:
        assert torch.all(got[0, 1, 7] == 0)


def test_heads_where_they_lie() -> None:
    """q, k and v side by side in one buffer, the result by rows of all heads."""
    qkv, extents = random(2, 40, 3 * 48), [2, 3, 3, 40, 40, 16, 16]
    places = [n for part in range(3) for n in (48 * part, 40 * 144, 16, 144)]
    result = dense("BSHD", 3, 40, 16)
    places += [result.offset, result.batch, result.head, result.position]
    operands = (qkv, qkv, qkv, None, True, 0.25, extents, places, [2, 40, 48])
    got = run_kernel(detect(), strided_attention_int8, *operands)
    assert torch.equal(got, strided_attention_int8(*operands))
    q, k, v = (x.view(2, 40, 3, 16).transpose(1, 2) for x in qkv.split(48, -1))
    assert torch.equal(got, attention_int8(q, k, v, None, True, 0.25).transpose(1, 2).reshape(2, 40, 48))


def test_weights_are_rounded_to_255_steps() -> None:
    x = torch.linspace(LEAST_SCORE, 0.0, 20001)
    found = powers(x)
    assert found[-1] == 255
    assert found[0] == 0
    assert torch.equal(found, found.round())
    exact = 255 * x.double().exp()
    assert float((found.double() - exact).abs().max()) < 0.521  # half a step, and a fiftieth by the polynomial


@pytest.mark.parametrize("keys", [64, 512])
def test_the_error_of_rounding(keys: int) -> None:
    """q and k: 1/127/sqrt(12) of about three standard deviations each, half a step of a weight in 255."""
    q, k, v = (random(1, 2, n, 64, seed=i) for i, n in enumerate((64, keys, keys)))
    exact = attention(q, k, v, None, False, 0.125)
    error = float((attention_int8(q, k, v, None, False, 0.125) - exact).norm() / exact.norm())
    assert 2e-3 < error < 2.5e-2


def test_refusals() -> None:
    q, k = random(1, 1, 1, 1), random(1, 1, MOST_KEYS + 1, 1)
    assert f"{MOST_KEYS + 1} keys" in refusal(detect(), attention_int8, q, k, k, None, False, 1.0)
    q, k = random(1, 1, 2, 8).double(), random(1, 1, 2, 8).double()
    assert "float64" in refusal(detect(), attention_int8, q, k, k, None, False, 1.0)


def test_what_it_says() -> None:
    call = kernel_of(detect(), attention_int8, *(random(1, 2, 64, 32) for _ in range(3)), None, False, 1.0)
    assert isinstance(call, KernelCall)
    assert call.algorithm == "int8 attention, rows rounded at run time"
    assert call.work.flops == {"int8": 2.0 * 2 * 64 * 64 * 64}


@pytest.mark.skipif(detect().vector_dot_product("int8") != "vnni", reason="no vpdpbusd here")
def test_accumulators_stay_in_registers() -> None:
    node, _, _ = place(attention_int8, *(random(1, 2, 256, 64) for _ in range(3)), None, False, 0.125)
    call = KERNELS[attention_int8](node, detect())
    assert isinstance(call, KernelCall)
    loops = [loop for loop in loops_with(call.func, detect(), "vpdpbusd") if loop.count > 1]
    assert len(loops) >= 2  # q . k and p . v
    assert all(loop.spills == 0 for loop in loops)
