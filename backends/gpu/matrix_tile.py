"""Which tile of a product a block computes on matrix units, by the rule of tile.py with their rate."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ...hwdb import Hardware
from .tile import BYTES_PER_CYCLE, STEP_CYCLES

SIDE = 16  # of a fragment


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

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.down * self.across * self.warp_threads

    @property
    def reason(self) -> str:
        """What the report says of it."""
        warps = f"{self.down}x{self.across} warps"
        return f"{self.rows}x{self.columns}x{self.depth} a block on matrix units, {warps}, {self.blocks} blocks"


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


def choose_matrix_tile(hw: Hardware, batch: int, rows: int, columns: int, depth: int, dtype: str) -> MatrixTile:
    """The tile that takes `hw` the fewest cycles; where only latency counts, the one with more blocks."""
    peak = hw.peak_flops(dtype)
    rate = peak / (2e6 * hw.clock_mhz * hw.cores) if peak and hw.clock_mhz else 512.0

    def blocks(candidate: tuple[int, ...]) -> int:
        return batch * ceil(rows / candidate[0]) * ceil(columns / candidate[1])

    def cycles(candidate: tuple[int, ...]) -> tuple[float, float]:
        height, width, step, *_ = candidate
        block = depth * max(height * width / rate, 4.0 * (height + width) / BYTES_PER_CYCLE)
        busy = ceil(blocks(candidate) / hw.cores) * block
        return max(busy, ceil(depth / step) * STEP_CYCLES), busy

    warp = int(getattr(hw, "warp_threads", None) or 32)
    best = min(_AMD if warp == 64 else _NVIDIA, key=cycles)
    return MatrixTile(*best, blocks(best), warp)
