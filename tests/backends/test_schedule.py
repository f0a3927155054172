"""The generic schedule: right results, in vectors, in parallel where it pays, never failing."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import te, tirx, topi

from graphwright.backends.cpu import schedule as module
from graphwright.backends.cpu.expand_math import expand_math
from graphwright.backends.cpu.predict import predicted_seconds
from graphwright.backends.cpu.schedule import schedule
from graphwright.hwdb import Hardware, detect

few = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))


@functools.cache
def machine(cores: int = 4) -> Hardware:
    return dataclasses.replace(detect(), cores=cores, clock_mhz=3000.0)


def placeholder(shape: tuple[int, ...], dtype: str = "float32", name: str = "x") -> Any:
    return te.placeholder(shape, dtype, name)


def function(compute: Callable[..., Any], *inputs: Any) -> Any:
    results = compute(*inputs)
    results = list(results) if isinstance(results, (list, tuple)) else [results]
    return te.create_prim_func([*inputs, *results])


def run(func: Any, operands: list[np.ndarray], results: list[tuple[tuple[int, ...], str]]) -> list[np.ndarray]:
    main = tvm.compile(
        tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), target=tvm.target.Target(detect().tvm_target())
    )["main"]
    outs = [tvm.runtime.tensor(np.full(shape, 77).astype(dtype)) for shape, dtype in results]
    main(*[tvm.runtime.tensor(np.array(x, order="C")) for x in operands], *outs)
    return [out.numpy() for out in outs]


def scheduled(func: Any, cores: int = 4) -> Any:
    """The schedule by the first rule; what falls to a simpler one fails the test."""
    return module._joined(func, machine(cores))


def results_of(func: Any, count: int) -> list[tuple[tuple[int, ...], str]]:
    return [(tuple(int(n) for n in p.shape), str(p.dtype)) for p in func.params[len(func.params) - count :]]


def check(
    compute: Callable[..., Any], *operands: np.ndarray, expected: Any, rtol: float = 0.0, atol: float = 0.0
) -> str:
    """Assert the scheduled function's result; returns its script."""
    inputs = [placeholder(x.shape, str(x.dtype), f"x{i}") for i, x in enumerate(operands)]
    func = function(compute, *inputs)
    wanted = expected if isinstance(expected, list) else [expected]
    better = scheduled(func)
    got = run(expand_math(better), list(operands), results_of(func, len(wanted)))
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, np.asarray(theirs), rtol=rtol, atol=atol, equal_nan=True)
        assert ours.dtype == np.asarray(theirs).dtype
    return str(better.script())


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


shapes = st.lists(st.sampled_from([1, 2, 3, 5, 7, 8, 9, 16, 17, 33]), min_size=1, max_size=4).map(tuple)


@few
@given(shapes, st.data())
def test_permutations_are_exact(shape: tuple[int, ...], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    dtype = data.draw(st.sampled_from(["float32", "float64", "int8", "int64", "float16", "bool"]))
    x = (normal(*shape) * 100).astype(dtype)
    check(lambda a: topi.transpose(a, order), x, expected=x.transpose(order))


@few
@given(shapes, st.data())
def test_reductions_over_any_axes(shape: tuple[int, ...], data: st.DataObject) -> None:
    axes = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1).map(sorted))
    x = normal(*shape)
    exact = x.astype(np.float64).sum(tuple(axes)).astype(np.float32)
    check(lambda a: topi.sum(a, axes), x, expected=exact, rtol=1e-5, atol=2e-6 * math.sqrt(x.size))
    check(lambda a: topi.max(a, axes), x, expected=x.max(tuple(axes)))


@few
@given(shapes, st.data())
def test_softmax_over_any_axis_runs_by_rows(shape: tuple[int, ...], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    x = normal(*shape)
    exact = torch.softmax(torch.from_numpy(x).double(), axis).float().numpy()
    check(lambda a: topi.nn.softmax(a, axis), x, expected=exact, rtol=3e-6, atol=1e-7)


@few
@given(shapes, shapes)
def test_broadcast_arithmetic(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    rank = min(len(left), len(right))
    pairs = zip(left[-rank:], right[-rank:], strict=True)
    right = tuple(a if k % 2 else 1 for k, (a, _) in enumerate(pairs))
    a, b = normal(*left), normal(*right, seed=1)
    check(lambda x, y: topi.add(topi.multiply(x, y), y), a, b, expected=a * b + b, rtol=1e-6, atol=1e-6)


@few
@given(st.integers(1, 20), st.integers(1, 20), st.tuples(*[st.integers(0, 3)] * 4))
def test_padding_is_cut_into_vectors(height: int, width: int, pad: tuple[int, int, int, int]) -> None:
    x = normal(2, 3, height, width)
    top, bottom, left, right = pad
    expected = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    check(lambda a: topi.nn.pad(a, [0, 0, top, left], [0, 0, bottom, right]), x, expected=expected)


@few
@given(st.integers(0, 2), st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_concatenation_is_cut_into_its_parts(axis: int, lengths: list[int]) -> None:
    arrays = [normal(*[n if k == axis else 5 for k in range(3)], seed=i) for i, n in enumerate(lengths)]
    expected = np.concatenate(arrays, axis)
    check(lambda *parts: topi.concatenate(parts, axis), *arrays, expected=expected)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("width", [4, 19])
def test_convolution_with_guards_in_the_reduction(kernel: int, pad: int, width: int) -> None:
    x, w = normal(2, 3, 9, width), normal(5, 3, kernel, kernel, seed=1)
    exact = torch.nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(w), padding=pad).numpy()
    check(lambda a, b: topi.nn.conv2d_nchw(a, b, 1, pad, 1), x, w, expected=exact, rtol=1e-5, atol=1e-5)


def test_heads_are_merged_by_whole_vectors() -> None:
    x = normal(12, 5, 64)
    script = check(
        lambda a: te.compute((5, 768), lambda s, c: a[c // 64, s, c % 64]),
        x,
        expected=x.transpose(1, 0, 2).reshape(5, 768),
    )
    assert "// 64" not in script
    assert "T.vectorized" in script


def test_gathers_copy_whole_vectors() -> None:
    table, index = normal(30, 65), np.array([3, 29, 0, 3, 7], "int64")
    check(lambda t, i: te.compute((5, 65), lambda a, b: t[i[a], b]), table, index, expected=table[index])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_argmax_takes_the_first(axis: int) -> None:
    x = np.random.default_rng(0).integers(0, 3, (6, 17, 9)).astype("float32")
    check(lambda a: topi.argmax(a, axis, select_last_index=False), x, expected=x.argmax(axis).astype("int32"))


@pytest.mark.parametrize(
    ("shape", "axis", "value"), [((3, 0), 1, 0.0), ((0, 4), 1, None), ((0,), 0, 0.0), ((), (), None)]
)
def test_empty_and_scalar_tensors(shape: tuple[int, ...], axis: Any, value: float | None) -> None:
    x = np.full(shape, 2.0, "float32")
    if shape == ():
        check(lambda a: te.compute((), lambda: a() + 1.0), x, expected=np.float32(3))
    else:
        check(lambda a: topi.sum(a, axis), x, expected=x.sum(axis, dtype="float32"))


def test_nan_survives_a_maximum_written_to_keep_it() -> None:
    def combine(a: Any, b: Any) -> Any:
        return tirx.Select(tirx.any(a > b, tirx.isnan(a)), a, b)

    keep = te.comm_reducer(combine, lambda dtype: tirx.const(-math.inf, dtype))
    x = normal(5, 37)
    x[1, 3] = x[2, 36] = np.nan

    def compute(a: Any) -> Any:
        k = te.reduce_axis((0, 37), "k")
        return te.compute((5,), lambda i: keep(a[i, k], axis=k))

    check(compute, x, expected=x.max(1))


def test_long_sums_are_more_accurate_than_one_chain() -> None:
    x = np.random.default_rng(0).uniform(0, 1, (1, 200_003)).astype("float32")
    exact = x.astype(np.float64).sum()
    check(lambda a: topi.sum(a, 1), x, expected=np.array([exact], "float32"), rtol=3e-7)
    check(lambda a: topi.sum(a, 0), x.T.copy(), expected=np.array([exact], "float32"), rtol=3e-7)


def test_several_results_of_one_function() -> None:
    x = normal(40, 50)

    def compute(a: Any) -> list[Any]:
        b = te.compute(a.shape, lambda *i: a(*i) * 2.0, "b")
        return [b, topi.sum(b, 1), topi.transpose(b, (1, 0))]

    check(compute, x, expected=[x * 2, (x * 2).sum(1), (x * 2).T], rtol=1e-5, atol=1e-5)


def test_work_decides_what_is_parallel() -> None:
    def relu(shape: tuple[int, ...]) -> Any:
        return function(lambda a: topi.nn.relu(a), placeholder(shape))

    small, large = scheduled(relu((8, 16))).script(), scheduled(relu((1024, 1024))).script()
    assert "T.parallel" not in small
    assert "T.parallel" in large
    assert "T.parallel" not in scheduled(relu((1024, 1024)), cores=1).script()
    for script in (small, large):
        assert "T.vectorized" in script


def test_cheap_producers_vanish_and_shared_heavy_ones_stay() -> None:
    def cheap(a: Any) -> Any:
        b = te.compute(a.shape, lambda *i: a(*i) + 1.0, "b")
        return te.compute(a.shape, lambda *i: b(*i) * b(*i), "c")

    assert "alloc_buffer" not in scheduled(function(cheap, placeholder((64, 64)))).script()
    softmax = scheduled(function(lambda a: topi.nn.softmax(a, 1), placeholder((64, 100)))).script()
    assert softmax.count("T.exp") < 12  # unrolled, but computed once: maximum, exponential and sum, quotient
    assert "alloc_buffer((100,)" in softmax  # the exponentials of one row


def test_statements_of_other_forms_are_kept() -> None:
    def compute(a: Any) -> Any:
        def body(ins: Any, outs: Any) -> Any:
            i = tirx.Var("i", "int32")
            store = tirx.BufferStore(outs[0], tirx.BufferLoad(ins[0], [15 - i]), [i])
            return tirx.For(i, 0, 16, tirx.ForKind.SERIAL, store)

        reverse = te.extern((16,), [a], body, dtype="float32", name="reverse")
        return te.compute((16,), lambda i: reverse[i] + 1.0)

    x = normal(16)
    check(compute, x, expected=x[::-1] + 1)


def test_a_failing_rule_leaves_a_correct_function(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    func = function(lambda a: topi.sum(a, 1), placeholder((5, 9)))

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(module, "_scheduled", broken)
    with caplog.at_level(logging.DEBUG, logger=module.__name__):
        assert schedule(func, machine()).same_as(func)
    assert "planted" in caplog.text


@pytest.mark.parametrize("bits", [128, 256, 512])
def test_vector_width_comes_from_the_machine(bits: int) -> None:
    hw = dataclasses.replace(machine(), vector_bits=bits)
    func = function(lambda a: topi.nn.relu(a), placeholder((64, 64)))
    assert f"T.vectorized({bits // 32})" in schedule(func, hw).script()
    turned = function(lambda a: topi.transpose(a, (1, 0)), placeholder((64, 64)))
    x = normal(64, 64)
    np.testing.assert_array_equal(run(schedule(turned, hw), [x], [((64, 64), "float32")])[0], x.T)


def test_fused_loops_are_predicted_by_bytes_and_by_arithmetic():
    def function(size, formula):
        x = te.placeholder((size,), "float32", "x")
        return te.create_prim_func([x, te.compute((size,), lambda i: formula(x[i]), "y")])

    copy, double, heavy = (
        predicted_seconds(function(size, formula), detect())
        for size, formula in (
            (1 << 20, lambda v: v),
            (1 << 21, lambda v: v),
            (1 << 20, lambda v: tirx.exp(tirx.exp(v))),
        )
    )
    assert copy < double < 3 * copy
    assert copy < heavy


def test_a_prediction_counts_the_rows_that_are_looked_up_not_the_table() -> None:
    def looked_up(rows: int) -> float:
        table = te.placeholder((rows, 512), "float32", "table")
        place = te.placeholder((64,), "int64", "place")
        found = te.compute((64, 512), lambda i, j: table[place[i], j], "found")
        seconds = predicted_seconds(te.create_prim_func([table, place, found]), detect())
        assert seconds is not None
        return seconds

    assert looked_up(1 << 20) == looked_up(1 << 10)


def test_a_transpose_is_predicted_dearer_than_a_copy() -> None:
    def moved(turned: bool) -> float:
        x = te.placeholder((512, 512), "float32", "x")
        y = te.compute((512, 512), lambda i, j: x[j, i] if turned else x[i, j] + 1.0, "y")
        seconds = predicted_seconds(te.create_prim_func([x, y]), detect())
        assert seconds is not None
        return seconds

    assert moved(True) > 1.5 * moved(False)
