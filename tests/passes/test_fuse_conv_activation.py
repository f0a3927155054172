"""Convolutions take up pads, biases, residuals and activations, and nothing else."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import HW, assert_rewrite, assert_same_numbers, check_values, trace, trace_core

from graphwright.compiler.pipeline import copy_graph
from graphwright.compiler.reference import run_eager
from graphwright.passes import dialect
from graphwright.passes.families import restrict
from graphwright.passes.fuse_conv_activation import fuse_conv_activation

conv2d = torch.ops.graphwright.conv2d
aten = torch.ops.aten
# Bias and padding enter the sum at another place: a rounding or two of sums of up to 72 terms.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
X, W, B = torch.randn(2, 4, 6, 7), torch.randn(8, 4, 3, 3), torch.randn(8)
COLUMN = torch.randn(8, 1, 1)
PLAIN = ([1, 1], [1, 1, 1, 1], [1, 1], 1)


def fused(x, w, b=None, y=None, activation="none", args=(), geometry=PLAIN):
    return conv2d(x, w, b, y, *geometry, activation, list(args), "NCHW")


ACTIVATIONS = [
    (torch.relu, "relu", []),
    (F.relu6, "relu6", []),
    (F.silu, "silu", []),
    (F.gelu, "gelu", []),
    (lambda x: F.gelu(x, approximate="tanh"), "gelu_tanh", []),
    (F.hardswish, "hardswish", []),
    (F.hardsigmoid, "hardsigmoid", []),
    (torch.sigmoid, "sigmoid", []),
    (torch.tanh, "tanh", []),
    (lambda x: x.clamp(-1, 2), "clamp", [-1.0, 2.0]),
    (lambda x: x.clamp(min=0), "relu", []),
    (lambda x: x.clamp(max=2), "clamp", [-torch.inf, 2.0]),
    (lambda x: x.clamp(0, 6), "relu6", []),
    (F.hardtanh, "clamp", [-1.0, 1.0]),
    (lambda x: F.leaky_relu(x, 0.2), "leaky_relu", [0.2]),
]


@pytest.mark.parametrize(("activation", "name", "args"), ACTIVATIONS)
def test_activations_are_taken_up(activation, name, args):
    graph = trace_core(lambda x, w, b: activation(F.conv2d(x, w, b, padding=1)), [X, W, B], pre_dispatch=True)
    before = copy_graph(graph)
    assert fuse_conv_activation(graph, HW) == 1
    (node,) = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert node.args[8:10] == (name, args)
    assert_same_numbers(before, graph, [X, W, B], **CLOSE)


def test_bias_residual_and_activation():
    bias = torch.nn.Parameter(torch.randn(8, 1, 1))
    flat = torch.nn.Parameter(bias.detach().reshape(8))

    class Before(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = torch.nn.Parameter(W), bias

        def forward(self, x, y):
            return torch.relu(y + (F.conv2d(x, self.w, padding=1) + self.b))

    class After(Before):
        def forward(self, x, y):
            return fused(x, self.w, self.b.reshape(8), y, "relu")

    assert flat.shape == (8,)
    assert_rewrite(Before(), After(), [X, torch.randn(2, 8, 6, 7)], fuse_conv_activation, 1, **CLOSE)


def test_a_bare_convolution_is_written_in_the_dialect():
    def before(x, w):
        return F.conv2d(x, w, None, (2, 1), (1, 0), (1, 2), 2)

    def after(x, w):
        return fused(x, w, geometry=([2, 1], [1, 1, 0, 0], [1, 2], 2))

    assert_rewrite(before, after, [X, torch.randn(8, 2, 3, 3)], fuse_conv_activation, 1, **CLOSE)


def test_zero_padding_is_taken_up():
    def before(x, w):
        padded = F.pad(x, (0, 1, 2, 3))
        return F.conv2d(padded, w, padding=1), F.conv2d(padded, w)

    def after(x, w):
        return (
            fused(x, w, geometry=([1, 1], [3, 4, 1, 2], [1, 1], 1)),
            fused(x, w, geometry=([1, 1], [2, 3, 0, 1], [1, 1], 1)),
        )

    assert_rewrite(before, after, [X, W], fuse_conv_activation, 2, **CLOSE)


@pytest.mark.parametrize(
    "pad",
    [
        lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
        lambda x: F.pad(x, (1, -1, 1, 1)),
        lambda x: F.pad(x, (1, 1, 1, 1, 0, 2))[:, :4] + 0 * F.pad(x, (1, 1, 1, 1)),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    ],
)
def test_other_padding_stays(pad):
    graph = trace_core(lambda x, w: F.conv2d(pad(x), w), [X, W])
    before = copy_graph(graph)
    assert fuse_conv_activation(graph, HW) == 1
    (node,) = [n for n in graph.graph.nodes if n.target is dialect.conv2d]
    assert node.args[5] == [0, 0, 0, 0]
    assert_same_numbers(before, graph, [X, W], **CLOSE)


def test_padding_of_channels_stays():
    graph = trace_core(lambda x, w: F.conv2d(F.pad(x, (0, 0, 0, 0, 0, 1)), w), [X[:, :3], W])
    assert fuse_conv_activation(graph, HW) == 1
    assert any(n.target is aten.constant_pad_nd.default for n in graph.graph.nodes)


@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("conv+relu", lambda x, w: torch.relu(F.conv2d(x, w, padding=1))),
        ("conv+add", lambda x, w: F.conv2d(x, w, padding=1) + x[:, :1].expand(2, 8, 6, 7).contiguous()),
        ("conv+pad", lambda x, w: F.conv2d(F.pad(x, (1, 1, 1, 1)), w)),
    ],
)
def test_families_that_are_left_out(family, model, caplog):
    def nodes(families):
        graph = trace(model, [X, W])
        restrict(graph, families)
        fuse_conv_activation(graph, HW)
        return [n.target for n in graph.graph.nodes if n.op == "call_function"]

    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert len(nodes([])) == len(nodes([family])) + 1
    if family == "conv+relu":
        assert "kernel_fusion leaves activations out" in caplog.text


@pytest.mark.parametrize("families", [[], ["conv+bias"]])
def test_a_bias_that_is_left_out(families):
    graph = trace(lambda x, w: F.conv2d(x, w, padding=1) + COLUMN, [X, W])
    restrict(graph, families)
    fuse_conv_activation(graph, HW)
    assert any(n.target is aten.add.Tensor for n in graph.graph.nodes) == (not families)


REFUSED = [
    (lambda c, y: [c, torch.relu(c)], "read by 2 nodes"),
    (lambda c, y: torch.add(c, y, alpha=2), "scales what it adds"),
    (lambda c, y: c + y[:1], "no free bias or residual"),
    (lambda c, y: c + y[:, :1], "no free bias or residual"),
    (lambda c, y: c + 3.0, "adds a number"),
    (lambda c, y: c + c, "the product to itself"),
    (lambda c, y: c + y.double(), "mixes dtypes"),
    (lambda c, y: c + y.int(), "mixes dtypes"),
    (lambda c, y: c - y, "is no activation"),
    (lambda c, y: torch.relu(c.double()), "is no activation"),
    (lambda c, y: F.elu(c), "is no activation"),
    (lambda c, y: torch.sigmoid(c) * c, "read by 2 nodes"),
]


@pytest.mark.parametrize(("behind", "reason"), REFUSED)
def test_what_is_not_taken_up(behind, reason, caplog):
    y = torch.randn(2, 8, 6, 7)
    graph = trace_core(lambda x, w, y: behind(F.conv2d(x, w, padding=1), y), [X, W, y])
    before = copy_graph(graph)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert fuse_conv_activation(graph, HW) == 1
    assert reason in caplog.text
    (node,) = [n for n in graph.graph.nodes if n.target is dialect.conv2d]
    assert node.args[2:4] == (None, None)
    assert node.args[8] == "none"
    assert_same_numbers(before, graph, [X, W, y], **CLOSE)
    assert fuse_conv_activation(graph, HW) == 0


@pytest.mark.parametrize(
    "model",
    [
        lambda x, w, y: F.conv2d(x, w, B, padding=1) + COLUMN,
        lambda x, w, y: F.conv2d(x, w, padding=1) + y + COLUMN,
        lambda x, w, y: F.conv2d(x, w, padding=1) + y + y.sin(),
    ],
    ids=["two biases", "a bias behind a residual", "two residuals"],
)
def test_a_second_addition_stays(model, caplog):
    inputs = [X, W, torch.randn(2, 8, 6, 7)]
    graph = trace_core(model, inputs)
    before = copy_graph(graph)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert fuse_conv_activation(graph, HW) == 1
    assert "no free bias or residual" in caplog.text
    assert [n.target for n in graph.graph.nodes].count(aten.add.Tensor) == 1
    assert_same_numbers(before, graph, inputs, **CLOSE)


def test_nothing_follows_an_activation():
    graph = trace_core(lambda x, w, y: torch.relu(F.conv2d(x, w, padding=1)) + y, [X, W, torch.randn(2, 8, 6, 7)])
    assert fuse_conv_activation(graph, HW) == 1
    assert [str(n.target) for n in graph.graph.nodes][-2] == "aten.add.Tensor"


def test_of_two_convolutions_one_is_the_residual_of_the_other():
    def model(x, w):
        return torch.relu(F.conv2d(x, w, padding=1) + F.conv2d(x + 1, w, padding=1))

    graph = trace_core(model, [X, W])
    before = copy_graph(graph)
    assert fuse_conv_activation(graph, HW) == 2
    calls = [n for n in graph.graph.nodes if n.target is dialect.conv2d]
    assert sorted(n.args[8] for n in calls) == ["none", "relu"]
    assert_same_numbers(before, graph, [X, W], **CLOSE)


def test_a_residual_that_is_computed_later_is_waited_for():
    def model(x, w):
        c = F.conv2d(x, w, padding=1)
        y = torch.sin(F.avg_pool2d(x, 1).repeat(1, 2, 1, 1))
        return c + y

    graph = trace_core(model, [X, W])
    before = copy_graph(graph)
    assert fuse_conv_activation(graph, HW) == 1
    graph.graph.lint()
    assert graph.graph.find_nodes(op="call_function", target=dialect.conv2d)[0].args[3] is not None
    assert_same_numbers(before, graph, [X, W], **CLOSE)


def test_a_residual_computed_from_the_product_is_none():
    """The product is read twice then, so that no cycle can arise."""
    graph = trace_core(lambda x, w: [c := F.conv2d(x, w, padding=1), c + torch.sin(c)][1:], [X, W])
    assert fuse_conv_activation(graph, HW) == 1
    assert graph.graph.find_nodes(op="call_function", target=dialect.conv2d)[0].args[3] is None


def test_a_fused_convolution_takes_up_more():
    def model(x, w, y):
        c = conv2d(x, w, None, y, *PLAIN, "none", [], "NHWC")
        return torch.relu(c)

    x, y = X.permute(0, 2, 3, 1).contiguous(), torch.randn(2, 6, 7, 8)
    graph = trace_core(model, [x, W, y])
    assert fuse_conv_activation(graph, HW) == 1
    (node,) = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert node.args[3] is not None
    assert node.args[8] == "relu"


@pytest.mark.parametrize("model", [lambda x, w: F.conv2d(x[0], w), lambda x, w: F.conv2d(x.int(), w.int())])
def test_unbatched_images_and_integers_stay(model, caplog):
    graph = trace(model, [X, W])
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert fuse_conv_activation(graph, HW) == int(any(n.name.startswith("unsq") for n in graph.graph.nodes))
    assert dialect.conv2d not in {n.target for n in graph.graph.nodes} or "unsqueeze" in str(graph.graph)


def test_a_sequence_is_an_image_of_one_row():
    x, w, y = torch.randn(2, 4, 9), torch.randn(6, 2, 3), torch.randn(2, 6, 5)

    def model(x, w, y):
        return torch.relu(F.conv1d(F.pad(x, (1, 0)), w, None, 2, 0, 1, 2) + y[..., :4])

    graph = trace(model, [x, w, y])
    before = copy_graph(graph)
    assert fuse_conv_activation(graph, HW) == 1
    check_values(graph, [x, w, y])
    (node,) = [n for n in graph.graph.nodes if n.target is dialect.conv2d]
    assert node.args[4:8] == ([1, 2], [0, 0, 1, 0], [1, 1], 2)
    assert node.args[3] is not None
    assert node.args[8] == "relu"
    assert_same_numbers(before, graph, [x, w, y], **CLOSE)
    assert fuse_conv_activation(graph, HW) == 0


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(["pad", "bias", "residual", "scaled", "activation", "read"]), max_size=5),
    st.integers(0, len(ACTIVATIONS) - 1),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_any_neighbourhood_keeps_its_numbers(steps, which, bias, dtype):
    x, w, b, channel = (t.to(dtype) for t in (X, W, B, torch.randn(1, 8, 1, 1)))

    def model(x):
        outputs = []
        x = F.pad(x, (1, 0, 0, 1)) if "pad" in steps else x
        c = F.conv2d(x, w, b if bias else None, padding=1)
        for step in steps:
            if step == "bias":
                c = c + channel
            elif step == "residual":
                c = torch.ones_like(c) * 0.5 + c
            elif step == "scaled":
                c = torch.add(c, c.sin(), alpha=0.5)
            elif step == "activation":
                c = ACTIVATIONS[which][0](c)
            elif step == "read":
                outputs.append(c)
        return (*outputs, c)

    graph = trace_core(model, [x])
    before = copy_graph(graph)
    assert fuse_conv_activation(graph, HW) == 1
    graph.graph.lint()
    check_values(graph, [x])
    assert_same_numbers(before, graph, [x], **CLOSE)
    assert fuse_conv_activation(graph, HW) == 0


def test_the_padding_of_nothing_stays(caplog):
    graph = trace_core(lambda x: F.conv1d(F.pad(x, (1, 1)), torch.ones(1, 1, 1)), [torch.randn(1, 1, 0)])
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        fuse_conv_activation(graph, HW)
    assert "without elements" in caplog.text
    assert run_eager(graph, [torch.randn(1, 1, 0)])[0].shape == (1, 1, 2)
