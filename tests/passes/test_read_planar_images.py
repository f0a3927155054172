"""Convolutions of few channels read NCHW; whoever else reads the permuted image, or wider ones, keep the permute."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from rewriting import HW, assert_same_numbers, check_values, trace_core

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect
from graphwright.passes.dialect_planar import planar_conv2d
from graphwright.passes.read_planar_images import read_planar_images

# Made before anything is traced: constants.
WEIGHT, DEEP, ONE_EACH, WIDE = (torch.randn(*n) for n in ((4, 3, 3, 3), (4, 12, 3, 3), (3, 1, 3, 3), (4, 3, 1, 17)))
SIXTH = torch.randn(4, 6, 3, 3)
DOUBLE = WEIGHT.double()
IMAGE = torch.randn(2, 3, 6, 5)


def nhwc(x):
    n, c, h, w = x.shape
    return dialect.permute(x, [n, c, h * w], [0, 2, 1], [n, h, w, c])


def conv(x, weight, stride=1, groups=1, residual=None, bias=None, layout="NHWC"):
    pad = [weight.shape[2] // 2] * 2 + [weight.shape[3] // 2] * 2
    return dialect.conv2d(x, weight, bias, residual, [stride] * 2, pad, [1, 1], groups, "relu", [], layout)


def run(model, inputs, count):
    graph = trace_core(model, inputs, pre_dispatch=True)
    before = copy_graph(graph)
    assert read_planar_images(graph, HW) == count
    check_values(graph, inputs)
    assert_same_numbers(before, graph, inputs, rtol=1e-5, atol=1e-6)  # torch's own convolution, of another layout
    assert read_planar_images(graph, HW) == 0
    return [n.target for n in graph.graph.nodes if n.op == "call_function"]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 3, 4]), st.integers(1, 2), st.booleans())
def test_the_permute_is_taken_up(channels, taps, stride, joined):
    weight, bias = torch.randn(4, channels, taps, taps), torch.randn(4) if joined else None
    x = torch.randn(2, channels, 6, 5)
    count = int(channels > 1)  # of one channel nothing moves
    assert (planar_conv2d in run(lambda x: conv(nhwc(x), weight, stride, bias=bias), [x], count)) == bool(count)


def test_a_residual_stays():
    run(lambda x, y: conv(nhwc(x), WEIGHT, residual=y), [IMAGE, torch.randn(2, 6, 5, 4)], 1)


REFUSED = {
    "as well": lambda x: (conv(y := nhwc(x), WEIGHT), y.sin()),
    "read as vectors": lambda x: conv(nhwc(x.repeat(1, 4, 1, 1)), DEEP),
    "grouped": lambda x: conv(nhwc(x), ONE_EACH, groups=3),
    "computed": lambda x: conv(nhwc(x), x[:, :, :3, :3]),
    "so wide": lambda x: conv(nhwc(x), WIDE),
    "not in NHWC": lambda x: conv(nhwc(x), SIXTH, layout="NCHW"),
    "float64": lambda x: conv(nhwc(x.double()), DOUBLE),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused(reason, caplog):
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        run(REFUSED[reason], [IMAGE], 0)
    assert reason in caplog.text


def test_another_permute_is_none_of_images():
    run(lambda x: conv(dialect.permute(x, [2, 3, 6, 5], [0, 3, 2, 1], [2, 5, 6, 3]), WEIGHT), [IMAGE], 0)
    run(lambda x: conv(x, WEIGHT), [torch.randn(2, 6, 5, 3)], 0)
