"""Attention whose two products are of bytes: q and k rounded row by row, scores' powers in [0, 255], v by its columns.

    q8 = round(q * (127 / max |q|))       of a row, and so k8; of a column (channel of a head) v8: dialect_rows.py
    s = (float(q8 . k8) * unit_k) * (unit_q * scale)         exact in int32; fma(..., mask) where a mask is added
    p = round(255 * 2^(log2(e) * (s - max s)))               [0, 255]; 2^f by a polynomial of three multiply-adds
    out = (float(p . v8) * (1 / sum p)) * unit_v             exact in int32, and so is the sum

Masks, causal attention, groups of heads and `fill` are those of `dialect.attention`. A row that the mask leaves nothing
of is zeros (NaN with `fill`). NaN in a row of q or in its mask makes that row of the result NaN, in a row of k those of
all queries that see the key, in a column of v that column; infinities likewise, as their rows have no unit.

Every operation is rounded to float32 as the kernel rounds it, multiply-adds once. The column's unit of causal attention
is that of all keys, those behind a query too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from . import dialect
from .dialect_int8 import fma
from .dialect_rows import steps_of

MOST_KEYS = 1 << 16  # sum p < 2^24 and sum p * v8 < 2^31
LOG2_E = 1.4426950216293335  # in float32
LEAST_SCORE = -6.25  # below the largest: 255 e^-6.25 is less than half a step
# 255 * 2^f = p(f), |f| <= 0.5; a fiftieth of a step (benchmarks/fit_polynomials.py)
POWERS = (254.98165893554688, 176.78155517578125, 61.8658332824707, 14.068754196166992)
_EXACT = 1 << 24  # whole numbers that float32 holds


def _attention_int8(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, fill: float | None = None
) -> Tensor:
    group = q.shape[-3] // k.shape[-3]
    rows, row_units = steps_of(q.float(), (-1,))
    row_units = row_units * torch.tensor(scale, dtype=torch.float32)
    keys = [x.repeat_interleave(group, -3) for x in (*steps_of(k.float(), (-1,)), *steps_of(v.float(), (-2,)))]
    shape = (*q.shape[:-1], k.shape[-2])
    masks = None if mask is None else (mask if mask.dtype == torch.bool else mask.float()).expand(shape)
    result = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float32)
    for head in product(*map(range, shape[:-2])):  # one by one: scores of all are large
        seen = None if masks is None else masks[head]
        scores = _scores(rows[head], row_units[head], keys[0][head], keys[1][head], seen, is_causal, fill)
        result[head] = _weighted(scores, keys[2][head], keys[3][head], 0.0 if fill is None else math.nan)
    return result


def _scores(
    q: Tensor, q_unit: Tensor, k: Tensor, k_unit: Tensor, mask: Tensor | None, causal: bool, fill: float | None
) -> Tensor:
    scores = _exact(q, k.mT, 127 * 127) * k_unit.mT
    if mask is not None and mask.dtype != torch.bool:
        scores = fma(scores, q_unit, mask)
    else:
        scores = scores * q_unit
        if mask is not None:
            scores = torch.where(mask, scores, -math.inf if fill is None else fill)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape, dtype=torch.bool).triu(1), -math.inf)
    return scores


def _weighted(scores: Tensor, v: Tensor, v_unit: Tensor, empty: float) -> Tensor:
    largest = torch.where(scores.isnan(), -math.inf, scores).amax(-1, keepdim=True)
    below = scores - torch.where(largest == -math.inf, 0.0, largest)
    weights = powers(torch.where(below < LEAST_SCORE, LEAST_SCORE, below))
    total = weights.sum(-1, keepdim=True)
    inverse = torch.where(total == 0, empty, 1.0 / total)
    return _exact(weights.nan_to_num(0.0), v, 255 * 127) * inverse * v_unit


def powers(x: Tensor) -> Tensor:
    """round(255 * e^x) for LEAST_SCORE <= x <= 0, as the kernel computes it; NaN stays."""
    exponents = x.double() * LOG2_E
    whole = exponents.round()
    f = (exponents - whole).float()
    y = torch.full_like(f, POWERS[-1])
    for coefficient in reversed(POWERS[:-1]):
        y = fma(y, f, torch.tensor(coefficient))
    powers_of_2 = ((whole.nan_to_num(0.0).int() + 127) << 23).view(torch.float32)
    return (y * powers_of_2).round()


def _exact(a: Tensor, b: Tensor, most: int) -> Tensor:
    """The product of whole numbers, each term at most `most`, rounded to float32 once."""
    if a.shape[-1] * most < _EXACT:
        return a @ b
    return (a.double() @ b.double()).float()


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, fill: float | None = None
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=torch.float32)


def _strided_attention_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    extents: Sequence[int],
    places: Sequence[int],
    out_shape: Sequence[int],
    fill: float | None = None,
    rows: Tensor | None = None,
    out_rows: Tensor | None = None,
) -> Tensor:
    heads = dialect.heads_of((q, k, v), extents, places, rows)
    return dialect.put_heads(_attention_int8(*heads, mask, is_causal, scale, fill), places, out_shape, out_rows)


def _strided_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    extents: Sequence[int],
    places: Sequence[int],
    out_shape: Sequence[int],
    fill: float | None = None,
    rows: Tensor | None = None,
    out_rows: Tensor | None = None,
) -> Tensor:
    return q.new_empty(list(out_shape), dtype=torch.float32)


attention_int8 = dialect.define("attention_int8", dialect.ATTENTION, _attention_int8, _attention_fake)
strided_attention_int8 = dialect.define(
    "strided_attention_int8", dialect.STRIDED_ATTENTION, _strided_attention_int8, _strided_attention_fake
)

# What each attention in float32 becomes.
IN_BYTES = {dialect.attention: attention_int8, dialect.strided_attention: strided_attention_int8}
ROUNDING = frozenset(IN_BYTES.values())
