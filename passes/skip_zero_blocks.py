"""linear(x, W, b, r) -> sparse_linear(x, W, b, r, blocks) where whole blocks of W are zero and skipping them pays.

    conv2d(x, W, ...) in NHWC, 1x1, stride 1 -> the same: its pixels are rows

W is looked at, not asked about: any model with zeros has them skipped, whoever put them there. Blocks are 16 outputs (a
whole number of vectors) times 16, 4 or 1 inputs, whichever is predicted to cost least (zero_blocks.py). A few thousand
weights of each product are sampled first, so that a dense model takes microseconds a product.

Refused: zeros in other places, N:M patterns among them; fewer outputs than a block has; weights that are computed or
not float32; biases and residuals that broadcast; windows, strides, padding and groups of convolutions, and NCHW;
vectors and nothing; products that take nearly as long by blocks (GAIN).
"""

from __future__ import annotations

import logging
from math import prod

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .dialect_sparse import sparse_linear
from .precision.forms import Times, streamed_bytes
from .refusals import keep
from .zero_blocks import LEAST_ZEROS, Blocks, best_blocks, columns_of, neighbours, zeros_of

log = logging.getLogger(__name__)
aten = torch.ops.aten

GAIN = 0.9  # of the dense product's time: less is not worth a kernel of its own
_PRODUCTS = (aten.linear.default, dialect.linear, dialect.conv2d)


def skip_zero_blocks(graph: fx.GraphModule, hw: Hardware) -> int:
    """Rewrite products whose weights have zero blocks that pay; returns how many."""
    if not hw.lanes("float32"):
        return 0  # no vector unit that the blocks could be made for
    count = 0
    products = [node for node in graph.graph.nodes if rewrite.calls(node, *_PRODUCTS)]
    streamed = None
    for node in products:
        a = rewrite.arguments(node)
        weight = rewrite.constant(graph, a["weight"])
        if weight is None or weight.dim() < 2 or zeros_of(weight) < LEAST_ZEROS:
            continue
        zeros = 100 * float(weight.eq(0).float().mean())
        streamed = streamed_bytes(graph, products) if streamed is None else streamed
        found = _refused(node, a, hw) or _paying(node, weight.flatten(1), hw, streamed)
        if isinstance(found, str):
            keep(log, node, "%.0f %% of its weights are zero, but %s", zeros, found)
            continue
        _rewrite(graph, node, a, found[0])
        count += 1
    return rewrite.finish(graph, count)


def skipping_seconds(graph: fx.GraphModule, node: fx.Node, hw: Hardware, streamed: int) -> float | None:
    """Predicted seconds of a product that skips blocks of zeros; None for one that the pass would leave alone.

    `streamed`: bytes of all weights of the graph.
    """
    if not rewrite.calls(node, *_PRODUCTS) or not hw.lanes("float32"):
        return None
    a = rewrite.arguments(node)
    weight = rewrite.constant(graph, a["weight"])
    if weight is None or weight.dim() < 2 or zeros_of(weight) < LEAST_ZEROS or _refused(node, a, hw) is not None:
        return None
    found = _paying(node, weight.flatten(1), hw, streamed)
    return None if isinstance(found, str) else found[1]


def _refused(node: fx.Node, a: dict[str, object], hw: Hardware) -> str | None:
    weight, bias, residual = a["weight"], a["bias"], a.get("residual")
    if (operand := rewrite.other_than(torch.float32, node, *node.all_input_nodes)) is not None:
        return f"{operand.name} is not float32, and the kernel is"
    assert isinstance(weight, fx.Node)
    shape = rewrite.shape_of(weight)
    if node.target is dialect.conv2d and (reason := _not_pointwise(a, shape)) is not None:
        return reason
    if not prod(rewrite.shape_of(node)) or len(rewrite.shape_of(node.args[0])) < 2:  # type: ignore[arg-type]
        return "its input is a vector, or nothing"
    if shape[0] < columns_of(hw):
        return f"its {shape[0]} outputs are fewer than the {columns_of(hw)} of a block"
    if isinstance(bias, fx.Node) and rewrite.shape_of(bias) != shape[:1]:
        return f"the bias has shape {rewrite.shape_of(bias)}, not one value a column"
    if isinstance(residual, fx.Node) and rewrite.shape_of(residual) != rewrite.shape_of(node):
        return f"the residual has shape {rewrite.shape_of(residual)}, the result {rewrite.shape_of(node)}"
    return None


def _not_pointwise(a: dict[str, object], shape: tuple[int, ...]) -> str | None:
    if shape[2:] != (1, 1) or a["groups"] != 1:
        return "only convolutions of 1x1 without groups have a kernel that skips blocks"
    if list(a["stride"]) != [1, 1] or any(a["padding"]):  # type: ignore[call-overload, arg-type]
        return "it has a stride or padding: its pixels are not the rows of a matrix"
    return "its image is in NCHW" if a["layout"] != "NHWC" else None


def _paying(node: fx.Node, weight: torch.Tensor, hw: Hardware, streamed: int) -> tuple[Blocks, float] | str:
    """The blocks to skip zeros by and the seconds predicted, or why none pays."""
    pattern = neighbours(weight)
    if pattern is not None and best_blocks(weight, hw, 1)[0].density > GAIN:
        return f"in a {pattern} pattern: no vector instruction of a CPU leaves out single weights"
    times = Times(node, hw, streamed)
    blocks, cost = best_blocks(weight, hw, times.rows)
    dense, sparse = times.seconds(), times.seconds(item_bytes=4 * blocks.density, rate=1 / max(cost, 1e-9))
    share = sparse / dense if dense else 1.0
    if share > GAIN:
        return f"not in blocks that pay: of {blocks.text()}, predicted to take {share:.2f} of the dense product"
    return blocks, sparse


def _rewrite(graph: fx.GraphModule, node: fx.Node, a: dict[str, object], blocks: Blocks) -> None:
    weight = a["weight"]
    assert isinstance(weight, fx.Node)
    if node.target is dialect.conv2d:
        matrix = rewrite.constant(graph, weight)
        assert matrix is not None
        weight = rewrite.add_constant(graph, f"{weight.target}_matrix", matrix.flatten(1), node)
    epilogue = (a.get("activation", "none"), a.get("activation_args", []))
    shape = [blocks.columns, blocks.depth, blocks.count, blocks.longest]
    operands = (a["input"], weight, a["bias"], a.get("residual"), *epilogue, shape)
    new = rewrite.call(graph, sparse_linear, operands, before=node, value=node.meta["val"])
    log.debug("%s: %s", node, blocks.text())
    rewrite.replace(node, new)
