"""Identities of operators that move elements or repeat them: no number changes, only what is copied and read.

Reshapes and permutes have a pass of their own (fuse_reshape_transpose.py).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .. import rewrite
from ..rewrite import calls
from .identity import Identity, Site, dtype_of

aten = torch.ops.aten

_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor)
# Elementwise, of operands that broadcast and have one dtype.
_BROADCASTS = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self),
    *(aten.maximum.default, aten.minimum.default, aten.bitwise_and.Tensor, aten.bitwise_or.Tensor),
    *(aten.logical_and.default, aten.logical_or.default, aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor),
    *(aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor),
)
_ATTENTION = aten.scaled_dot_product_attention.default


def cut(node: object) -> tuple[fx.Node, int, int, int, int] | None:
    """A slice as operand, dim, first element, step and number of elements."""
    if not calls(node, aten.slice.Tensor) or rewrite.value_of(node) is None:
        return None
    a, shape = rewrite.arguments(node), rewrite.shape_of(node.args[0])  # type: ignore[arg-type]
    dim = a["dim"] % len(shape)
    if not all(isinstance(v, int) or v is None for v in (a["start"], a["end"], a["step"])):
        return None
    first, _, step = slice(a["start"], a["end"], a["step"]).indices(shape[dim])
    return a["self"], dim, first, step, rewrite.shape_of(node)[dim]


def _slice_of(site: Site, x: fx.Node, dim: int, first: int, step: int, count: int) -> fx.Node:
    whole = rewrite.shape_of(x)[dim]
    if (first, step, count) == (0, 1, whole):
        return x
    end = min(whole, first + (count - 1) * step + 1)
    return site.call(aten.slice.Tensor, x, dim, first, end, *([step] if step > 1 else []))


def _slice_of_slice(site: Site) -> fx.Node | None:
    outer = cut(site.node)
    inner = cut(outer[0]) if outer else None
    if outer is None or inner is None or outer[1] != inner[1] or outer[4] == 0:
        return None
    x, dim, first, step, _ = inner
    return _slice_of(site, x, dim, first + outer[2] * step, step * outer[3], outer[4])


def _slice_of_cat(site: Site) -> fx.Node | None:
    found = cut(site.node)
    if found is None or found[4] == 0:
        return None
    _, dim, first, step, count = found
    place = _part_of(found[0], dim, first, first + (count - 1) * step)
    return None if place is None else _slice_of(site, place[0], dim, first - place[1], step, count)


def _part_of(cat: object, dim: int, first: int, last: int) -> tuple[fx.Node, int] | None:
    """The operand of a concatenation that holds all of first..last, and where it starts."""
    parts = _parts(cat)
    if parts is None or parts[1] != dim:
        return None
    start = 0
    for part in parts[0]:
        end = start + rewrite.shape_of(part)[dim]
        if start <= first and last < end:
            return (part, start) if dtype_of(part) == dtype_of(cat) else None
        start = end
    return None


def _parts(cat: object) -> tuple[list[fx.Node], int] | None:
    """The operands of a concatenation, all of its rank, and the dim; None for torch's old 1-d empty operands."""
    if not calls(cat, aten.cat.default) or rewrite.value_of(cat) is None:
        return None
    a, rank = rewrite.arguments(cat), len(rewrite.shape_of(cat))
    parts: Any = a["tensors"]
    if any(rewrite.value_of(p) is None or len(rewrite.shape_of(p)) != rank for p in parts):
        return None
    return list(parts), a["dim"] % rank


def _select_of_cat(site: Site) -> fx.Node | None:
    x, dim, index = (site.arguments[k] for k in ("self", "dim", "index"))
    rank, length = len(rewrite.shape_of(x)), rewrite.shape_of(x)[dim]
    place = _part_of(x, dim % rank, index % length, index % length)
    if place is None:
        return None
    part, start = place
    if rewrite.shape_of(part)[dim] == 1:
        return site.call(aten.reshape.default, part, list(site.shape))
    return site.call(aten.select.int, part, dim % rank, index % length - start)


def _select_of_slice(site: Site) -> fx.Node | None:
    x, dim, index = (site.arguments[k] for k in ("self", "dim", "index"))
    inner = cut(x)
    if inner is None or inner[1] != dim % len(rewrite.shape_of(x)):
        return None
    return site.call(aten.select.int, inner[0], inner[1], inner[2] + (index % inner[4]) * inner[3])


def _cat(site: Site) -> fx.Node | None:
    """cat of one, of empty ones, of concatenations, and of all parts of a split or of adjacent slices."""
    found = _parts(site.node)
    if found is None or not site.same_dtype(*found[0]):
        return None
    parts, dim = found
    flat: list[fx.Node] = []
    for part in parts:
        inner = _parts(part)
        nested = inner is not None and inner[1] == dim and len(part.users) == 1 and site.same_dtype(*inner[0])
        flat += inner[0] if inner is not None and nested else [part]
    flat = [p for p in flat if rewrite.shape_of(p)[dim]] or flat[:1]
    joined: list[fx.Node] = []
    for part in flat:
        merged = _adjacent(site, joined[-1], part, dim) if joined else None
        joined[-1:] = [merged] if merged is not None else [*joined[-1:], part]
    if joined == parts and len(parts) > 1:
        return None
    return joined[0] if len(joined) == 1 else site.call(aten.cat.default, joined, dim)


def _adjacent(site: Site, a: fx.Node, b: fx.Node, dim: int) -> fx.Node | None:
    """One slice for two where the second begins at the end of the first."""
    x, y = _range(a, dim), _range(b, dim)
    if x is None or y is None or x[0] is not y[0] or x[2] != y[1]:
        return None
    return _slice_of(site, x[0], dim, x[1], 1, y[2] - x[1])


def _range(node: fx.Node, dim: int) -> tuple[fx.Node, int, int] | None:
    """The elements of a tensor, first to end, that a slice or a part of a split along `dim` is."""
    found = cut(node)
    if found is not None:
        x, along, first, step, count = found
        return (x, first, first + count) if along == dim and step == 1 else None
    if node.target is not operator.getitem or not calls(node.args[0], *_SPLITS):
        return None
    split, index = node.args
    assert isinstance(split, fx.Node)
    assert isinstance(index, int)
    arguments: tuple[Any, ...] = (*split.args, 0)
    x, sizes, along = arguments[:3]
    if along % len(rewrite.shape_of(x)) != dim:
        return None
    start = index * sizes if isinstance(sizes, int) else sum(sizes[:index])
    return x, start, start + rewrite.shape_of(node)[dim]


def _expand_of_expand(site: Site) -> fx.Node | None:
    (x, *_) = site.args
    return site.call(aten.expand.default, x.args[0], list(site.shape)) if calls(x, aten.expand.default) else None


def _broadcast(site: Site) -> fx.Node | None:
    """f(expand(x), y) -> f(x, y) where y alone gives the shape."""
    tensors = [a for a in site.args if isinstance(a, fx.Node)]
    if len({dtype_of(t) for t in tensors if t is not site.args[0] or site.node.target is not aten.where.self}) != 1:
        return None  # the dtype of a result depends on who has dims
    for place, x in enumerate(site.args):
        if not calls(x, aten.expand.default):
            continue
        args = [*site.args[:place], x.args[0], *site.args[place + 1 :]]
        shapes = [rewrite.shape_of(a) for a in args if isinstance(a, fx.Node)]
        if len(shapes) > 1 and tuple(torch.broadcast_shapes(*shapes)) == site.shape:  # type: ignore[no-untyped-call]
            return site.call(site.node.target, *args, **site.node.kwargs)  # type: ignore[arg-type]
    return None


def _attention_mask(site: Site) -> fx.Node | None:
    """A mask is broadcast by the kernel; one that allows everything, or adds 0, is none."""
    a = site.arguments
    mask = a["attn_mask"]
    everything = site.uniform(mask)
    if mask is not None and (everything is True or (everything == 0 and not isinstance(everything, bool))):
        a["attn_mask"] = None
    elif calls(mask, aten.expand.default) and len(rewrite.shape_of(mask.args[0])) >= 2:  # type: ignore[arg-type]
        a["attn_mask"] = mask.args[0]
    else:
        return None
    keywords = {k: a.pop(k) for k in ("scale", "enable_gqa")}
    return site.call(_ATTENTION, *a.values(), **keywords)


def _flip_of_flip(site: Site) -> fx.Node | None:
    x, dims = site.args
    rank = len(site.shape)
    if not rank:
        return x  # type: ignore[no-any-return]
    turned = {d % rank for d in dims}
    inner = x
    if calls(x, aten.flip.default):
        turned ^= {d % rank for d in rewrite.arguments(x)["dims"]}
        inner = x.args[0]
    turned = {d for d in turned if site.shape[d] > 1}
    if inner is x and turned == {d % rank for d in dims}:
        return None
    return site.call(aten.flip.default, inner, sorted(turned)) if turned else inner


def _arange_index(site: Site) -> fx.Node | None:
    """index_select, and index by one vector, of numbers in even steps -> slice."""
    if site.node.target is aten.index_select.default:
        x, dim, index = site.args
    else:
        x, indices = site.args
        used = [i for i, node in enumerate(indices) if node is not None]
        if len(used) != 1:
            return None
        (dim,), index = used, indices[used[0]]
    values = rewrite.constant(site.graph, index)
    if values is None or values.dtype not in (torch.int64, torch.int32) or values.dim() != 1 or not values.numel():
        return None
    first, count = int(values[0]), values.numel()
    step = int(values[1]) - first if count > 1 else 1
    dim %= len(rewrite.shape_of(x))
    if first < 0 or step < 1 or first + (count - 1) * step >= rewrite.shape_of(x)[dim]:
        return None
    wanted = torch.arange(first, first + count * step, step, dtype=values.dtype)
    return _slice_of(site, x, dim, first, step, count) if torch.equal(values, wanted) else None


IDENTITIES = (
    Identity("slice(slice(x)) -> slice(x)", (aten.slice.Tensor,), _slice_of_slice, "steps multiply"),
    Identity("slice(cat(a, b)) -> slice(a)", (aten.slice.Tensor,), _slice_of_cat, "all of it lies in one operand"),
    Identity("select(cat(a, b)) -> select(a)", (aten.select.int,), _select_of_cat, "likewise"),
    Identity("select(slice(x)) -> select(x)", (aten.select.int,), _select_of_slice, "one index"),
    Identity("cat(x), cat(x, empty), cat(cat(a, b), c), cat of all parts of x", (aten.cat.default,), _cat,
             "the same elements in the same order"),
    Identity("expand(expand(x)) -> expand(x)", (aten.expand.default,), _expand_of_expand, "the last shape counts"),
    Identity("f(expand(x), y) -> f(x, y)", _BROADCASTS, _broadcast, "f broadcasts, and y has the shape"),
    Identity("attention(mask=expand(m)) -> attention(mask=m); all True or all 0 -> no mask", (_ATTENTION,),
             _attention_mask, "masks broadcast; exp cannot see the sign of zero"),
    Identity("flip(flip(x)), flip along 1 element -> x", (aten.flip.default,), _flip_of_flip, "dims turned twice"),
    Identity("x[arange] -> slice(x)", (aten.index_select.default, aten.index.Tensor), _arange_index, "even steps"),
)  # fmt: skip
