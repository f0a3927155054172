"""The fused operators: eager bodies against the operators they stand for, fake kernels against eager bodies."""

from __future__ import annotations

import importlib

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.library import opcheck

from graphwright.passes import dialect

# Gradients are not promised; schema, aliasing and fake kernels are.
CHECKS = ("test_schema", "test_faketensor")


def nhwc(x):
    return x.permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("padding", [[1, 1, 1, 1], [0, 1, 2, 0]])
def test_conv2d_is_its_parts(layout, padding):
    x, w, b = torch.randn(2, 4, 7, 6), torch.randn(6, 2, 3, 3), torch.randn(6)
    top, bottom, left, right = padding
    wanted = F.conv2d(F.pad(x, (left, right, top, bottom)), w, b, (2, 1), groups=2)
    residual = torch.randn_like(wanted)
    wanted = torch.clamp(wanted + residual, -0.5, 1.0)
    move = nhwc if layout == "NHWC" else torch.Tensor.contiguous
    args = (move(x), w, b, move(residual), [2, 1], padding, [1, 1], 2, "clamp", [-0.5, 1.0], layout)
    opcheck(dialect.conv2d, args, test_utils=CHECKS)
    # The padded copy and the implicit padding are different kernels of torch's: one more rounding a product.
    torch.testing.assert_close(dialect.conv2d(*args), move(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(dialect.ACTIVATIONS))
def test_activations_are_torch_s(name):
    torch_s = {
        "none": torch.clone,
        "relu": torch.relu,
        "relu6": F.relu6,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "clamp": lambda x: torch.clamp(x, -1.0, 2.0),
        "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
        "swish": lambda x: x * torch.sigmoid(1.5 * x),
    }
    args = {"clamp": [-1.0, 2.0], "leaky_relu": [0.2], "swish": [1.5]}.get(name, [])
    x = torch.tensor([[-3.0, -0.0, 0.0, 0.5, 7.0, torch.inf, -torch.inf, torch.nan]])
    result = dialect.linear(x[:, :1], torch.eye(1), None, None, name, args)
    assert result.shape == (1, 1)
    wide = dialect.ACTIVATIONS[name](x, args)
    torch.testing.assert_close(wide, torch_s[name](x), rtol=0, atol=0, equal_nan=True)
    assert bool(wide.isnan()[0, -1])


def test_linear_and_matmul_are_their_parts():
    x, w, b, y = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5), torch.randn(2, 3, 5)
    args = (x, w, b, y, "gelu", [])
    opcheck(dialect.linear, args, test_utils=CHECKS)
    torch.testing.assert_close(dialect.linear(*args), F.gelu(F.linear(x, w, b) + y), rtol=0, atol=0)
    a, c = torch.randn(2, 1, 4, 3), torch.randn(5, 6, 4)
    args = (a, c, None, None, True, True, "none", [])
    opcheck(dialect.matmul, args, test_utils=CHECKS)
    torch.testing.assert_close(dialect.matmul(*args), a.mT @ c.mT, rtol=0, atol=0)


def test_permute_never_returns_its_operand():
    x = torch.randn(2, 3)
    same = dialect.permute(x, [2, 3], [0, 1], [2, 3])
    assert torch.equal(same, x)
    assert same.data_ptr() != x.data_ptr()
    opcheck(dialect.permute, (x, [6], [0], [3, 2]), test_utils=CHECKS)
    opcheck(dialect.permute, (x, [2, 3], [1, 0], [6]), test_utils=CHECKS)


def test_attention_groups_heads_and_masks():
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(3, 5) > 0.3
    mask[1] = False  # a row that sees nothing gives 0
    args = (q, k, v, mask, False, 0.25)
    opcheck(dialect.attention, args, test_utils=CHECKS)
    wide = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask, scale=0.25)
    result = dialect.attention(*args)
    torch.testing.assert_close(result, wide, rtol=1e-5, atol=1e-6)  # sums in another order
    assert not result[:, :, 1].any()


def test_strided_attention_reads_and_writes_rows_of_heads():
    x = torch.randn(2, 5, 3 * 4 * 8)
    row = 3 * 4 * 8
    places = [n for start in (0, 32, 64) for n in (start, 5 * row, 8, row)] + [0, 5 * 32, 8, 32]
    args = (x, x, x, None, True, 0.25, [2, 4, 4, 5, 5, 8, 8], places, [2, 5, 32])
    opcheck(dialect.strided_attention, args, test_utils=CHECKS)
    q, k, v = (part.view(2, 5, 4, 8).transpose(1, 2) for part in x.split(32, dim=2))
    wide = dialect.attention(q, k, v, None, True, 0.25).transpose(1, 2).reshape(2, 5, 32)
    assert torch.equal(dialect.strided_attention(*args), wide)


@settings(max_examples=30, deadline=None)
@given(
    st.tuples(*[st.integers(1, 4)] * 2),
    st.tuples(*[st.integers(1, 3)] * 2),
    st.tuples(*[st.integers(0, 2)] * 2),
    st.tuples(*[st.integers(1, 2)] * 2),
    st.tuples(*[st.integers(8, 11)] * 2),
    st.booleans(),
    st.sampled_from(["NCHW", "NHWC"]),
)
def test_pools_have_torch_s_shapes_and_values(kernel, stride, padding, dilation, size, ceil_mode, layout):
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    x = torch.randn(2, 3, *size)
    around = [padding[0], padding[0], padding[1], padding[1]]
    move = nhwc if layout == "NHWC" else torch.Tensor.contiguous
    largest = F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    args = (move(x), kernel, stride, around, dilation, ceil_mode, layout)
    opcheck(dialect.max_pool2d, args, test_utils=CHECKS)
    torch.testing.assert_close(dialect.max_pool2d(*args), move(largest), rtol=0, atol=0)
    mean = F.avg_pool2d(x, kernel, stride, padding, ceil_mode, False)
    args = (move(x), kernel, stride, around, ceil_mode, False, None, layout)
    opcheck(dialect.avg_pool2d, args, test_utils=CHECKS)
    torch.testing.assert_close(dialect.avg_pool2d(*args), move(mean), rtol=1e-6, atol=1e-6)  # order of sums


def test_uneven_pooling():
    x = torch.randn(1, 2, 6, 6)
    result = dialect.max_pool2d(x, [3, 3], [2, 2], [0, 1, 0, 1], [1, 1], False, "NCHW")
    assert torch.equal(result, F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, 2))
    with pytest.raises(ValueError, match="pad the input first"):
        dialect.max_pool2d(x, [3, 3], [2, 2], [0, 1, 0, 1], [1, 1], True, "NCHW")
    with pytest.raises(ValueError, match="pad the input first"):
        dialect.avg_pool2d(x, [3, 3], [2, 2], [0, 1, 0, 1], False, False, None, "NCHW")


def test_a_second_import_finds_the_operators():
    before = dialect.conv2d
    again = importlib.reload(dialect)
    assert again.conv2d is before
    assert again.permute(torch.ones(2, 3), [2, 3], [1, 0], [3, 2]).shape == (3, 2)
