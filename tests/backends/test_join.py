"""Stages that run together: one pass over formulas, long reductions in blocks, rows with other rows in between."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import te, topi

from graphwright.backends.cpu import schedule as module
from graphwright.backends.cpu.expand_math import expand_math
from graphwright.backends.cpu.join import groups, join_formulas, split_reductions
from graphwright.backends.cpu.stages import inline_producers, read_stages
from graphwright.hwdb import Hardware, detect

few = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


def machine(cores: int = 4, bits: int | None = None) -> Hardware:
    hw = dataclasses.replace(detect(), cores=cores, clock_mhz=3000.0)
    return hw if bits is None else dataclasses.replace(hw, vector_bits=bits)


def stages_of(*tensors: Any) -> list[Any]:
    return inline_producers(*read_stages(te.create_prim_func(list(tensors), "int64")))


def run(func: Any, inputs: list[np.ndarray], shapes: list[tuple[int, ...]], hw: Hardware) -> list[np.ndarray]:
    scheduled = expand_math(module._joined(func, hw)).with_attr("global_symbol", "main")
    main = tvm.compile(tvm.IRModule({"main": scheduled}), target=tvm.target.Target(detect().tvm_target()))["main"]
    outs = [tvm.runtime.tensor(np.full(shape, 77, "float32")) for shape in shapes]
    main(*[tvm.runtime.tensor(x) for x in inputs], *outs)
    return [out.numpy() for out in outs]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype("float32")


# ---- one pass ----


def chain(*shape: int) -> list[Any]:
    x = te.placeholder(shape, name="x")
    y = te.compute(shape, lambda *i: x(*i) * 2, name="y")
    return [x, y, te.compute(shape, lambda *i: y(*i) + x(*i), name="z")]


def test_formulas_over_the_same_elements_are_one_stage() -> None:
    stages = stages_of(*chain(1000))
    together = join_formulas(stages)
    assert together is not None
    assert len(together.body.seq) == 2
    assert [b.name for b in together.writes] == ["y", "z"]


@few
@given(st.sampled_from([1, 7, 8, 100, 1000, 4099]), st.sampled_from([256, 512]))
def test_one_pass_has_exact_tails(length: int, bits: int) -> None:
    x = normal(length)
    func = te.create_prim_func(chain(length), "int64")
    y, z = run(func, [x], [(length,)] * 2, machine(bits=bits))
    np.testing.assert_array_equal(y, x * 2)
    np.testing.assert_array_equal(z, x * 2 + x)


def test_a_single_stage_is_not_joined() -> None:
    assert join_formulas(stages_of(*chain(8)[:2])) is None


def test_other_elements_are_not_joined() -> None:
    x = te.placeholder((8, 9), name="x")
    y = te.compute((8, 9), lambda i, j: x[i, j] * 2, name="y")
    short = te.compute((8, 8), lambda i, j: x[i, j] + 1, name="short")
    assert join_formulas(stages_of(x, y, short)) is None


def test_a_read_of_another_element_is_not_joined() -> None:
    x = te.placeholder((9, 9), name="x")
    y = te.compute((9, 9), lambda i, j: x[i, j] * 2, name="y")
    turned = te.compute((9, 9), lambda i, j: y[j, i] + 1, name="turned")
    assert join_formulas(stages_of(x, y, turned)) is None


def test_reductions_are_not_joined() -> None:
    x = te.placeholder((9, 9), name="x")
    assert join_formulas(stages_of(x, topi.sum(x, 1), topi.max(x, 1))) is None


# ---- blocks ----


def test_a_long_reduction_goes_by_blocks() -> None:
    x = te.placeholder((1 << 16,), name="x")
    stages, buffers = split_reductions(stages_of(x, topi.sum(x, 0)), machine())
    first, second = stages
    assert len(buffers) == 1
    assert first.spatial[0].extent == second.reduce[0].extent == int(buffers[0].shape[0])
    assert first.spatial[0].extent % 4 == 0


@pytest.mark.parametrize(
    ("shape", "cores", "why"),
    [
        ((1 << 10,), 4, "short"),
        ((1 << 16,), 1, "one core"),
        ((65537,), 4, "prime"),
        ((8, 1 << 16), 4, "as many results as cores"),
    ],
)
def test_reductions_that_stay_whole(shape: tuple[int, ...], cores: int, why: str) -> None:
    x = te.placeholder(shape, name="x")
    stages = stages_of(x, topi.sum(x, len(shape) - 1))
    assert split_reductions(stages, machine(cores)) == (stages, []), why


def test_a_reduction_nobody_can_combine_stays_whole() -> None:
    x = te.placeholder((1 << 16,), name="x")
    stages = stages_of(x, topi.argmax(x, 0))
    assert split_reductions(stages, machine()) == (stages, [])


@few
@given(st.sampled_from([(1 << 15,), (3, 1 << 14), (256, 256), (64, 32, 48)]), st.sampled_from([2, 3, 8]))
def test_statistics_by_blocks_are_right(shape: tuple[int, ...], cores: int) -> None:
    values = normal(*shape)
    x = te.placeholder(shape, name="x")
    axes = list(range(len(shape)))
    func = te.create_prim_func([x, topi.sum(x, axes), topi.max(x, axes), topi.min(x, axes)], "int64")
    total, most, least = run(func, [values], [()] * 3, machine(cores))
    np.testing.assert_allclose(total, values.astype("float64").sum(), rtol=1e-5, atol=2e-6 * values.size**0.5)
    assert most == values.max()
    assert least == values.min()


# ---- rows ----


def test_another_stage_in_between_does_not_part_two_of_equal_rows() -> None:
    x = te.placeholder((64, 512), name="x")
    table = te.placeholder((512, 7), name="table")
    k, n = te.reduce_axis((0, 512), "k"), te.reduce_axis((0, 7), "n")
    total = te.compute((64,), lambda i: te.sum(x[i, k], axis=k), name="total")
    columns = te.compute((512,), lambda j: te.sum(table[j, n], axis=n), name="columns")
    y = te.compute((64, 512), lambda i, j: x[i, j] * total[i], name="y")
    found = groups(stages_of(x, table, total, columns, y), machine())
    assert sorted(len(members) for members, _ in found) == [1, 2]
    assert [{b.name for s in members for b in s.writes} for members, depth in found if depth] == [{"total", "y"}]


def test_readers_of_one_tensor_share_its_rows() -> None:
    x = te.placeholder((64, 512), name="x")
    found = groups(stages_of(x, topi.sum(x, 1), topi.max(x, 1)), machine())
    assert [(len(members), depth) for members, depth in found] == [(2, 1)]


def test_unrelated_large_stages_stay_apart() -> None:
    x, y = te.placeholder((64, 512), name="x"), te.placeholder((64, 512), name="y")
    found = groups(stages_of(x, y, topi.sum(x, 1), topi.max(y, 1)), machine())
    assert [depth for _, depth in found] == [0, 0]


def test_rows_beyond_half_of_the_second_cache_stay_apart() -> None:
    wide = 1 << 21
    x = te.placeholder((4, wide), name="x")
    y = te.compute((4, wide), lambda i, j: te.exp(x[i, j]), name="y")
    k = te.reduce_axis((0, wide), "k")
    s = te.compute((4,), lambda i: te.sum(y[i, k], axis=k), name="s")
    found = groups(stages_of(x, y, s), machine())
    assert [depth for _, depth in found] == [0, 0]
