"""Which operators are broken up, and which stay whole because a pass, a kernel or lowering knows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import global_decomposition_table

aten = torch.ops.aten

# Composites a pass or a kernel wants to see as one node.
KEPT: tuple[torch._ops.OpOverload, ...] = (
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten.avg_pool1d.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.gelu.default,
    aten.group_norm.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.layer_norm.default,
    aten.linear.default,
    aten.log_softmax.int,
    aten.max_pool2d.default,
    aten.scaled_dot_product_attention.default,
    aten.silu.default,
    aten.softmax.int,
    aten.upsample_bicubic2d.default,
    aten.upsample_bicubic2d.vec,
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_linear1d.default,
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.default,
    aten.upsample_trilinear3d.default,
)

# torch has a decomposition of these that export does not use; with it they reach operators we compile.
ADDED: tuple[torch._ops.OpOverload, ...] = (aten.addmv.default,)


def table() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """The decomposition table capture runs: torch.export's own, less `KEPT`, plus `ADDED`."""
    everything = global_decomposition_table["post_autograd"]
    result = dict(torch.export.default_decompositions().items())
    for operator in KEPT:
        result.pop(operator, None)
    for operator in ADDED:
        result[operator] = everything[operator]
    return result
