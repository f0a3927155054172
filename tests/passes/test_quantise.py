"""Products in 8 bits: what `quantise` writes, how roundings are joined, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import trace, trace_core
from torch import fx

from graphwright.compiler.pipeline import copy_graph
from graphwright.compiler.reference import run_eager
from graphwright.hwdb import Hardware, lookup
from graphwright.passes import dialect, dialect_int8
from graphwright.passes.fold_constants import fold_constants
from graphwright.passes.fuse_matmul_bias import fuse_matmul_bias
from graphwright.passes.hoist_quantise import hoist_quantise
from graphwright.passes.precision.forms import PRODUCTS
from graphwright.passes.precision.int8_forms import int8_form, is_product, table_reason
from graphwright.passes.precision.int8_scales import (
    Scale,
    Table,
    corrected_bias,
    quantised_weight,
    scale_between,
    weight_scales,
)
from graphwright.passes.quantise import quantise
from graphwright.passes.refusals import recording
from graphwright.passes.requantise import requantise

VNNI = lookup("znver4")
conv2d = dialect.conv2d


def linears(*sizes: int) -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(i, o), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1]).eval()


def fused(model: Any, *inputs: torch.Tensor) -> fx.GraphModule:
    graph = trace(model, inputs)
    fuse_matmul_bias(graph, VNNI)
    return graph


def named(graph: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph.graph.nodes if is_product(n)]


def table_for(graph: fx.GraphModule, x: torch.Tensor) -> Table:
    """Scales of what every product reads, from one run."""
    scales: dict[str, Scale] = {}

    class Look(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor) and value.is_floating_point() and n.op != "get_attr":
                scales[n.name] = scale_between(float(value.min()), float(value.max()))
            return value

    with torch.no_grad():
        Look(graph).run(x)
    return Table(scales)


def targets(graph: fx.GraphModule) -> list[str]:
    return [str(n.target).split(".")[1] for n in graph.graph.nodes if n.op == "call_function"]


def joined(graph: fx.GraphModule) -> int:
    count = 0
    while made := hoist_quantise(graph, VNNI) + requantise(graph, VNNI):
        count += made
    return count


def test_two_linears_become_integers_with_one_rounding_each() -> None:
    model, x = linears(64, 48, 32), torch.randn(5, 64)
    graph = fused(model, x)
    before = run_eager(graph, [x])[0]
    table = table_for(graph, x)
    assert quantise(graph, table, {n.name for n in named(graph)}) == 2
    assert targets(graph) == ["quantize", "qlinear", "quantize", "qlinear"]
    assert joined(graph) == 1
    assert targets(graph) == ["quantize", "qlinear", "qlinear"]
    assert quantise(graph, table, {n.name for n in named(graph)}) == 0
    after = run_eager(graph, [x])[0]
    # Two products of values in steps of about 1/255 of their range each: a few hundredths would be a fault.
    assert 0.0 < float((after - before).norm() / before.norm()) < 2e-2


def test_weights_alone_leave_inputs_as_they_are() -> None:
    model, x = linears(64, 48, 32), torch.randn(5, 64)
    graph = fused(model, x)
    before = run_eager(graph, [x])[0]
    names = {n.name for n in named(graph)}
    assert quantise(graph, Table({}), names, weights_only=names) == 2
    assert targets(graph) == ["linear_w8", "linear_w8"]
    after = run_eager(graph, [x])[0]
    assert 0.0 < float((after - before).norm() / before.norm()) < 2e-2


@pytest.mark.parametrize("way", ["weights_only", "by_rows", "halved"])
def test_products_read_what_another_form_computes(way: str) -> None:
    """By the scale of the value, whatever its node is called now."""
    x = torch.randn(5, 64)
    graph = fused(torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(2)]), x)
    first, second = (n.name for n in named(graph))
    before = run_eager(graph, [x])[0]
    some: Any = {first: 32} if way == "halved" else {first}
    assert quantise(graph, table_for(graph, x), {first, second}, **{way: some}) == 2
    assert targets(graph)[1:] == ["quantize", "qlinear"]
    assert float((run_eager(graph, [x])[0] - before).norm() / before.norm()) < 0.2  # of four bits: 9 %


def test_products_read_rows_of_a_table() -> None:
    ids = torch.arange(1100)
    model = torch.nn.Sequential(torch.nn.Embedding(1100, 64), torch.nn.Linear(64, 32))
    graph = fused(model, ids)
    before = run_eager(graph, [ids])[0]
    names = {n.name for n in graph.graph.nodes if is_product(n) or table_reason(graph, n) is not None}
    assert quantise(graph, table_for(graph, ids), names) == 2
    assert targets(graph) == ["embedding_w8", "quantize", "qlinear"]
    assert float((run_eager(graph, [ids])[0] - before).norm() / before.norm()) < 2e-2


def test_only_what_was_chosen() -> None:
    model, x = linears(64, 48, 32), torch.randn(5, 64)
    graph = fused(model, x)
    last = named(graph)[-1].name
    assert quantise(graph, table_for(graph, x), {last}) == 1
    assert targets(graph) == ["linear", "quantize", "qlinear"]


def residual_block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    sizes = ([1, 1], [1, 1, 1, 1], [1, 1], 1)
    y = conv2d(x, w, None, None, *sizes, "relu", [], "NHWC")
    pooled = torch.ops.graphwright.max_pool2d(y, [2, 2], [2, 2], [0, 0, 0, 0], [1, 1], False, "NHWC")
    z = conv2d(pooled, w, None, None, *sizes, "relu", [], "NHWC")
    return conv2d(z, w, None, pooled, *sizes, "relu", [], "NHWC")


class Block(torch.nn.Module):
    def __init__(self, body: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("w", torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(1)) / 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x, self.w)


def test_a_residual_block_and_its_pool_stay_in_bytes() -> None:
    x = torch.randn(1, 8, 8, 16)
    graph = trace(Block(residual_block), [x])
    quantise(graph, table_for(graph, x), {n.name for n in named(graph)})
    joined(graph)
    assert targets(graph) == ["quantize", "qconv2d", "max_pool2d", "qconv2d", "qconv2d"]
    last = next(n for n in reversed(graph.graph.nodes) if n.op == "call_function")
    given = dict(zip([a.name for a in last.target._schema.arguments], last.args, strict=True))
    assert given["residual"].meta["val"].dtype == torch.uint8
    assert given["dtype"] is None


def test_concatenated_images_are_rounded_in_front() -> None:
    def body(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        sizes = ([1, 1], [1, 1, 1, 1], [1, 1], 1)
        a = conv2d(x, w, None, None, *sizes, "relu", [], "NHWC")
        b = conv2d(x, w, None, None, *sizes, "none", [], "NHWC")
        both = torch.cat([a, b], 3)[..., :16]
        return conv2d(both, w, None, None, *sizes, "none", [], "NHWC")

    x = torch.randn(1, 8, 8, 16)
    graph = trace(Block(body), [x])
    quantise(graph, table_for(graph, x), {n.name for n in named(graph)})
    before = run_eager(copy_graph(graph), [x])[0]
    joined(graph)
    assert targets(graph) == ["quantize", "qconv2d", "qconv2d", "cat", "slice", "qconv2d"]
    assert torch.equal(run_eager(graph, [x])[0], before)  # rounding in front of moves gives the same bits


def test_pairs_of_one_scale_go_and_of_two_stay() -> None:
    def same(x: torch.Tensor) -> torch.Tensor:
        q = dialect_int8.quantize(x, 0.1, 3, torch.uint8)
        back = dialect_int8.dequantize(q, 0.1, 3)
        return dialect_int8.dequantize(dialect_int8.quantize(back, 0.1, 3, torch.uint8), 0.1, 3)

    def other(x: torch.Tensor) -> torch.Tensor:
        q = dialect_int8.quantize(x, 0.1, 3, torch.uint8)
        back = dialect_int8.dequantize(q, 0.1, 3)
        return dialect_int8.dequantize(dialect_int8.quantize(back, 0.2, 3, torch.uint8), 0.2, 3)

    x = torch.randn(9)
    graph = trace(same, [x])
    assert requantise(graph, VNNI) == 1
    assert targets(graph) == ["quantize", "dequantize"]
    assert requantise(trace(other, [x]), VNNI) == 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.permutations(range(3)), st.floats(0.01, 1.0), st.integers(0, 255), st.integers(0, 2))
def test_hoisting_keeps_the_bits(order: list[int], scale: float, zero: int, kind: int) -> None:
    def moved(x: torch.Tensor) -> torch.Tensor:
        y = x.relu().permute(order)
        if kind == 1:
            y = torch.cat([y, y], 0).reshape(-1)
        if kind == 2:
            y = y[1:].unsqueeze(0)
        return dialect_int8.quantize(y, scale, zero, torch.uint8)

    x = torch.randn(3, 4, 5) * 9
    graph = trace_core(moved, [x], pre_dispatch=True)
    before = run_eager(copy_graph(graph), [x])[0]
    assert hoist_quantise(graph, VNNI) >= (order != [0, 1, 2])
    assert targets(graph)[1] == "quantize"
    assert torch.equal(run_eager(graph, [x])[0], before)
    assert hoist_quantise(graph, VNNI) == 0


def test_moves_that_others_read_stay_in_float32() -> None:
    def two_readers(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x.t()
        return dialect_int8.quantize(y, 0.1, 0, torch.uint8), y.exp()

    with recording() as refusals:
        assert hoist_quantise(trace(two_readers, [torch.randn(3, 4)]), VNNI) == 0
    assert any("float32" in r.reason for r in refusals)


def test_what_is_returned_or_rounded_twice_is_not_requantised() -> None:
    w, s = torch.randint(-9, 9, (4, 8), dtype=torch.int8), torch.ones(4)

    class Returned(torch.nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            self.again = again
            self.register_buffer("w", w)
            self.register_buffer("s", s)

        def forward(self, q: torch.Tensor) -> Any:
            y = dialect_int8.qlinear(q, 0, self.w, self.s, None, None, 1.0, 0, "none", [], 1.0, 0, None)
            first = dialect_int8.quantize(y, 0.5, 0, torch.uint8)
            return (first, dialect_int8.quantize(y, 0.7, 0, torch.uint8)) if self.again else (first, y)

    q = torch.randint(0, 255, (2, 8), dtype=torch.uint8)
    for again, reason in ((True, "different scales"), (False, "returns")):
        with recording() as refusals:
            assert requantise(trace(Returned(again), [q]), VNNI) == 0
        assert any(reason in r.reason for r in refusals)


def form(model: Any, *inputs: torch.Tensor, hw: Hardware = VNNI) -> Any:
    graph = fused(model, *inputs)
    return int8_form(graph, next(n for n in graph.graph.nodes if n.target in PRODUCTS), hw)


def test_forms_that_pay_and_refusals_with_their_reasons() -> None:
    x = torch.randn(64, 256)
    assert form(linears(256, 256), x).pays
    without = form(linears(256, 256), x, hw=lookup("x86-64-v3"))
    assert not without.possible
    assert "no dot product of bytes" in without.reason
    pairs = form(linears(256, 256), x, hw=lookup("raspberry-pi-4b"))
    assert pairs.pays
    assert pairs.float32_seconds / pairs.seconds > 1.6
    assert "smull" in pairs.reason
    without = form(linears(256, 256), x, hw=lookup("raspberry-pi-3b"))  # products and sums share a pipe
    assert "no dot product of bytes" in without.reason
    row = torch.randn(1, 256)
    small = dataclasses.replace(lookup("x86-64-v3"), caches=VNNI.caches[:1], dram_gbs=10.0, clock_mhz=3000.0)
    alone = form(linears(256, 256), row, hw=small)
    assert alone.pays
    assert alone.name == "int8 weights"
    broken = linears(256, 256)
    broken[0].weight.data[3, 3] = torch.nan
    assert "infinities or NaN" in form(broken, x).reason
    thin = form(linears(256, 1), x)
    assert thin.possible
    assert not thin.pays
    assert "gains nothing" in thin.reason
    assert "not float32" in form(linears(64, 64).double(), torch.randn(8, 64).double()).reason
    assert (
        "computed" in form(lambda x, w: dialect.linear(x, w, None, None, "none", []), x, torch.randn(256, 256)).reason
    )
    assert "terms" in form(linears(70000, 1), torch.randn(1, 70000)).reason
    unknown = dataclasses.replace(VNNI, clock_mhz=None)
    assert form(linears(256, 256), x, hw=unknown).pays


W8, B8, R8 = torch.randn(24, 32), torch.randn(24), torch.randn(4, 24)
REFUSED = {
    "the result has no elements": (lambda x: F.linear(x[:0], W8), ()),
    "its bias is computed": (lambda x, b: F.linear(x, W8, b), (B8,)),
    "the bias has shape (1,)": (lambda x: dialect.linear(x, W8, B8[:1], None, "none", []), ()),
    "the residual has shape (24,)": (lambda x, r: dialect.linear(x, W8, None, r, "none", []), (B8,)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_products_that_kernels_of_8_bits_do_not_take(reason: str) -> None:
    model, others = REFUSED[reason]
    graph = trace_core(model, [torch.randn(4, 32), *others], pre_dispatch=True)
    fold_constants(graph, VNNI)
    found = int8_form(graph, next(n for n in graph.graph.nodes if n.target in PRODUCTS), VNNI)
    assert not found.possible
    assert reason in found.reason


@pytest.mark.parametrize("broken", [False, True])
def test_tables_are_stored_in_8_bits_where_they_are_finite(broken: bool) -> None:
    table = torch.randn(4096, 16)
    table[7, 3] = torch.inf if broken else 0.0
    graph = trace_core(lambda i: F.embedding(i, table), [torch.arange(5)], pre_dispatch=True)
    (node,) = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert (table_reason(graph, node) is None) == broken


@pytest.mark.parametrize(("layout", "groups", "reason"), [("NCHW", 1, "layout"), ("NHWC", 4, "4 groups")])
def test_convolutions_that_have_no_form(layout: str, groups: int, reason: str) -> None:
    def body(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return conv2d(x, w[:, : 16 // groups], None, None, [1, 1], [1, 1, 1, 1], [1, 1], groups, "none", [], layout)

    x = torch.randn(1, 16, 16, 16)
    graph = trace(Block(body), [x])
    fold_constants(graph, VNNI)
    node = next(n for n in graph.graph.nodes if n.target is conv2d)
    assert reason in int8_form(graph, node, VNNI).reason


def test_scales_cover_their_range_and_hold_zero() -> None:
    ranges = ((-3.0, 5.0), (0.0, 2.0), (1.0, 2.0), (-4.0, -1.0), (-1e4, 1e-3), (0.0, 1e-44), (-1e-44, 1e-44))
    for (low, high), symmetric in itertools.product(ranges, (False, True)):
        found = scale_between(low, high, symmetric)
        assert 0 <= found.zero <= 255
        assert math.isfinite(dialect_int8.inverse(found.scale))
        assert (0 - found.zero) * found.scale <= min(low, 0.0) + found.scale
        assert (255 - found.zero) * found.scale >= max(high, 0.0) - found.scale
    assert scale_between(0.0, 0.0) == Scale(1.0, 0)
    assert scale_between(-2.0, 1.0, symmetric=True) == Scale(2.0 / 127.0, 128)
    assert scale_between(0.0, 1.0, symmetric=True).zero == 0


def test_weights_have_a_scale_a_row_and_zeros_stay_zeros() -> None:
    w = torch.randn(6, 9) * torch.logspace(-3, 3, 6)[:, None]
    w[2] = 0.0
    scales = weight_scales(w)
    stored = quantised_weight(w, scales)
    assert stored.dtype == torch.int8
    assert float(scales[2]) == 1.0
    assert not stored[2].any()
    error = (stored.float() * scales[:, None] - w).abs()
    assert bool((error <= scales[:, None] * 0.5001).all())
    assert len(set(weight_scales(w, per_channel=False).tolist())) == 1


def test_bias_correction_takes_off_the_mean_error() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(500, 32, generator=generator) + 1.0
    w = torch.randn(8, 32, generator=generator)
    scales = weight_scales(w) * 8  # coarse, so that the error is there to see
    stored = quantised_weight(w, scales)
    exact, rounded = F.linear(x, w), F.linear(x, stored.float() * scales[:, None])
    bias = corrected_bias(None, w, stored, scales, x.mean(0))
    before, after = (rounded - exact).mean(0).abs(), (rounded + bias - exact).mean(0).abs()
    assert float(before.max()) > 0.1
    assert float(after.max()) < 1e-4  # float32 sums of 32 terms
