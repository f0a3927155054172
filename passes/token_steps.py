"""linear_tokens in plain operators of float32, for machines without products of bytes.

    unit = max(max |x| / 127.5, eps)      linear(min(round(x * (1 / unit)), 127), w) * unit * scale + bias + residual

Sums are rounded to float32 where the operator's own are exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import rewrite
from .dialect_rows import EPSILON, TOKEN_STEPS
from .rewrite import arguments, constant

aten = torch.ops.aten


def spell_out_tokens(graph: fx.GraphModule, node: fx.Node) -> None:
    """Replace a `linear_tokens` without activation, which is how models state it."""
    a = arguments(node)
    assert a["activation"] == "none", node
    weight = constant(graph, a["weight"])
    assert weight is not None, node

    def call(operator: Any, *args: Any) -> fx.Node:
        return rewrite.call(graph, operator, args, before=node)

    x = a["input"]
    largest = call(aten.amax.default, call(aten.abs.default, x), [-1], True)
    unit = call(aten.clamp_min.default, call(aten.div.Tensor, largest, TOKEN_STEPS), EPSILON)
    steps = call(aten.round.default, call(aten.mul.Tensor, x, call(aten.reciprocal.default, unit)))
    floats = rewrite.add_constant(graph, f"{a['weight'].target}_float32", weight.float(), node)
    y = call(aten.linear.default, call(aten.clamp.default, steps, -128.0, 127.0), floats, None)
    y = call(aten.mul.Tensor, call(aten.mul.Tensor, y, unit), a["scale"])
    for added in (a["bias"], a["residual"]):
        y = y if added is None else call(aten.add.Tensor, y, added)
    rewrite.replace(node, y)
