"""Identities of casts.

    to(to(x, B), A) -> x          x of dtype A, and B holds every value of A: f16 -> f32 -> f16
    to(to(x, B), C) -> to(x, C)   likewise: what is rounded to C is the same number

Not here: f32 -> f16 -> f32 (it rounds), f16 -> f32 -> i32 and i32 -> f64 -> i8 (out of range, the machine decides).
"""

from __future__ import annotations

import torch
from torch import fx

from .. import rewrite
from ..rewrite import calls
from .identity import Identity, Site, dtype_of

aten = torch.ops.aten

_I = (torch.int16, torch.int32, torch.int64)
_SMALL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# B holds every value of A. An integer of n bits needs n - 1 bits of precision and a sign, or n where it has none.
HOLDS: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    torch.bool: (torch.uint8, torch.int8, *_I, *_SMALL),
    torch.uint8: (*_I, *_SMALL),
    torch.int8: (*_I, *_SMALL),
    torch.int16: (torch.int32, torch.int64, torch.float32, torch.float64),
    torch.int32: (torch.int64, torch.float64),
    torch.float16: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.float32: (torch.float64,),
}


def _cast_of_cast(site: Site) -> fx.Node | None:
    (inner, *_) = site.args
    if not _only_casts(site.node) or not _only_casts(inner):
        return None
    (x, *_) = inner.args
    first, second, last = dtype_of(x), dtype_of(inner), site.dtype
    if first is None or second not in HOLDS.get(first, ()):
        return None
    if last == first:
        return x  # type: ignore[no-any-return]
    whole = first not in rewrite.FLOATS and second not in rewrite.FLOATS
    if last in rewrite.FLOATS or last == torch.bool or whole:
        return site.call(aten._to_copy.default, x, dtype=last)
    return None


def _only_casts(node: object) -> bool:
    """Whether a copy changes the dtype and nothing else."""
    if not calls(node, aten._to_copy.default) or not isinstance(node.args[0], fx.Node):
        return False
    a = rewrite.arguments(node)
    old, new = rewrite.value_of(node.args[0]), rewrite.value_of(node)
    plain = a["layout"] in (None, torch.strided) and a["memory_format"] in (None, torch.preserve_format)
    return plain and old is not None and new is not None and old.device == new.device


IDENTITIES = (
    Identity("to(to(x, B), A) -> x, to(to(x, B), C) -> to(x, C)", (aten._to_copy.default,), _cast_of_cast,
             "B holds every value of A"),
)  # fmt: skip
