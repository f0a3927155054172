"""Refusals that no other test of a pass needs: the model, and the reason that is recorded.

`make mutate` removes every guard in turn; these are the tests that fail then.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rewriting import HW, trace_core

from graphwright.passes import dialect_int8
from graphwright.passes.flatten_conv3d import flatten_conv3d
from graphwright.passes.fold_batch_norm import fold_batch_norm
from graphwright.passes.fold_scale import fold_scale
from graphwright.passes.fuse_attention import fuse_attention
from graphwright.passes.fuse_conv_depthwise import fuse_conv_depthwise
from graphwright.passes.fuse_conv_transpose import fuse_conv_transpose
from graphwright.passes.fuse_head_moves import fuse_head_moves
from graphwright.passes.fuse_matmul_bias import fuse_matmul_bias
from graphwright.passes.fuse_reshape_transpose import fuse_reshape_transpose
from graphwright.passes.hoist_quantise import hoist_quantise
from graphwright.passes.printer import format_graph
from graphwright.passes.recognise_activations import recognise_activations
from graphwright.passes.recognise_norms import recognise_norms
from graphwright.passes.refusals import recording
from graphwright.passes.split_batch_norm import split_batch_norm

sdpa = F.scaled_dot_product_attention
conv2d = torch.ops.graphwright.conv2d
torch.manual_seed(0)
W, B, MEAN, VAR = torch.randn(3, 2, 1, 1), torch.randn(3), torch.randn(3), torch.rand(3) + 0.5
X, Q = torch.randn(2, 2, 4, 4), torch.randn(2, 4, 5, 8)
POINT, DEPTH = torch.ones(32, 2, 1, 1), torch.ones(32, 1, 3, 3)
GREAT, SMALL, ZERO = torch.full((3,), 1e38), torch.full((3,), 1e-4), torch.zeros(3)
BACKWARD = torch.arange(40).flip(0)
LINEAR, FACTOR = torch.randn(6, 4), torch.randn(6)


def attend(q, k, v):
    return torch.ops.graphwright.attention(q, k, v, None, False, 0.5, float("-inf"))


def pair(x, first, second, layouts=("NHWC", "NHWC"), groups=None):
    y = conv2d(x, first, None, None, [1, 1], [0] * 4, [1, 1], 1, "none", [], layouts[0])
    groups = second.shape[0] if groups is None else groups
    return conv2d(y, second, None, None, [1, 1], [1] * 4, [1, 1], groups, "none", [], layouts[1])


REFUSED = {
    "bias from outside, norm": (
        fold_batch_norm,
        lambda x, b: F.batch_norm(F.conv2d(x, W, b), MEAN, VAR),
        [X, B],
        "not constants",
    ),
    "weight of a norm from outside": (
        split_batch_norm,
        lambda x, w: F.batch_norm(x, MEAN, VAR, w),
        [torch.randn(2, 3, 4), B],
        "statistics are not constants",
    ),
    "weights from outside, scale": (
        fold_scale,
        lambda x, w: F.linear(x, w) * FACTOR,
        [torch.randn(3, 4), LINEAR],
        "not constants",
    ),
    "bias from outside, scale": (
        fold_scale,
        lambda x, b: F.linear(x, LINEAR, b) * FACTOR,
        [torch.randn(3, 4), FACTOR],
        "not constants",
    ),
    "integer volumes": (
        flatten_conv3d,
        lambda x, w: F.conv3d(x, w),
        [torch.ones(1, 2, 3, 3, 3, dtype=torch.int64), torch.ones(2, 2, 1, 1, 1, dtype=torch.int64)],
        "not in floating point",
    ),
    "a bias beyond float32": (
        fold_batch_norm,
        lambda x: F.batch_norm(F.conv2d(x, W), GREAT, SMALL),
        [X],
        "not finite",
    ),
    "a weight beyond float32": (
        fold_batch_norm,
        lambda x: F.batch_norm(F.conv2d(x, W), ZERO, SMALL, GREAT),
        [X],
        "not finite",
    ),
    "no heads": (fuse_attention, lambda q: sdpa(q[:, :0], q[:, :0], q[:, :0]), [Q], "0 heads of q, 0 of k"),
    "integers in a linear": (
        fuse_matmul_bias,
        lambda x, w: F.linear(x, w),
        [torch.ones(2, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64)],
        "not floating point of one dtype",
    ),
    "integers, product and sum": (
        fuse_matmul_bias,
        lambda c, a, b: torch.addmm(c, a, b),
        [torch.ones(2, 3, dtype=torch.int64), *[torch.ones(n, m, dtype=torch.int64) for n, m in ((2, 4), (4, 3))]],
        "not floating point of one dtype",
    ),
    "a vector in a linear": (fuse_matmul_bias, F.linear, [torch.randn(4), torch.randn(3, 4)], "a vector"),
    "a vector in a product": (fuse_matmul_bias, torch.matmul, [torch.randn(4), torch.randn(4, 3)], "a vector"),
    "a table that cuts heads of the result": (
        fuse_head_moves,
        lambda q: attend(q, q, q).reshape(40, 8).index_select(0, BACKWARD),
        [Q],
        "cut the result's heads",
    ),
    "rounded by two scales": (
        hoist_quantise,
        lambda x: [
            dialect_int8.quantize(y, scale, 0, torch.uint8) for y in [x.mT.contiguous()] for scale in (0.1, 0.2)
        ],
        [X],
        "by another scale",
    ),
    "another dtype to be rounded": (
        hoist_quantise,
        lambda x: dialect_int8.quantize(x.mT.contiguous(), 0.1, 0, torch.uint8),
        [X.double()],
        "something else than float32",
    ),
    "no volumes": (
        flatten_conv3d,
        lambda x: F.conv3d(x, torch.ones(2, 2, 1, 1, 1)),
        [torch.randn(0, 2, 3, 3, 3)],
        "empty",
    ),
    "integers transposed": (
        fuse_conv_transpose,
        lambda x, w: F.conv_transpose2d(x, w),
        [torch.ones(1, 2, 3, 3, dtype=torch.int64), torch.ones(2, 2, 1, 1, dtype=torch.int64)],
        "not a batch in floating point",
    ),
    "heads of v alone broadcast": (fuse_attention, lambda q: sdpa(q, q, q[:, :1]), [Q], "operands of shape"),
    "more heads of k": (fuse_attention, lambda q: sdpa(q[:, :1], q, q), [Q], "1 heads of q, 4 of k"),
    "ranks differ": (fuse_attention, lambda q: sdpa(q, q[0], q[0]), [Q], "operands of rank"),
    "first in NCHW": (
        fuse_conv_depthwise,
        lambda x: pair(x, POINT, DEPTH, ("NCHW", "NHWC")),
        [torch.randn(2, 2, 4, 32)],
        "not in NHWC",
    ),
    "second in NCHW": (
        fuse_conv_depthwise,
        lambda x: pair(x, POINT, DEPTH, ("NHWC", "NCHW")),
        [torch.randn(2, 32, 4, 2)],
        "not in NHWC",
    ),
    "one channel": (
        fuse_conv_depthwise,
        lambda x: pair(x, torch.ones(1, 2, 1, 1), torch.ones(1, 1, 3, 3)),
        [torch.randn(2, 8, 4, 2)],
        "not depthwise",
    ),
    "no images": (
        fuse_conv_depthwise,
        lambda x: pair(x, POINT, DEPTH),
        [torch.randn(0, 8, 4, 2)],
        "empty",
    ),
    "a returned copy whose moves come to nothing": (
        fuse_reshape_transpose,
        lambda x: x.unsqueeze(1).transpose(1, 2).clone().reshape(2, 3),
        [torch.randn(2, 3)],
        "the graph returns what this chain copies",
    ),
    "a mean that widens": (
        recognise_norms,
        lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True, dtype=torch.float32) + 1e-5),
        [torch.randn(2, 8, dtype=torch.float16)],
        "not floating point of one dtype",
    ),
    "range in range": (recognise_activations, lambda x: x.clamp(min=0).clamp(1, 2), [X], "one range"),
    "two upper ends": (recognise_activations, lambda x: x.clamp(max=2).clamp(max=1), [X], "one range"),
    "two lower ends": (recognise_activations, lambda x: x.clamp(min=1).clamp(min=2), [X], "one range"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    rewrite, model, inputs, reason = REFUSED[case]
    graph = trace_core(model, inputs, pre_dispatch=True)
    text = format_graph(graph)
    with recording() as refusals:
        assert rewrite(graph, HW) == 0
    assert format_graph(graph) == text
    assert any(reason in refusal.reason for refusal in refusals), [r.reason for r in refusals]


def test_a_mask_beside_is_causal_is_refused():
    """torch refuses it too, so that only a graph made by hand has it."""
    graph = trace_core(lambda q, mask: sdpa(q, q, q, mask), [Q, torch.zeros(5, 5)], pre_dispatch=True)
    (node,) = [n for n in graph.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    node.args = (*node.args[:4], 0.0, True)
    with recording() as refusals:
        assert fuse_attention(graph, HW) == 0
    assert [r.reason for r in refusals] == ["a mask and is_causal"]
