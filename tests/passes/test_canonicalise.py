"""One spelling for each operation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rewriting import HW, assert_same_numbers, trace_core
from torch.fx.experimental.proxy_tensor import make_fx

from graphwright.compiler.capture import capture, export
from graphwright.compiler.pipeline import copy_graph
from graphwright.passes.canonicalise import canonicalise

aten = torch.ops.aten


def targets(graph):
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]


def respell(function, inputs, *, core=True):
    """The targets after canonicalise, which must keep the numbers and find nothing twice."""
    if core:
        graph = trace_core(function, inputs)  # canonicalises as well
        plain = make_fx(function, tracing_mode="real")(*inputs)
        expected, results = plain(*inputs), graph(*inputs)
        expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
        for old, new in zip(expected, results, strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    else:
        graph = capture(export(function, inputs)).graph
        before = copy_graph(graph)
        canonicalise(graph, HW)
        graph.graph.lint()
        assert_same_numbers(before, graph, inputs)
    assert canonicalise(graph, HW) == 0
    return targets(graph)


@pytest.mark.parametrize(
    "reshape",
    [
        lambda x: x.view(2, 6),
        lambda x: x.unsqueeze(-1),
        lambda x: x.squeeze(),
        lambda x: x.squeeze(1),
        lambda x: aten.squeeze.dims(x, [1]),
        lambda x: x.flatten(1),
        lambda x: aten._unsafe_view(x, [4, 3]),
        lambda x: aten.reshape(x, [-1, 2]),
    ],
)
def test_views_are_reshapes(reshape):
    assert respell(reshape, [torch.randn(2, 1, 6)]) == ["aten.reshape.default"]


@pytest.mark.parametrize(
    "permute",
    [
        lambda x: x.transpose(-1, 0),
        lambda x: x.permute(-1, 0, 1),
        lambda x: x.movedim(0, 2),
        lambda x: x.mT,
    ],
)
def test_transposes_are_permutes(permute):
    assert respell(permute, [torch.randn(2, 3, 6)]) == ["aten.permute.default"]


def test_dims_of_a_permute_count_from_the_front():
    graph = trace_core(lambda x: x.permute(-1, 0, 1), [torch.randn(2, 3, 6)])
    (node,) = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert node.args[1] == [2, 0, 1]


@pytest.mark.parametrize(("rank", "convolve"), [(1, F.conv1d), (2, F.conv2d), (3, F.conv3d)])
def test_convolution_is_named_by_its_rank(rank, convolve):
    x, w = torch.randn(2, 4, *[6] * rank), torch.randn(6, 2, *[3] * rank)
    found = respell(lambda x, w: convolve(x, w, None, 2, 1, 1, 2), [x, w])
    assert found == [f"aten.conv{rank}d.default"]


@pytest.mark.parametrize(("rank", "convolve"), [(1, F.conv_transpose1d), (2, F.conv_transpose2d)])
def test_transposed_convolution_is_named_by_its_rank(rank, convolve):
    x, w = torch.randn(2, 4, *[6] * rank), torch.randn(4, 3, *[3] * rank)
    found = respell(lambda x, w: convolve(x, w, None, 2, 1, 1, 2, 1), [x, w])
    assert found == [{1: "aten.conv_transpose1d.default", 2: "aten.conv_transpose2d.input"}[rank]]


def test_padding_by_name_is_padding_by_number():
    x, w = torch.randn(2, 4, 6, 7), torch.randn(6, 4, 3, 5)

    def model(x, w):
        return aten.conv2d.padding(x, w, None, [1, 1], "same", [2, 1]), aten.conv2d.padding(x, w, None, [2], "valid")

    graph = make_fx(model, tracing_mode="real", pre_dispatch=True)(x, w)
    before = copy_graph(graph)
    assert canonicalise(graph, HW) == 2
    assert targets(graph) == ["aten.conv2d.default"] * 2
    assert_same_numbers(before, graph, [x, w])


def test_uneven_same_padding_pads_behind():
    x, w = torch.randn(2, 4, 6, 7), torch.randn(6, 4, 4, 3)
    graph = make_fx(
        lambda x, w: [aten.conv2d.padding(x, w, None, [1, 1], "same")], tracing_mode="real", pre_dispatch=True
    )(x, w)
    before = copy_graph(graph)
    canonicalise(graph, HW)
    assert targets(graph) == ["aten.constant_pad_nd.default", "aten.conv2d.default"]
    assert_same_numbers(before, graph, [x, w])


def test_one_sided_clamps():
    found = respell(lambda x: x.clamp_min(0).clamp_max(1), [torch.tensor([-1.0, 0.5, torch.nan])])
    assert found == ["aten.clamp.default"] * 2


def test_first_results():
    norm = torch.nn.BatchNorm2d(3).eval()

    def model(x):
        y = aten._native_batch_norm_legit_no_training(
            x, norm.weight, norm.bias, norm.running_mean, norm.running_var, 0.1, 1e-5
        )[0]
        return aten.max_pool2d_with_indices(y, [2, 2])[0], aten.native_layer_norm(y, [4], None, None, 1e-5)[0]

    found = respell(model, [torch.randn(1, 3, 4, 4)])
    assert found == ["aten.batch_norm.default", "aten.max_pool2d.default", "aten.layer_norm.default"]


def test_instance_norm_is_a_norm_of_groups_or_by_running_statistics(caplog):
    x, w, b = torch.randn(2, 3, 4, 5), torch.randn(3), torch.randn(3)

    def plain(x, w, b):
        return aten.instance_norm(x, w, b, None, None, True, 0.1, 1e-5, False)

    def tracked(x, w, b):
        return aten.instance_norm(x, w, b, b, w.abs(), False, 0.1, 1e-5, False)

    def training(x, w, b):
        return aten.instance_norm(x, w, b, b + 0.0, w.abs(), True, 0.1, 1e-5, False)

    for model, wanted in ((plain, "group_norm"), (tracked, "batch_norm"), (training, "instance_norm")):
        graph = trace_core(model, [x, w, b], pre_dispatch=True)
        assert f"aten.{wanted}.default" in targets(graph)
        torch.testing.assert_close(graph(x, w, b)[0], model(x, w, b), rtol=1e-5, atol=1e-6)  # other sums
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        canonicalise(graph, HW)
    assert "it changes its running statistics" in caplog.text


def test_both_results_are_kept(caplog):
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        found = respell(lambda x: tuple(aten.max_pool2d_with_indices(x, [2, 2])), [torch.randn(1, 3, 4, 4)])
    assert "aten.max_pool2d_with_indices.default" in found
    assert "more of its results" in caplog.text
    found = respell(lambda x: aten.max_pool2d_with_indices(x, [2, 2])[1], [torch.randn(1, 3, 4, 4)])
    assert "aten.max_pool2d_with_indices.default" in found


def test_a_norm_in_training_mode_is_kept(caplog):
    """Its statistics are those of the batch, and it changes the stored ones."""
    w, b, mean, var = torch.randn(3), torch.randn(3), torch.randn(3), torch.rand(3)

    def model(x, training):
        return aten.native_batch_norm(x, w, b, mean.clone(), var.clone(), training, 0.1, 1e-5)[0]

    x = torch.randn(1, 3, 4, 4)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        found = respell(lambda x: model(x, True), [x])
    assert "aten.native_batch_norm.default" in found
    assert "in training mode" in caplog.text
    assert "aten.batch_norm.default" in respell(lambda x: model(x, False), [x])


def test_captured_models_are_respelt():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding="same"), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    found = respell(model.eval(), [torch.randn(1, 3, 4, 4)], core=False)
    assert found == ["aten.conv2d.default", "aten.batch_norm.default", "aten.reshape.default"]


def test_another_dtype_is_no_reshape():
    found = respell(lambda x: x.view(torch.int32), [torch.randn(4)])
    assert found[0] == "aten.view.dtype"
