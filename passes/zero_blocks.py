"""Blocks of zeros in constant weights: where they are, and what a product that skips them is predicted to take.

A block is `columns` outputs times `depth` inputs of w[N, K]. Its outputs are a whole number of vectors, so that one
value of x is multiplied by vectors of weights as in a dense product; what a kernel loses to one, by tiles of MR rows:

    dense     MR * V multiply-adds a value of k, at the rate of the machine; with a few rows never less than the latency
              of one, in which L3 hands over the weights
    blocks    the same of the blocks that are kept, and BLOCK_CYCLES from one block to the next

Zeros in other places (N:M, or strewn) save nothing on a CPU: no vector instruction leaves out single lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..hwdb import Hardware

DEPTHS = (16, 4, 1)  # inputs of a block
COLUMNS = 16  # outputs of a block, at least; a whole number of vectors
# Of a tile, from one block to the next: its place, the loop. On Zen 4 blocks of 1, 4 and 16 inputs took 0.25 of the
# dense product where 0.25 were kept: what this costs is hidden behind the arithmetic, or nearly.
BLOCK_CYCLES = 2.0
ROWS = 16  # of a tile, at most: what `tiling` chooses where there are so many
SAMPLED = 4096  # weights that are looked at first
PANELS = 12  # rows of blocks that are looked at next
LEAST_ZEROS = 0.3  # of the weights sampled: with fewer a product is taken for dense


@dataclass(frozen=True)
class Blocks:
    """The shape of the blocks, how many hold anything but zeros, the most of those in one row, how many there are."""

    columns: int
    depth: int
    count: int
    longest: int
    total: int

    @property
    def density(self) -> float:
        """The share of the blocks that are kept."""
        return self.count / self.total if self.total else 1.0

    def text(self) -> str:
        """The blocks in words."""
        return f"{self.depth}x{self.columns} blocks, {self.density:.0%} kept"


def zeros_of(weight: torch.Tensor) -> float:
    """The share of zeros among some of the weights, spread over all of them."""
    line = weight.detach().reshape(-1)
    # A step without small factors, so that no pattern of the rows is met at one place only.
    step = max(1, line.numel() // SAMPLED) | 1
    return float((line[::step] == 0).float().mean()) if line.numel() else 0.0


def panels_of(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """weight[N, K] as [ceil(N / columns), columns, K], zeros past N."""
    n, k = weight.shape
    panels = -(-n // columns)
    if panels * columns == n:
        return weight.reshape(panels, columns, k)
    padded = weight.new_zeros((panels * columns, k))
    padded[:n] = weight
    return padded.view(panels, columns, k)


def filled(weight: torch.Tensor, columns: int, depth: int) -> torch.Tensor:
    """Which blocks [row of blocks, block of inputs] of weight[N, K] hold anything; K is a multiple of depth."""
    panels = panels_of(weight, columns).ne(0).any(1)
    return panels.view(len(panels), -1, depth).any(2)


def columns_of(hw: Hardware) -> int:
    """The outputs of a block on a machine."""
    lanes = hw.lanes("float32")
    return -(-COLUMNS // lanes) * lanes


def blocks_of(weight: torch.Tensor, columns: int, depth: int) -> Blocks:
    """The blocks of weight[N, K]."""
    there = filled(weight, columns, depth)
    counts = there.sum(1)
    return Blocks(columns, depth, int(counts.sum()), int(counts.max()) if len(counts) else 0, there.numel())


def cost(hw: Hardware, rows: int, blocks: Blocks) -> float:
    """Time of skipping the other blocks, as a share of the dense product's."""
    vectors = max(1, blocks.columns // hw.lanes("float32"))
    tile = max(1, min(rows, ROWS, (hw.vector_registers - 1 - vectors) // vectors))
    step = max(tile * vectors / hw.fma_per_cycle, float(hw.fma_latency_cycles))
    return blocks.density * (1.0 + BLOCK_CYCLES / (blocks.depth * step))


def best_blocks(weight: torch.Tensor, hw: Hardware, rows: int) -> tuple[Blocks, float]:
    """The blocks of weight[N, K] that cost the least, and that cost; those of one input divide any K.

    Looks at some rows of blocks first, and at all of them for the shape that promises most.
    """
    columns = columns_of(hw)
    depths = [depth for depth in DEPTHS if weight.shape[1] % depth == 0]
    some = _spread(weight, columns)
    tried = [(cost(hw, rows, blocks_of(some, columns, depth)), depth) for depth in depths]
    best, depth = min(tried)
    if best > 1.0 and some is not weight:
        return blocks_of(some, columns, depth), best
    blocks = blocks_of(weight, columns, depth)
    return blocks, cost(hw, rows, blocks)


def _spread(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """PANELS rows of blocks, evenly spread."""
    panels = weight.shape[0] // columns
    if panels <= PANELS:
        return weight
    whole = weight[: panels * columns].view(panels, columns, -1)
    chosen: Sequence[int] = [i * panels // PANELS for i in range(PANELS)]
    return whole[list(chosen)].reshape(PANELS * columns, -1)


def neighbours(weight: torch.Tensor) -> str | None:
    """The N:M pattern of weight[N, K], such as "2:4"; None where it has none."""
    some = _spread(weight, COLUMNS)
    for kept, group in ((1, 4), (2, 4), (4, 8)):
        if weight.shape[1] % group == 0 and int(some.ne(0).view(-1, group).sum(1).max()) <= kept:
            return f"{kept}:{group}"
    return None
