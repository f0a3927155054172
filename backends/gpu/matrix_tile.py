"""Which tile of a product a block computes on matrix units, by the rule of tile.py with their rate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from ...hwdb import Hardware
from ...hwdb.accelerators import Gpu
from .tile import BYTES_PER_CYCLE, STEP_CYCLES

SIDE = 16  # of a fragment
GAIN = 0.75  # of the cycles, with the second launch: what the rule does not know may be as much as a quarter
SECOND_CYCLES = 4000  # of one more launch, some 3 microseconds: a rule of thumb
_PARTS = (2, 4, 8)  # of others the code of a convolution counts taps in more registers: six spilled on sm_80


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
    sparse: bool = False  # of weights that are 2 of 4
    note: str = ""  # for the report

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.down * self.across * self.warp_threads

    @property
    def reason(self) -> str:
        """What the report says of it."""
        warps = f"{self.down}x{self.across} warps"
        parts = f", {self.parts} parts of the sum" if self.parts > 1 else ""
        units = "sparse matrix units" if self.sparse else "matrix units"
        note = f" ({self.note})" if self.note else ""
        size = f"{self.rows}x{self.columns}x{self.depth}"
        return f"{size} a block on {units}, {warps}, {self.blocks} blocks{parts}{note}"

    def noted(self, note: str) -> MatrixTile:
        """The same with words for the report."""
        return replace(self, note=note)

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


@dataclass(frozen=True)
class Product:
    """Batch, rows, columns and depth of products in `dtype`; bytes that an element of the left operand and of the right
    one have in memory: what is float32 there is rounded on its way."""

    batch: int
    rows: int
    columns: int
    depth: int
    dtype: str
    left_bytes: float = 4.0
    right_bytes: float = 2.0
    two_of_four: bool = False  # of the right one's neighbours along the sum are zero, and left out

    def sparse(self, item_bytes: float) -> Product:
        """The same with a right operand that is 2 of 4, and takes `item_bytes` an element of the whole."""
        return replace(self, right_bytes=item_bytes, two_of_four=True)

    def blocks(self, tile: tuple[int, ...]) -> int:
        """Of a tile, with the whole sum each."""
        return self.batch * ceil(self.rows / tile[0]) * ceil(self.columns / tile[1])

    def cycles(self, hw: Hardware, tile: MatrixTile, latency: float = STEP_CYCLES) -> tuple[float, float]:
        """Of `hw` with the tile; and without the latency, which decides where only latency counts."""
        peak = hw.peak_flops(self.dtype)
        if self.two_of_four and isinstance(hw, Gpu):
            peak = hw.peak_flops(self.dtype, sparse=True)
        rate = peak / (2e6 * hw.clock_mhz * hw.cores) if peak and hw.clock_mhz else 512.0
        part = min(self.depth, tile.part(self.depth))
        read = self.left_bytes * tile.rows + self.right_bytes * tile.columns
        busy = ceil(tile.blocks / hw.cores) * part * max(tile.rows * tile.columns / rate, read / BYTES_PER_CYCLE)
        second = 0.0
        if tile.parts > 1:
            second = SECOND_CYCLES + 8.0 * tile.parts * self.rows * self.columns / (BYTES_PER_CYCLE * hw.cores)
        return max(busy, ceil(part / tile.depth) * latency) + second, busy


def choose_matrix_tile(hw: Hardware, product: Product, may_part: bool = False) -> MatrixTile:
    """The tile that takes `hw` the fewest cycles.

    With `may_part` blocks add up parts of the sum where that gains a quarter, and still gains where latency is half of
    what the rule takes it for; a second kernel adds those.
    """

    def cycles(tile: MatrixTile) -> tuple[float, float]:
        return product.cycles(hw, tile)

    warp = int(getattr(hw, "warp_threads", None) or 32)
    candidates = _AMD if warp == 64 else _NVIDIA

    def tile(candidate: tuple[int, int, int, int, int], parts: int) -> MatrixTile:
        return MatrixTile(*candidate, parts * product.blocks(candidate), warp, parts, product.two_of_four)

    best = min((tile(candidate, 1) for candidate in candidates), key=cycles)
    if not may_part:
        return best
    parted = [
        tile(candidate, parts)
        for candidate in candidates
        for parts in _PARTS
        if parts * product.blocks(candidate) > best.blocks
    ]
    parted = [part for part in parted if part.part(product.depth) * (part.parts - 1) < product.depth]
    least = min(parted, key=cycles, default=best)
    pays = cycles(least)[0] < GAIN * cycles(best)[0]
    soon = [product.cycles(hw, tile, STEP_CYCLES / 2)[0] for tile in (least, best)]
    return least if pays and soon[0] < soon[1] else best
