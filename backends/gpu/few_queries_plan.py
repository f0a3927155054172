"""How attention of few queries is cut (few_queries.py): queries of a block, lanes of a key, parts of the keys.

cycles = max(blocks of a unit x their keys / what a unit reads from L2, all keys / bandwidth of memory,
             steps of a block x latency of memory) + those of a second kernel, where keys are parted
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ...hwdb import Hardware
from ..kernels.attention_plan import Problem
from ..kernels.loops import Shape
from .matrix_tile import GAIN, SECOND_CYCLES
from .tile import BYTES_PER_CYCLE, LANES, STEP_CYCLES

MOST_QUERIES = 8
_WARPS = 4  # of a block
_HELD = 64  # values of queries and results that a lane has, at most
_LOADED = 16  # words of k, and of v, that a lane loads in a step
_MOST_PARTS = 32


@dataclass(frozen=True)
class FewPlan:
    """Queries of a block among `chunks` of those that share keys; keys of a part; the lanes of a team."""

    rows: int
    chunks: int
    keys: int
    parts: int
    team: int
    lanes: int  # neighbours that a lane loads at a time
    pieces: int  # loads of a lane for a key
    unrolled: int  # keys of a team in a step
    warp_threads: int
    blocks: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return _WARPS * self.warp_threads

    @property
    def teams(self) -> int:
        """Of a block."""
        return self.threads // self.team

    @property
    def step(self) -> int:
        """Keys that a block takes at a time."""
        return self.teams * self.unrolled

    @property
    def width(self) -> int:
        """Of a key, as the lanes of a team hold it."""
        return self.team * self.lanes * self.pieces

    @property
    def reason(self) -> str:
        """What the report says of it."""
        parts = f", {self.parts} parts of {self.keys} keys" if self.parts > 1 else ""
        return f"{self.rows} queries a block, {self.team} lanes a key, {self.blocks} blocks{parts}"


def reach(p: Problem, causal: bool) -> int:
    """How many keys are seen."""
    return min(p.keys, p.queries) if causal else p.keys


def plan_few_queries(hw: Hardware, p: Problem, dtype: str = "float32", causal: bool = False) -> FewPlan | None:
    """The plan for tensors of `dtype`; None for more than 8 queries, or heads beyond what registers hold.

    Keys are parted where the rule predicts a gain of a quarter with the second launch counted.
    """
    item = 4 if dtype == "float32" else 2
    lanes = next(n for n in (16 // item, 1) if p.depth % n == 0 and p.value_depth % n == 0)
    deepest = max(p.depth, p.value_depth)
    team = min(32, 1 << (ceil(deepest / lanes) - 1).bit_length())
    pieces = ceil(deepest / (team * lanes))
    most = min(MOST_QUERIES, _HELD // (2 * pieces * lanes))
    if p.queries > MOST_QUERIES or most < 1:
        return None
    together = p.heads // p.key_heads * p.queries
    chunks = ceil(together / most)
    words = max(1, lanes * item // 4) * pieces
    warp = int(getattr(hw, "warp_threads", None) or 32)
    fixed = (team, lanes, pieces, max(1, min(4, _LOADED // words)), warp)
    seen = reach(p, causal)
    pairs = p.batch * p.key_heads * chunks
    step = FewPlan(1, 1, 1, 1, *fixed, 1).step

    def plan(parts: int) -> FewPlan:
        keys = ceil(ceil(seen / step) / parts) * step
        parts = ceil(seen / keys)
        return FewPlan(ceil(together / chunks), chunks, keys, parts, *fixed, pairs * parts)

    def cycles(plan: FewPlan) -> tuple[float, int]:
        read = float(item * (p.depth + p.value_depth))
        dram, clock = hw.bandwidth_gbs(0), hw.clock_mhz
        memory = pairs * seen * read * clock / (dram * 1e3) if dram and clock else 0.0
        busy = ceil(plan.blocks / hw.cores) * plan.keys * read / BYTES_PER_CYCLE
        second = 0.0
        if plan.parts > 1:
            second = SECOND_CYCLES + 8.0 * plan.blocks * plan.rows * p.value_depth / (BYTES_PER_CYCLE * hw.cores)
        return max(busy, memory, ceil(plan.keys / step) * STEP_CYCLES) + second, plan.parts

    whole = plan(1)
    best = min((plan(parts) for parts in range(1, _MOST_PARTS + 1)), key=cycles)
    return best if cycles(best)[0] < GAIN * cycles(whole)[0] else whole


def parts_shape(p: Problem, plan: FewPlan) -> Shape:
    """Of what the first kernel gives the second: results not divided yet, then maximum and sum."""
    return p.batch * p.heads * p.queries, plan.parts, p.value_depth + (LANES if p.value_depth % LANES == 0 else 2)
