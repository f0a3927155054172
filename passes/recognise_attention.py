"""Attention that was written out becomes graphwright::attention.

    softmax(q @ k.mT * scale + mask) @ v                  -> attention(q, k, v, mask, False, scale, -inf)
    softmax(where(seen, q @ k.mT * scale, fill)) @ v      -> attention(q, k, v, seen, False, scale, fill)
    the same with k and v repeated for groups of heads    -> attention of k and v as they are

The products may be mm, bmm, baddbmm or matmul, their batches folded by reshapes, the scores transposed; factors may
stand before or behind the product, on q, on k, or behind a mask. Several masks become one that is added: that takes a
fill of -inf or the least number, beside which any score below 1e30 vanishes. Otherwise numbers are those of the
operators in their order up to rounding, in rows that a mask hides as well: see `fill` of the dialect's attention.

Refused for a softmax over another dim than the last; where anybody else reads the weights or a value in between, where
the dtype changes on the way, for several masks of which one hides with another number, for masks whose leading dims are
not batch and heads, for operands whose shapes do not make heads, and after 32 steps between product and softmax.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .attention_operands import MOVES, composed, heads, moves_above, one_number, unscaled, without_repeats
from .moves.index_map import identity
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten

_PRODUCTS = frozenset({aten.mm.default, aten.bmm.default, aten.matmul.default, aten.baddbmm.default})


@dataclass(frozen=True)
class _Mask:
    """What is done to scores of shape [*lead, queries, keys] before the softmax."""

    node: fx.Node
    lead: tuple[int, ...]
    factor: float = 1.0  # of an additive mask
    fill: float | None = None  # of a mask that hides: what hidden scores become
    hides: bool = False  # whether it is true where scores are hidden, not where they are seen


@dataclass(frozen=True)
class _Scores:
    """scale * left @ right with masks, in their order; transposed where the product has keys as rows."""

    left: fx.Node
    right: fx.Node
    scale: float = 1.0
    masks: tuple[_Mask, ...] = ()
    transposed: bool = False


def recognise_attention(graph: fx.GraphModule, hw: Hardware) -> int:
    """Rewrite every written-out attention the dialect can express; returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        if not rewrite.calls(node, aten.softmax.int):
            continue
        reason = _rewrite(graph, node)
        if reason:
            keep(log, node, "%s", reason)
            continue
        count += 1
    return rewrite.finish(graph, count)


def _rewrite(graph: fx.GraphModule, softmax: fx.Node) -> str:
    """Rewrite the attention around a softmax, or say why not."""
    a = rewrite.arguments(softmax)
    if len(rewrite.shape_of(softmax)) < 2:
        return "not a matrix"
    if a["dim"] % len(rewrite.shape_of(softmax)) != len(rewrite.shape_of(softmax)) - 1:
        return "not along the last dim"
    product = _weighted(softmax)
    if isinstance(product, str):
        return product
    scores = _scores(a["self"])
    if isinstance(scores, str):
        return scores
    if not rewrite.is_float(softmax, scores.left, scores.right, product):
        return "the dtype changes between the products"
    least = torch.finfo(softmax.meta["val"].dtype).min
    if len(scores.masks) > 1 and any(mask.fill is not None and mask.fill > least for mask in scores.masks):
        return f"{len(scores.masks)} masks, of which one hides with a number that scores change"
    if any(mask.fill is None and not rewrite.is_float(softmax, mask.node) for mask in scores.masks):
        return "a mask of another dtype"
    return _emit(graph, softmax, scores, product)


def _weighted(softmax: fx.Node) -> fx.Node | str:
    """The product of the weights with the values, or why there is none."""
    weights, path = softmax, list[fx.Node]()
    while (user := rewrite.sole_user(weights)) is not None and user.target in MOVES:
        weights = user
        path.append(user)
    if user is None:
        return f"its weights are read by {len(weights.users)} nodes" if weights.users else "nobody reads its weights"
    moved = composed(softmax, path[::-1])
    if moved is None or not moved.keeps_order or moved.shape[-2:] != rewrite.shape_of(softmax)[-2:]:
        return f"{weights} moves its weights"
    if user.target not in _PRODUCTS - {aten.baddbmm.default} or user.args[0] is not weights:
        return f"its weights are read by {user}, which is no product with values"
    values = user.args[1]
    assert isinstance(values, fx.Node)
    if rewrite.shape_of(values)[:-2] != moved.shape[:-2]:
        return "the values are not as many matrices as the weights"
    return user


def _scores(node: fx.Node, depth: int = 0) -> _Scores | str:
    """Read scores upwards from the softmax, as far as the product."""
    if not isinstance(node.target, rewrite.Operator):
        return "the scores are no product"
    if len(node.users) != 1:
        return f"{node}, a value in between, is read by {len(node.users)} nodes"
    if depth > 32:
        return "more than 32 steps between product and softmax"
    if node.target in _PRODUCTS:
        return _product(node)
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return _scaled(node, depth)
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        return _added(node, depth)
    if node.target in (aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _hidden(node, depth)
    if node.target in MOVES:
        return _moved(node, depth)
    return f"{node} stands between product and softmax"


def _product(node: fx.Node) -> _Scores | str:
    a = rewrite.arguments(node)
    names = ("batch1", "batch2") if node.target is aten.baddbmm.default else ("self", "mat2")
    left, right = a[names[0]], a[names[1]] if names[1] in a else a["other"]
    shapes = rewrite.shape_of(left), rewrite.shape_of(right)
    if shapes[0][:-2] != shapes[1][:-2]:
        return f"a product of shapes {shapes[0]} and {shapes[1]}"
    if node.target is not aten.baddbmm.default:
        return _Scores(left, right)
    mask = _Mask(a["self"], rewrite.shape_of(node)[:-2], float(a["beta"]))
    return _Scores(left, right, float(a["alpha"]), (mask,) if a["beta"] else ())


def _scaled(node: fx.Node, depth: int) -> _Scores | str:
    factor, scores = one_number(node.args[1]), node.args[0]
    if factor is None and node.target is aten.mul.Tensor:
        factor, scores = one_number(node.args[0]), node.args[1]
    if not factor or not math.isfinite(factor):
        return f"{node} is not scaled by a number"
    factor = 1 / factor if node.target is aten.div.Tensor else factor
    assert isinstance(scores, fx.Node)
    found = _scores(scores, depth + 1)
    if isinstance(found, str):
        return found
    dtype = node.meta["val"].dtype
    masks = tuple(
        replace(
            mask, factor=mask.factor * factor, fill=mask.fill and (torch.tensor(mask.fill, dtype=dtype) * factor).item()
        )
        for mask in found.masks
    )
    return replace(found, scale=found.scale * factor, masks=masks)


def _added(node: fx.Node, depth: int) -> _Scores | str:
    a = rewrite.arguments(node)
    sign = 1.0 if node.target is aten.add.Tensor else -1.0
    if a["alpha"] != 1 or not all(isinstance(operand, fx.Node) for operand in (a["self"], a["other"])):
        return f"{node} adds a number or a multiple"
    sides = [(a["self"], a["other"])]
    sides += [(a["other"], a["self"])] if sign > 0 else []
    found: _Scores | str = ""
    for scores, mask in sides:
        if rewrite.value_of(scores) is None or rewrite.shape_of(scores) != rewrite.shape_of(node):
            found = found or f"{node} broadcasts the scores"
            continue
        above = _scores(scores, depth + 1)
        if not isinstance(above, str):
            return _with(above, _Mask(mask, rewrite.shape_of(node)[:-2], sign))
        found = found or above
    return found


def _hidden(node: fx.Node, depth: int) -> _Scores | str:
    seen, kept, other = node.args
    fill, hides = one_number(other), False
    if node.target is not aten.where.self:
        seen, kept, hides = kept, seen, True
    if fill is None and not hides:
        kept, fill, hides = other, one_number(kept), True
    if fill is None or math.isnan(fill):
        return f"{node} does not put one number in the place of scores"
    assert isinstance(seen, fx.Node)
    assert isinstance(kept, fx.Node)
    if rewrite.shape_of(kept) != rewrite.shape_of(node):
        return f"{node} broadcasts the scores"
    found = _scores(kept, depth + 1)
    if isinstance(found, str):
        return found
    return _with(found, _Mask(seen, rewrite.shape_of(node)[:-2], fill=fill, hides=hides))


def _moved(node: fx.Node, depth: int) -> _Scores | str:
    source, path = moves_above(node, alone=True)
    found = _scores(source, depth + 1)
    if isinstance(found, str):
        return found
    old, new = rewrite.shape_of(source), rewrite.shape_of(node)
    moved = composed(source, path)
    if moved is not None and moved.keeps_order:
        return found if old[-2:] == new[-2:] else f"{node} reshapes queries and keys"
    rank = len(old)
    swapped = identity(old).permute([*range(rank - 2), rank - 1, rank - 2])
    assert swapped is not None
    if found.masks or moved != swapped.reshape(new) or new[-2:] != old[:-3:-1]:
        return f"{node} moves more than queries and keys, or a mask with them"
    return replace(found, transposed=not found.transposed)


def _with(scores: _Scores, mask: _Mask) -> _Scores:
    return replace(scores, masks=(*scores.masks, mask))


def _emit(graph: fx.GraphModule, softmax: fx.Node, scores: _Scores, product: fx.Node) -> str:
    """Build the attention in the place of `product`; a reason where a mask does not fit."""
    queries, keys = rewrite.shape_of(softmax)[-2:]
    values = product.args[1]
    assert isinstance(values, fx.Node)
    lead = _batch_and_heads(softmax, scores)
    fitting = [_fitting(mask, lead) for mask in scores.masks]
    if None in fitting:
        return f"a mask over {[mask.lead for mask in scores.masks]} is not one over batch and heads {lead}"
    q_side, k_side = (scores.right, scores.left) if scores.transposed else (scores.left, scores.right)
    (q, q_scale), (k, k_scale) = (unscaled(graph, side, product) for side in (q_side, k_side))
    depth = rewrite.shape_of(scores.left)[-1]
    rows = (queries, depth), (keys, depth), (keys, rewrite.shape_of(product)[-1])
    q = heads(graph, q, (*lead, *rows[0]), scores.transposed, product)
    k, v = without_repeats(
        graph,
        (k, (*lead, *rows[1]), not scores.transposed),
        (values, (*lead, *rows[2]), False),
        product,
    )
    placed = [_placed(graph, mask, fit, product) for mask, fit in zip(scores.masks, fitting, strict=True) if fit]
    mask, fill = placed[0] if placed else None, -math.inf
    if len(placed) == 1:
        fill = fill if scores.masks[0].fill is None else scores.masks[0].fill
    elif placed:
        mask = _sum(graph, list(zip(scores.masks, placed, strict=True)), product)
    args = (q, k, v, mask, False, scores.scale * q_scale * k_scale, fill)
    new = rewrite.call(graph, dialect.attention, args, before=product, source=softmax)
    shape = rewrite.shape_of(product)
    back = rewrite.call(graph, aten.reshape.default, (new, list(shape)), before=product, value=product.meta["val"])
    product.replace_all_uses_with(back)
    rewrite.erase_cone(product)
    return ""


def _sum(graph: fx.GraphModule, masks: list[tuple[_Mask, fx.Node]], before: fx.Node) -> fx.Node:
    """One additive mask that does what several do one behind the other."""
    total: fx.Node | None = None
    for mask, node in masks:
        if mask.fill is not None:
            dtype = before.meta["val"].dtype
            hidden = rewrite.add_constant(graph, "hidden_score", torch.tensor(mask.fill, dtype=dtype), before)
            seen = total or rewrite.add_constant(graph, "seen_score", torch.tensor(0.0, dtype=dtype), before)
            total = rewrite.call(graph, aten.where.self, (node, seen, hidden), before=before)
        else:
            total = node if total is None else rewrite.call(graph, aten.add.Tensor, (total, node), before=before)
    assert total is not None
    return total


def _batch_and_heads(softmax: fx.Node, scores: _Scores) -> tuple[int, int]:
    """The two leading dims: the last one seen alone is that of heads; all matrices are heads where none is."""
    shapes = [rewrite.shape_of(softmax)]
    for operand in (scores.left, scores.right):
        _, path = moves_above(operand)
        for i in range(len(path)):
            above = path[i].args[0]
            assert isinstance(above, fx.Node)
            moved = composed(above, path[: i + 1])
            if moved is not None and moved.keeps_order and moved.source[-2:] == rewrite.shape_of(operand)[-2:]:
                shapes.append(moved.source)
    shapes += [(*mask.lead, 1, 1) for mask in scores.masks]
    lead = next((shape[:-2] for shape in shapes if len(shape) > 3), None)
    if lead is None:
        return 1, math.prod(rewrite.shape_of(softmax)[:-2])
    return math.prod(lead[:-1]), lead[-1]


def _fitting(mask: _Mask, lead: tuple[int, int]) -> tuple[list[int], list[int]] | None:
    """(shape to expand the mask to, shape of that as [batch, heads, queries, keys]), None where it has none."""
    value = rewrite.value_of(mask.node)
    if value is None or value.dim() > len(mask.lead) + 2:
        return None
    shape = [1] * (len(mask.lead) + 2 - value.dim()) + list(value.shape)
    own, rows = shape[:-2], shape[-2:]
    cuts = [i for i in range(len(own) + 1) if math.prod(mask.lead[:i]) == lead[0]]
    if not cuts:
        whole = list(lead) if math.prod(own) > 1 else [1, 1]
        return (shape, [*whole, *rows]) if math.prod(own) in (1, math.prod(lead)) else None
    cut = cuts[-1] if len(own[cuts[-1] :]) else cuts[0]
    full: list[int] = []
    ends: list[int] = []
    for mine, all_of in ((own[:cut], mask.lead[:cut]), (own[cut:], mask.lead[cut:])):
        spread = list(all_of) if math.prod(mine) > 1 else list(mine)
        full += spread
        ends.append(math.prod(spread))
    return [*full, *rows], [*ends, *rows]


def _placed(graph: fx.GraphModule, mask: _Mask, fit: tuple[list[int], list[int]], before: fx.Node) -> fx.Node:
    """The mask as [batch, heads, queries, keys], each dim full or 1."""
    wide, shape = fit
    node = mask.node
    own = [1] * (len(wide) - len(rewrite.shape_of(node))) + list(rewrite.shape_of(node))
    if own != wide:
        node = rewrite.call(graph, aten.reshape.default, (node, own), before=before)
        node = rewrite.call(graph, aten.expand.default, (node, wide), before=before)
    if list(rewrite.shape_of(node)) != shape:
        node = rewrite.call(graph, aten.reshape.default, (node, shape), before=before)
    if mask.hides:
        node = rewrite.call(graph, aten.logical_not.default, (node,), before=before)
    if mask.fill is None and mask.factor != 1:
        node = rewrite.call(graph, aten.mul.Tensor, (node, mask.factor), before=before)
    return node
