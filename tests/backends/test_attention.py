"""Attention: any shape, mask and layout against float64, rows masked everywhere, refusals, and the machine code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_harness import UNIT, compile_kernel, inner_loops, kernel_of, refusal, run_kernel

from graphwright.backends.kernels.attention import attention
from graphwright.backends.kernels.attention_plan import Placement, Problem, dense, plan_attention, predicted_seconds
from graphwright.backends.lowering.registry import KernelCall
from graphwright.hwdb import Hardware, detect, lookup
from graphwright.passes import dialect

sdpa = torch.ops.aten.scaled_dot_product_attention.default


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked_scores(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    scores = q @ k.mT * scale
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return scores


def check(
    got: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> None:
    """Assert that `got` is the attention, up to the error of float32 scores, exponentials and sums.

    A score errs by at most (D + 2) u |q|.|k| scale, and by u of itself for the mask; its exponential is off by twice
    that, relatively (the maximum errs too); the sums over the keys add (S_k + 8) u, all of sum p |v|.
    """
    q, k, v = q.double(), k.double(), v.double()
    if q.dim() > 2:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = masked_scores(q, k, mask, causal, factor)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)  # rows without any key count as zeros
    magnitude = (q.abs() @ k.abs().mT) * abs(factor)
    if mask is not None and mask.dtype != torch.bool:
        magnitude = magnitude + mask.double().abs().nan_to_num(posinf=0.0)
    score_error = (q.shape[-1] + 4) * UNIT * magnitude.masked_fill(scores == -torch.inf, 0.0).amax(-1, keepdim=True)
    allowed = (2 * score_error + 2 * (k.shape[-2] + 8) * UNIT) * (weights @ v.abs()) + 1e-30
    error = (got.double() - weights @ v).abs()
    assert not torch.isnan(got).any()
    assert torch.all(error <= allowed), f"{(error / allowed).max().item():.1f} times the bound"


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    batch, key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 3]))
    queries = draw(st.one_of(st.integers(1, 20), st.sampled_from([1, 65, 130])))
    keys = draw(st.one_of(st.integers(1, 20), st.sampled_from([33, 128, 200])))
    depth, value_depth = draw(st.sampled_from([1, 3, 8, 20, 64])), draw(st.sampled_from([1, 7, 16, 24, 64]))
    heads = key_heads * group
    q, k = random(batch, heads, queries, depth), random(batch, key_heads, keys, depth, seed=1)
    v = random(batch, key_heads, keys, value_depth, seed=2)
    kind = draw(st.sampled_from(["none", "causal", "float", "bool"]))  # torch takes one or the other
    mask, causal = None, kind == "causal"
    if kind in ("float", "bool"):
        shape = [draw(st.sampled_from([1, n])) for n in (batch, heads, queries, keys)]
        mask = random(*shape[draw(st.integers(0, 2)) :], seed=3)
        mask = mask > 0 if kind == "bool" else torch.where(mask > 1, -torch.inf, mask)
    scale = draw(st.sampled_from([0.125, 1.0, -0.5]))
    got = run_kernel(detect(), dialect.attention, q, k, v, mask, causal, scale)
    check(got, q, k, v, mask, causal, scale)


@pytest.mark.parametrize("shape", [(17, 8), (3, 17, 8), (2, 3, 17, 8), (2, 2, 3, 17, 8)])
def test_aten_of_any_rank(shape: tuple[int, ...]) -> None:
    q, k, v = (random(*shape, seed=i) for i in range(3))
    check(run_kernel(detect(), sdpa, q, k, v), q, k, v)


def test_aten_options() -> None:
    q, k, v = random(1, 4, 9, 8), random(1, 2, 30, 8, seed=1), random(1, 2, 30, 8, seed=2)
    got = run_kernel(detect(), sdpa, q, k, v, None, 0.0, True, scale=0.3, enable_gqa=True)
    check(got, q, k, v, None, True, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_row_without_keys_is_zero_as_in_torch(dtype: torch.dtype) -> None:
    q, k, v = (random(1, 2, 7, 8, seed=i) for i in range(3))
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[3] = False
    if dtype == torch.float32:
        mask = torch.zeros(7, 7).masked_fill(~mask, -torch.inf)
    got = run_kernel(detect(), sdpa, q, k, v, mask)
    assert torch.all(got[:, :, 3] == 0)
    assert torch.all(torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)[:, :, 3] == 0)
    check(got, q, k, v, mask)


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float32).min, -2.0])
@pytest.mark.parametrize(("groups", "length"), [(1, 7), (4, 1), (4, 9)])
def test_with_a_fill_rows_are_those_of_softmax(kind: str, fill: float, groups: int, length: int) -> None:
    """A row of -inf only is NaN; a bool mask hides keys with `fill`, so that a row without keys weighs them all."""
    q, k, v = random(1, 4, length, 8), random(1, groups, 16, 8, seed=1), random(1, groups, 16, 8, seed=2)
    mask = torch.rand(length, 16, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[length // 2] = False
    mask = mask if kind == "bool" else torch.zeros(length, 16).masked_fill(~mask, fill)
    args = (q, k, v, mask, False, 0.3, fill)
    wanted = dialect.attention(q.double(), k.double(), v.double(), *args[3:])
    got = run_kernel(detect(), dialect.attention, *args).double()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)  # scores and sums in float32
    assert wanted.isnan().any() == (fill == -torch.inf)


def test_nan_stays_in_its_row() -> None:
    q, k, v = (random(1, 1, 9, 8, seed=i) for i in range(3))
    q[0, 0, 4, 2] = float("nan")
    got = run_kernel(detect(), sdpa, q, k, v)
    assert got[0, 0, 4].isnan().all()
    assert got.isnan().sum() == 8


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (random(1, 1, 9, 8, seed=i) for i in range(3))
    check(run_kernel(detect(), dialect.attention, q, k, v, None, False, 1000.0), q, k, v, None, False, 1000.0)


@pytest.mark.parametrize("causal", [False, True])
def test_heads_second_in_memory(causal: bool) -> None:
    p = Problem(batch=2, heads=4, key_heads=2, queries=37, keys=41, depth=20, value_depth=13)
    q, k = random(2, 37, 4, 20), random(2, 41, 2, 20, seed=1)
    v, out = random(2, 41, 2, 13, seed=2), torch.full((2, 37, 4, 13), float("nan"))
    func = attention(p, detect(), 0.25, causal=causal, layout="BSHD")
    compile_kernel(func, detect())["main"](*map(tvm.runtime.from_dlpack, (q, k, v, out)))
    q, k, v, got = (x.transpose(1, 2) for x in (q, k, v, out))
    check(got, q, k, v, None, causal, 0.25)


def test_queries_keys_and_values_side_by_side_in_one_buffer() -> None:
    qkv, out = random(2, 19, 3, 4, 8), torch.full((2, 19, 4, 8), float("nan"))  # [B, S, 3, H, D]
    row = 3 * 4 * 8
    parts = tuple(Placement(i * 4 * 8, 19 * row, 8, row) for i in range(3))
    func = attention(
        Problem(2, 4, 4, 19, 19, 8, 8),
        detect(),
        0.25,
        placements=(*parts, dense("BSHD", 4, 19, 8)),
        buffer_shapes=(*(tuple(qkv.shape) for _ in parts), tuple(out.shape)),
    )
    compile_kernel(func, detect())["main"](*map(tvm.runtime.from_dlpack, (qkv, qkv, qkv, out)))
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    check(out.transpose(1, 2), q, k, v, None, False, 0.25)


def test_one_head_is_shared_by_the_cores() -> None:
    plan = plan_attention(detect(), Problem(1, 1, 1, 512, 512, 64, 64), causal=False)
    cores = detect().cores
    assert plan.tasks % cores == 0
    assert plan.parts % cores == 0
    q, k, v = (random(1, 1, 300, 16, seed=i) for i in range(3))
    check(run_kernel(detect(), sdpa, q, k, v), q, k, v)


def test_refusals_say_why() -> None:
    hw, q, k = detect(), random(2, 3, 7, 8), random(2, 3, 9, 8)
    assert "dropout" in refusal(hw, sdpa, q, k, k, None, 0.5)
    assert "float64" in refusal(hw, sdpa, q.double(), k.double(), k.double())
    assert "batches" in refusal(hw, sdpa, q, k[:1], k[:1])
    assert "broadcast" in refusal(hw, sdpa, q, k[:, :1], k[:, :1])
    assert "empty" in refusal(hw, sdpa, q, k[:, :, :0], k[:, :, :0])
    large = torch.zeros(1, 1, 1, 8).expand(1, 1, 2**28, 8)
    assert "32-bit" in refusal(hw, sdpa, q[:1, :1], large, large)


def test_work_counts_half_where_causal() -> None:
    q = random(1, 2, 64, 16)
    calls: list[Any] = [kernel_of(detect(), sdpa, q, q, q, None, 0.0, causal) for causal in (False, True)]
    assert all(isinstance(call, KernelCall) for call in calls)
    assert calls[0].work.flops["float32"] == 4 * 2 * 64 * 64 * 16 == 2 * calls[1].work.flops["float32"]


@pytest.mark.parametrize(("name", "register"), [("x86-64-v3", "ymm"), ("x86-64-v4", "zmm"), ("raspberry-pi-4", ".4s")])
def test_accumulators_stay_in_registers(name: str, register: str) -> None:
    hw = lookup(name)
    p = Problem(batch=1, heads=12, key_heads=12, queries=128, keys=128, depth=64, value_depth=64)
    plan = plan_attention(hw, p, causal=False)
    loops = inner_loops(attention(p, hw, 0.125, plan=plan), hw)
    for tiling in (plan.scores, plan.values):
        accumulators = tiling.rows * tiling.columns // tiling.lanes
        products = [loop for loop in loops if loop.multiply_adds % accumulators == 0]
        assert any(loop.stack == 0 and register in loop.text for loop in products), f"{accumulators}: {loops}"


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
def test_strided_operands(data: st.DataObject) -> None:
    """One buffer [B, S, columns] holds q, k and v; the result is [B, S, H * D]."""
    draw = data.draw
    batch, groups, group = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    positions, depth, margin = draw(st.integers(1, 40)), draw(st.sampled_from([3, 8, 20])), draw(st.integers(0, 5))
    heads, causal = groups * group, draw(st.booleans())
    widths = [heads * depth, groups * depth, groups * depth]
    row = sum(widths) + margin
    x = random(batch, positions, row)
    starts = [0, widths[0], widths[0] + widths[1]]
    places = [number for start in starts for number in (start, positions * row, depth, row)]
    places += [0, positions * widths[0], depth, widths[0]]
    extents = [batch, heads, groups, positions, positions, depth, depth]
    shape = [batch, positions, widths[0]]
    got = run_kernel(detect(), dialect.strided_attention, x, x, x, None, causal, 0.25, extents, places, shape)
    q, k, v = (
        x[..., start : start + width].unflatten(-1, (-1, depth)).transpose(1, 2)
        for start, width in zip(starts, widths, strict=True)
    )
    check(got.unflatten(-1, (heads, depth)).transpose(1, 2), q, k, v, None, causal, 0.25)


def machine(bits: int) -> Hardware:
    """This machine's instructions, used as those of one with vectors of `bits`: LLVM splits or narrows them."""
    return replace(detect(), vector_bits=bits)


@pytest.mark.parametrize("bits", [128, 256, 512])
@pytest.mark.parametrize("kind", ["none", "causal", "float", "bool"])
def test_few_queries_read_keys_in_place(bits: int, kind: str) -> None:
    """Two queries of three heads on one key head, and keys that are no multiple of a vector."""
    hw, keys = machine(bits), 77
    p = Problem(2, 6, 2, 2, keys, 64, 32)
    plan = plan_attention(hw, p, kind == "causal")
    assert plan.in_place
    assert plan.group == 3
    q, k, v = random(2, 6, 2, 64), random(2, 2, keys, 64, seed=1), random(2, 2, keys, 32, seed=2)
    mask = None
    if kind in ("float", "bool"):
        mask = random(2, 6, 2, keys, seed=3)
        mask = mask > 0 if kind == "bool" else torch.where(mask > 1, -torch.inf, mask)
    got = run_kernel(hw, dialect.attention, q, k, v, mask, kind == "causal", 0.125)
    check(got, q, k, v, mask, kind == "causal", 0.125)


def test_many_queries_are_packed() -> None:
    plan = plan_attention(detect(), Problem(1, 12, 12, 197, 197, 64, 64), causal=False)
    assert not plan.in_place
    rows = -(-plan.scores.row_tiles // plan.blocks) * plan.scores.rows
    l1 = detect().cache(1)
    assert l1 is not None
    assert 4 * (rows * 197 + 197 * plan.values.columns) <= l1.size_bytes


def test_several_tiles_share_panels_that_come_from_the_second_cache() -> None:
    for keys in (256, 512, 1024):
        plan = plan_attention(lookup("x86-64-v4"), Problem(1, 12, 12, keys, keys, 64, 64), causal=False)
        assert -(-plan.scores.row_tiles // plan.blocks) >= 4, plan.reason


@pytest.mark.parametrize("bits", [128, 512])
@pytest.mark.parametrize("causal", [False, True])
def test_other_vectors(bits: int, causal: bool) -> None:
    q, k, v = random(1, 2, 61, 24), random(1, 2, 61, 24, seed=1), random(1, 2, 61, 20, seed=2)
    check(run_kernel(machine(bits), dialect.attention, q, k, v, None, causal, 0.2), q, k, v, None, causal, 0.2)


@pytest.mark.parametrize("kind", ["causal", "float"])
def test_no_masked_stores(kind: str) -> None:
    """They are slow; LLVM makes them of a select that is stored where one operand came from."""
    hw = lookup("x86-64-v3")
    func = attention(
        Problem(1, 2, 2, 50, 50, 64, 64),
        hw,
        0.125,
        causal=kind == "causal",
        mask=((1, 1, 50, 50), "float32") if kind == "float" else None,
    )
    assert "vmaskmov" not in compile_kernel(func, hw).mod.inspect_source("asm")


def test_prediction_grows_with_the_work() -> None:
    hw = lookup("zen4")

    def seconds(queries: int, keys: int, causal: bool = False) -> float:
        found = predicted_seconds(hw, plan_attention(hw, Problem(1, 12, 12, queries, keys, 64, 64), causal))
        assert found is not None
        return found

    assert seconds(1, 128) < seconds(16, 128) < seconds(128, 128, causal=True) < seconds(128, 128) < seconds(256, 256)
    assert (
        predicted_seconds(replace(hw, clock_mhz=None), plan_attention(hw, Problem(1, 1, 1, 4, 4, 4, 4), True)) is None
    )


@pytest.mark.parametrize(
    ("queries", "in_place"),
    [(1, True), (4, True), (49, False)],
)
def test_few_queries_are_computed_where_keys_and_values_lie(queries: int, in_place: bool) -> None:
    plan = plan_attention(lookup("zen4"), Problem(16, 6, 6, queries, 49, 32, 32), causal=False)
    assert plan.in_place is in_place


def test_rows_of_v_that_fall_upon_the_same_sets_of_cache_are_packed() -> None:
    hw, p = lookup("zen4"), Problem(8, 12, 12, 10, 24, 128, 128)
    assert plan_attention(hw, p, causal=False).in_place
    assert not plan_attention(hw, p, causal=False, value_stride=3 * 1024).in_place
