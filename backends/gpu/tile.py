"""Which tile of a product a block computes: by rule, from what the database says of the GPU.

    time of a unit = max(its blocks x cycles of a block, steps of the sum x latency of memory)

A large tile reads each operand less often; a small one gives every unit a block. Cycles of a block are those of its
multiply-adds on the vector lanes or those of its reads from L2, whichever are more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from ...hwdb import Hardware
from ...hwdb.accelerators import Gpu

LANES = 4  # float32 of a 128-bit access
PAD = 4  # floats behind a row of a tile in shared memory: neighbours along the sum fall on other banks
STEP_CYCLES = 600  # from the request of a tile to its arrival, which other blocks may hide: a rule of thumb
BYTES_PER_CYCLE = 32.0  # a unit reads from L2, where it is not known

# Rows, columns and depth of a block's tile; rows and columns of a thread's.
CANDIDATES = (
    (128, 128, 8, 8, 8),
    (128, 64, 16, 8, 4),
    (64, 128, 16, 4, 8),
    (64, 64, 16, 4, 4),
    (64, 32, 16, 4, 4),
    (32, 64, 16, 4, 4),
    (32, 32, 16, 4, 4),
)


@dataclass(frozen=True)
class Tile:
    """The part of a product that a block computes, `depth` of the sum at a time, and the part of each thread."""

    rows: int
    columns: int
    depth: int
    thread_rows: int
    thread_columns: int
    blocks: int = 1

    @property
    def across(self) -> int:
        """Threads side by side."""
        return self.columns // self.thread_columns

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows // self.thread_rows * self.across

    @property
    def reason(self) -> str:
        """What the report says of it."""
        return (
            f"{self.rows}x{self.columns}x{self.depth} a block, {self.thread_rows}x{self.thread_columns} a thread, "
            f"{self.blocks} blocks"
        )


def choose_tile(hw: Hardware, batch: int, rows: int, columns: int, depth: int) -> Tile:
    """The tile that takes `hw` the fewest cycles for `batch` products; the larger of equals."""

    def tile(candidate: tuple[int, ...]) -> Tile:
        return replace(Tile(*candidate), blocks=batch * ceil(rows / candidate[0]) * ceil(columns / candidate[1]))

    return min(map(tile, CANDIDATES), key=lambda t: _cycles(hw, t, depth))


def _cycles(hw: Hardware, tile: Tile, depth: int) -> tuple[float, float]:
    """Of a unit; and without the latency, which decides where only latency counts: for more blocks."""
    lanes, read = 64.0, BYTES_PER_CYCLE
    if isinstance(hw, Gpu):
        lanes = hw.vector_flops.get("float32", 128.0) / 2
        if hw.l2_gbs and hw.clock_mhz:
            read = hw.l2_gbs * 1e3 / (hw.clock_mhz * hw.cores)
    products = tile.thread_rows * tile.thread_columns
    loads = (tile.thread_rows + tile.thread_columns) / LANES
    multiplied = tile.rows * tile.columns / lanes * (products + loads) / products
    block = depth * max(multiplied, 4.0 * (tile.rows + tile.columns) / read)
    busy = ceil(tile.blocks / hw.cores) * block
    return max(busy, ceil(depth / tile.depth) * STEP_CYCLES), busy
