"""Images lie in NHWC between convolutions, and the permutes that remain are few."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import HW, assert_rewrite, assert_same_numbers, check_values, text_of, trace_core

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect
from graphwright.passes.assign_layout import assign_layout
from graphwright.passes.fold_constants import fold_constants
from graphwright.passes.fuse_conv_activation import fuse_conv_activation
from graphwright.passes.fuse_reshape_transpose import fuse_reshape_transpose

conv2d, permute = torch.ops.graphwright.conv2d, torch.ops.graphwright.permute
aten = torch.ops.aten
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # sums over an image, and of a product, in another order
X, W, OTHER = torch.randn(2, 4, 6, 8), torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3)
EVEN = ([1, 1], [1, 1, 1, 1], [1, 1], 1, "none", [])


def conv(x, w=W):
    return conv2d(x, w, None, None, *EVEN, "NCHW")


def laid_out(model, inputs):
    """The rewritten graph, its numbers kept, and how many permutes are left once chains are merged."""
    graph = trace_core(model, inputs)
    before = copy_graph(graph)
    assert assign_layout(graph, HW) > 0
    graph.graph.lint()
    check_values(graph, inputs)
    assert assign_layout(graph, HW) == 0
    fold_constants(graph, HW)
    fuse_reshape_transpose(graph, HW)
    assert_same_numbers(before, graph, inputs, **CLOSE)
    return graph, sum(n.target is dialect.permute for n in graph.graph.nodes)


def test_a_convolution_between_permutes():
    def after(x, w, y):
        x = permute(x, [2, 4, 6, 8], [0, 2, 3, 1], [2, 6, 8, 4])
        y = permute(y, [2, 4, 6, 8], [0, 2, 3, 1], [2, 6, 8, 4])
        z = conv2d(x, w, None, y, *EVEN, "NHWC")
        return permute(z, [2, 6, 8, 4], [0, 3, 1, 2], [2, 4, 6, 8])

    def before(x, w, y):
        return conv2d(x, w, None, y, *EVEN, "NCHW")

    assert_rewrite(before, after, [X, W, X + 1], assign_layout, 1, **CLOSE)


BETWEEN = {
    "unary": lambda x: torch.sin(x),
    "number": lambda x: x * 2.0 + 1,
    "channels": lambda x: x * torch.arange(4.0).reshape(4, 1, 1),
    "columns": lambda x: x + torch.arange(8.0),
    "rows": lambda x: x + torch.arange(6.0).reshape(6, 1),
    "scalar": lambda x: x * torch.tensor(2.0),
    "one": lambda x: x * torch.ones(1, 1, 1),
    "itself": lambda x: x + x.cos(),
    "gate": lambda x: x * torch.sigmoid(conv(x.mean((2, 3), keepdim=True))),
    "where": lambda x: torch.where(x > 0, x, -x),
    "cast": lambda x: x.double().float(),
    "max_pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "avg_pool": lambda x: F.avg_pool2d(x, (3, 1), 1, (1, 0), count_include_pad=False),
    "cat": lambda x: torch.cat([x, x.sin()], 1)[:, 2:6],
    "slice": lambda x: x[:, :, 1:-1, ::2],
    "split": lambda x: torch.cat(torch.split(x, [1, 3], 1)[::-1], 1),
    "chunk": lambda x: torch.chunk(x, 2, 2)[0],
    "softmax": lambda x: torch.softmax(x, 1),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1), value=0.5),
    "sum": lambda x: x + x.sum(1, keepdim=True),
    "amax": lambda x: x - x.amax((1, 3), keepdim=True),
    "upsample": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "model's own": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), [4]).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_between_two_convolutions_nothing_is_permuted(name):
    graph, permutes = laid_out(lambda x: conv(BETWEEN[name](conv(x))), [X])
    assert permutes == 2, text_of(graph)  # one at the input, one at the output


HEADS = {
    "mean": lambda x: x.mean((2, 3)),
    "sum of all": lambda x: x.sum((0, 1, 2, 3)),
    "channel maximum": lambda x: x.amax(1),
    "global pool": lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    "tokens": lambda x: x.flatten(2).transpose(1, 2).sin(),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_need_no_permute(name):
    graph, permutes = laid_out(lambda x: HEADS[name](conv(x)), [X])
    assert permutes == 1, text_of(graph)


def test_windows_of_one_size_are_a_pool():
    graph, permutes = laid_out(lambda x: F.adaptive_avg_pool2d(conv(x), (3, 2)), [X])
    assert permutes == 2
    assert dialect.avg_pool2d in {n.target for n in graph.graph.nodes}


STAYS = {
    "windows of several sizes": lambda x: F.adaptive_avg_pool2d(x, (4, 3)),
    "rows summed away": lambda x: x.sum(3),
    "group norm": lambda x: F.group_norm(x, 2),
    "rank 5": lambda x: x + torch.ones(3, 1, 1, 1, 1),
    "upsampled by a fraction": lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest"),
    "cumulative sum": lambda x: x.cumsum(2),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_in_nchw(name, caplog):
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        _, permutes = laid_out(lambda x: STAYS[name](conv(x)), [X])
    assert permutes == 2
    assert "cannot follow" in caplog.text


def test_the_lighter_side_is_moved():
    """A gate from a convolution of one pixel does not pull an image into NHWC."""

    def model(x, y):
        return y * conv2d(x, W[:, :, :1, :1], None, None, [1, 1], [0] * 4, [1, 1], 1, "none", [], "NCHW")

    graph, _ = laid_out(model, [X[:, :, :1, :1], X])
    (product,) = [n for n in graph.graph.nodes if n.target is aten.mul.Tensor]
    assert tuple(product.meta["val"].shape) == (2, 4, 6, 8)


def test_what_the_model_computes_between_its_own_permutes_stays():
    """Rank 4, but no image in NCHW: the tokens of a block that permutes to channels last and back by itself."""

    def model(x, w):
        tokens = F.layer_norm(conv(x).permute(0, 2, 3, 1), [4]).reshape(96, 4) @ w
        return conv(conv(x) + (tokens.reshape(2, 6, 8, 4) * 2.0).permute(0, 3, 1, 2))

    _, permutes = laid_out(model, [X, torch.randn(4, 4)])
    assert permutes == 2


def test_an_image_is_permuted_once():
    def model(x):
        return conv(x) + conv(x, OTHER), x.flip(3)

    _, permutes = laid_out(model, [X])
    assert permutes == 2


def test_without_convolutions_nothing_moves():
    graph = trace_core(lambda x: F.relu(x.permute(0, 3, 1, 2)).mean((2, 3)), [X])
    text = text_of(graph)
    assert assign_layout(graph, HW) == 0
    assert text_of(graph) == text


def test_a_residual_network_keeps_one_permute():
    def model(x):
        for _ in range(3):
            x = torch.relu(conv(torch.relu(conv(x))) + x)
        return x.mean((2, 3))

    graph = trace_core(model, [X])
    fuse_conv_activation(graph, HW)
    assert assign_layout(graph, HW) == 6  # the mean is in NHWC too, but is no image
    fuse_reshape_transpose(graph, HW)
    assert sum(n.target is dialect.permute for n in graph.graph.nodes) == 1


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.sampled_from(["conv", "read", *BETWEEN, *STAYS]), min_size=1, max_size=6),
    st.sampled_from(sorted(HEADS)),
)
def test_any_network_keeps_its_numbers(steps, head):
    def model(x):
        outputs, images = [], []
        for step in ["conv", *steps]:
            images.append(x)
            if step == "conv":
                x = conv(x)
            elif step == "read":
                outputs.append(x)
            else:
                y = {**BETWEEN, **STAYS}[step](x) if x.shape == X.shape else x.neg()
                x = y[0] if y.dim() == 5 else y
            x = x if x.dim() == 4 and x.shape[1] == 4 else images[-1]
            same = [i for i in images if i.shape == x.shape]
            x = x * 0.1 + (same[0] if same else 0.0)
        return (*outputs, HEADS[head](x))

    graph = trace_core(model, [X])
    before = copy_graph(graph)
    assign_layout(graph, HW)
    graph.graph.lint()
    check_values(graph, [X])
    assert_same_numbers(before, graph, [X], **CLOSE)
    assert assign_layout(graph, HW) == 0
