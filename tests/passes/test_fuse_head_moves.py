"""Attention that reads its heads out of rows, splits and joint buffers, and writes rows; what is refused."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import HW, assert_same_numbers, check_values, text_of, trace_core
from torch import fx

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect
from graphwright.passes.fuse_attention import fuse_attention
from graphwright.passes.fuse_head_moves import fuse_head_moves
from graphwright.passes.fuse_reshape_transpose import fuse_reshape_transpose
from graphwright.passes.remove_dead import remove_dead

aten = torch.ops.aten
B, S, H, D = 2, 5, 3, 4
ROWS = [torch.randn(B, S, H * D) for _ in range(3)]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # torch has another attention kernel for strided operands


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def heads(x):
    return x.view(*x.shape[:2], H, D).transpose(1, 2)


def rows(y):
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def rewritten(model: Any, inputs: list[torch.Tensor], count: int = 1) -> fx.GraphModule:
    """The graph after the pass and those before it; numbers are kept, and a second run finds nothing."""
    graph = trace_core(model, inputs, pre_dispatch=True)
    fuse_attention(graph, HW)
    fuse_reshape_transpose(graph, HW)
    before = copy_graph(graph)
    assert fuse_head_moves(graph, HW) == count
    remove_dead(graph, HW)
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs, **CLOSE)
    assert fuse_head_moves(graph, HW) == 0
    return graph


def operators(graph: fx.GraphModule) -> list[Any]:
    return [n.target for n in graph.graph.nodes if n.op == "call_function"]


def places(graph: fx.GraphModule) -> list[list[int]]:
    (node,) = [n for n in graph.graph.nodes if n.target is dialect.strided_attention]
    numbers = list(node.args[7])
    return [numbers[i : i + 4] for i in range(0, 16, 4)]


def test_heads_in_rows():
    graph = rewritten(lambda q, k, v: rows(sdpa(heads(q), heads(k), heads(v))), ROWS)
    assert operators(graph) == [dialect.strided_attention]
    assert places(graph) == [[0, S * H * D, D, H * D]] * 4


def test_heads_in_one_buffer():
    """GPT-2's: one product for all three, split."""

    def model(x):
        return rows(sdpa(*[heads(part) for part in x.split(H * D, dim=2)]))

    graph = rewritten(model, [torch.randn(B, S, 3 * H * D)])
    assert operators(graph) == [dialect.strided_attention]
    assert places(graph)[:3] == [[i * H * D, S * 3 * H * D, D, 3 * H * D] for i in range(3)]


def test_unbound_heads():
    """timm's: one product, [B, S, 3, H, D] permuted and unbound."""

    def model(x):
        return rows(sdpa(*x.view(B, S, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)))

    graph = rewritten(model, [torch.randn(B, S, 3 * H * D)])
    assert operators(graph) == [dialect.strided_attention]
    assert places(graph)[1] == [H * D, S * 3 * H * D, D, 3 * H * D]


def test_selected_and_sliced_heads():
    def model(x, y):
        z = x.view(B, S, 3, H, D).permute(2, 0, 3, 1, 4)
        return sdpa(z[0], z[1], heads(y[:, 1:, 2 : 2 + H * D]))

    graph = rewritten(model, [torch.randn(B, S, 3 * H * D), torch.randn(B, S + 1, 3 * H * D)])
    row = 3 * H * D
    assert places(graph)[2] == [row + 2, (S + 1) * row, D, row]


def test_a_result_that_is_read_twice_keeps_its_move():
    def model(q, k, v):
        y = sdpa(heads(q), heads(k), heads(v))
        return y, rows(y)

    graph = rewritten(model, ROWS)
    assert operators(graph) == [dialect.strided_attention, dialect.permute]


def test_only_the_result_is_moved():
    graph = rewritten(lambda q, k, v: rows(sdpa(q, k, v)), [torch.randn(B, H, S, D) for _ in range(3)])
    assert operators(graph) == [dialect.strided_attention]


def test_groups_and_masks():
    def model(q, k, v, mask):
        k, v = (x.view(B, S, 1, D).transpose(1, 2) for x in (k, v))
        return rows(F.scaled_dot_product_attention(heads(q), k, v, mask, enable_gqa=True))

    rewritten(model, [ROWS[0], torch.randn(B, S, D), torch.randn(B, S, D), torch.randn(S, S)])


def test_a_slice_across_heads_is_not_taken_apart():
    """Columns 2.. of [S, (H, D)] cross from one head into the next: as heads they have no single stride."""

    def model(x, k, v):
        part = x.view(B, S, H + 1, D).transpose(1, 2).reshape(B, -1)[:, 2 : 2 + H * S * D].view(B, H, S, D)
        return sdpa(part, heads(k), heads(v))

    graph = rewritten(model, [torch.randn(B, S, (H + 1) * D), *ROWS[1:]])
    assert dialect.permute in operators(graph)


REFUSED = [
    (lambda q, k, v: sdpa(q, k, v), [torch.randn(B, H, S, D) for _ in range(3)], "moved by nobody"),
    (lambda q, k, v: sdpa(q, k, v), [torch.randn(H, S, D) for _ in range(3)], "moved by nobody"),
    (lambda q, k, v: sdpa(heads(q), heads(k), heads(v)), [x[:0] for x in ROWS], "no heads with elements"),
    (lambda q, k, v: rows(sdpa(heads(q), k, v)), [ROWS[0][:, :1], *[torch.randn(B, H, S, D)] * 2], "moved by nobody"),
    (
        lambda q, k, v: sdpa(heads(q), heads(k), heads(v)),
        [x.double() for x in ROWS],
        "no kernel reads torch.float64",
    ),
]


@pytest.mark.parametrize(("model", "inputs", "reason"), REFUSED)
def test_what_is_kept(model, inputs, reason, caplog):
    graph = trace_core(model, inputs, pre_dispatch=True)
    fuse_attention(graph, HW)
    fuse_reshape_transpose(graph, HW)
    text = text_of(graph)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert fuse_head_moves(graph, HW) == 0
    assert reason in caplog.text
    assert text_of(graph) == text


ROLLS = [torch.arange(B * S).roll(n) for n in (1, 1, 2)]
BACKWARD = torch.arange(B * S * H).flip(0)


def gathered(x, table):
    return x.view(len(table), -1).index_select(0, table).view(B, S, H * D)


@pytest.mark.parametrize(
    ("tables", "reason"),
    [(ROLLS, "gathered by several tables"), ([BACKWARD] * 3, "the gathers of its operands cut heads")],
)
def test_gathers_that_stay(tables, reason, caplog):
    """The heads are read where they lie in the gathered rows."""

    def model(*operands):
        return sdpa(*[heads(gathered(x, table)) for x, table in zip(operands, tables, strict=True)])

    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        graph = rewritten(model, ROWS)
    assert reason in caplog.text
    assert operators(graph).count(aten.index_select.default) == 3
    assert places(graph)[:3] == [[0, S * H * D, D, H * D]] * 3


def test_a_result_that_no_strides_reach_keeps_its_move(caplog):
    def model(q, k, v):
        return sdpa(heads(q), heads(k), heads(v)).permute(0, 3, 1, 2)

    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        graph = rewritten(model, ROWS)
    assert "not written by strides" in caplog.text
    assert operators(graph)[-1] is dialect.permute


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_chain_of_moves(data):
    """Random views, permutes, splits and slices in front of random heads: the numbers stay."""
    draw = data.draw
    batch, positions, count, depth = (draw(st.integers(1, 3)) for _ in range(4))
    order = draw(st.permutations(range(5)))
    start, step_over = draw(st.integers(0, 1)), draw(st.integers(0, 2))
    back = draw(st.permutations(range(4)))
    sizes = [batch, positions, count, depth, 3]

    def model(x):
        y = x[:, start : start + batch * positions * count * depth * 3]
        y = y.reshape([sizes[d] for d in order]).permute([order.index(d) for d in range(5)])
        q, k, v = ((y[..., i] if i != step_over else y.unbind(4)[i]).transpose(1, 2) for i in range(3))
        return sdpa(q, k, v).permute(back)

    x = torch.randn(1, batch * positions * count * depth * 3 + 1)
    graph = trace_core(model, [x], pre_dispatch=True)
    fuse_attention(graph, HW)
    fuse_reshape_transpose(graph, HW)
    before = copy_graph(graph)
    fuse_head_moves(graph, HW)
    remove_dead(graph, HW)
    check_values(graph, [x])
    assert_same_numbers(before, graph, [x], **CLOSE)
    assert fuse_head_moves(graph, HW) == 0
