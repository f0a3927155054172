"""How one attention is cut: which rows share a head's keys, tiles, blocks that stay in L1, tasks, and predicted cycles.

rows       the queries of one head; those of all heads that share their keys where each has but few
way        "panels": k and v are packed once a head, then register tiles as in `matmul`
           "in place": rows so few that packing would cost more than multiplying. A score is a dot product along
           D, a result a sum of rows of v
block      rows whose scores stay in L1 beside one panel of v; where L1 has no room for that panel, SHARING tiles, which
           read a panel that comes from L2; of heads too large for L2, rows enough that several tiles read every panel
           fetched from L3
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Literal

from ...hwdb import Hardware
from ...hwdb.cost import launch_seconds
from ..tiling import Tiling, choose_tiling, core_l2_bytes, vectors_limit
from .gemv import DOT_STEPS, side_by_side
from .loops import Shape
from .rows import even_tasks

Layout = Literal["BHSD", "BSHD"]
CHUNK = 64  # keys whose values are added to all rows, in place, while they are in L1
SHARING = 4  # tiles: one of 256 to 1024 keys alone takes 1.27 times as long, more than 4 gain nothing (Zen 4, AVX-512)

# Cycles of one vector: estimates after runs on one core of Zen 4, not fitted.
PACK_CYCLES = 4.5  # of k through a transpose in registers, and of v
SOFTMAX_CYCLES = 9.0  # maximum, exponential and sum
MASK_CYCLES = 2.0
FOLD_CYCLES = 2.0  # of a dot product: shuffles that add up its lanes beside those of its neighbours
ROW_CYCLES = 40.0  # of a row of scores, beside its vectors
BLOCK_CYCLES = 100.0
# With products of bytes, from 128 to 2048 keys of depth 64 on one core of Zen 4 (benchmarks/int8_attention.py).
BYTES_RATE = 3.4  # products in the time of one of floats: sums are converted, scaled and stored
BYTES_PACK_CYCLES = 7.5  # rows and columns are looked through, rounded and laid out


@dataclass(frozen=True)
class Placement:
    """Where an operand's element [b, h, s, d] lies in its buffer, in floats: offset + b, h, s times strides, + d."""

    offset: int
    batch: int
    head: int
    position: int


def dense(layout: Layout, heads: int, positions: int, depth: int) -> Placement:
    """The placement of a buffer that holds just that operand."""
    if layout == "BHSD":
        return Placement(0, heads * positions * depth, positions * depth, depth)
    return Placement(0, heads * positions * depth, depth, heads * depth)


@dataclass(frozen=True)
class Problem:
    """The extents of one attention: queries S_q x D against keys S_k x D and values S_k x D_v."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    depth: int
    value_depth: int


def problem(q: Shape, k: Shape, v: Shape) -> Problem:
    """The extents of operands of shapes [..., H, S, D]; a missing head or batch dimension counts one."""
    q, k, v = ((1,) * (3 - len(shape)) + shape for shape in (q, k, v))
    return Problem(prod(q[:-3]), q[-3], k[-3], q[-2], k[-2], q[-1], v[-1])


@dataclass(frozen=True)
class Plan:
    """The tiles of the two products (the same row tiles), the row blocks and the split over cores."""

    scores: Tiling
    values: Tiling
    group: int  # heads whose rows are computed together
    in_place: bool
    blocks: int
    parts: int  # units of work of one group of rows
    tasks: int
    cycles: float  # predicted for the busiest core
    reason: str


def plan_attention(
    hw: Hardware,
    p: Problem,
    causal: bool,
    masked: bool = False,
    value_stride: int | None = None,
    in_bytes: bool = False,
) -> Plan:
    """Choose rows, way, tiles, blocks and split from the hardware's facts.

    `value_stride`: floats from one row of v to the next, by default the row's own. `in_bytes`: the products are of
    bytes (int8_attention.py), whose panels are always packed.
    """
    group = p.heads // p.key_heads if p.queries < hw.vector_registers // 2 else 1
    rows = p.queries * group
    pairs = p.batch * p.heads // group
    scores, values = min(
        (_tiles(hw, p, rows, pairs, height) for height in range(1, min(rows, 16) + 1)),
        key=lambda pair: pair[0].cycles * pair[0].tasks + pair[1].cycles * pair[1].tasks,
    )
    blocks = _blocks(hw, p, scores, values)
    # The part of the scores that is computed, whole blocks on the diagonal.
    share = (1 + 1 / blocks) / 2 if causal and group == 1 and p.queries == p.keys else 1.0
    vectors = -(-p.keys // scores.lanes)
    products = share * (scores.cycles * scores.tasks + values.cycles * values.tasks) / pairs
    packing = (BYTES_PACK_CYCLES if in_bytes else PACK_CYCLES) * vectors * (p.depth + p.value_depth)
    products /= BYTES_RATE if in_bytes else 1.0
    dots = rows * _dots(hw, p, value_stride or p.value_depth)
    in_place = not in_bytes and _can_stay(hw, p) and dots < packing + products
    if in_place:
        products, packing, blocks = dots, 0.0, 1
        columns = side_by_side(hw)
        scores = replace(scores, columns=columns, panels=-(-p.keys // columns))
    softmax = rows * (ROW_CYCLES + share * vectors * (SOFTMAX_CYCLES + masked * MASK_CYCLES))
    whole = pairs * (packing + products + softmax + blocks * BLOCK_CYCLES)
    microseconds = whole / hw.cycles_per_us
    tasks, parts = 1, 1
    if hw.cores > 1 and microseconds > 2 * hw.launch_us:
        while parts < blocks and -(-pairs * parts // hw.cores) * hw.cores > 1.05 * pairs * parts:
            parts += 1
        tasks = _even_divisor(pairs * parts, even_tasks(microseconds, pairs * parts, hw), hw.cores)
    units = pairs * parts
    busiest = max(1 / hw.cores, -(-units // tasks) / units) if tasks > 1 else 1.0
    reason = (
        f"{pairs} heads x {blocks} blocks of {-(-rows // blocks)} queries, "
        + ("in place" if in_place else f"tiles {scores.rows}x{scores.columns} and {values.rows}x{values.columns}")
        + f", {tasks} {'task' if tasks == 1 else 'tasks'}"
    )
    return Plan(
        replace(scores, row_chunks=blocks),
        replace(values, row_chunks=blocks),
        group,
        in_place,
        blocks,
        parts,
        tasks,
        whole * busiest,
        reason,
    )


def predicted_seconds(hw: Hardware, plan: Plan) -> float | None:
    """Seconds the attention takes on `hw`, or None where the clock is unknown."""
    if hw.clock_mhz is None:
        return None
    return plan.cycles / (hw.clock_mhz * 1e6) + (launch_seconds(hw) if plan.tasks > 1 else 0.0)


def value_columns(hw: Hardware, depth: int) -> int:
    """Columns of one row of results that registers hold, an even part of all; 0 if there is no such part."""
    lanes = hw.lanes("float32")
    parts = -(-depth // (lanes * vectors_limit(hw, 1)))
    return depth // parts if depth % (parts * lanes) == 0 else 0


def _can_stay(hw: Hardware, p: Problem) -> bool:
    """Whether the extents are whole vectors, so that k and v can be read where they are."""
    return p.depth % hw.lanes("float32") == 0 and p.keys >= side_by_side(hw) and value_columns(hw, p.value_depth) > 0


def _dots(hw: Hardware, p: Problem, value_stride: int) -> float:
    """Cycles of one row in place: whole panels of dot products, each added up over its lanes, and rows of v."""
    lanes, columns = hw.lanes("float32"), side_by_side(hw)
    padded = -(-p.keys // columns) * columns
    scores, values = padded * p.depth / lanes, p.keys * p.value_depth / lanes
    if not _chunk_stays(hw, p, 4 * value_stride):
        values *= 2  # from L2, for every row again
    return (DOT_STEPS * (scores + values) + FOLD_CYCLES * padded) / hw.fma_per_cycle


def _chunk_stays(hw: Hardware, p: Problem, stride_bytes: int) -> bool:
    """Whether a chunk of v takes no more than half of the ways of each L1 set that it falls into."""
    l1 = hw.cache(1)
    if l1 is None or l1.ways is None:
        return True
    way_bytes = l1.size_bytes // l1.ways
    lines = -(-4 * p.value_depth // l1.line_bytes)
    apart = way_bytes // gcd(stride_bytes, way_bytes)  # rows before one falls upon the sets of another
    sets = min(way_bytes // l1.line_bytes, apart * lines)
    return min(CHUNK, p.keys) * lines <= sets * l1.ways / 2


def _tiles(hw: Hardware, p: Problem, rows: int, pairs: int, height: int) -> tuple[Tiling, Tiling]:
    """The tilings of q . k^T and of scores . v on row tiles of `height`."""
    return (
        choose_tiling(hw, rows, p.keys, p.depth, repeats=pairs, fixed_rows=height),
        choose_tiling(
            hw, rows, p.value_depth, p.keys, row_stride_bytes=4 * p.keys + 64, repeats=pairs, fixed_rows=height
        ),
    )


def _even_divisor(units: int, most: int, cores: int) -> int:
    """The largest number of equal tasks up to `most` that is a multiple of the cores, else `most`."""
    return next((n for n in range(most, cores - 1, -1) if units % n == 0 and n % cores == 0), most)


def _blocks(hw: Hardware, p: Problem, scores: Tiling, values: Tiling) -> int:
    l1, second = hw.cache(1), core_l2_bytes(hw)
    first = l1.size_bytes // l1.shared_by_cores if l1 else 32 * 1024
    rows = min(64, second // 4 // (4 * p.keys))
    if 4 * p.keys * (p.depth + p.value_depth) <= second // 2:
        fitting = (first - 4 * p.keys * values.columns) // (4 * (p.keys + p.depth))
        rows = fitting if fitting > 0 else min(rows, SHARING * scores.rows)
    return -(-scores.row_tiles // max(1, rows // scores.rows))
