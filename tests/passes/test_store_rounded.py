"""Which values become 16 bits in memory on GPUs, who keeps float32, and that the numbers stay the same."""

from __future__ import annotations

import pytest
import torch
from rewriting import trace_core
from torch import fx

from graphwright.compiler.reference import run_eager
from graphwright.hwdb import lookup
from graphwright.passes import dialect, dialect_mixed
from graphwright.passes.assign_precision import assign_precision, plan_precisions
from graphwright.passes.store_rounded import store_rounded

torch.manual_seed(0)
NARROW, WIDE, ODD = torch.randn(64, 32), torch.randn(64, 64), torch.randn(66, 64)
TRIPLE, KERNEL = torch.cat([NARROW] * 3), torch.randn(64, 64, 1, 1)
X = torch.randn(48, 32)


def linear(x, weight=WIDE, bias=None, residual=None):
    return dialect.linear(x, weight, bias, residual, "none", [])


def assigned(body, *inputs: torch.Tensor, precision: str = "fp16", machine: str = "a100") -> fx.GraphModule:
    """The graph in 16 bits; its numbers are those of the graph without stored roundings."""
    graph = trace_core(body, list(inputs), pre_dispatch=True)
    plan = plan_precisions(graph, lookup(machine), precision)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("graphwright.passes.assign_precision.store_rounded", lambda graph, nodes: 0)
        plain = trace_core(body, list(inputs), pre_dispatch=True)
        assign_precision(plain, plan.choices)
    assign_precision(graph, plan.choices)
    graph.graph.lint()
    for ours, theirs in zip(run_eager(graph, list(inputs)), run_eager(plain, list(inputs)), strict=True):
        assert torch.equal(ours, theirs)
    return graph


def stored(graph: fx.GraphModule, dtype: torch.dtype = torch.float16) -> list[str]:
    """The operators that give 16 bits, in order."""
    return [
        str(node.target).split(".")[1]
        for node in graph.graph.nodes
        if node.op == "call_function" and getattr(node.meta["val"], "dtype", None) == dtype
    ]


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_what_only_products_read_is_stored_rounded(precision, dtype):
    graph = assigned(lambda x: linear(linear(x, NARROW)), X, precision=precision)
    assert len(stored(graph, dtype)) == 1
    assert store_rounded(graph, [node for node in graph.graph.nodes if node.target is dialect_mixed.linear_f16]) == 0


def test_who_reads_float32_keeps_it():
    assert stored(assigned(lambda x: (y := linear(x, NARROW), linear(y)), X)) == []  # an output
    assert stored(assigned(lambda x: linear(linear(x, NARROW)).sin(), X)) == ["linear_f16"]
    assert stored(assigned(lambda x: linear(linear(x, NARROW).softmax(-1)), X)) == []
    assert stored(assigned(lambda x: linear((y := linear(x, NARROW)), residual=y), X)) == []
    assert stored(assigned(lambda x, r: linear(linear(x, NARROW), residual=r), X, torch.randn(48, 64))) == [
        "linear_f16"
    ]
    # 66 columns are no multiple of 8; a product of few rows does not round.
    narrow = torch.randn(64, 66)
    assert stored(assigned(lambda x: linear(linear(linear(x, NARROW), ODD), narrow), X)) == ["linear_f16"]
    assert stored(assigned(lambda x: linear(linear(x, NARROW)[:8]), X)) == []


def test_norms_and_elementwise_operators_get_a_cast_that_joins_them():
    one = torch.ones(32)
    graph = assigned(lambda x: linear(torch.layer_norm(x, [32], one), NARROW), X)
    assert stored(graph) == ["_to_copy"]
    assert stored(assigned(lambda x: linear(torch.tanh(x), NARROW), X)) == ["_to_copy"]
    assert stored(assigned(lambda x: linear((y := torch.tanh(x)), NARROW) + y.sum(), X)) == []


def test_moves_between_move_16_bits():
    def body(x):
        y = linear(x, TRIPLE).reshape(2, 24, 3, 4, 16).permute(2, 0, 3, 1, 4)
        mixed_heads = dialect.attention(y[0], y[1], y[2], None, False, 0.25)
        return linear(mixed_heads.transpose(1, 2).reshape(48, 64))

    graph = assigned(body, X)
    names = stored(graph)
    assert names[0] == "linear_f16"
    assert "attention_f16" in names
    assert names.count("linear_f16") == 1  # the last one is an output
    for node in graph.graph.nodes:
        if node.target in (dialect_mixed.attention_f16, dialect_mixed.linear_f16):
            operand = node.args[0]
            assert operand.op == "placeholder" or operand.meta["val"].dtype == torch.float16


def test_images_are_stored_rounded_where_channels_are_neighbours():
    def convs(layout):
        def conv(x):
            return dialect.conv2d(x, KERNEL, None, None, [1, 1], [0] * 4, [1, 1], 1, "relu", [], layout)

        return lambda x: conv(conv(x))

    assert stored(assigned(convs("NHWC"), torch.randn(1, 6, 6, 64))) == ["conv2d_f16"]
    assert stored(assigned(convs("NCHW"), torch.randn(1, 64, 6, 6))) == []


def test_masks_of_attention_are_not_rounded():
    q = torch.randn(1, 2, 16, 16)

    def body(q, x):
        mask = linear(x, NARROW[:16])
        return dialect.attention(q, q, q, mask, False, 0.25)

    assert stored(assigned(body, q, X[:16])) == []
