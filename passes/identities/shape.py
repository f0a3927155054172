"""Values that depend on the shape of a tensor only: no tensor is read, so that constants can be folded.

full_like(x, n), zeros_like(x), ones_like(x), new_full(x, shape, n), ... -> full(shape, n)
"""

from __future__ import annotations

import torch
from torch import fx

from .. import rewrite
from .identity import Identity, Site

aten = torch.ops.aten

_NUMBER = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
}
_GIVEN = {aten.full_like.default: "fill_value", aten.new_full.default: "fill_value"}


def _filled(site: Site) -> fx.Node | None:
    value = rewrite.value_of(site.node)
    a = site.arguments
    if value is None or a["layout"] not in (None, torch.strided) or not value.is_contiguous():
        return None
    number = _NUMBER.get(site.node.target, a.get(_GIVEN.get(site.node.target, "")))  # type: ignore[call-overload]
    if not isinstance(number, (bool, int, float)):
        return None
    return site.call(aten.full.default, list(value.shape), number, dtype=value.dtype, device=value.device)


IDENTITIES = (
    Identity("zeros_like(x), ones_like(x), full_like(x, n), ... -> full(shape, n)", (*_NUMBER, *_GIVEN), _filled,
             "only the shape of x is read"),
)  # fmt: skip
