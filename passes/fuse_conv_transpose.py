"""A transposed convolution over images or sequences and what follows it become one graphwright::conv_transpose2d.

    conv_transpose2d(x, W, b)                           -> graphwright::conv_transpose2d(x, W, b)
    activation(add(add(conv_transpose2d(x, W), b), y))  -> the same with bias, residual y and activation
    conv_transpose1d(x, W)                              -> the same on an image of one row, reshaped back

Refused for unbatched input and dtypes that are not floating point. Where the chain
behind it stops is said in `epilogue`.
"""

from __future__ import annotations

import logging

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .epilogue import Epilogue, allowed, extend
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten


def fuse_conv_transpose(graph: fx.GraphModule, hw: Hardware) -> int:
    """Fuse transposed convolutions with the epilogues behind them; returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        if rewrite.calls(node, aten.conv_transpose1d.default, aten.conv_transpose2d.input) and _fuse(graph, node):
            count += 1
    return rewrite.finish(graph, count)


def _fuse(graph: fx.GraphModule, conv: fx.Node) -> bool:
    a = rewrite.arguments(conv)
    x, weight, bias = a["input"], a["weight"], a["bias"]
    rank = len(rewrite.shape_of(conv))
    if not rewrite.is_float(conv, *[n for n in (x, weight, bias) if n is not None]) or rank != len(
        rewrite.shape_of(weight)
    ):
        keep(log, conv, "not a batch in floating point")
        return False
    shape = rewrite.shape_of(conv)
    wanted = [1, shape[1], *[1] * (rank - 2)]
    found = extend(Epilogue(conv, bias), lambda other: _is_bias(other, wanted), allowed(graph, "conv"))
    last = found.last

    def image(node: fx.Node | None) -> fx.Node | None:
        """A sequence as an image of one row."""
        if node is None or rank == 4:
            return node
        n = rewrite.shape_of(node)
        return rewrite.call(graph, aten.reshape.default, (node, [*n[:2], 1, *n[2:]]), before=last)

    bias = found.bias
    if bias is not None and rewrite.shape_of(bias) != (shape[1],):
        bias = rewrite.call(graph, aten.reshape.default, (bias, [shape[1]]), before=last)
    spatial = rank - 2
    row, edge = [1] * (2 - spatial), [0] * (2 - spatial)
    arguments = (
        image(x),
        image(weight),
        bias,
        image(found.residual),
        row + rewrite.repeated(a["stride"], spatial),
        edge + rewrite.repeated(a["padding"], spatial),
        edge + rewrite.repeated(a["output_padding"], spatial),
        row + rewrite.repeated(a["dilation"], spatial),
        a["groups"],
        found.activation,
        list(found.args),
        "NCHW",
    )
    value = rewrite.packed(last.meta["val"], None if rank == 4 else [*shape[:2], 1, *shape[2:]])
    new = rewrite.call(graph, dialect.conv_transpose2d, arguments, before=last, value=value, source=conv)
    if rank == 3:
        new = rewrite.call(graph, aten.reshape.default, (new, list(shape)), before=last)
    rewrite.replace_chain(conv, last, new)
    return True


def _is_bias(other: fx.Node, wanted: list[int]) -> bool:
    """Whether a constant holds one number a channel."""
    shape = rewrite.shape_of(other)
    return other.op == "get_attr" and [1] * (len(wanted) - len(shape)) + list(shape) == wanted
