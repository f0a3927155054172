"""Which scores an attention lets through: within the keys, causal, by a mask of bool or of what is added."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from ..kernels.attention_plan import Problem
from ..kernels.loops import Shape, constant


@dataclass(frozen=True)
class Mask:
    """Of one head, number `number` among those of all batches.

    `extents` are those of the mask [batch, heads, queries, keys], each full or 1, and `values` its flat buffer of
    `dtype` ("bool": True is let through; "float32": added), None without a mask. `fill` is the score of what a mask of
    bool stops, -inf where it is None. `past_the_end`: keys beyond the last one are asked for.
    """

    p: Problem
    number: Any
    causal: bool
    past_the_end: bool
    fill: float | None
    extents: Shape = ()
    dtype: str = ""
    values: Any = None

    def score(self, score: Any, query: Any, key: Any) -> Any:
        """What becomes of a score, scaled already."""
        nothing = tirx.const(-math.inf, "float32")
        inside = [key < self.p.keys] if self.past_the_end else []
        if self.values is not None:
            place = self._place(query, key)
            there = tirx.all(query < self.p.queries, key < self.p.keys)
            if self.dtype == "bool":
                stopped = nothing if self.fill is None else constant(self.fill)
                lets = tirx.if_then_else(there, self.values[place], tirx.const(False, "bool"))
                score = tirx.Select(lets, score, stopped)
            else:
                score = score + tirx.if_then_else(there, self.values[place], constant(0.0))
        if self.causal:
            inside.append(key <= query)
        return tirx.Select(tirx.all(*inside), score, nothing) if inside else score

    def _place(self, query: Any, key: Any) -> Any:
        batch, head = tirx.floordiv(self.number, self.p.heads), tirx.floormod(self.number, self.p.heads)
        place: Any = 0
        for extent, index in zip(self.extents, (batch, head, query, key), strict=True):
            place = place * extent + (index if extent > 1 else 0)
        return place
