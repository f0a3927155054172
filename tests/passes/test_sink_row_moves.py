"""Products let moves of rows through to attention, which takes them up; whoever else reads the rows keeps them."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import HW, assert_same_numbers, check_values, trace_core
from torch import fx
from windows import image, operators, rolled, windows

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect
from graphwright.passes.fuse_attention import fuse_attention
from graphwright.passes.fuse_head_moves import fuse_head_moves
from graphwright.passes.fuse_matmul_bias import fuse_matmul_bias
from graphwright.passes.fuse_reshape_transpose import fuse_reshape_transpose
from graphwright.passes.gather_rows import gather_rows
from graphwright.passes.merge_duplicates import merge_duplicates
from graphwright.passes.remove_dead import remove_dead
from graphwright.passes.sink_row_moves import sink_row_moves

aten = torch.ops.aten
H, D, SIZE = 2, 4, 2
C = H * D
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # torch has another attention kernel for strided operands
torch.manual_seed(0)
WEIGHTS = [torch.randn(C, C) / 3 for _ in range(4)]
JOINT = torch.randn(3 * C, C) / 3
MASK = torch.randn(6, H, SIZE * SIZE, SIZE * SIZE)
IMAGE = torch.randn(1, 4, 6, C)


def heads(x):
    return x.unflatten(-1, (H, D)).transpose(1, 2)


def attended(q, k, v, mask=None):
    return F.scaled_dot_product_attention(heads(q), heads(k), heads(v), mask).transpose(1, 2).flatten(2)


def swin(x, by=0, mask=None, weights=WEIGHTS):
    """Attention within the windows of an image, shifted on request."""
    y = windows(rolled(x, -by) if by else x, SIZE)
    y = F.linear(attended(*[F.linear(y, w) for w in weights[:3]], mask), weights[3])
    y = image(y, SIZE, 4, 6)
    return rolled(y, by) if by else y


def prepared(model: Any, inputs: list[torch.Tensor]) -> fx.GraphModule:
    graph = trace_core(model, inputs, pre_dispatch=True)
    for one in (fuse_attention, fuse_matmul_bias, fuse_reshape_transpose, remove_dead, gather_rows):
        one(graph, HW)
    return graph


def rewritten(model: Any, inputs: list[torch.Tensor], count: int) -> fx.GraphModule:
    """The graph behind the pass and those that take up what it moved."""
    graph = prepared(model, inputs)
    before = copy_graph(graph)
    assert sink_row_moves(graph, HW) == count
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs, **CLOSE)
    assert sink_row_moves(graph, HW) == 0
    for one in (merge_duplicates, fuse_head_moves, remove_dead):
        one(graph, HW)
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs, **CLOSE)
    return graph


def kept(model: Any, inputs: list[torch.Tensor]) -> None:
    graph = prepared(model, inputs)
    assert sink_row_moves(graph, HW) == 0


@pytest.mark.parametrize("by", [0, 1])
@pytest.mark.parametrize("mask", [None, MASK])
def test_windows_are_read_and_written_in_the_image(by, mask):
    graph = rewritten(lambda x: swin(x, by, mask), [IMAGE], 4)
    assert operators(graph) == [dialect.linear] * 3 + [dialect.strided_attention, dialect.linear]


def test_one_product_for_all_three():
    def model(x):
        q, k, v = F.linear(windows(rolled(x, -1), SIZE), JOINT).split(C, dim=-1)
        return attended(q, k, v).sin()

    graph = rewritten(model, [IMAGE], 1)
    assert operators(graph)[:2] == [dialect.linear, dialect.strided_attention]


def test_only_the_result_is_moved():
    def model(q, k, v):
        return rolled(image(F.linear(attended(q, k, v), WEIGHTS[3]), SIZE, 4, 6), 1)

    graph = rewritten(model, [torch.randn(6, 4, C) for _ in range(3)], 1)
    assert operators(graph) == [dialect.strided_attention, dialect.linear]


def test_rows_that_somebody_else_reads_stay(caplog):
    def model(x):
        y = windows(x, SIZE)
        return attended(*[F.linear(y, w) for w in WEIGHTS[:3]]), y.sin()

    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        kept(model, [IMAGE])
    assert "somebody besides attention" in caplog.text


def test_a_product_that_somebody_else_reads_keeps_its_rows():
    def model(x):
        q, k, v = (F.linear(windows(x, SIZE), w) for w in WEIGHTS[:3])
        return attended(q, k, v), q.sin()

    kept(model, [IMAGE])


def test_a_mask_is_not_read_by_rows():
    def model(x, q):
        mask = F.linear(windows(x, SIZE), torch.ones(SIZE * SIZE, C)).unsqueeze(1)
        return attended(q, q, q, mask)

    kept(model, [IMAGE, torch.randn(6, 4, C)])


def test_a_residual_would_have_to_move_too(caplog):
    def model(q, r):
        y = F.linear(attended(q, q, q), WEIGHTS[3]) + r
        return rolled(image(y, SIZE, 4, 6), 1)

    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        kept(model, [torch.randn(6, 4, C), torch.randn(6, 4, C)])
    assert "residual" in caplog.text


def test_what_attention_wrote_and_somebody_else_reads_stays(caplog):
    def model(q):
        y = attended(q, q, q)
        return rolled(image(F.linear(y, WEIGHTS[3]), SIZE, 4, 6), 1), y.sin()

    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        kept(model, [torch.randn(6, 4, C)])
    assert "what attention wrote" in caplog.text


def test_products_without_attention_keep_their_moves():
    kept(lambda x: F.linear(windows(x, SIZE), WEIGHTS[0]).sin(), [IMAGE])
    kept(lambda x: image(F.linear(x, WEIGHTS[0]), SIZE, 4, 6).sin(), [torch.randn(6, 4, C)])


def test_columns_that_move_are_no_rows():
    kept(lambda q: F.linear(attended(q, q, q), WEIGHTS[3]).transpose(1, 2).sin(), [torch.randn(6, 4, C)])


def test_another_order_of_keys_is_refused(caplog):
    """q by shifted windows, k and v by plain ones: they cannot be read by one table."""

    def model(x):
        q = F.linear(windows(rolled(x, -1), SIZE), WEIGHTS[0])
        k, v = (F.linear(windows(x, SIZE), w) for w in WEIGHTS[1:3])
        return attended(q, k, v).sin()

    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        kept(model, [IMAGE])
    assert "different orders" in caplog.text


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.sampled_from([1, 2]), st.sampled_from([(2, 2), (2, 4), (4, 6)]), st.booleans())
def test_any_windows(by, size, extents, joint):
    height, width = extents
    x = torch.randn(2, height, width, C)

    def model(x):
        y = windows(rolled(x, -by) if by else x, size)
        parts = F.linear(y, JOINT).split(C, dim=-1) if joint else [F.linear(y, w) for w in WEIGHTS[:3]]
        y = image(F.linear(attended(*parts), WEIGHTS[3]), size, height, width)
        return (rolled(y, by) if by else y) + x

    graph = prepared(model, [x])
    before = copy_graph(graph)
    for one in (sink_row_moves, merge_duplicates, fuse_head_moves, remove_dead):
        one(graph, HW)
    check_values(graph, [x])
    assert_same_numbers(before, graph, [x], **CLOSE)
    assert aten.index_select.default not in operators(graph)
    assert dialect.permute not in operators(graph)
