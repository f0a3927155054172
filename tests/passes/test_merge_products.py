"""Products of one input are one product where their readers read slices; others are kept apart."""

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
from graphwright.passes.default import PASSES
from graphwright.passes.fuse_attention import fuse_attention
from graphwright.passes.merge_products import merge_products

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # a wider product may sum in another order
aten = torch.ops.aten


def weights(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) / shape[-1] ** 0.5 for shape in shapes]


class Model(torch.nn.Module):
    def __init__(self, function, tensors):
        super().__init__()
        self.function, self.count = function, len(tensors)
        for i, tensor in enumerate(tensors):
            self.register_buffer(f"w{i}", tensor)

    def forward(self, *x):
        return self.function(*x, *[getattr(self, f"w{i}") for i in range(self.count)])


def merged(function, inputs, tensors, count, prepare=()):
    graph = trace_core(Model(function, tensors), inputs, pre_dispatch=True)
    for rewrite in prepare:
        rewrite(graph, HW)
    before = copy_graph(graph)
    assert merge_products(graph, HW) == count
    check_graph(graph)
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs, **CLOSE)
    assert merge_products(graph, HW) == 0
    return graph


def targets(graph, target):
    return [n for n in graph.graph.nodes if n.target is target]


def attention(x, q, k, v, b, heads=4):
    rows = [F.linear(x, w, bias).unflatten(-1, (-1, 8)).transpose(1, 2) for w, bias in ((q, b), (k, None), (v, None))]
    y = F.scaled_dot_product_attention(*rows, enable_gqa=True)
    return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("heads", [4, 2])
def test_queries_keys_and_values(heads):
    x = torch.randn(2, 64, 32)
    graph = merged(attention, [x], weights((32, 32), (8 * heads, 32), (8 * heads, 32), (32,)), 2, [fuse_attention])
    (product,) = targets(graph, aten.linear.default)
    assert tuple(product.meta["val"].shape) == (2, 64, 32 + 16 * heads)


def test_attention_reads_the_slices_where_they_lie():
    from graphwright.compiler.pipeline import run

    x = torch.randn(2, 64, 32)
    tensors = weights((32, 32), (16, 32), (16, 32), (32,))
    graph, _ = run(trace_core(Model(attention, tensors), [x], pre_dispatch=True), HW, PASSES)
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [
        dialect.linear,
        dialect.strided_attention,
    ]


def test_the_halves_of_a_gate():
    def model(x, gate, up):
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    graph = merged(model, [torch.randn(64, 32)], weights((48, 32), (48, 32)), 1)
    assert len(targets(graph, aten.slice.Tensor)) == 2


def test_convolutions_read_by_elementwise_operators():
    def model(x, a, b, bias):
        return torch.sin(F.conv2d(x, a, bias, padding=1)), torch.cos(F.conv2d(x, b, padding=1)).neg()

    image = torch.randn(2, 8, 12, 12)
    tensors = [*weights((6, 8, 3, 3), (4, 8, 3, 3)), torch.randn(6)]
    graph = merged(model, [image], tensors, 1)
    (product,) = targets(graph, aten.conv2d.default)
    assert tuple(product.meta["val"].shape) == (2, 10, 12, 12)


def test_what_saves_is_merged_without_what_does_not():
    """The third is read by a product, which would need a copy of its slice."""

    def model(x, a, b, c, d):
        return F.linear(x, a).sin() * F.linear(x, b).cos(), F.linear(F.linear(x, c), d)

    graph = merged(model, [torch.randn(512, 64)], weights((64, 64), (64, 64), (512, 64), (32, 512)), 1)
    assert len(targets(graph, aten.linear.default)) == 3


def test_products_that_wait_for_their_weights_are_kept(caplog):
    """One row of a decoder: what takes the time is memory, however many kernels wait for it."""
    hw = hwdb.lookup("zen4")
    large = hw.caches[-1].size_bytes // (4 * 4096) // 2 + 8

    def model(x, a, b):
        return F.linear(x, a).sin() + F.linear(x, b).cos()

    def count(rows, columns):
        tensors = weights((columns, 4096), (columns, 4096))
        graph = trace_core(Model(model, tensors), [torch.randn(rows, 4096)], pre_dispatch=True)
        return merge_products(graph, hw)

    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert count(1, large) == 0
    assert "waits for" in caplog.text
    assert count(256, large) == 1  # arithmetic takes longer
    assert count(1, 64) == 1  # weights stay in the cache


KEPT = [
    (lambda x, a, b: (F.linear(x, a).relu() @ x, F.linear(x, b).relu() @ x), "its slices would cost"),
    (lambda x, a, b: (F.linear(x, a), F.linear(x, b)), "its slices would cost"),
    (lambda x, a, b: (F.linear(x, a).sin(), F.linear(x, x[: len(b)]).sin()), "its weights are no constants"),
    (lambda x, a, b: (F.linear(x, a).sin(), F.linear(x, b, x[0]).sin()), "its weights are no constants"),
    (lambda x, a, b: (F.linear(x, a).sin(), F.linear(x, b).sin() + b[0, 0]), "its weights are read by 2 nodes"),
    (lambda x, a, b: (F.linear(x.long(), a.long()).neg(), F.linear(x.long(), b.long()).neg()), ""),
    (lambda x, a, b: (F.linear(x, a[0]).sin(), F.linear(x, b[0]).sin()), ""),
]


@pytest.mark.parametrize(("function", "reason"), KEPT)
def test_what_is_kept(function, reason, caplog):
    graph = trace_core(Model(function, weights((256, 256), (256, 256))), [torch.randn(256, 256)], pre_dispatch=True)
    text = text_of(graph)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert merge_products(graph, HW) == 0
    assert reason in caplog.text
    assert text_of(graph) == text


def kept(function, inputs, tensors, caplog):
    graph = trace_core(Model(function, tensors), inputs, pre_dispatch=True)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert merge_products(graph, HW) == 0
    return caplog.text


def test_integers_and_vectors_are_kept(caplog):
    def model(x, a, b):
        return F.linear(x, a).neg(), F.linear(x, b).neg()

    whole = [torch.ones(64, 64, dtype=torch.int64)] * 2
    assert "not floating point" in kept(
        model, [torch.ones(64, 64, dtype=torch.int64)], [w.clone() for w in whole], caplog
    )
    assert "one column" in kept(model, [torch.randn(64, 64)], weights((64,), (64,)), caplog)
    assert "one column" in kept(model, [torch.randn(0, 64)], weights((64, 64), (64, 64)), caplog)


def test_groups_and_other_shapes_are_kept(caplog):
    def grouped(x, a, b):
        return F.conv2d(x, a, groups=2).sin(), F.conv2d(x, b, groups=2).sin()

    image = torch.randn(1, 8, 12, 12)
    assert "2 groups of channels" in kept(grouped, [image], weights((4, 4, 1, 1), (4, 4, 1, 1)), caplog)

    def other(x, a, b, c):
        return F.conv2d(x, a).sin(), F.conv2d(x, b, padding=1).sin(), F.conv2d(x, c, padding=1, stride=2).sin()

    assert kept(other, [image], weights((4, 8, 1, 1), (4, 8, 3, 3), (4, 8, 3, 3)), caplog)


def test_double_precision_attention_is_kept(caplog):
    x = torch.randn(8, 512, 8).double()
    tensors = [w.double() for w in weights((32, 8), (16, 8), (16, 8), (32,))]
    graph = trace_core(Model(attention, tensors), [x], pre_dispatch=True)
    fuse_attention(graph, HW)
    assert merge_products(graph, HW) == 0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.booleans(), st.sampled_from(["sin", "relu", "add", "out", "mm"])),
        min_size=2,
        max_size=5,
    ),
    st.integers(1, 80),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_products_keep_their_numbers(branches, rows, depth, images, seed):
    tensors = []
    for width, biased, _ in branches:
        tensors += weights((width, depth), seed=seed)
        tensors += [torch.randn(width)] if biased else []

    def model(x, *given):
        given, results = list(given), []
        for _, biased, reader in branches:
            weight = given.pop(0)
            bias = given.pop(0) if biased else None
            y = F.conv2d(x, weight[:, :, None, None], bias).movedim(1, -1) if images else F.linear(x, weight, bias)
            results.append({"sin": y.sin(), "relu": y.relu(), "add": (y + 1.0).neg(), "out": y, "mm": y @ y.mT}[reader])
        return tuple(results)

    x = torch.randn(1, depth, 4, rows) if images else torch.randn(rows, depth)
    graph = trace_core(Model(model, tensors), [x], pre_dispatch=True)
    before = copy_graph(graph)
    merge_products(graph, HW)
    check_values(graph, [x])
    assert_same_numbers(before, graph, [x], **CLOSE)
    assert merge_products(graph, HW) == 0
