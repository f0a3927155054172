"""A factor for each channel becomes part of the weights in front of it."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from rewriting import HW, assert_kept, assert_rewrite, trace
from torch import nn

from graphwright.passes.fold_scale import fold_scale

# The weights are rounded to float32 once more, and a sum has up to 64 terms.
CLOSE = {"rtol": 1e-5, "atol": 1e-5, "wide": 3e-6}


class Scaled(nn.Module):
    """A product and a factor behind it, or in front in the multiplication."""

    def __init__(self, product, shape, first=False):
        super().__init__()
        self.product, self.first = product, first
        self.scale = nn.Parameter(torch.empty(shape).uniform_(-2, 2))

    def forward(self, x):
        return self.scale * self.product(x) if self.first else self.product(x) * self.scale


CASES = [
    (nn.Linear(4, 6), (6,), (2, 3, 4), True),
    (nn.Linear(4, 6, bias=False), (1, 6), (3, 4), False),
    (nn.Conv1d(4, 6, 3, groups=2), (6, 1), (2, 4, 8), False),
    (nn.Conv2d(4, 6, 3, stride=2), (1, 6, 1, 1), (2, 4, 8, 7), True),
    (nn.Conv2d(4, 6, 3), (6, 1, 1), (4, 8, 7), False),
    (nn.Conv3d(2, 3, 2, bias=False), (3, 1, 1, 1), (1, 2, 4, 4, 4), False),
]


@pytest.mark.parametrize(("product", "scale", "shape", "first"), CASES, ids=lambda v: type(v).__name__)
def test_products_take_it(product, scale, shape, first):
    graph = assert_rewrite(Scaled(product, scale, first), None, [torch.randn(shape)], fold_scale, 1, **CLOSE)
    assert [n.op for n in graph.graph.nodes].count("call_function") == 1


def test_the_module_keeps_its_weights():
    model = Scaled(nn.Linear(4, 6), (6,))
    weight = model.product.weight.detach().clone()
    fold_scale(trace(model, [torch.randn(3, 4)]), HW)
    assert torch.equal(model.product.weight, weight)


def refuse(model, inputs, caplog, reason):
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert_kept(model, inputs, fold_scale)
    assert reason in caplog.text


def test_a_product_read_twice_is_kept(caplog):
    class Model(Scaled):
        def forward(self, x):
            y = self.product(x)
            return y * self.scale + y

    refuse(Model(nn.Linear(4, 6), (6,)), [torch.randn(3, 4)], caplog, "read by 2 nodes")


def test_a_computed_factor_is_kept(caplog):
    class Model(Scaled):
        def forward(self, x):
            return self.product(x) * x.mean()

    refuse(Model(nn.Linear(4, 6), (6,)), [torch.randn(3, 4)], caplog, "not constants")


@pytest.mark.parametrize("shape", [(1,), (3, 1), (3, 6), (1, 1, 6)])
def test_a_factor_that_is_not_one_number_a_channel_is_kept(shape, caplog):
    refuse(Scaled(nn.Linear(4, 6), shape), [torch.randn(3, 4)], caplog, "not one number a channel")


def test_another_dtype_is_kept(caplog):
    model = Scaled(nn.Linear(4, 6), (6,))
    model.scale = nn.Parameter(model.scale.double())
    refuse(model, [torch.randn(3, 4)], caplog, "dtype")


def test_weights_that_overflow_are_kept(caplog):
    model = Scaled(nn.Linear(4, 6), (6,))
    with torch.no_grad():
        model.scale.fill_(3e38)
        model.product.weight.fill_(2.0)
    refuse(model, [torch.zeros(3, 4)], caplog, "not finite")


@given(st.integers(1, 8), st.integers(2, 8), st.booleans(), st.booleans())
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_width(inputs, outputs, bias, first):
    model = Scaled(nn.Linear(inputs, outputs, bias=bias), (outputs,), first)
    assert_rewrite(model, None, [torch.randn(3, inputs)], fold_scale, 1, **CLOSE)
