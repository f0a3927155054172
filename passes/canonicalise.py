"""One spelling for each operation, so that later passes know one.

    view, flatten, squeeze, unsqueeze, ...(x)   -> reshape(x, shape)
    transpose, t, movedim, ...(x)               -> permute(x, dims)
    convolution(x, w, b, ...)                   -> conv1d, conv2d, conv3d, conv_transpose1d, ...
    conv2d(x, w, b, "same")                     -> conv2d(x, w, b, padding), behind a pad where it is uneven
    contiguous(x)                               -> clone(x)
    clamp_min(x, a), clamp_max(x, a)            -> clamp(x, a), clamp(x, None, a)
    _softmax(x, dim), _adaptive_avg_pool2d(x)   -> softmax(x, dim), adaptive_avg_pool2d(x)
    _native_batch_norm_legit_no_training(x)[0]  -> batch_norm(x)
    native_layer_norm(x)[0]                     -> layer_norm(x)
    max_pool2d_with_indices(x)[0]               -> max_pool2d(x)
    instance_norm(x)                            -> group_norm(x, channels), or batch_norm(x) by running statistics

An operator with several results is respelt only where the first one alone is read.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from . import rewrite
from .refusals import keep
from .rewrite import Operator

log = logging.getLogger(__name__)
aten = torch.ops.aten

_RESHAPES = {
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.view_as.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
    aten.unflatten.int,
}
PERMUTES: dict[Operator, Callable[..., torch.Tensor]] = {
    aten.permute.default: torch.permute,
    aten.transpose.int: torch.transpose,
    aten.t.default: torch.t,
    aten.mT.default: lambda x: x.mT,
    aten.numpy_T.default: lambda x: x.permute(*range(x.dim())[::-1]),
    aten.movedim.int: torch.movedim,
    aten.movedim.intlist: torch.movedim,
    aten.swapaxes.default: torch.swapaxes,
    aten.swapdims.default: torch.swapdims,
}
_CONV = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_CONV_TRANSPOSE = {
    1: aten.conv_transpose1d.default,
    2: aten.conv_transpose2d.input,
    3: aten.conv_transpose3d.input,
}
_PADDED_BY_NAME = {aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3}
_SOFTMAX = {aten._softmax.default: aten.softmax.int, aten._log_softmax.default: aten.log_softmax.int}
# The operator for the first result, and the names of the arguments it takes from the spelling with several.
_FIRST_RESULT: dict[Operator, tuple[Operator, Callable[[dict[str, Any]], tuple[Any, ...]]]] = {
    aten._native_batch_norm_legit_no_training.default: (
        aten.batch_norm.default,
        lambda a: (
            a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"], False, a["momentum"],
            a["eps"], False,
        ),
    ),
    aten.native_batch_norm.default: (
        aten.batch_norm.default,
        lambda a: (
            a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"], False, a["momentum"],
            a["eps"], False,
        ),
    ),
    aten.native_layer_norm.default: (
        aten.layer_norm.default,
        lambda a: (a["input"], a["normalized_shape"], a["weight"], a["bias"], a["eps"]),
    ),
    aten.max_pool2d_with_indices.default: (
        aten.max_pool2d.default,
        lambda a: (a["self"], a["kernel_size"], a["stride"], a["padding"], a["dilation"], a["ceil_mode"]),
    ),
}  # fmt: skip


def canonicalise(graph: fx.GraphModule, hw: Hardware) -> int:
    """Rewrite synonyms to the spelling that the other passes know; returns the number of nodes respelt."""
    count = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        if rewrite.value_of(node) is None:
            continue
        respell = _first_result if node.target is operator.getitem else _respelt
        if (spelling := respell(graph, node)) is None:
            continue
        target, args, kwargs = spelling
        owner = node.args[0]
        rewrite.replace(node, rewrite.call(graph, target, args, kwargs, before=node, value=node.meta["val"]))
        if respell is _first_result:
            rewrite.erase_unused(owner)
        count += 1
    return rewrite.finish(graph, count)


Spelling = tuple[Operator, tuple[Any, ...], dict[str, Any]]


def _respelt(graph: fx.GraphModule, node: fx.Node) -> Spelling | None:
    target, source = node.target, node.args[0]
    assert isinstance(source, fx.Node)
    if target in _RESHAPES:
        shape = list(rewrite.shape_of(node))
        same = target is aten.reshape.default and list(node.args[1]) == shape  # type: ignore[arg-type]
        return None if same else (aten.reshape.default, (source, shape), {})
    if target in PERMUTES:
        dims = permuted_dims(node)
        same = target is aten.permute.default and list(node.args[1]) == dims  # type: ignore[arg-type]
        return None if same else (aten.permute.default, (source, dims), {})
    if target is aten.contiguous.default:
        return aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
    if target is aten.clamp_min.default:
        return aten.clamp.default, (source, node.args[1]), {}
    if target is aten.clamp_max.default:
        return aten.clamp.default, (source, None, node.args[1]), {}
    if target in _SOFTMAX and not node.args[2]:
        return _SOFTMAX[target], (source, node.args[1]), {}
    if target is aten._adaptive_avg_pool2d.default:
        return aten.adaptive_avg_pool2d.default, (source, node.args[1]), {}
    if target is aten.instance_norm.default:
        return _instance_norm(node)
    if target is aten.convolution.default:
        return _convolution(node)
    if target in _PADDED_BY_NAME:
        return _padded_by_name(graph, node)
    return None


def permuted_dims(node: fx.Node) -> list[int]:
    """The order of dims that a call of one of PERMUTES gives, found by permuting distinct extents."""
    rank = len(rewrite.shape_of(node))
    probe = torch.empty(tuple(range(2, 2 + rank)), device="meta")
    return [d - 2 for d in PERMUTES[node.target](probe, *node.args[1:], **node.kwargs).shape]  # type: ignore[index]


def _convolution(node: fx.Node) -> Spelling | None:
    a = rewrite.arguments(node)
    spatial = len(rewrite.shape_of(a["weight"])) - 2
    stride, padding, dilation = (rewrite.repeated(a[k], spatial) for k in ("stride", "padding", "dilation"))
    head = (a["input"], a["weight"], a["bias"], stride, padding)
    if spatial not in _CONV:
        return None
    if a["transposed"]:
        output_padding = rewrite.repeated(a["output_padding"], spatial)
        return _CONV_TRANSPOSE[spatial], (*head, output_padding, a["groups"], dilation), {}
    return _CONV[spatial], (*head, dilation, a["groups"]), {}


def _instance_norm(node: fx.Node) -> Spelling | None:
    a = rewrite.arguments(node)
    affine, source = (a["weight"], a["bias"]), a["input"]
    if not a["use_input_stats"]:
        statistics = (a["running_mean"], a["running_var"], False, a["momentum"], a["eps"], False)
        return aten.batch_norm.default, (source, *affine, *statistics), {}
    if a["running_mean"] is not None:
        keep(log, node, "it changes its running statistics")
        return None
    return aten.group_norm.default, (source, rewrite.shape_of(source)[1], *affine, a["eps"]), {}


def _padded_by_name(graph: fx.GraphModule, node: fx.Node) -> Spelling | None:
    a = rewrite.arguments(node)
    spatial = _PADDED_BY_NAME[node.target]  # type: ignore[index]
    kernel = rewrite.shape_of(a["weight"])[2:]
    stride, dilation = (rewrite.repeated(a[k], spatial) for k in ("stride", "dilation"))
    source = a["input"]
    # torch puts the odd element of "same" padding behind the data.
    reach = [d * (k - 1) if a["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    before, after = [r // 2 for r in reach], [r - r // 2 for r in reach]
    if before != after:
        uneven = [p for b, e in zip(before[::-1], after[::-1], strict=True) for p in (0, e - b)]
        source = rewrite.call(graph, aten.constant_pad_nd.default, (source, uneven, 0.0), before=node)
    return _CONV[spatial], (source, a["weight"], a["bias"], stride, before, dilation, a["groups"]), {}


def _first_result(graph: fx.GraphModule, node: fx.Node) -> Spelling | None:
    owner, index = node.args
    assert isinstance(owner, fx.Node)
    if owner.target not in _FIRST_RESULT or index != 0:
        return None
    if len(owner.users) > 1:
        keep(log, owner, "more of its results than the first are read")
        return None
    a = rewrite.arguments(owner)
    if a.get("training"):
        keep(log, owner, "it is in training mode, and changes its statistics")
        return None
    target, select = _FIRST_RESULT[owner.target]
    return target, select(a), {}
