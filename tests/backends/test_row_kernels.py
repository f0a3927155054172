"""Softmax and normalisation over rows: accuracy against float64 beside torch's own, any row length, special values."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_harness import kernel_of, refusal
from torch import fx

from graphwright.backends.lowering import kernels_norm  # noqa: F401  (fills KERNELS)
from graphwright.backends.lowering.registry import KERNELS, KernelCall
from graphwright.hwdb import Hardware, detect

aten = torch.ops.aten
HW = dataclasses.replace(detect(), cores=3, clock_mhz=3000.0)
few = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
lengths = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 128, 129, 300, 1000]))


def run(op: Any, *args: Any, hw: Hardware = HW) -> list[torch.Tensor]:
    """The results of the kernel that the table offers for this call."""
    graph = fx.Graph()
    given: dict[fx.Node, torch.Tensor] = {}

    def node_of(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(f"t{len(given)}")
        node.meta["val"] = value.to("meta")
        given[node] = value.contiguous()
        return node

    node = graph.call_function(op, tuple(node_of(a) for a in args))
    expected = op(*args)
    single = isinstance(expected, torch.Tensor)
    node.meta["val"] = expected.to("meta") if single else tuple(e.to("meta") for e in expected)
    call = KERNELS[op](node, hw)
    assert isinstance(call, KernelCall), call
    func = call.func.with_attr("global_symbol", "main")
    main = tvm.compile(tvm.IRModule({"main": func}), target=tvm.target.Target(detect().tvm_target()))["main"]
    results = [torch.full(e.shape, 77.0) for e in ([expected] if single else expected)]
    main(*[tvm.runtime.tensor(given[o].numpy()) for o in call.operands], *map(tvm.runtime.from_dlpack, results))
    return results


def check(op: Any, *args: Any) -> None:
    """At most four times torch's own error against float64, in the largest norm, and never worse than 2e-7 of it."""
    ours, theirs = run(op, *args), op(*args)
    wide = op(*[a.double() if isinstance(a, torch.Tensor) else a for a in args])
    if isinstance(theirs, torch.Tensor):
        theirs, wide = [theirs], [wide]
    for a, b, exact in zip(ours, theirs, wide, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.isinf(), b.isinf())
        finite = exact.isfinite() & b.isfinite()
        scale = exact[finite].abs().max() if finite.any() else 0.0
        own = (b.double() - exact)[finite].abs().max() if finite.any() else 0.0
        error = (a.double() - exact)[finite].abs().max() if finite.any() else 0.0
        assert error <= 4 * own + 2e-7 * scale, (float(error), float(own))


def values(rows: int, length: int, seed: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(rows, length, generator=torch.Generator().manual_seed(seed)) * scale + mean


@few
@given(st.integers(1, 9), lengths, st.integers(0, 99), st.sampled_from([0.1, 3.0, 40.0]))
def test_softmax(rows: int, length: int, seed: int, scale: float) -> None:
    check(aten.softmax.int, values(rows, length, seed, scale), -1)


@few
@given(st.integers(1, 9), lengths, st.integers(0, 99), st.sampled_from([0.1, 3.0, 40.0]))
def test_log_softmax(rows: int, length: int, seed: int, scale: float) -> None:
    check(aten.log_softmax.int, values(rows, length, seed, scale), -1)


@pytest.mark.parametrize("op", [aten.softmax.int, aten.log_softmax.int])
def test_masked_infinite_and_missing_values(op: Any) -> None:
    inf, nan = math.inf, math.nan
    x = values(8, 37, 0)
    x[0, 5:] = -inf
    x[1] = -inf
    x[2, 36] = inf
    x[3, 0] = nan
    x[4, 36] = nan
    x[5] = -1e30
    x[6] = 1e38
    x[7] = 1e-42
    check(op, x, -1)


@few
@given(
    st.integers(1, 9),
    lengths,
    st.integers(0, 99),
    st.sampled_from([(1.0, 0.0), (1.0, 1000.0), (1e-3, 10.0), (1e4, -1e5)]),
    st.booleans(),
    st.booleans(),
)
def test_layer_norm(
    rows: int, length: int, seed: int, spread: tuple[float, float], weighted: bool, shifted: bool
) -> None:
    x = values(rows, length, seed, *spread)
    weight = values(1, length, seed + 1)[0] if weighted else None
    bias = values(1, length, seed + 2)[0] if shifted else None
    check(aten.layer_norm.default, x, [length], weight, bias, 1e-5)


def test_layer_norm_of_constant_rows_of_nan_and_of_several_dims() -> None:
    x = torch.full((3, 4, 5), 7.0)
    x[1, 0, 0] = math.nan
    check(aten.layer_norm.default, x, [4, 5], None, None, 1e-5)
    check(aten.layer_norm.default, values(6, 20, 0).view(2, 3, 4, 5), [4, 5], values(4, 5, 1), values(4, 5, 2), 1e-5)


def test_native_layer_norm_gives_its_statistics() -> None:
    check(aten.native_layer_norm.default, values(5, 70, 0, 2.0, 3.0), [70], values(1, 70, 1)[0], None, 1e-6)


@few
@given(st.integers(1, 6), lengths, st.integers(0, 99), st.booleans())
def test_rms_norm(rows: int, length: int, seed: int, weighted: bool) -> None:
    weight = values(1, length, seed + 1)[0] if weighted else None
    check(aten.rms_norm.default, values(rows, length, seed, 3.0), [length], weight, 1e-6)


@few
@given(st.integers(1, 3), st.sampled_from([(6, 3), (4, 1), (8, 8)]), st.integers(1, 40), st.integers(0, 99))
def test_group_norm(batch: int, channels: tuple[int, int], plane: int, seed: int) -> None:
    count, groups = channels
    x = values(batch * count, plane, seed, 2.0, 5.0).view(batch, count, plane)
    weight, bias = values(1, count, seed + 1)[0], values(1, count, seed + 2)[0]
    check(aten.group_norm.default, x, groups, weight, bias, 1e-5)
    check(aten.native_group_norm.default, x, None, bias, batch, count, plane, groups, 1e-5)


@pytest.mark.parametrize("bits", [128, 256, 512])
@pytest.mark.parametrize("length", [5, 16, 100])
def test_every_vector_width(bits: int, length: int) -> None:
    hw = dataclasses.replace(HW, vector_bits=bits, vector_registers=16 if bits == 256 else 32)
    x = values(4, length, 0)
    torch.testing.assert_close(run(aten.softmax.int, x, -1, hw=hw)[0], torch.softmax(x, -1))


def test_many_rows_are_parallel_and_few_are_not() -> None:
    def tasks(shape: tuple[int, ...]) -> int | None:
        call = kernel_of(HW, aten.softmax.int, torch.zeros(shape), -1)
        assert isinstance(call, KernelCall)
        return call.work.tasks

    assert tasks((4, 16)) == 1
    many = tasks((4096, 512))
    assert many is not None
    assert many >= HW.cores


def test_refusals_name_the_reason() -> None:
    assert "not the last" in refusal(HW, aten.softmax.int, torch.zeros(3, 4), 0)
    assert "float64" in refusal(HW, aten.softmax.int, torch.zeros(3, 4, dtype=torch.float64), -1)
    assert "no rows" in refusal(HW, aten.softmax.int, torch.zeros(3, 0), -1)
    assert "no rows" in refusal(HW, aten.softmax.int, torch.zeros(()), 0)
    assert "float64" in refusal(HW, aten.layer_norm.default, torch.zeros(3, 4, dtype=torch.float64), [4])
    assert "no rows" in refusal(HW, aten.layer_norm.default, torch.zeros(0, 4), [4])
    assert "float16" in refusal(HW, aten.group_norm.default, torch.zeros(1, 4, 2, dtype=torch.float16), 2)


def test_a_softmax_whose_later_dims_are_one_is_over_the_last() -> None:
    x = values(6, 11, 0).view(2, 3, 11, 1, 1)
    torch.testing.assert_close(run(aten.softmax.int, x, 2)[0], torch.softmax(x, 2))
