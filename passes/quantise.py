"""linear(x, w, b) -> qlinear(quantize(x), w8, scale, b'), conv2d likewise, for the products that were chosen.

    linear(x, w, b) -> linear_rows(x, w8, scale, b)      those in `by_rows`: x is rounded at run time, a scale a row
    conv2d(x, w, b) -> conv2d_images(x, w8, scale, b)    likewise, a scale an image
    linear(x, w, b) -> linear_w8(x, w8, scale, b)        those in `weights_only`
    linear(x, w, b) -> linear_w4(x, w4, scales, b)       those in `halved`: groups of so many inputs have a scale
    embedding(w, i) -> embedding_w8(w8, scale, i)        a scale a row
    attention(q, k, v) -> attention_int8(q, k, v)        both products of bytes; strided_attention likewise

x is rounded by its scale in the table, once for all products that read it; the result is float32 (`requantise` makes it
8 bits where only such products read it). A residual of a convolution that the table has a scale for becomes
dequantize(quantize(residual)): it is stored in a quarter of the bytes. b' is the bias corrected for the mean error of
the rounded weights.

Refused by int8_forms.py, which decides what is chosen; names that are no such product any more are left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from . import dialect, dialect_int8, dialect_mixed, dialect_rows, rewrite
from .dialect_attention import IN_BYTES
from .precision import int4_groups
from .precision.int8_forms import is_product, table_reason
from .precision.int8_scales import Scale, Table, corrected_bias, quantised_weight, weight_scales
from .rewrite import arguments, constant

log = logging.getLogger(__name__)


def quantise(
    graph: fx.GraphModule,
    table: Table,
    chosen: Collection[str],
    weights_only: Collection[str] = (),
    halved: Mapping[str, int] = MappingProxyType({}),
    by_rows: Collection[str] = (),
) -> int:
    """Rewrite the products named in `chosen`, those in `weights_only` with float32 inputs; returns how many.

    `halved`: those whose weights alone are narrow, in four bits, and their groups. `by_rows`: those whose inputs
    are rounded at run time.
    """
    named = [n for n in graph.graph.nodes if n.name in chosen]
    tables = [n for n in named if table_reason(graph, n) is not None]
    nodes = [n for n in named if is_product(n)]
    attentions = [n for n in named if n.op == "call_function" and n.target in IN_BYTES]
    for node in attentions:
        node.target = IN_BYTES[node.target]  # whose name stays what the table knows
    rounded: dict[fx.Node, fx.Node] = {}
    names: dict[fx.Node, str] = {}  # of what is rewritten, as the table knows it
    for node in tables:
        names[_rows(graph, node)] = node.name

    def in_8_bits(value: fx.Node) -> tuple[fx.Node, Scale]:
        scale = table.scales[names.get(value, value.name)]
        if value not in rounded:
            # Behind what makes the value, so that every reader finds it.
            rounded[value] = _behind(graph, value, scale)
        return rounded[value], scale

    for node in nodes:
        given, name = arguments(node), node.name
        if name in halved:
            names[_halved(graph, node, halved[name])] = name
            continue
        if name in weights_only or name in by_rows:
            operator = dialect_mixed.linear_w8
            if name in by_rows:
                image = node.target is dialect.conv2d
                operator = dialect_rows.conv2d_images if image else dialect_rows.linear_rows
            names[_float_input(graph, node, table.per_channel, operator)] = name
            continue
        x, scale = in_8_bits(given["input"])
        residual: Any = given.get("residual")
        images = isinstance(residual, fx.Node) and node.target is dialect.conv2d
        if images and names.get(residual, residual.name) in table.scales:
            stored, how = in_8_bits(residual)
            residual = rewrite.call(graph, dialect_int8.dequantize, (stored, how.scale, how.zero), before=node)
        mean = table.means.get(names.get(given["input"], given["input"].name))
        names[_replace(graph, node, x, scale, residual, table.per_channel, mean)] = name
    return rewrite.finish(graph, len(nodes) + len(tables) + len(attentions))


def _rows(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """An embedding whose rows are stored in 8 bits."""
    source, indices = node.args[:2]
    weight = constant(graph, source)
    assert weight is not None, node
    assert isinstance(source, fx.Node)
    scales = weight_scales(weight)
    w = rewrite.add_constant(graph, f"{source.target}_rows_int8", quantised_weight(weight, scales), node)
    s = rewrite.add_constant(graph, f"{source.target}_rows_scale", scales, node)
    return _instead(graph, node, dialect_mixed.embedding_w8, (w, s, indices))


def _float_input(graph: fx.GraphModule, node: fx.Node, per_channel: bool, operator: Any) -> fx.Node:
    """A product that reads float32, with weights in 8 bits."""
    given = arguments(node)
    weight = constant(graph, given["weight"])
    assert weight is not None, node
    scales = weight_scales(weight, per_channel)
    name = str(given["weight"].target)
    w = rewrite.add_constant(graph, f"{name}_int8", quantised_weight(weight, scales), node)
    s = rewrite.add_constant(graph, f"{name}_scale", scales, node)
    activation = (given.get("activation", "none"), list(given.get("activation_args", [])))
    sizes = [given[key] for key in ("stride", "padding", "dilation") if key in given]
    operands = (given["input"], w, s, given["bias"], given.get("residual"), *sizes, *activation)
    return _instead(graph, node, operator, operands)


def _halved(graph: fx.GraphModule, node: fx.Node, group: int) -> fx.Node:
    given = arguments(node)
    weight = constant(graph, given["weight"])
    assert weight is not None, node
    steps, scales = int4_groups.rounded(weight, group)
    name = str(given["weight"].target)
    w = rewrite.add_constant(graph, f"{name}_int4", int4_groups.halves(steps), node)
    s = rewrite.add_constant(graph, f"{name}_scales", scales, node)
    activation = (given.get("activation", "none"), list(given.get("activation_args", [])))
    operands = (given["input"], w, s, given["bias"], given.get("residual"), *activation)
    return _instead(graph, node, dialect_mixed.linear_w4, operands)


def _instead(graph: fx.GraphModule, node: fx.Node, operator: Any, operands: tuple[Any, ...]) -> fx.Node:
    """A call in the place of `node`."""
    made = rewrite.call(graph, operator, operands, before=node, value=node.meta["val"])
    rewrite.replace(node, made)
    return made


def _behind(graph: fx.GraphModule, value: fx.Node, scale: Scale) -> fx.Node:
    before = value.next
    while before.op in ("placeholder", "get_attr"):
        before = before.next
    arguments = (value, scale.scale, scale.zero, scale.dtype)
    return rewrite.call(graph, dialect_int8.quantize, arguments, before=before, source=value)


def _replace(
    graph: fx.GraphModule,
    node: fx.Node,
    x: fx.Node,
    scale: Scale,
    residual: fx.Node | None,
    per_channel: bool,
    mean: torch.Tensor | None,
) -> fx.Node:
    given = arguments(node)
    weight = constant(graph, given["weight"])
    assert weight is not None, node
    scales = weight_scales(weight, per_channel)
    stored = quantised_weight(weight, scales)
    bias = None if given["bias"] is None else constant(graph, given["bias"])
    corrected = given["bias"]
    name = str(given["weight"].target)
    if mean is not None:
        value = corrected_bias(bias, weight, stored, scales, mean)
        if bias is not None or bool(value.abs().max() > 0):
            corrected = rewrite.add_constant(graph, f"{node.name}_bias", value, node)
    w = rewrite.add_constant(graph, f"{name}_int8", stored, node)
    s = rewrite.add_constant(graph, f"{node.name}_scale", scales * scale.scale, node)
    head = (x, scale.zero, w, s, corrected, residual, 1.0, 0)
    activation = (given.get("activation", "none"), list(given.get("activation_args", [])), 1.0, 0, None)
    log.debug("%s: 8 bits, input scale %.3g, zero %d", node.name, scale.scale, scale.zero)
    if node.target is dialect.conv2d:
        sizes = tuple(given[key] for key in ("stride", "padding", "dilation", "groups"))
        return _instead(graph, node, dialect_int8.qconv2d, (*head, *sizes, *activation))
    return _instead(graph, node, dialect_int8.qlinear, (*head, *activation))
