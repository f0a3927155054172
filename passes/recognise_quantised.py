"""Products of a model that others quantised (PT2E, torchao) become products of integers.

    linear(dequantize(q), dequantize(w8), b)          -> qlinear(q, w8, b), its result in float32
    conv2d(dequantize(q), dequantize(w8), b), NHWC    -> qconv2d(q, w8, b)
    linear(x, dequantize(w8), b)                      -> linear_w8(x, w8, b)
    embedding(dequantize(w8), i)                      -> embedding_w8(w8, i)
    any other reader of dequantize(w8)                -> reads the weights in float32
    linear_tokens(x, w8, b), without such machines    -> the same in float32: round(x / unit), linear, scales

q is in uint8 or int8 with a scale and zero point, and may pass through moves on the way; w8 is a constant with a scale
for each row, or one for all, and zero points that leave w8 - zero in int8. Sums are exact where the model's own are
rounded to float32, so that values rounded afterwards agree within a step. `give_bytes` then lets products give bytes.

Refused: machines without dot products of bytes and GPUs (float32 is as fast), NCHW, groups that are not depthwise,
sums of more than 32 bits, biases and residuals that kernels do not take.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, dialect_int8, dialect_mixed, dialect_rows, rewrite
from .hoist_quantise import moved
from .precision.forms import PRODUCTS
from .precision.int8_forms import is_depthwise
from .refusals import keep
from .rewrite import arguments, calls, constant, shape_of
from .token_steps import spell_out_tokens

log = logging.getLogger(__name__)
aten = torch.ops.aten


@dataclass(frozen=True)
class Stored:
    """Weights in int8 with zero point 0, a scale a row."""

    steps: torch.Tensor
    scales: torch.Tensor
    name: str


def recognise_quantised(graph: fx.GraphModule, hw: Hardware) -> int:
    """Compute products of quantised operands by integers; returns the number of weights that found their form."""
    count = 0
    for node in list(graph.graph.nodes):
        if not calls(node, *dialect_int8.STORED) or constant(graph, node.args[0]) is None:
            continue
        stored = stored_weights(graph, node)
        for user in list(node.users):
            count += stored is not None and _by_integers(graph, hw, user, node, stored)
        if node.users:
            count += _spell_out(graph, node)
        rewrite.erase_unused(node)
    if hw.kind == "gpu" or (hw.vector_dot_product("int8") is None and hw.byte_rate <= 1):
        for node in [n for n in graph.graph.nodes if calls(n, dialect_rows.linear_tokens)]:
            keep(log, node, "no products of bytes here: its rows are rounded, and computed in float32")
            spell_out_tokens(graph, node)
            count += 1
    return rewrite.finish(graph, count)


def stored_weights(graph: fx.GraphModule, node: fx.Node) -> Stored | None:
    """The constant that `node` dequantizes, as kernels take weights; None where that cannot be."""
    a = arguments(node)
    w = constant(graph, a["input"])
    assert w is not None
    if w.dtype not in dialect_int8.RANGES or w.dim() < 2 or not w.numel():
        return None
    rows = w.shape[0]
    if node.target is dialect_int8.dequantize:
        scales, zeros = torch.full((rows,), a["scale"]), torch.full((rows,), a["zero"])
    else:
        found = constant(graph, a["scales"])
        zero = None if a["zeros"] is None else constant(graph, a["zeros"])
        if found is None or (a["zeros"] is not None and zero is None) or (a["axis"] != 0 and found.numel() != 1):
            keep(log, node, "its scales are no constants, one a row")
            return None
        scales = found.float().reshape(-1).expand(rows) if found.numel() == 1 else found.float()
        zeros = torch.zeros(rows) if zero is None else zero.reshape(-1).expand(rows)
    steps = w.to(torch.int32) - zeros.to(torch.int32).view(-1, *[1] * (w.dim() - 1))
    if int(steps.min()) < -128 or int(steps.max()) > 127 or not bool(scales.isfinite().all()):
        keep(log, node, "its zero points take the weights beyond int8, or scales are not finite")
        return None
    return Stored(steps.to(torch.int8), scales.contiguous(), str(a["input"].target))


def _by_integers(graph: fx.GraphModule, hw: Hardware, user: fx.Node, weights: fx.Node, stored: Stored) -> bool:
    """Give one reader of the weights its form in 8 bits, where it has one."""
    if hw.kind == "gpu":
        keep(log, user, "8 bits have no kernel on a GPU")
        return False
    if calls(user, aten.embedding.default) and user.args[0] is weights:
        made = rewrite.call(
            graph,
            dialect_mixed.embedding_w8,
            (*_constants(graph, stored, stored.scales, user), user.args[1]),
            before=user,
            value=user.meta["val"],
        )
        rewrite.replace(user, made)
        return True
    if user.target not in PRODUCTS or arguments(user)["weight"] is not weights:
        keep(log, user, "no product that takes weights of 8 bits")
        return False
    if (reason := refusal(graph, user)) is not None:
        keep(log, user, "%s", reason)
        return False
    source = _quantised_source(arguments(user)["input"])
    if source is not None and hw.vector_dot_product("int8") is not None:
        _to_integers(graph, user, stored, source)
        return True
    if user.target is dialect.conv2d:
        keep(log, user, "its input is in float32, or the machine has no dot products of bytes")
        return False
    a = arguments(user)
    given = (a["input"], *_constants(graph, stored, stored.scales, user), a["bias"], a.get("residual"), *_activation(a))
    rewrite.replace(user, rewrite.call(graph, dialect_mixed.linear_w8, given, before=user, value=user.meta["val"]))
    return True


def refusal(graph: fx.GraphModule, node: fx.Node) -> str | None:
    """Why no kernel of 8 bits computes a product, or None."""
    a = arguments(node)
    shape = shape_of(a["weight"])
    if not prod(shape_of(node)):
        return "the result has no elements"
    if node.target is dialect.conv2d and a["layout"] != "NHWC":
        return f"the layout is {a['layout']}"
    if node.target is dialect.conv2d and a["groups"] != 1 and not is_depthwise(node):
        return f"{a['groups']} groups of channels"
    if prod(shape[1:]) > dialect_int8.MOST_TERMS:
        return f"sums of {prod(shape[1:])} terms do not fit 32 bits"
    bias, residual = a["bias"], a.get("residual")
    if bias is not None and shape_of(bias) != shape[:1]:
        return f"the bias has shape {shape_of(bias)}, not one value a column"
    if residual is not None and shape_of(residual) != shape_of(node):
        return f"the residual has shape {shape_of(residual)}, the result {shape_of(node)}"
    return None


def _quantised_source(value: fx.Node) -> fx.Node | None:
    """The dequantize behind moves that a product reads, or None."""
    while not calls(value, dialect_int8.dequantize):
        operands = moved(value)
        if len(operands) != 1 or isinstance(value.args[0], (list, tuple)):
            return None
        value = operands[0]
    return value


def _bytes(graph: fx.GraphModule, value: fx.Node, source: fx.Node, before: fx.Node) -> Any:
    """`value`, which is moves of dequantize(q), as the same moves of q."""
    if value is source:
        return source.args[0]
    assert isinstance(value.args[0], fx.Node)
    assert isinstance(value.target, rewrite.Operator)
    inner = _bytes(graph, value.args[0], source, before)
    return rewrite.call(graph, value.target, (inner, *value.args[1:]), dict(value.kwargs), before=before, source=value)


def _to_integers(graph: fx.GraphModule, node: fx.Node, stored: Stored, source: fx.Node) -> None:
    a = arguments(node)
    (_, scale, zero), old = source.args, a["input"]
    x = _bytes(graph, old, source, node)
    weights = _constants(graph, stored, stored.scales * torch.tensor(scale, dtype=torch.float32), node)
    head = (x, zero, *weights, a["bias"], a.get("residual"), 1.0, 0)
    tail = (*_activation(a), 1.0, 0, None)
    target, sizes = dialect_int8.qlinear, tuple[Any, ...]()
    if node.target is dialect.conv2d:
        target, sizes = dialect_int8.qconv2d, tuple(a[key] for key in ("stride", "padding", "dilation", "groups"))
    made = rewrite.call(graph, target, (*head, *sizes, *tail), before=node, value=node.meta["val"])
    rewrite.replace(node, made)
    while isinstance(old, fx.Node) and not old.users and old.op == "call_function":
        inner = old.args[0]
        rewrite.erase_unused(old)
        old = inner


def _constants(graph: fx.GraphModule, stored: Stored, scales: torch.Tensor, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    w = rewrite.add_constant(graph, f"{stored.name}_int8", stored.steps, before)
    return w, rewrite.add_constant(graph, f"{stored.name}_scale", scales, before)


def _activation(a: dict[str, Any]) -> tuple[str, list[float]]:
    return a.get("activation", "none"), list(a.get("activation_args", []))


def _spell_out(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Weights that no kernel takes in 8 bits, in float32."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: constant(graph, n))
    if any(n.op != "get_attr" for n in node.all_input_nodes):
        return False
    assert callable(node.target)
    value = node.target(*args, **kwargs)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(rewrite.add_constant(graph, f"{source.target}_float32", value, node))
    return True
