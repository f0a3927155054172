"""The register tile, the panel split over cores and the cache blocks of a rows x columns x depth product.

The model counts cycles of the innermost step (one k of one tile), after Goto and van de Geijn (2008) and the
analytical model of BLIS (Low et al., 2016): multiply-adds issue at `fma_per_cycle`; each accumulator is touched
once a step, so a step is never shorter than the multiply-add latency; V vector loads and MR broadcasts share the
load ports; where lanes may be factors, each row loads a vector for as many steps as it has lanes. To that come
padded columns, the shorter row tiles, the share of the busiest core, and rows whose addresses fall on the same L1
sets. A handful of tiles fits the registers, so all are costed and the best kept.

A product with constant weights is shared out by panels or by rows. By rows, a core reads what it wrote a layer before
and writes whole lines, in chunks whose rows stay in L2 while all panels pass; by panels, each weight is read by one
core only. `_moved_cycles` weighs the two.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import gcd

from ..hwdb import Hardware
from ..hwdb.cost import launch_seconds, overlapped
from .choices import SHORTLIST
from .kernels.epilogue import is_heavy

ALIAS_BYTES = 4096  # an L1 way of 64 sets of 64-byte lines: rows that far apart share a set
LARGE_TILE = 16  # accumulators
TILE_CYCLES = 24.0  # entering and leaving a tile, beside its stores
LONGEST_SUM = 384  # additions in one chain: the error grows with their number
L3_BYTES_PER_CYCLE = 16.0  # of one core, as in Hardware.bandwidth_gbs
HEAVY_CYCLES = 24.0  # of a vector through an activation that is a polynomial


@dataclass(frozen=True)
class Tiling:
    """How a [rows x depth] by [depth x columns] product is cut; `rows` and `columns` are the register tile's."""

    rows: int
    columns: int
    lanes: int
    total_rows: int
    total_columns: int
    depth: int
    panels: int  # column panels, the last one padded
    row_tiles: int  # of two sizes: total_rows // row_tiles, and one more
    row_chunks: int  # groups of row tiles; panels * row_chunks units of work
    depth_blocks: int  # parts of k, between which partial sums rest in scratch
    sum_blocks: int  # parts of such a part, each summed from zero
    tasks: int  # 1 = not worth a parallel region
    cycles: float  # predicted for the busiest core
    efficiency: float  # predicted share of the peak of the cores in use
    reason: str
    by_element: bool = False  # the left operand is read by vectors of k, whose lanes are factors


def vectors_limit(hw: Hardware, rows: int) -> int:
    """Most accumulator columns (in vectors) a tile of `rows` rows may have: rows * V + V + 1 <= registers.

    A single row multiplies straight from memory or reuses one register for each vector: V + 2 registers. By element,
    each row has a register of its own for its values of k.
    """
    spare = hw.vector_registers - 1 - (rows if hw.multiplies_by_element and rows > 1 else 0)
    return max(1, (spare - 1) if rows == 1 else spare // (rows + 1))


def step_cycles(hw: Hardware, rows: int, vectors: int, streamed: bool = False) -> float:
    """Cycles of one k of a rows x vectors tile; `streamed` when the panel is too large for L1 and comes from L2."""
    rate = hw.fma_per_cycle
    arithmetic = rows * vectors / rate
    read = rows / hw.lanes("float32") if hw.multiplies_by_element else rows
    loads = (read + vectors) / max(1.0, rate)  # load ports keep pace with the multiply-add pipes
    # L2 hands over half of what the load ports take (`Hardware.bandwidth_gbs`).
    stream = 2.0 * vectors / rate if streamed else 0.0
    busiest = max(arithmetic, float(hw.fma_latency_cycles), loads, stream)
    # Moving overlaps the arithmetic, but not wholly: the less, the more instructions a cycle has to start. The weights
    # fit 3x24, 5x16, 6x16 and 4x24 of AVX2 (two multiply-adds a cycle) and 14 tiles of AVX-512 (one), all on Zen 4.
    crowded = min(1.0, rate / 2) ** 2
    # Large tiles of AVX-512 were up to 3 % slower than those of some 16 accumulators.
    large = 0.0025 * max(0, rows * vectors - LARGE_TILE) * arithmetic
    return busiest + (0.25 * loads + 0.08 * stream) * crowded + large + hw.load_stall_cycles * (read + vectors)


def choose_tiling(
    hw: Hardware,
    rows: int,
    columns: int,
    depth: int,
    *,
    row_stride_bytes: int | None = None,
    repeats: int = 1,
    fixed_rows: int | None = None,
    fixed_columns: int | None = None,
    packed: bool = False,
    residual: bool = False,
) -> Tiling:
    """Return the cheapest tiling of `repeats` float32 products that share the cores, as `rank_tilings` finds it."""
    return rank_tilings(
        hw,
        rows,
        columns,
        depth,
        row_stride_bytes=row_stride_bytes,
        repeats=repeats,
        fixed_rows=fixed_rows,
        fixed_columns=fixed_columns,
        packed=packed,
        residual=residual,
    )[0]


def rank_tilings(
    hw: Hardware,
    rows: int,
    columns: int,
    depth: int,
    *,
    row_stride_bytes: int | None = None,
    repeats: int = 1,
    fixed_rows: int | None = None,
    fixed_columns: int | None = None,
    packed: bool = False,
    residual: bool = False,
) -> list[Tiling]:
    """Return tilings of `repeats` float32 products that share the cores, the cheapest first.

    `row_stride_bytes` separates rows of the left operand; `fixed_rows` and `fixed_columns` keep a register tile's
    extent already chosen. `packed`: the right operand is a constant in panels; `residual`: a third operand is added.
    """
    lanes = hw.lanes("float32")
    stride = 4 * depth if row_stride_bytes is None else row_stride_bytes
    # By element, two registers a row and then some: taller tiles are spilled.
    tallest = min(rows, 12 if hw.multiplies_by_element else 16)
    heights = [fixed_rows] if fixed_rows else range(1, max(1, tallest) + 1)
    tiles = [
        (tile_rows, vectors)
        for tile_rows in heights
        for vectors in range(1, vectors_limit(hw, tile_rows) + 1)
        if fixed_columns in (None, vectors * lanes)
    ]
    if not tiles:  # a fixed width beyond the register file: one row at a time
        assert fixed_columns is not None
        tiles = [(1, fixed_columns // lanes)]
    # Cheapest first when shared out evenly, so that the search stops where even that would not do.
    work = sorted((_work_cycles(hw, rows, columns, depth, stride, *tile), *tile) for tile in tiles)
    ranked: list[Tiling] = []
    for cycles, tile_rows, vectors in work:
        if len(ranked) >= SHORTLIST and cycles * repeats / hw.cores >= min(found.cycles for found in ranked):
            break
        row_tiles = max(1, -(-rows // tile_rows))
        panels = max(1, -(-columns // (vectors * lanes)))
        splits = [_row_chunks(hw, rows, depth, panels * repeats, row_tiles)]
        if packed and repeats == 1:
            splits += _row_splits(hw, rows, columns, depth, residual, row_tiles)
        for chunks in splits:
            found = _share_out(hw, rows, columns, depth, repeats, tile_rows, vectors, cycles * repeats, chunks)
            ranked.append(_with_traffic(hw, found, residual) if packed and repeats == 1 else found)
    return sorted(ranked, key=lambda found: found.cycles)


def predicted_seconds(hw: Hardware, tiling: Tiling, activation: str = "none") -> float | None:
    """Seconds the product and its activation take on `hw`, or None where the clock is unknown."""
    if hw.clock_mhz is None:
        return None
    elements = tiling.total_rows * -(-tiling.total_columns // tiling.lanes) * tiling.lanes
    seconds = tiling.cycles / (hw.clock_mhz * 1e6) + activation_seconds(hw, activation, elements, tiling.tasks)
    return seconds + (launch_seconds(hw) if tiling.tasks > 1 else 0.0)


def activation_seconds(hw: Hardware, activation: str, elements: int, tasks: int) -> float:
    """Seconds that a polynomial in the epilogue adds; other activations hide in it. 0 where the clock is unknown."""
    if hw.clock_mhz is None or not is_heavy(activation):
        return 0.0
    return HEAVY_CYCLES * elements / hw.lanes("float32") / min(hw.cores, tasks) / (hw.clock_mhz * 1e6)


def _row_splits(hw: Hardware, rows: int, columns: int, depth: int, residual: bool, tiles: int) -> list[int]:
    """Row chunks worth a look where each core takes rows: as few as possible, and so many that a chunk fits L2."""
    row_bytes = 4 * (depth + columns * (2 if residual else 1))
    fitting = -(-rows * row_bytes // (hw.cores * (core_l2_bytes(hw) // 4)))
    return [hw.cores * n for n in sorted({1, fitting}) if hw.cores > 1 and hw.cores * n <= tiles]


def _with_traffic(hw: Hardware, t: Tiling, residual: bool) -> Tiling:
    """The tiling with the cycles for moving its operands added."""
    cycles = t.cycles + _moved_cycles(hw, t, residual)
    weights = 4.0 * t.depth * t.panels * t.columns
    if hw.dram_gbs is not None and _is_cold(hw, weights):
        stream = weights / (hw.dram_gbs * 1e3) * hw.cycles_per_us
        cycles = overlapped(hw, cycles, stream, 0.4)
    return replace(t, cycles=cycles, efficiency=min(1.0, t.efficiency * t.cycles / max(cycles, 1.0)))


def _moved_cycles(hw: Hardware, t: Tiling, residual: bool) -> float:
    """Cycles a core loses to operands that do not come from its own caches in order.

    Fitted on the pointwise layers of MobileNetV2 and ResNet-50 and the products of BERT, on two cores of Zen 4:
    rows another core has written, and results completed in several passes while they leave L2, pass at half of L3's
    rate (8 bytes a cycle); weights stream, and mostly hide behind the arithmetic.
    """
    by_rows = t.row_chunks % t.tasks == 0
    half_l2 = core_l2_bytes(hw) / 2
    weights = 4.0 * t.depth * t.panels * t.columns
    results = 4.0 * t.total_rows * t.total_columns * (2 if residual else 1)
    inputs = 4.0 * t.total_rows * t.depth
    foreign = 0.0 if by_rows else inputs * (1 - 1 / t.tasks)
    passes = t.panels if by_rows else t.panels / t.tasks
    torn = results / t.tasks if passes > 1 and (inputs + results) / t.row_chunks > half_l2 else 0.0
    first = weights if by_rows else weights / t.tasks
    again = first * (t.row_chunks / t.tasks - 1 if by_rows else t.row_chunks - 1) if weights > half_l2 else 0.0
    # L3 holds what L2 has let go (Zen), so that two cores may well fetch the same weights from memory twice.
    first *= 1.5 if _is_cold(hw, weights) else 1 / 6
    return (2 * (foreign + torn) + first + again / 3) / L3_BYTES_PER_CYCLE


def _is_cold(hw: Hardware, weights: float) -> bool:
    """Whether weights of so many bytes are taken to come from memory: a model of such layers does not stay in L3."""
    l3 = hw.cache(3)
    return weights > (l3.size_bytes if l3 else core_l2_bytes(hw)) / 16


def _work_cycles(hw: Hardware, rows: int, columns: int, depth: int, stride: int, tile_rows: int, vectors: int) -> float:
    """Cycles of one product on one core."""
    width = vectors * hw.lanes("float32")
    tiles = max(1, -(-rows // tile_rows))
    small, larger = divmod(rows, tiles)
    blocks = _depth_blocks(hw, tiles, width, depth)

    l1 = hw.cache(1)
    streamed = depth * width * 4 > (l1.size_bytes if l1 else 32 * 1024) // 2

    def tile_cycles(size: int) -> float:
        step = step_cycles(hw, size, vectors, streamed)
        if depth > 16 and _rows_collide(hw, size, stride):
            step *= 1.6
        return depth * step + blocks * (TILE_CYCLES + 1.5 * size * vectors)

    panels = max(1, -(-columns // width))
    return (larger * tile_cycles(small + 1) + (tiles - larger) * tile_cycles(small)) * panels


def _share_out(
    hw: Hardware,
    rows: int,
    columns: int,
    depth: int,
    repeats: int,
    tile_rows: int,
    vectors: int,
    whole: float,
    chunks: int,
) -> Tiling:
    """Split `whole` cycles of work over the cores."""
    lanes = hw.lanes("float32")
    width = vectors * lanes
    panels = max(1, -(-columns // width))
    tiles = max(1, -(-rows // tile_rows))
    height = -(-rows // tiles)
    blocks = _depth_blocks(hw, tiles, width, depth)
    tasks = min(hw.cores, panels * chunks * repeats)
    if whole / hw.cycles_per_us < 2.0 * hw.launch_us:
        tasks = 1
    cycles = whole * _busiest(panels * repeats, tiles, chunks, tasks)
    ideal = rows * columns * depth * repeats / (lanes * hw.fma_per_cycle * tasks)
    reason = (
        f"{height}x{width}, {panels} {'panel' if panels == 1 else 'panels'}"
        + (f" x {chunks} row chunks" if chunks > 1 else "")
        + (f" x {repeats}" if repeats > 1 else "")
        + (f", depth in {blocks} blocks" if blocks > 1 else "")
        + f", {tasks} {'task' if tasks == 1 else 'tasks'}, model {ideal / max(cycles, 1.0):.0%} of peak"
    )
    return Tiling(
        rows=height,
        columns=width,
        lanes=lanes,
        total_rows=rows,
        total_columns=columns,
        depth=depth,
        panels=panels,
        row_tiles=tiles,
        row_chunks=chunks,
        depth_blocks=blocks,
        sum_blocks=max(1, -(-depth // (blocks * LONGEST_SUM))),
        tasks=tasks,
        cycles=cycles,
        efficiency=min(1.0, ideal / max(cycles, 1.0)),
        reason=reason,
        by_element=hw.multiplies_by_element,
    )


def _row_chunks(hw: Hardware, rows: int, depth: int, panels: int, tiles: int) -> int:
    """Enough row chunks that one stays near the core, and that the cores get nearly equal shares of the units."""
    least = min(tiles, max(1, -(-rows * depth * 4 // _chunk_bytes(hw))))
    best, best_load = least, float("inf")
    for chunks in range(least, min(tiles, least + 2 * hw.cores) + 1):
        load = _busiest(panels, tiles, chunks, hw.cores)
        if load < best_load * 0.97:  # more chunks read the panels more often: only for a real gain
            best, best_load = chunks, load
        if best_load * hw.cores < 1.03:
            break
    return best


def _chunk_bytes(hw: Hardware) -> int:
    """Bytes of the left operand that every panel may walk over again.

    Broadcasts need little bandwidth, so a share of L3 serves as well as L2: 2 MB chunks (L2: 1 MB, L3: 16 MB a core)
    were the fastest on Zen 4, 2 % before 512 KB and 8 % before no chunks, at 2048 x 2048 x 2048.
    """
    l3 = hw.cache(3)
    beyond = min(2 * core_l2_bytes(hw), l3.size_bytes // l3.shared_by_cores // 4) if l3 else 0
    return max(core_l2_bytes(hw) // 2, beyond)


def _depth_blocks(hw: Hardware, tiles: int, width: int, depth: int) -> int:
    """Parts of k such that one part of the panel, which every row tile reads again, stays in L2."""
    size = core_l2_bytes(hw)
    if tiles == 1 or depth * width * 4 <= size * 3 // 4:
        return 1
    return -(-depth * width * 4 // (size // 2))


def _rows_collide(hw: Hardware, rows: int, stride: int) -> bool:
    """Whether `rows` rows `stride` bytes apart need more ways of an L1 set than there are."""
    l1 = hw.cache(1)
    ways = (l1.ways if l1 else None) or 8
    way = (l1.size_bytes if l1 else 32 * 1024) // ways
    sets = way // gcd(stride, way)  # distinct positions within a way
    return -(-rows // sets) > ways


def _busiest(panels: int, tiles: int, chunks: int, tasks: int) -> float:
    """The share of all work in the busiest of `tasks` equal runs of units (chunk by chunk, panel by panel)."""

    def done(unit: int) -> int:
        chunk, panel = divmod(unit, panels)
        first, last = chunk * tiles // chunks, (chunk + 1) * tiles // chunks
        return first * panels + panel * (last - first)

    units = panels * chunks
    bounds = [done(task * units // tasks) for task in range(tasks + 1)]
    return max(after - before for before, after in pairwise(bounds)) / (panels * tiles)


def core_l2_bytes(hw: Hardware) -> int:
    """A core's share of L2."""
    l2 = hw.cache(2)
    return l2.size_bytes // l2.shared_by_cores if l2 else 256 * 1024
