"""What follows a gate row by row leaves out the rows that the gate emptied, where that pays."""

from __future__ import annotations

from functools import cache

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import HW, assert_same_numbers, check_graph, check_values, text_of, trace
from torch import nn

import graphwright
from graphwright import hwdb
from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect, dialect_gating
from graphwright.passes.default import passes_for
from graphwright.passes.refusals import recording
from graphwright.passes.skip_gated_rows import skip_gated_rows

WIDE, NARROW, BIAS = torch.randn(256, 64), torch.randn(64, 256), torch.randn(256)
SHORT = torch.randn(64, 128)


def rows(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape)
    x[..., ::2, :] *= 0.01
    return x


def targets(graph):
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def run(model, inputs, count):
    graph = trace(model, inputs)
    before = copy_graph(graph)
    with recording() as refusals:
        assert skip_gated_rows(graph, HW) == count
    check_graph(graph)
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs, **({"rtol": 1e-4, "atol": 1e-3} if count else {}))
    assert skip_gated_rows(graph, HW) == 0
    if not count:
        assert text_of(graph) == text_of(before)
    return graph, [r.reason for r in refusals]


class Block(nn.Module):
    def __init__(self, between=F.gelu, behind=lambda x, y: y, **options) -> None:
        super().__init__()
        self.between, self.behind, self.options = between, behind, options
        for name, value in (("wide", WIDE), ("narrow", NARROW), ("short", SHORT), ("bias", BIAS)):
            self.register_buffer(name, value)

    def forward(self, x):
        hidden = self.between(F.linear(graphwright.gate(x, 0.5, **self.options), self.wide, self.bias))
        return self.behind(x, F.linear(hidden, self.narrow))


@pytest.mark.parametrize("options", [{}, {"by": "element"}, {"share": 0.9}])
@pytest.mark.parametrize("behind", [lambda x, y: y, lambda x, y: x + y, lambda x, y: (y.relu(), y * 2.0)])
def test_a_block_is_packed(options, behind) -> None:
    graph, _ = run(Block(behind=behind, **options), (rows(2, 64, 64),), 1)
    found = targets(graph)
    assert found.count(dialect_gating.packed_linear) == 2
    assert found.count(dialect_gating.pack_rows) == found.count(dialect_gating.unpack_rows) == 1


def test_a_hidden_value_that_is_read_is_unpacked_too() -> None:
    class Both(Block):
        def forward(self, x):
            hidden = F.linear(graphwright.gate(x, 0.5), self.wide, self.bias)
            return hidden, F.linear(hidden.relu(), self.narrow)

    graph, _ = run(Both(), (rows(128, 64),), 1)
    assert targets(graph).count(dialect_gating.unpack_rows) == 2


def swiglu(part):
    class Swiglu(Block):
        def forward(self, x):
            hidden = F.linear(graphwright.gate(x, 0.5), self.wide, self.bias)
            return F.linear(part(hidden), self.short)

    return Swiglu()


@pytest.mark.parametrize(
    "part",
    [
        lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
        lambda h: F.silu(h[..., :128]) * h[..., 128:],
        lambda h: F.silu(h[..., ::2]) * h.split([100, 28, 128], -1)[2],
        lambda h: h.split([100, 128, 28], -1)[1],
    ],
)
def test_parts_of_rows_stay_packed(part) -> None:
    graph, _ = run(swiglu(part), (rows(2, 64, 64),), 1)
    found = targets(graph)
    assert found.count(dialect_gating.packed_linear) == 2
    assert found.count(dialect_gating.pack_rows) == found.count(dialect_gating.unpack_rows) == 1


@pytest.mark.parametrize("last", [lambda h: h.split([56, 200], -1)[1] * 2.0, lambda h: h[..., 3:100]])
def test_parts_behind_the_last_product_see_all_rows(last) -> None:
    class Cut(Block):
        def forward(self, x):
            return last(F.linear(graphwright.gate(x, 0.5), self.wide, self.bias))

    graph, _ = run(Cut(), (rows(128, 64),), 1)
    assert targets(graph).count(dialect_gating.unpack_rows) == 1


def test_a_part_that_is_read_outside_is_unpacked() -> None:
    class Both(Block):
        def forward(self, x):
            one, other = F.linear(graphwright.gate(x, 0.5), self.wide, self.bias).chunk(2, -1)
            return other, F.linear(one, self.short)

    graph, _ = run(Both(), (rows(128, 64),), 1)
    assert targets(graph).count(dialect_gating.packed_linear) == 2


def test_slices_of_rows_end_the_chain() -> None:
    class Rows(Block):
        def forward(self, x):
            hidden = F.linear(graphwright.gate(x, 0.5), self.wide, self.bias)
            return F.linear(hidden[16:].relu(), self.narrow), F.linear(hidden.chunk(2, 0)[1], self.narrow)

    graph, _ = run(Rows(), (rows(128, 64),), 1)
    assert targets(graph).count(dialect_gating.packed_linear) == 1


def test_blocks_behind_each_other_stay_packed() -> None:
    """A residual that is gated itself keeps its rows apart."""

    class Stack(Block):
        def forward(self, x):
            kept = graphwright.gate(x, 0.5)
            for _ in range(2):
                hidden = F.linear(kept, self.wide, self.bias).relu()
                kept = dialect.linear(hidden, self.narrow, None, kept, "none", [])
            return kept

    graph, _ = run(Stack(), (rows(128, 64),), 1)
    found = targets(graph)
    assert found.count(dialect_gating.packed_linear) == 4
    assert found.count(dialect_gating.pack_rows) == found.count(dialect_gating.unpack_rows) == 1


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (lambda x: graphwright.gate(x, 0.5).sin(), rows(128, 64), "no linear layer"),
        (lambda x: graphwright.gate(x, 0.5).mT @ x, rows(128, 64), "no linear layer"),
        (Block(), torch.randn(64), "no linear layer"),
        (Block(), torch.randn(0, 64), "no linear layer"),
        (Block(share=0.0), rows(128, 64), "0% of the rows empty"),
        (Block(), rows(2, 64), "50% of the rows empty"),
    ],
)
def test_why_not(model, x, reason) -> None:
    _, reasons = run(model, (x,), 0)
    assert any(reason in said for said in reasons), reasons


def test_doubles_and_computed_weights_are_left_alone() -> None:
    double = Block().double()
    _, reasons = run(double, (rows(128, 64).double(),), 0)
    assert "it is torch.float64" in reasons[0]
    run(lambda x, w: F.linear(graphwright.gate(x, 0.5), w), (rows(128, 64), WIDE), 0)


def test_a_softmax_along_rows_stops_it() -> None:
    """What mixes rows, or is no operator that is known to keep them apart, reads unpacked rows."""
    graph, _ = run(Block(between=lambda y: y.softmax(-2)), (rows(128, 64),), 1)
    assert targets(graph).count(dialect_gating.packed_linear) == 1


def test_gpus_compute_zeros() -> None:
    assert skip_gated_rows not in passes_for(hwdb.lookup("a100"))


@cache
def packed(by: str):
    """The graph of a block before and behind the pass."""
    graph = trace(Block(between=torch.relu, by=by), (torch.randn(64, 64),))
    before = copy_graph(graph)
    assert skip_gated_rows(graph, HW) == 1
    return before, graph


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 0.01, 1.0, float("nan"), float("inf")]), min_size=64, max_size=64),
    st.sampled_from(["row", "element"]),
)
def test_any_rows(sizes, by) -> None:
    x = torch.randn(64, 64) * torch.tensor(sizes)[:, None]
    assert_same_numbers(*packed(by), (x,), rtol=1e-4, atol=1e-3)
