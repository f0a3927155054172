"""Normalisations that were written out are one operator again; what only looks like one is kept."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from rewriting import HW, assert_same_numbers, check_graph, check_values, text_of, trace_core

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes.merge_duplicates import merge_duplicates
from graphwright.passes.recognise_norms import recognise_norms

CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # means are summed in another order
aten = torch.ops.aten
X, W, B = torch.randn(2, 3, 8) + 0.5, torch.randn(8), torch.randn(8)
IMAGE, GAIN, OFFSET = torch.randn(2, 6, 4, 5), torch.randn(6), torch.randn(6)


def centred(x, dim=-1):
    return x - x.mean(dim, keepdim=True)


def square(x, dim=-1):
    return x.pow(2).mean(dim, keepdim=True)


def channels(x):
    return x[:, None, None]


def grouped(x, groups):
    rows = x.reshape(x.shape[0], groups, -1)
    return (centred(rows) / torch.sqrt(square(centred(rows)) + 1e-5)).reshape(x.shape)


ROWS = {
    "layer norm": (lambda x, w, b: centred(x) / torch.sqrt(square(centred(x)) + 1e-5) * w + b, aten.layer_norm.default),
    "by rsqrt": (
        lambda x, w, b: b + w * (centred(x) * torch.rsqrt(square(centred(x)) + 1e-5)),
        aten.layer_norm.default,
    ),
    "root first": (lambda x, w, b: torch.rsqrt(square(centred(x)) + 1e-5) * centred(x), aten.layer_norm.default),
    "by a power": (lambda x, w, b: centred(x) * (square(centred(x)) + 1e-5) ** -0.5 * w, aten.layer_norm.default),
    "over a power": (lambda x, w, b: centred(x) / (square(centred(x)) + 1e-5) ** 0.5, aten.layer_norm.default),
    "by a reciprocal": (
        lambda x, w, b: centred(x) * torch.reciprocal(torch.sqrt(square(centred(x)) + 1e-5)),
        aten.layer_norm.default,
    ),
    "by a quotient": (
        lambda x, w, b: centred(x) * torch.div(torch.full([], 1.0), torch.sqrt(square(centred(x)) + 1e-5)),
        aten.layer_norm.default,
    ),
    "by var": (
        lambda x, w, b: centred(x) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-5) * w,
        aten.layer_norm.default,
    ),
    "by var_mean": (
        lambda x, w, b: (lambda v: (x - v[1]) * torch.rsqrt(v[0] + 1e-3))(
            torch.var_mean(x, -1, correction=0, keepdim=True)
        ),
        aten.layer_norm.default,
    ),
    "two dims": (
        lambda x, w, b: centred(x, (1, 2)) / torch.sqrt(square(centred(x, (1, 2)), (-1, -2)) + 1e-5) * w,
        aten.layer_norm.default,
    ),
    "no eps": (lambda x, w, b: centred(x) / square(centred(x)).sqrt(), aten.layer_norm.default),
    "T5": (lambda x, w, b: w * (x * torch.rsqrt(square(x) + 1e-6)), aten.rms_norm.default),
    "Llama": (
        lambda x, w, b: w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype),
        aten.rms_norm.default,
    ),
    "mean of x * x": (lambda x, w, b: x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) + b, aten.rms_norm.default),
}
IMAGES = {
    "over channels": (
        lambda x, w, b: channels(w) * (centred(x, 1) / torch.sqrt(square(centred(x, 1), 1) + 1e-6)) + channels(b),
        aten.layer_norm.default,
    ),
    "group": (lambda x, w, b: grouped(x, 3) * channels(w) + channels(b), aten.group_norm.default),
    "group without offset": (lambda x, w, b: channels(w) * grouped(x, 2), aten.group_norm.default),
    "instance, plain": (lambda x, w, b: grouped(x, 6), aten.group_norm.default),
}


def found(model, inputs, count=None):
    graph = trace_core(model, inputs)
    merge_duplicates(graph, HW)
    before = copy_graph(graph)
    assert recognise_norms(graph, HW) == count if count is not None else recognise_norms(graph, HW)
    check_graph(graph)
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs, **CLOSE)
    assert recognise_norms(graph, HW) == 0
    return [n for n in graph.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("name", ROWS)
def test_rows(name):
    model, wanted = ROWS[name]
    nodes = found(model, [X, W, B], 1)
    assert [n.target for n in nodes].count(wanted) == 1
    assert len(nodes) <= 2  # what takes no offset is followed by an addition


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    model, wanted = IMAGES[name]
    nodes = found(model, [IMAGE, GAIN, OFFSET])
    assert [n.target for n in nodes].count(wanted) == 1


def test_after():
    nodes = found(ROWS["layer norm"][0], [X, W, B], 1)
    assert [n.target for n in nodes] == [aten.layer_norm.default]
    assert nodes[0].args[1] == [8]
    assert nodes[0].args[4] == 1e-5


REFUSED = [
    (lambda x, w: centred(x) / (torch.sqrt(square(centred(x))) + 1e-5), ""),
    (lambda x, w: centred(x) / (x.var(-1, keepdim=True) + 1e-5).sqrt(), "the variance of a sample"),
    (lambda x, w: centred(x) / torch.sqrt(x.pow(2).mean(-1, keepdim=True) - x.mean(-1, keepdim=True) ** 2 + 1e-5), ""),
    (
        lambda x, w: (lambda c: (c, c / torch.sqrt(square(c) + 1e-5)))(centred(x)),
        "a value in between, is read by output",
    ),
    (lambda x, w: (lambda s: (s.sin(), x * torch.rsqrt(s + 1e-5)))(square(x)), "a value in between, is read by sin"),
    (lambda x, w: x * torch.rsqrt(square(x, 1) + 1e-5) * 2.0, ""),
    (lambda x, w: x * torch.rsqrt(square(x, 0) + 1e-5), "which are not the last"),
    (lambda x, w: centred(x) * torch.rsqrt(square(centred(x, (0, 1)), (0, 1)) + 1e-5), ""),
    (lambda x, w: centred(x) * torch.rsqrt(square(x) + 1e-5), ""),
    (lambda x, w: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-5), ""),
    (lambda x, w: x[0, 0] * torch.rsqrt(x[0, 0].pow(2).mean(-1) + 1e-5), ""),
    (lambda x, w: x.double() * torch.rsqrt(square(x) + 1e-5), ""),
    (lambda x, w: x[:0] * torch.rsqrt(square(x[:0]) + 1e-5), "it has no elements"),
]


@pytest.mark.parametrize(("model", "reason"), [case for i, case in enumerate(REFUSED) if i != 5])
def test_what_is_kept(model, reason, caplog):
    graph = trace_core(model, [X, W])
    merge_duplicates(graph, HW)
    text = text_of(graph)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert recognise_norms(graph, HW) == 0
    assert reason in caplog.text
    assert text_of(graph) == text


def test_mixed_dtypes_are_kept(caplog):
    graph = trace_core(lambda x, d: x * torch.rsqrt(square(x) + d), [X, torch.full([], 1e-5, dtype=torch.float64)])
    assert recognise_norms(graph, HW) == 0


@pytest.mark.parametrize("other", [torch.randn(3, 8), torch.randn(1), torch.randn(8).double()])
def test_a_gain_of_another_kind_stays_behind(other):
    nodes = found(lambda x, w: x * torch.rsqrt(square(x) + 1e-5) * w, [X, other], 1)
    assert aten.mul.Tensor in [n.target for n in nodes]


def test_groups_of_no_images_stay_rows():
    def model(x):
        return torch.nn.functional.layer_norm(x.reshape(0, 2, 12), [12]).reshape(0, 4, 2, 3)

    graph = trace_core(model, [torch.randn(0, 4, 2, 3)], pre_dispatch=True)
    assert recognise_norms(graph, HW) == 0


def test_rows_that_are_no_groups_stay_rows(caplog):
    def model(x):
        rows = x.reshape(-1, 5)
        return torch.layer_norm(rows, (5,)).reshape(x.shape)

    graph = trace_core(model, [torch.randn(2, 3, 4, 5)], pre_dispatch=True)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert recognise_norms(graph, HW) == 0
    assert "are no groups of channels" in caplog.text


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(ROWS)),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(2, 9),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_any_rows_keep_their_numbers(name, lead, length, dtype, seed):
    torch.manual_seed(seed)
    if name == "two dims":
        lead = [2, *lead[-1:]]
    x, w, b = (torch.randn(*shape, length, dtype=dtype) for shape in (lead, (), ()))
    graph = trace_core(ROWS[name][0], [x * 2 + 1, w, b])
    merge_duplicates(graph, HW)
    before = copy_graph(graph)
    recognise_norms(graph, HW)
    check_values(graph, [x * 2 + 1, w, b])
    # A row of nearly one value has no direction: sums in another order give any.
    assert_same_numbers(before, graph, [x * 2 + 1, w, b], rtol=1e-3, atol=1e-3, wide=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(IMAGES)), st.integers(1, 3), st.integers(1, 5), st.integers(2, 5), st.integers(0, 99))
def test_any_images_keep_their_numbers(name, batch, height, width, seed):
    torch.manual_seed(seed)
    inputs = [torch.randn(batch, 6, height, width), torch.randn(6), torch.randn(6)]
    graph = trace_core(IMAGES[name][0], inputs)
    merge_duplicates(graph, HW)
    before = copy_graph(graph)
    recognise_norms(graph, HW)
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs, rtol=1e-3, atol=1e-3, wide=1e-6)  # likewise
