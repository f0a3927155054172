"""Which values training has given 256 codes, told by a clamp in front of the product that reads them.

    linear(clamp(x, low, high), w), w on a grid (weight_grid.py)      x has the codes 0 .. 255 from low to high

Moves between the clamp and the product, and clamps that a product in front has taken up as its activation, are seen
through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from .. import rewrite
from ..epilogue import activation_of
from ..hoist_quantise import moved
from .int8_scales import Scale, scale_between
from .weight_grid import on_grid

aten = torch.ops.aten


def bounds_of(value: object) -> tuple[float, float] | None:
    """The finite ends of a clamp that made the value; None where it was none."""
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return None
    operands = moved(value)
    if operands:
        ends = {bounds_of(operand) for operand in operands}
        return ends.pop() if len(ends) == 1 else None
    activation = activation_of(value)
    if activation is None and isinstance(value.target, rewrite.Operator):
        given = rewrite.arguments(value)
        if isinstance(given.get("activation"), str):
            activation = given["activation"], given["activation_args"]
    if activation is None:
        return None
    name, args = activation
    if name == "relu6":
        return 0.0, 6.0
    if name != "clamp" or not all(math.isfinite(end) for end in args):
        return None
    low, high = args
    return float(low), float(high)


def learned_scales(graph: fx.GraphModule, products: Sequence[fx.Node]) -> dict[fx.Node, Scale]:
    """The scale of each product's input, for the products that were trained for 8 bits."""
    found = {}
    for node in products:
        given = rewrite.arguments(node)
        weight, ends = rewrite.constant(graph, given["weight"]), bounds_of(given["input"])
        if weight is not None and ends is not None and on_grid(weight):
            found[node] = scale_between(*ends)
    return found
