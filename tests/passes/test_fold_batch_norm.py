"""Batch norm becomes part of the weights in front of it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from rewriting import HW, assert_kept, assert_rewrite, assert_same_numbers, trace, trace_core
from torch import nn

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes.fold_batch_norm import fold_batch_norm
from graphwright.passes.split_batch_norm import split_batch_norm

# The weights are rounded to float32 once more, and a sum has up to 64 terms.
CLOSE = {"rtol": 1e-5, "atol": 1e-5, "wide": 3e-6}


def normed(product, norm):
    """A product and a batch norm with statistics that change something."""
    with torch.no_grad():
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        if norm.affine:
            norm.weight.uniform_(-2, 2)
            norm.bias.uniform_(-1, 1)
    return nn.Sequential(product, norm).eval()


PRODUCTS = [
    (nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 8)),
    (nn.Conv2d(4, 6, 3, bias=False, padding=1, stride=2), nn.BatchNorm2d(6), (2, 4, 8, 7)),
    (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (1, 2, 4, 4, 4)),
    (nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6), (2, 4, 8)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), nn.BatchNorm2d(6), (1, 4, 5, 5)),
    (nn.ConvTranspose3d(2, 3, 2, bias=False), nn.BatchNorm3d(3), (1, 2, 3, 3, 3)),
    (nn.Linear(4, 6), nn.BatchNorm1d(6), (3, 4)),
    (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), (1, 4, 3, 3)),
]


@pytest.mark.parametrize(("product", "norm", "shape"), PRODUCTS, ids=lambda v: type(v).__name__)
def test_products_take_it(product, norm, shape):
    graph = assert_rewrite(normed(product, norm), None, [torch.randn(shape)], fold_batch_norm, 1, **CLOSE)
    (call,) = [n for n in graph.graph.nodes if n.op == "call_function"]
    assert type(product).__name__.lower().replace("transpose", "_transpose") in str(call.target)


def test_the_module_keeps_its_weights():
    model = normed(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
    weight = model[0].weight.detach().clone()
    fold_batch_norm(trace(model, [torch.randn(1, 4, 3, 3)]), HW)
    assert torch.equal(model[0].weight, weight)


def test_a_shared_convolution_is_folded_for_each_norm():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 1)
            self.a, self.b = (normed(nn.Identity(), nn.BatchNorm2d(3)) for _ in range(2))

        def forward(self, x):
            return self.a(self.conv(x)) + self.b(self.conv(x + 1))

    assert_rewrite(Model().eval(), None, [torch.randn(1, 2, 3, 3)], fold_batch_norm, 2, **CLOSE)


def refuse(model, inputs, caplog, reason):
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert_kept(model, inputs, fold_batch_norm)
    assert reason in caplog.text


def test_a_product_read_twice_is_kept(caplog):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = normed(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    refuse(Model().eval(), [torch.randn(1, 2, 3, 3)], caplog, "read by 2 nodes")


def test_the_statistics_of_the_batch_are_not_folded(caplog):
    def model(x, w):
        return torch.batch_norm(torch.conv2d(x, w), None, None, None, None, True, 0.1, 1e-5, False)

    graph = trace_core(model, [torch.randn(2, 2, 3, 3), torch.randn(3, 2, 1, 1)], pre_dispatch=True)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert fold_batch_norm(graph, HW) == 0
    assert "training" in caplog.text
    assert split_batch_norm(graph, HW) == 0


def test_statistics_from_outside_are_not_folded(caplog):
    conv = nn.Conv2d(2, 3, 1)

    def model(x, mean, var):
        return torch.nn.functional.batch_norm(conv(x), mean, var)

    inputs = [torch.randn(1, 2, 3, 3), torch.zeros(3), torch.ones(3)]
    refuse(model, inputs, caplog, "statistics are not constants")
    assert_kept(model, inputs, split_batch_norm)


def test_weights_from_outside_are_not_folded(caplog):
    norm = normed(nn.Identity(), nn.BatchNorm2d(3))

    def model(x, w):
        return norm(torch.conv2d(x, w))

    refuse(model, [torch.randn(1, 2, 3, 3), torch.randn(3, 2, 1, 1)], caplog, "weights it follows are not constants")


def test_channels_elsewhere_are_not_folded(caplog):
    """linear of [B, C, F] has features last; the norm's channels are dim 1."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    refuse(model, [torch.randn(2, 3, 4)], caplog, "are not its dim 1")


def test_weights_that_would_overflow_are_not_folded(caplog):
    model = normed(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, eps=0.0))
    model[1].running_var[1] = 0.0  # torch divides by zero at run time as well
    refuse(model, [torch.randn(1, 2, 3, 3)], caplog, "not finite")
    assert_kept(model, [torch.randn(1, 2, 3, 3)], split_batch_norm)


def test_a_norm_behind_something_else_is_kept(caplog):
    model = normed(nn.ReLU(), nn.BatchNorm2d(3))
    refuse(model, [torch.randn(1, 3, 3, 3)], caplog, "does not follow a product")


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 3, 4, 4)])
@pytest.mark.parametrize("affine", [True, False])
def test_what_is_left_is_split(shape, affine):
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)](3, affine=affine)
    graph = assert_rewrite(normed(nn.ReLU(), norm), None, [torch.randn(shape)], split_batch_norm, 1, **CLOSE)
    found = [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]
    assert found == ["aten.relu.default", "aten.mul.Tensor", "aten.add.Tensor"]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
def test_any_convolution_keeps_its_numbers(inputs, outputs, groups, bias, transposed, dtype, seed):
    torch.manual_seed(seed)
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    product = kind(inputs * groups, outputs * groups, 2, groups=groups, bias=bias)
    model = normed(product, nn.BatchNorm2d(outputs * groups)).to(dtype)
    x = torch.randn(2, inputs * groups, 4, 4, dtype=dtype)
    graph = trace_core(model, [x], pre_dispatch=True)
    before = copy_graph(graph)
    assert fold_batch_norm(graph, HW) == 1
    graph.graph.lint()
    assert_same_numbers(before, graph, [x], **CLOSE)
