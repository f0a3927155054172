"""scaled_dot_product_attention becomes graphwright::attention.

    scaled_dot_product_attention(q, k, v, mask, 0, causal, scale) -> attention(q, k, v, mask, causal, scale)
    the same with k and v repeated for groups of heads            -> attention of k and v as they are
    a constant mask that hides nothing, or what is_causal hides   -> no mask, or is_causal; in the dialect's too

The scale torch leaves open is 1 / sqrt(depth). Three-dimensional operands get a batch of one head. A row whose
mask is False everywhere gives 0, as torch has it.

Refused with dropout, with a mask beside is_causal (torch refuses that as well), for operands whose batches
differ or whose heads do not divide, and for masks that are neither bool nor of q's dtype.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten


def fuse_attention(graph: fx.GraphModule, hw: Hardware) -> int:
    """Rewrite every attention the dialect can express; returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        if rewrite.calls(node, dialect.attention, dialect.strided_attention):
            count += _simplify(graph, node)
        if not rewrite.calls(node, aten.scaled_dot_product_attention.default):
            continue
        a = rewrite.arguments(node)
        a["key"], a["value"] = _without_repeats(a)
        reason = _refused(node, a)
        if reason is not None:
            keep(log, node, "%s", reason)
            continue
        a |= _simpler_mask(
            graph, a["attn_mask"], (rewrite.shape_of(a["query"])[-2], rewrite.shape_of(a["key"])[-2]), -math.inf
        )
        _rewrite(graph, node, a)
        count += 1
    return rewrite.finish(graph, count)


def _refused(node: fx.Node, a: dict[str, Any]) -> str | None:
    if a["dropout_p"] != 0:
        return f"it drops {a['dropout_p']} of the weights"
    q, k, v = (rewrite.shape_of(a[name]) for name in ("query", "key", "value"))
    if not len(q) == len(k) == len(v) or len(q) not in (3, 4):
        return f"operands of rank {len(q)}, {len(k)} and {len(v)}"
    if not q[0] == k[0] == v[0] or k[:-1] != v[:-1]:
        return f"operands of shape {q}, {k} and {v}"
    if len(q) == 4 and (not k[1] or q[1] % k[1]):
        return f"{q[1]} heads of q, {k[1]} of k"
    mask = a["attn_mask"]
    if mask is None:
        return None
    if mask.meta["val"].dtype not in (torch.bool, node.meta["val"].dtype):
        return "a mask in another dtype"
    return "a mask and is_causal" if a["is_causal"] else None


def _without_repeats(a: dict[str, Any]) -> tuple[fx.Node, fx.Node]:
    """k and v before their heads were repeated for the groups of q's, where both were."""
    key, value = _unrepeated(a["key"]), _unrepeated(a["value"])
    if key is None or value is None or rewrite.shape_of(key)[1] != rewrite.shape_of(value)[1]:
        return a["key"], a["value"]
    return key, value


def _simplify(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Say without a mask what a constant one says, in an attention of the dialect."""
    a = rewrite.arguments(node)
    if a["mask"] is None or a["is_causal"]:
        return False
    if node.target is dialect.attention:
        extents = (rewrite.shape_of(a["q"])[-2], rewrite.shape_of(a["k"])[-2])
    else:
        extents = (a["extents"][3], a["extents"][4])
    simpler = _simpler_mask(graph, a["mask"], extents, -math.inf if a["fill"] is None else a["fill"])
    if not simpler:
        return False
    a |= {"mask": None, "is_causal": simpler.get("is_causal", False)}
    node.args, node.kwargs = tuple(a.values()), {}
    return True


def _simpler_mask(graph: fx.GraphModule, mask: object, extents: tuple[int, int], fill: float) -> dict[str, Any]:
    """What replaces a constant mask, where that can be said without one.

    In a row that sees a key, one whose score is the least of all numbers weighs nothing, like one of -inf.
    """
    spread = mask
    while rewrite.calls(spread, aten.expand.default):
        spread = spread.args[0]
    stored = rewrite.constant(graph, spread)
    if stored is None:
        return {}
    is_bool = stored.dtype == torch.bool
    least = torch.finfo(torch.float32 if is_bool else stored.dtype).min
    if is_bool and fill > least:
        return {}
    hidden = ~stored if is_bool else stored <= least
    if not is_bool and bool(((stored != 0) & ~hidden).any()):
        return {}
    if not hidden.any():
        return {"attn_mask": None}
    causal = torch.ones(extents, dtype=torch.bool).triu(1)
    if hidden.shape[-2:] == causal.shape and bool((hidden == causal).all()):
        return {"attn_mask": None, "is_causal": True}
    return {}


def _unrepeated(node: fx.Node) -> fx.Node | None:
    """x where `node` is reshape(expand(reshape(x, [B, H, 1, S, D]), [B, H, n, S, D]), [B, H * n, S, D])."""
    expand = node.args[0] if rewrite.calls(node, aten.reshape.default) else None
    if rewrite.calls(expand, aten.clone.default):
        expand = expand.args[0]
    split = expand.args[0] if rewrite.calls(expand, aten.expand.default) else None
    source = split.args[0] if rewrite.calls(split, aten.reshape.default) else None
    if not (isinstance(source, fx.Node) and isinstance(split, fx.Node) and isinstance(expand, fx.Node)):
        return None
    if any(rewrite.value_of(n) is None for n in (node, expand, split, source)):
        return None
    shape, spread = rewrite.shape_of(source), rewrite.shape_of(expand)
    if len(shape) != 4 or rewrite.shape_of(split) != (*shape[:2], 1, *shape[2:]):
        return None
    batch, heads, length, depth = shape
    fits = spread[:2] + spread[3:] == shape and rewrite.shape_of(node) == (
        batch,
        heads * spread[2],
        length,
        depth,
    )
    return source if fits else None


def _rewrite(graph: fx.GraphModule, node: fx.Node, a: dict[str, Any]) -> None:
    def reshaped(operand: fx.Node, shape: list[int]) -> fx.Node:
        return rewrite.call(graph, aten.reshape.default, (operand, shape), before=node)

    q, k, v, mask = a["query"], a["key"], a["value"], a["attn_mask"]
    value = rewrite.packed(node.meta["val"])
    scale = a["scale"] if a["scale"] is not None else 1 / math.sqrt(rewrite.shape_of(q)[-1] or 1)
    batched = value.dim() == 4
    if not batched:
        q, k, v = (reshaped(n, [n_shape[0], 1, *n_shape[1:]]) for n in (q, k, v) for n_shape in [rewrite.shape_of(n)])
        if mask is not None and len(rewrite.shape_of(mask)) == 3:
            shape = rewrite.shape_of(mask)
            mask = reshaped(mask, [shape[0], 1, *shape[1:]])
    args = (q, k, v, mask, a["is_causal"], float(scale))
    new = rewrite.call(graph, dialect.attention, args, before=node, value=value if batched else None)
    rewrite.replace(node, new if batched else reshaped(new, list(value.shape)))
