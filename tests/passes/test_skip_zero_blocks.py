"""Products whose weights have blocks of zeros skip them where that pays; others say why not, and dense ones nothing."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import HW, assert_same_numbers, check_graph, check_values, text_of, trace_core

from graphwright import hwdb
from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect
from graphwright.passes.default import PASSES, passes_for
from graphwright.passes.dialect_sparse import sparse_linear
from graphwright.passes.refusals import recording
from graphwright.passes.skip_zero_blocks import skip_zero_blocks
from graphwright.passes.zero_blocks import COLUMNS, best_blocks, blocks_of, cost, neighbours, zeros_of

ROWS = torch.randn(64, 128)
BIAS, OTHER = torch.randn(64), torch.randn(64, 64)


def pruned(outputs: int, inputs: int, depth: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(-(-outputs // COLUMNS), inputs // depth, generator=generator) < density
    whole = mask.repeat_interleave(COLUMNS, 0)[:outputs].repeat_interleave(depth, 1)
    return torch.randn(outputs, inputs, generator=generator) * whole


WEIGHT, DENSE, NEGATIVE = pruned(64, 128, 16, 0.25), torch.randn(64, 128), pruned(64, 128, 16, 0.25)
NEGATIVE[NEGATIVE == 0] = -0.0
KERNEL = WEIGHT.view(64, 128, 1, 1)
WIDE = WEIGHT.view(64, 128, 1, 1).repeat(1, 1, 3, 3)
STREWN = DENSE * (torch.rand(64, 128, generator=torch.Generator().manual_seed(1)) < 0.25)
TWO_OF_FOUR = (DENSE.view(64, 32, 4) * (DENSE.view(64, 32, 4).abs().argsort(2).argsort(2) > 1)).view(64, 128)
DOUBLE = WEIGHT.double()
FEW = pruned(12, 128, 16, 0.0)
ODD = torch.zeros(64, 130)
VECTOR = pruned(64, 128, 16, 0.25)


def conv(x, weight, stride=1, pad=0, groups=1, layout="NHWC"):
    return dialect.conv2d(x, weight, BIAS, None, [stride] * 2, [pad] * 4, [1, 1], groups, "relu", [], layout)


def run(model, inputs, count):
    graph = trace_core(model, inputs, pre_dispatch=True)
    before = copy_graph(graph)
    with recording() as refusals:
        assert skip_zero_blocks(graph, HW) == count
    check_graph(graph)
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs, **({"rtol": 1e-5, "atol": 1e-5} if count else {}))
    assert skip_zero_blocks(graph, HW) == 0
    if not count:
        assert text_of(graph) == text_of(before)
    return graph, [r.reason for r in refusals]


TAKEN = {
    "linear": (lambda x: F.linear(x, WEIGHT, BIAS), [ROWS]),
    "linear without a bias": (lambda x: F.linear(x, WEIGHT), [ROWS]),
    "negative zeros": (lambda x: F.linear(x, NEGATIVE), [ROWS]),
    "with an epilogue": (lambda x, r: dialect.linear(x, WEIGHT, BIAS, r, "gelu", []), [ROWS, OTHER]),
    "a batch": (lambda x: F.linear(x, WEIGHT), [ROWS.view(4, 16, 128)]),
    "one row": (lambda x: F.linear(x, WEIGHT), [ROWS[:1]]),
    "pixels": (lambda x: conv(x, KERNEL), [torch.randn(2, 5, 6, 128)]),
    "pixels with a residual": (
        lambda x, r: dialect.conv2d(x, KERNEL, None, r, [1, 1], [0] * 4, [1, 1], 1, "none", [], "NHWC"),
        [torch.randn(1, 4, 4, 128), torch.randn(1, 4, 4, 64)],
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_blocks_are_skipped(name):
    model, inputs = TAKEN[name]
    graph, _ = run(model, inputs, 1)
    (node,) = [n for n in graph.graph.nodes if n.target is sparse_linear]
    columns, depth, count, longest = node.args[-1]
    assert (columns, depth) == (16, 16)
    assert 0 < longest <= 8
    assert count < 32


REFUSED = {
    "strewn": (lambda x: F.linear(x, STREWN), [ROWS], "not in blocks that pay: of 1"),
    "2:4": (lambda x: F.linear(x, TWO_OF_FOUR), [ROWS], "in a 2:4 pattern: no vector instruction"),
    "another dtype": (lambda x: F.linear(x, DOUBLE), [ROWS.double()], "is not float32"),
    "a vector": (lambda x: F.linear(x, VECTOR), [ROWS[0]], "a vector, or nothing"),
    "no rows": (lambda x: F.linear(x, WEIGHT), [ROWS[:0]], "a vector, or nothing"),
    "few outputs": (lambda x: F.linear(x, FEW), [ROWS], "12 outputs are fewer than the 16"),
    "a window": (lambda x: conv(x, WIDE, 1, 1), [torch.randn(1, 5, 5, 128)], "only convolutions of 1x1"),
    "groups": (
        lambda x: conv(x, KERNEL, groups=2),
        [torch.randn(1, 5, 5, 256)],
        "only convolutions of 1x1 without groups",
    ),
    "a stride": (lambda x: conv(x, KERNEL, 2), [torch.randn(1, 5, 5, 128)], "stride or padding"),
    "padding": (lambda x: conv(x, KERNEL, 1, 1), [torch.randn(1, 5, 5, 128)], "stride or padding"),
    "planes": (
        lambda x: dialect.conv2d(x, KERNEL, None, None, [1, 1], [0] * 4, [1, 1], 1, "none", [], "NCHW"),
        [torch.randn(1, 128, 5, 5)],
        "in NCHW",
    ),
    "a residual that broadcasts": (
        lambda x, r: dialect.linear(x, WEIGHT, None, r, "none", []),
        [ROWS, BIAS],
        "the residual has shape (64,)",
    ),
    "a bias that broadcasts": (
        lambda x, b: dialect.linear(x, WEIGHT, b, None, "none", []),
        [ROWS, BIAS[:1]],
        "the bias has shape (1,)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name):
    model, inputs, reason = REFUSED[name]
    _, reasons = run(model, inputs, 0)
    assert [reason in r for r in reasons] == [True], reasons
    assert "of its weights are zero, but " in reasons[0]


def test_a_shape_known_only_at_run_time_is_refused():
    graph = trace_core(lambda x: F.linear(x, WEIGHT), [ROWS], pre_dispatch=True)
    next(n for n in graph.graph.nodes if n.op == "placeholder").meta["val"] = None
    with recording() as refusals:
        assert skip_zero_blocks(graph, HW) == 0
    assert ["is not float32" in r.reason for r in refusals] == [True]


def test_dense_and_computed_weights_are_not_mentioned():
    assert run(lambda x: F.linear(x, DENSE), [ROWS], 0)[1] == []
    assert run(lambda x, w: F.linear(x, w), [ROWS, WEIGHT], 0)[1] == []


@pytest.mark.parametrize("period", [2, 3, 4, 8, 16, 32, 64])
def test_the_sample_meets_patterns_of_any_period(period):
    weight = torch.ones(512, 768)
    weight[:, ::period] = 0.0
    assert zeros_of(weight) == pytest.approx(1 / period, abs=0.03)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([16, 40, 64, 200]), st.sampled_from([16, 48, 128]), st.floats(0, 1), st.integers(0, 99))
def test_whatever_is_chosen_keeps_the_numbers(outputs, inputs, density, seed):
    weight = pruned(outputs, inputs, 16, density, seed)
    x = torch.randn(32, inputs)
    graph = trace_core(lambda x: F.linear(x, weight), [x], pre_dispatch=True)
    before = copy_graph(graph)
    count = skip_zero_blocks(graph, HW)
    check_values(graph, [x])
    assert_same_numbers(before, graph, [x], rtol=1e-5, atol=1e-5)
    assert skip_zero_blocks(graph, HW) == 0
    kept = float((weight != 0).float().mean())
    if kept > 0.95:
        assert not count


def test_the_finest_blocks_that_pay_are_found():
    found = best_blocks(pruned(64, 128, 1, 0.2), HW, 128)
    assert (found[0].depth, found[0].columns) == (1, 16)
    coarse = best_blocks(WEIGHT, HW, 128)
    assert coarse[0].depth == 16  # fewer places to look up than by four or one
    assert best_blocks(torch.zeros(16, 130), HW, 4)[0].depth == 1


def test_a_share_of_blocks_costs_more_than_that_share_of_the_arithmetic():
    for name in ("x86-64-v3", "znver4", "cortex-a76"):
        hw = hwdb.lookup(name)
        blocks = blocks_of(WEIGHT, 16, 16)
        assert blocks.density < cost(hw, 128, blocks) < 2 * blocks.density
        assert cost(hw, 1, blocks) >= cost(hw, 128, blocks)


def test_neighbours_are_told_from_blocks():
    assert neighbours(TWO_OF_FOUR) == "2:4"
    assert neighbours(STREWN) is None
    assert neighbours(DENSE) is None


def test_blocks_in_a_pattern_of_neighbours_are_skipped_all_the_same():
    """Whole blocks of a 2:4 weight zero on top of it."""
    weight = TWO_OF_FOUR * (WEIGHT != 0)
    assert neighbours(weight) == "2:4"
    run(lambda x: F.linear(x, weight), [ROWS], 1)


def test_it_is_for_cpus_and_comes_last():
    assert skip_zero_blocks in PASSES
    assert PASSES.index(skip_zero_blocks) == len(PASSES) - 2
    assert skip_zero_blocks not in passes_for(hwdb.lookup("a100"))
    graph = trace_core(lambda x: F.linear(x, WEIGHT), [ROWS], pre_dispatch=True)
    assert skip_zero_blocks(graph, hwdb.lookup("tpu-v4")) == 0
