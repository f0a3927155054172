"""Which tile of a product a block computes on matrix units, by the rule of tile.py with their rate."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ...hwdb import Hardware
from .tile import BYTES_PER_CYCLE, STEP_CYCLES

SIDE = 16  # of a fragment
FULL = 0.75  # of the units with a block: sums are parted where less have one
GAIN = 0.75  # of the cycles, with the second launch: what the rule does not know may be as much as a quarter
SECOND_CYCLES = 4000  # of one more launch, some 3 microseconds: a rule of thumb
_PARTS = range(2, 9)


@dataclass(frozen=True)
class MatrixTile:
    """The part of a product that a block computes: `down` x `across` warps of `warp_threads` share it."""

    rows: int
    columns: int
    depth: int
    down: int
    across: int
    blocks: int = 1
    warp_threads: int = 32
    parts: int = 1  # of the sum, added up by blocks of their own

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.down * self.across * self.warp_threads

    @property
    def reason(self) -> str:
        """What the report says of it."""
        warps = f"{self.down}x{self.across} warps"
        parts = f", {self.parts} parts of the sum" if self.parts > 1 else ""
        return f"{self.rows}x{self.columns}x{self.depth} a block on matrix units, {warps}, {self.blocks} blocks{parts}"

    def part(self, depth: int) -> int:
        """How much of a sum of `depth` a block adds up: an even number of steps."""
        return 2 * self.depth * ceil(ceil(depth / (2 * self.depth)) / self.parts)


# Rows, columns and depth of a block's tile; warps below and beside each other. 256 threads at most: TVM's ROCm limit.
_NVIDIA = (
    (128, 128, 32, 2, 4),
    (128, 64, 32, 4, 2),
    (64, 64, 32, 2, 2),
    (32, 64, 32, 2, 2),
    (64, 32, 32, 2, 2),
    (32, 32, 32, 2, 2),
)
_AMD = ((128, 128, 32, 2, 2), (128, 64, 32, 2, 2), *_NVIDIA[2:])


def choose_matrix_tile(
    hw: Hardware, batch: int, rows: int, columns: int, depth: int, dtype: str, may_part: bool = False
) -> MatrixTile:
    """The tile that takes `hw` the fewest cycles; where only latency counts, the one with more blocks.

    With `may_part` blocks add up parts of the sum where units would have none and that gains a quarter; a second kernel
    adds those.
    """
    peak = hw.peak_flops(dtype)
    rate = peak / (2e6 * hw.clock_mhz * hw.cores) if peak and hw.clock_mhz else 512.0

    def blocks(candidate: tuple[int, ...]) -> int:
        return batch * ceil(rows / candidate[0]) * ceil(columns / candidate[1])

    def cycles(tile: MatrixTile) -> tuple[float, float]:
        part = min(depth, tile.part(depth))
        block = part * max(tile.rows * tile.columns / rate, 4.0 * (tile.rows + tile.columns) / BYTES_PER_CYCLE)
        busy = ceil(tile.blocks / hw.cores) * block
        second = 0.0
        if tile.parts > 1:
            second = SECOND_CYCLES + 8.0 * tile.parts * rows * columns / (BYTES_PER_CYCLE * hw.cores)
        return max(busy, ceil(part / tile.depth) * STEP_CYCLES) + second, busy

    warp = int(getattr(hw, "warp_threads", None) or 32)
    candidates = _AMD if warp == 64 else _NVIDIA
    best = min((MatrixTile(*candidate, blocks(candidate), warp) for candidate in candidates), key=cycles)
    if not may_part or best.blocks >= FULL * hw.cores:
        return best
    parted = [
        MatrixTile(*candidate, parts * blocks(candidate), warp, parts)
        for candidate in candidates
        for parts in _PARTS
        if parts * blocks(candidate) > best.blocks
    ]
    parted = [tile for tile in parted if tile.part(depth) * (tile.parts - 1) < depth]  # none without a sum
    least = min(parted, key=cycles, default=best)
    return least if cycles(least)[0] < GAIN * cycles(best)[0] else best
