"""scaled_dot_product_attention in the dialect: heads, masks and what is refused."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import HW, assert_rewrite, assert_same_numbers, check_values, text_of, trace, trace_core

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect
from graphwright.passes.fuse_attention import fuse_attention

attention = torch.ops.graphwright.attention
sdpa = F.scaled_dot_product_attention
Q, K, V = (torch.randn(2, 4, n, 8) for n in (3, 5, 5))
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # masks take another of torch's kernels


def fused(model, inputs):
    """The attention node of the rewritten model, whose numbers must be kept."""
    graph = trace(model, inputs)
    before = copy_graph(graph)
    assert fuse_attention(graph, HW) == 1
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs, **CLOSE)
    assert fuse_attention(graph, HW) == 0
    (node,) = [n for n in graph.graph.nodes if n.target is dialect.attention]
    return node


def test_attention():
    def after(q, k, v):
        return attention(q, k, v, None, False, 1 / 8**0.5)

    assert_rewrite(sdpa, after, [Q, K, V], fuse_attention, 1, **CLOSE)


def test_mask_and_scale():
    def after(q, k, v, m):
        return attention(q, k, v, m, False, 0.5)

    def before(q, k, v, m):
        return sdpa(q, k, v, m, scale=0.5)

    assert_rewrite(before, after, [Q, K, V, torch.randn(3, 5)], fuse_attention, 1, **CLOSE)
    assert_rewrite(before, after, [Q, K, V, torch.rand(2, 1, 3, 5) > 0.4], fuse_attention, 1, **CLOSE)


def test_a_row_that_sees_nothing_is_zero():
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    node = fused(sdpa, [Q, K, V, mask])
    assert node.args[3] is not None


def test_causal():
    assert fused(lambda q, k, v: sdpa(q, k, v, is_causal=True), [Q, K, V]).args[4] is True


def test_heads_in_groups():
    def model(q, k, v):
        return sdpa(q, k, v, enable_gqa=True)

    node = fused(model, [Q, K[:, :2], V[:, :2]])
    assert tuple(node.args[1].meta["val"].shape) == (2, 2, 5, 8)


def test_repeated_heads_are_read_once():
    """transformers' repeat_kv: unsqueeze, expand, reshape."""

    def model(q, k, v):
        k, v = (t[:, :, None].expand(2, 2, 2, 5, 8).reshape(2, 4, 5, 8) for t in (k, v))
        return sdpa(q, k, v)

    node = fused(model, [Q, K[:, :2], V[:, :2]])
    assert [n.op for n in node.args[:3]] == ["placeholder"] * 3


def test_heads_that_are_tiled_are_no_groups():
    """repeat puts the heads in the order 0 1 0 1; groups are 0 0 1 1."""

    def model(q, k, v):
        k, v = (t[:, None].expand(2, 2, 2, 5, 8).reshape(2, 4, 5, 8) for t in (k, v))
        return sdpa(q, k, v)

    node = fused(model, [Q, K[:, :2], V[:, :2]])
    assert node.args[1].op != "placeholder"


def test_without_heads():
    def model(q, k, v, m):
        return sdpa(q, k, v, m)

    fused(model, [Q[:, 0], K[:, 0], V[:, 0], torch.rand(2, 3, 5) > 0.4])


def test_heads_of_no_channels():
    """Every score is 0, whatever it is divided by: the mean of the values."""
    fused(lambda q, k, v: sdpa(q, k, v), [Q[..., :0], K[..., :0], V])


class Masked(torch.nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, q, k, v):
        return sdpa(q, k, v, self.mask)


NOTHING = torch.zeros(3, 3)
CAUSAL = torch.ones(3, 3, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("mask", "hidden"),
    [
        (NOTHING == 0, "nothing"),
        (NOTHING, "nothing"),
        (CAUSAL, "causal"),
        (CAUSAL.expand(2, 1, 3, 3), "causal"),
        (NOTHING.masked_fill(~CAUSAL, -torch.inf), "causal"),
        (~CAUSAL.triu(), "other"),
        (NOTHING.masked_fill(~CAUSAL, -1e9), "other"),
        (NOTHING + 1.0, "other"),
        (CAUSAL[:1], "other"),
    ],
)
def test_constant_masks(mask, hidden):
    node = fused(Masked(mask), [Q, K[:, :, :3], V[:, :, :3]])
    assert (node.args[3] is None, node.args[4]) == {
        "nothing": (True, False),
        "causal": (True, True),
        "other": (False, False),
    }[hidden]


REFUSED = [
    (lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), "drops 0.5"),
    (lambda q, k, v: sdpa(q[:, :, None], k[:, :, None], v[:, :, None]), "rank 5"),
    (lambda q, k, v: sdpa(q, k[:1], v[:1]), "operands of shape"),
    (lambda q, k, v: sdpa(q.half(), k.half(), v.half(), torch.zeros(3, 5)), "a mask in another dtype"),
]


@pytest.mark.parametrize(("model", "reason"), REFUSED)
def test_what_is_kept(model, reason, caplog):
    graph = trace_core(model, [Q, K, V], pre_dispatch=True)
    text = text_of(graph)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert fuse_attention(graph, HW) == 0
    assert reason in caplog.text
    assert text_of(graph) == text


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["none", "bool", "float", "causal", "row"]),
    st.sampled_from([None, 0.3]),
    st.integers(0, 99),
)
def test_any_attention_keeps_its_numbers(groups, queries, keys, kind, scale, seed):
    torch.manual_seed(seed)
    q, k, v = torch.randn(1, 4, queries, 8), torch.randn(1, groups, keys, 8), torch.randn(1, groups, keys, 4)
    mask = {
        "none": None,
        "causal": None,
        "bool": torch.rand(queries, keys) > 0.5,
        "float": torch.randn(1, 1, queries, keys),
        "row": torch.rand(1, keys) > 0.5,
    }[kind]
    extra = [] if mask is None else [mask]

    def model(q, k, v, *m):
        return sdpa(q, k, v, *m, is_causal=kind == "causal", scale=scale, enable_gqa=True)

    graph = trace_core(model, [q, k, v, *extra], pre_dispatch=True)
    before = copy_graph(graph)
    assert fuse_attention(graph, HW) == 1
    check_values(graph, [q, k, v, *extra])
    assert_same_numbers(before, graph, [q, k, v, *extra], **CLOSE)
