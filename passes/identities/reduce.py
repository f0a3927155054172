"""Identities of reductions.

    amax, amin, all, any over dims of one element -> x, reshaped
    amax, amin, all, any of a repeated element     -> of the element once

Not here: sum and mean over one element (sums start at 0, and 0 + -0.0 is 0.0), sum(expand(x)) = n * x (rounding).
"""

from __future__ import annotations

import math

import torch
from torch import fx

from .. import rewrite
from ..rewrite import calls
from .identity import Identity, Site

aten = torch.ops.aten

_IDEMPOTENT = (aten.amax.default, aten.amin.default, aten.any.dim, aten.any.dims, aten.all.dim, aten.all.dims)
_SUMS = (aten.sum.dim_IntList, aten.prod.dim_int)


def _dims(site: Site) -> list[int]:
    """The dims that are reduced; all where none are named."""
    rank = len(rewrite.shape_of(site.args[0]))
    if not rank:
        return []  # a single number, whose dims may be called 0 or -1
    dims = site.arguments["dim"]
    named = [dims] if isinstance(dims, int) else dims
    return [d % rank for d in named] if named else list(range(rank))


def _over_one(site: Site) -> fx.Node | None:
    (x, *_) = site.args
    # bool(x) is what any and all return, and integers are summed in int64: the dtype must stay.
    if not site.same_dtype(x) or (site.node.target is aten.sum.dim_IntList and site.is_float):
        return None
    if any(rewrite.shape_of(x)[d] != 1 for d in _dims(site)):
        return None
    return site.call(aten.reshape.default, x, list(site.shape))


def _of_repeated(site: Site) -> fx.Node | None:
    (x, *_) = site.args
    if not calls(x, aten.expand.default):
        return None
    shape, dims = rewrite.shape_of(x), set(_dims(site))
    inner = (1,) * (len(shape) - len(rewrite.shape_of(x.args[0]))) + rewrite.shape_of(x.args[0])  # type: ignore[arg-type]
    repeated = [d for d in dims if inner[d] != shape[d]]
    if not repeated or math.prod(shape) == 0:
        return None
    once = [1 if d in repeated else n for d, n in enumerate(shape)]
    source = x.args[0] if once == list(rewrite.shape_of(x.args[0])) else None  # type: ignore[arg-type]
    if source is None:
        source = site.call(aten.expand.default, x.args[0], once)
    return site.call(site.node.target, source, *site.args[1:], **site.node.kwargs)  # type: ignore[arg-type]


IDENTITIES = (
    Identity("amax, any, prod, sum of integers over one element -> x", (*_IDEMPOTENT, *_SUMS), _over_one,
             "nothing is added"),
    Identity("amax(expand(x)) -> amax(x), likewise amin, any, all", _IDEMPOTENT, _of_repeated,
             "max(x, x) = x, also for NaN"),
)  # fmt: skip
