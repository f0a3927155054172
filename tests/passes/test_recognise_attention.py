"""Attention written out in all spellings becomes the dialect's; what only looks like it, or would change, is kept."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from rewriting import HW, assert_same_numbers, check_graph, check_values, text_of, trace, trace_core

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect
from graphwright.passes.fuse_attention import fuse_attention
from graphwright.passes.recognise_attention import recognise_attention
from graphwright.passes.remove_dead import remove_dead

LEAST = torch.finfo(torch.float32).min
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # factors are multiplied in another order
Q, K, V = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 6)
SEEN = torch.tensor([[True, True, False, True, False], [True] * 5, [False] * 5])  # the last query sees nothing
BIAS = torch.randn(4, 3, 5)


def recognised(model, inputs, count=1):
    """The attentions of the rewritten model, whose numbers must be kept."""
    graph = trace_core(model, inputs)
    remove_dead(graph, HW)
    before = copy_graph(graph)
    assert recognise_attention(graph, HW) == count
    check_graph(graph)
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs, **CLOSE)
    assert recognise_attention(graph, HW) == 0
    found = [n for n in graph.graph.nodes if n.target is dialect.attention]
    assert len(found) == count
    return found


def folded(x):
    return x.reshape(-1, *x.shape[-2:])


PLAIN = {
    "matmul": lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) / 3.0, -1) @ v,
    "scale before": lambda q, k, v: torch.softmax((q * 0.5) @ k.mT, -1) @ v,
    "scale on both": lambda q, k, v: torch.softmax((q * 0.6) @ (k * 0.6).mT, -1) @ v,
    "scale on k transposed": lambda q, k, v: torch.softmax(q @ (k.mT / 2.0), -1) @ v,
    "no scale": lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v,
    "scale by a tensor": lambda q, k, v: torch.softmax(q @ k.mT / torch.full([], 3.0), -1) @ v,
    "bmm": lambda q, k, v: torch.bmm(torch.bmm(folded(q), folded(k).mT).mul(0.3).softmax(-1), folded(v)),
    "baddbmm": lambda q, k, v: torch.bmm(
        torch.baddbmm(folded(BIAS.repeat(2, 1, 1)), folded(q), folded(k).mT, beta=0.5, alpha=0.3).softmax(-1), folded(v)
    ),
    "einsum": lambda q, k, v: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v),
    "transposed scores": lambda q, k, v: torch.softmax((k @ q.mT).mT * 0.3, -1) @ v,
    "one head": lambda q, k, v: torch.softmax(q[0, 0] @ k[0, 0].T * 0.3, -1) @ v[0, 0],
    "bias": lambda q, k, v: torch.softmax(q @ k.mT * 0.3 + BIAS, -1) @ v,
    "bias in front": lambda q, k, v: torch.softmax(BIAS + q @ k.mT, -1) @ v,
    "bias less": lambda q, k, v: torch.softmax(q @ k.mT - BIAS, -1) @ v,
    "bias scaled": lambda q, k, v: torch.softmax((q @ k.mT + BIAS) * 0.3, -1) @ v,
    "two biases": lambda q, k, v: torch.softmax(q @ k.mT + BIAS + SEEN.float(), -1) @ v,
    "windows": lambda q, k, v: (
        torch.softmax(((q @ k.mT + BIAS).view(1, 2, 4, 3, 5) + BIAS[:2].view(1, 2, 1, 3, 5)).view(2, 4, 3, 5), -1) @ v
    ),
    "hidden with the least": lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(~SEEN, LEAST), -1) @ v,
    "hidden with -inf": lambda q, k, v: torch.softmax((q @ k.mT).masked_fill(~SEEN, -torch.inf), -1) @ v,
    "hidden with little": lambda q, k, v: torch.softmax(torch.where(SEEN, q @ k.mT, -1e4), -1) @ v,
    "hidden and scaled": lambda q, k, v: torch.softmax(torch.where(SEEN, q @ k.mT, -3.0) * 0.5, -1) @ v,
    "hidden by adding -inf": lambda q, k, v: torch.softmax(q @ k.mT + torch.where(SEEN, 0.0, -torch.inf), -1) @ v,
    "hidden, then a bias": lambda q, k, v: torch.softmax(torch.where(SEEN, q @ k.mT, LEAST) + BIAS, -1) @ v,
    "a bias, then hidden": lambda q, k, v: torch.softmax(torch.where(SEEN, q @ k.mT + BIAS, -torch.inf), -1) @ v,
    "hidden twice": lambda q, k, v: (
        torch.softmax(torch.where(SEEN, torch.where(SEEN[:1], q @ k.mT, LEAST), LEAST), -1) @ v
    ),
    "weights reshaped": lambda q, k, v: folded(torch.softmax(q @ k.mT, -1)) @ folded(v),
}


@pytest.mark.parametrize("name", PLAIN)
def test_spellings(name):
    recognised(PLAIN[name], [Q, K, V])


def test_after():
    def before(q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v

    (node,) = recognised(before, [Q, K, V])
    assert node.args[3:] == (None, False, 0.5, -math.inf)
    assert [n.meta["val"].shape for n in node.args[:3]] == [Q.shape, K.shape, V.shape]


def test_a_mask_keeps_its_ones():
    def model(q, k, v, padding):
        scores = torch.bmm(folded(q), folded(k).mT).view(2, 4, 3, 5) + padding
        return torch.bmm(folded(scores.softmax(-1)), folded(v))

    (node,) = recognised(model, [Q, K, V, torch.randn(2, 1, 1, 5)])
    assert tuple(node.args[3].meta["val"].shape) == (2, 1, 1, 5)


def test_a_mask_over_all_matrices_is_one_over_heads():
    def model(q, k, v, mask):
        return torch.bmm((torch.bmm(folded(q), folded(k).mT) + mask).softmax(-1), folded(v))

    (node,) = recognised(model, [Q, K, V, torch.randn(8, 3, 5)])
    assert tuple(node.args[3].meta["val"].shape) == (2, 4, 3, 5)
    (node,) = recognised(model, [Q[0], K[0], V[0], torch.randn(4, 3, 5)])
    assert tuple(node.args[3].meta["val"].shape) == (1, 4, 3, 5)


def repeated(x, times):
    """transformers' repeat_kv."""
    batch, heads, length, depth = x.shape
    return x[:, :, None].expand(batch, heads, times, length, depth).reshape(batch, heads * times, length, depth)


@pytest.mark.parametrize("groups", [1, 2])
def test_repeated_heads_are_read_once(groups):
    def model(q, k, v):
        return torch.softmax(q @ repeated(k, 4 // groups).mT, -1) @ repeated(v, 4 // groups)

    (node,) = recognised(model, [Q, K[:, :groups], V[:, :groups]])
    assert tuple(node.args[1].meta["val"].shape) == (2, groups, 5, 8)


def test_one_head_of_keys_serves_all():
    (node,) = recognised(PLAIN["no scale"], [Q, K[:, :1], V[:, :1]])
    assert tuple(node.args[1].meta["val"].shape) == (2, 1, 5, 8)


def test_heads_that_are_tiled_are_no_groups():
    def model(q, k, v):
        k, v = (t[:, None].expand(2, 2, 2, 5, -1).reshape(2, 4, 5, -1) for t in (k, v))
        return torch.softmax(q @ k.mT, -1) @ v

    (node,) = recognised(model, [Q, K[:, :2], V[:, :2]])
    assert tuple(node.args[1].meta["val"].shape) == (2, 4, 5, 8)


def test_repeats_of_keys_alone_stay():
    def model(q, k, v):
        return torch.softmax(q @ repeated(k, 2).mT, -1) @ v

    (node,) = recognised(model, [Q, K[:, :2], V])
    assert tuple(node.args[1].meta["val"].shape) == (2, 4, 5, 8)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_of_torch(need_weights):
    layer = torch.nn.MultiheadAttention(8, 2).eval()

    def model(x, mask):
        return layer(x, x, x, need_weights=need_weights, attn_mask=mask)[0]

    inputs = [torch.randn(3, 2, 8), torch.randn(3, 3)]
    graph = trace(model, inputs)
    before = copy_graph(graph)
    remove_dead(graph, HW)
    assert recognise_attention(graph, HW) + fuse_attention(graph, HW) == 1
    assert_same_numbers(before, graph, inputs, **CLOSE)


@pytest.mark.parametrize("hidden", [LEAST, -torch.inf])
def test_a_triangle_is_causal(hidden):
    square = torch.ones(3, 3, dtype=torch.bool).tril()

    class Causal(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.zeros(3, 3).masked_fill(~square, hidden))

        def forward(self, q, k, v):
            return torch.softmax(q @ k.mT + self.mask, -1) @ v

    inputs = [Q, K[:, :, :3], V[:, :, :3]]
    graph = trace(Causal(), inputs)
    before = copy_graph(graph)
    remove_dead(graph, HW)
    assert recognise_attention(graph, HW) == 1
    (node,) = [n for n in graph.graph.nodes if n.target is dialect.attention]
    assert fuse_attention(graph, HW) == 0  # the mask is reshaped: only constants are looked into
    node.args = (*node.args[:3], next(n for n in graph.graph.nodes if n.op == "get_attr"), *node.args[4:])
    assert fuse_attention(graph, HW) == 1
    assert node.args[3:5] == (None, True)
    assert_same_numbers(before, graph, inputs, **CLOSE)
    assert fuse_attention(graph, HW) == 0


def test_a_bool_triangle_that_hides_with_little_stays():
    square = torch.ones(3, 3, dtype=torch.bool).tril()

    class Causal(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", square)

        def forward(self, q, k, v):
            return dialect.attention(q, k, v, self.mask, False, 1.0, -2.0)

    graph = trace(Causal(), [Q, K[:, :, :3], V[:, :, :3]])
    assert fuse_attention(graph, HW) == 0


def scores(q, k):
    return q @ k.mT


REFUSED = [
    (lambda q, k, v: (lambda w: (w, w @ v))(scores(q, k).softmax(-1)), "its weights are read by 2 nodes"),
    (lambda q, k, v: scores(q, k).softmax(-1), "its weights are read by 1 nodes"),
    (lambda q, k, v: (lambda s: (s, s.softmax(-1) @ v))(scores(q, k)), "a value in between, is read by"),
    (lambda q, k, v: (lambda s: (s.sum(), (s * 2.0).softmax(-1) @ v))(scores(q, k)), "a value in between, is read by"),
    (lambda q, k, v: scores(q, k).softmax(-2) @ v, "not along the last dim"),
    (lambda q, k, v: torch.softmax(scores(q, k).double(), -1).float() @ v, "which is no product with values"),
    (lambda q, k, v: torch.softmax(scores(q.double(), k.double()).float(), -1) @ v, "stands between"),
    (lambda q, k, v: torch.softmax(scores(q, k).sin(), -1) @ v, "stands between product and softmax"),
    (lambda q, k, v: torch.nn.functional.dropout(scores(q, k).softmax(-1), 0.5) @ v, "weights are read by"),
    (lambda q, k, v: torch.softmax(scores(q, k) * BIAS, -1) @ v, "is not scaled by a number"),
    (lambda q, k, v: torch.softmax(scores(q, k) * 0.0, -1) @ v, "is not scaled by a number"),
    (lambda q, k, v: torch.softmax(scores(q, k) + 1.0, -1) @ v, "adds a number or a multiple"),
    (lambda q, k, v: torch.softmax(torch.add(scores(q, k), BIAS, alpha=2), -1) @ v, "adds a number or a multiple"),
    (lambda q, k, v: torch.softmax(scores(q, k)[:, :1] + BIAS, -1) @ v, "broadcasts the scores"),
    (lambda q, k, v: torch.softmax(torch.where(SEEN, scores(q, k), BIAS), -1) @ v, "one number in the place of scores"),
    (
        lambda q, k, v: torch.softmax(torch.where(SEEN, scores(q, k), -9.0) + BIAS, -1) @ v,
        "a number that scores change",
    ),
    (lambda q, k, v: torch.softmax(scores(q, k).reshape(2, 4, 5, 3), -1) @ v[:, :, :3], "reshapes queries and keys"),
    (lambda q, k, v: torch.softmax(scores(q, k).transpose(1, 2), -1) @ v[:, :3], "moves more than"),
    (lambda q, k, v: torch.softmax((scores(k, q) + BIAS.mT).mT, -1) @ v, "or a mask with them"),
    (lambda q, k, v: torch.softmax(scores(k, q).permute(1, 0, 3, 2), -1) @ v.transpose(0, 1), "moves more than"),
    (lambda q, k, v: torch.softmax(scores(k, q).mT.reshape(2, 4, 5, 3), -1) @ v[:, :, :3], "moves more than"),
    (lambda q, k, v: torch.softmax(scores(q, k) * torch.inf, -1) @ v, "is not scaled by a number"),
    (lambda q, k, v: torch.softmax(torch.where(SEEN, scores(q, k), torch.nan), -1) @ v, "in the place of scores"),
    (lambda q, k, v: torch.softmax(torch.where(SEEN, scores(q, k)[:, :, :1], -9.0), -1) @ v, "broadcasts the scores"),
    (
        lambda q, k, v: (
            scores(q, k).softmax(-1).transpose(1, 2).reshape(8, 3, 5).transpose(0, 1) @ v.reshape(8, 5, 6)[:3]
        ),
        "moves its weights",
    ),
    (lambda q, k, v: scores(q, k).softmax(-1).transpose(0, 1) @ v.transpose(0, 1), "moves its weights"),
    (lambda q, k, v: scores(q, k).softmax(-1).reshape(2, 12, 5) @ v[:, 0], "moves its weights"),
    (lambda q, k, v: v.mT[..., :3] @ scores(q, k).softmax(-1), "which is no product with values"),
    (lambda q, k, v: torch.softmax(q.sum() * k.sum(), 0) * v, "not a matrix"),
    (lambda q, k, v: torch.softmax(q, -1) @ v[:, :, :1].expand(2, 4, 8, 6), "the scores are no product"),
    (
        lambda q, k, v: (
            torch.softmax((scores(q, k).view(4, 2, 3, 5) + BIAS[:2]).view(2, 4, 3, 5), -1) @ v  # two of four heads
        ),
        "is not one over batch and heads",
    ),
]


@pytest.mark.parametrize(("model", "reason"), REFUSED)
def test_what_is_kept(model, reason, caplog):
    graph = trace_core(model, [Q, K, V])
    if "dropout" not in text_of(graph):
        remove_dead(graph, HW)
    text = text_of(graph)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert recognise_attention(graph, HW) == 0
    assert reason in caplog.text
    assert text_of(graph) == text


def test_a_softmax_that_widens_is_kept(caplog):
    def model(q, k, v):
        return torch.softmax(scores(q, k), -1, dtype=torch.float64) @ v.double()

    graph = trace_core(model, [Q, K, V], pre_dispatch=True)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert recognise_attention(graph, HW) == 0
    assert "the dtype changes between the products" in caplog.text


def test_a_mask_of_another_dtype_is_kept(caplog):
    graph = trace_core(lambda q, k, v, m: torch.softmax(q @ k.mT + m, -1) @ v, [Q, K, V, torch.ones(3, 5).long()])
    remove_dead(graph, HW)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert recognise_attention(graph, HW) == 0
    assert "a mask of another dtype" in caplog.text


@pytest.mark.parametrize("values", [V[0, 0], V[:, :1]])
def test_fewer_values_than_weights_are_kept(values, caplog):
    graph = trace_core(PLAIN["no scale"], [Q, K, values], pre_dispatch=True)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert recognise_attention(graph, HW) == 0
    assert "the values are not as many" in caplog.text


def test_keys_for_all_queries_at_once_are_kept(caplog):
    graph = trace_core(PLAIN["no scale"], [Q, K[0, 0], V[0, 0]], pre_dispatch=True)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert recognise_attention(graph, HW) == 0
    graph = trace_core(lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, [Q, K[0, 0], V], pre_dispatch=True)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert recognise_attention(graph, HW) == 0
    assert "a product of shapes" in caplog.text


def test_a_long_way_to_the_product_is_not_gone(caplog):
    def model(q, k, v):
        scores = q @ k.mT
        for _ in range(40):
            scores = scores * 1.01
        return scores.softmax(-1) @ v

    graph = trace_core(model, [Q, K, V])
    remove_dead(graph, HW)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert recognise_attention(graph, HW) == 0
    assert "more than 32 steps" in caplog.text


def test_a_mask_with_more_dims_than_the_scores_is_kept(caplog):
    graph = trace_core(
        lambda q, k, v, m: torch.softmax(q @ k.T + m, -1).sum(0) @ v, [Q[0, 0], K[0, 0], V[0, 0], torch.randn(2, 3, 5)]
    )
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert recognise_attention(graph, HW) == 0


def test_factors_that_widen_or_broadcast_stay():
    wide = torch.full([], 0.5, dtype=torch.float64)
    recognised(lambda q, k, v: torch.softmax((q * wide) @ k.mT, -1) @ v, [Q, K, V])
    recognised(lambda q, k, v: torch.softmax((q * torch.full((1, 1, 1, 1, 1), 0.5))[0] @ k.mT, -1) @ v, [Q, K, V])


def test_nothing_to_attend_to():
    recognised(
        lambda q, k, v: torch.softmax(q @ repeated(k, 2).mT, -1) @ repeated(v, 2), [Q, K[:, :2, :0], V[:, :2, :0]]
    )


def test_weights_that_are_moved_are_kept(caplog):
    graph = trace_core(lambda q, k, v: torch.softmax(q @ k.mT, -1).mT @ v[:, :, :3], [Q, K, V])
    remove_dead(graph, HW)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert recognise_attention(graph, HW) == 0
    assert "moves its weights" in caplog.text


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["none", "add", "row", "where", "inf", "both", "shared"]),
    st.sampled_from(["q", "k", "scores", "none"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_attention_keeps_its_numbers(groups, queries, keys, kind, scaled, fold, seed):
    torch.manual_seed(seed)
    q, k, v = torch.randn(2, 4, queries, 8), torch.randn(2, groups, keys, 8), torch.randn(2, groups, keys, 3)
    seen, bias = torch.rand(2, 1, queries, keys) > 0.4, torch.randn(1, 4, queries, keys)

    def model(q, k, v, seen, bias):
        k, v = repeated(k, 4 // groups), repeated(v, 4 // groups)
        q = q * 0.4 if scaled == "q" else q
        k = k / 3.0 if scaled == "k" else k
        s = (folded(q) @ folded(k).mT).view(2, 4, queries, keys) if fold else q @ k.mT
        s = s * 0.3 if scaled == "scores" else s
        s = s + bias if kind in ("add", "both") else s
        s = s + bias[:, :1, :1] if kind == "row" else s
        s = s.masked_fill(~seen, -torch.inf) if kind == "inf" else s
        s = torch.where(seen, s, LEAST) if kind in ("where", "both") else s
        s = torch.where(seen[:1], s, -5.0) if kind == "shared" else s
        w = s.softmax(-1)
        return (folded(w) @ folded(v)).view(2, 4, queries, 3) if fold else w @ v

    inputs = [q, k, v, seen, bias]
    graph = trace_core(model, inputs)
    remove_dead(graph, HW)
    before = copy_graph(graph)
    assert recognise_attention(graph, HW) == 1
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs, **CLOSE)
