"""How a convolution and the depthwise convolution behind it are computed as one, and its packed constants."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...hwdb import Hardware
from ..tiling import TILE_CYCLES, core_l2_bytes, step_cycles
from .conv_plan import Conv, most_rows, widest
from .window import Axis, runs

PASS_CYCLES = 14.0  # a tile of the depthwise sum beside its multiply-adds: addresses, loop, epilogue
HEAVY_CYCLES = 13.0  # one vector of an activation that is a polynomial


@dataclass(frozen=True)
class Pair:
    """`first` makes an image in NHWC that only `second`, a depthwise convolution, reads."""

    first: Conv
    second: Conv
    planar: bool = False  # the input is NCHW

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """The input as it lies in memory."""
        batch, height, width, channels = self.first.input_shape
        return (batch, channels, height, width) if self.planar else (batch, height, width, channels)

    @property
    def depth(self) -> int:
        """Products in one value of the image in between."""
        return self.first.channels * self.first.kernel[0] * self.first.kernel[1]

    @property
    def taps(self) -> int:
        """Products in one result."""
        return self.second.kernel[0] * self.second.kernel[1]

    @property
    def flops(self) -> int:
        """Floating-point operations of both, nothing computed twice."""
        return self.first.flops + self.second.flops


@dataclass(frozen=True)
class PairPlan:
    """How the nest is cut."""

    lanes: int
    vectors: int  # of a panel of channels
    panels: int
    pixels: int  # of the first convolution's register tile
    swept: int  # pixels of the depthwise register tile
    block: int  # output rows computed from one filling of the scratch
    rows: int  # rows of the scratch
    row_blocks: int
    panel_blocks: int
    cycles: float  # predicted, of the busiest core
    efficiency: float  # predicted share of peak
    by_element: bool = False  # the first image is read by vectors of channels, whose lanes are factors

    @property
    def tasks(self) -> int:
        """Pieces of one image that may run at once."""
        return self.row_blocks * self.panel_blocks

    @property
    def columns(self) -> int:
        """Channels of a panel."""
        return self.vectors * self.lanes

    @property
    def reason(self) -> str:
        """The choice in a few words."""
        return (
            f"{self.pixels}x{self.columns} then {self.swept}x{self.lanes}, {self.panels} panels, "
            f"{self.block} rows at a time, {self.row_blocks} row x {self.panel_blocks} channel blocks"
        )


def choose_pair(pair: Pair, hw: Hardware) -> PairPlan:
    """Choose panel, tiles and blocks by predicted cycles."""
    lanes = hw.lanes("float32")
    needed_vectors = -(-pair.second.channels // lanes)
    best: PairPlan | None = None
    for vectors in range(1, min(needed_vectors, widest(hw)) + 1):
        for pixels in range(1, min(most_rows(hw, vectors), pair.second.width) + 1):
            plan = _cut(pair, hw, vectors, pixels)
            if best is None or plan.cycles < best.cycles:
                best = plan
    assert best is not None
    return best


def _cut(pair: Pair, hw: Hardware, vectors: int, pixels: int) -> PairPlan:
    """The best split over the cores for one register tile."""
    first, second = pair.first, pair.second
    lanes = hw.lanes("float32")
    panels = -(-second.channels // (vectors * lanes))
    swept = min(second.columns.out, hw.vector_registers // 2)
    produced = _product_cycles(pair, hw, vectors, pixels)  # of one hidden row of one panel
    summed = _depthwise_cycles(pair, hw, vectors, swept)  # of one output row of one panel
    row_bytes = 4 * (second.width + sum(second.padding[2:])) * vectors * lanes
    launch = hw.launch_us * hw.cycles_per_us
    found: tuple[float, int, int] | None = None
    for row_blocks in range(1, min(hw.cores, second.rows.out) + 1):
        share = -(-second.rows.out // row_blocks)
        made = min(second.height, _reach(second.rows, share))
        for panel_blocks in range(1, min(panels, 2 * hw.cores) + 1):
            turns = -(-first.batch * row_blocks * panel_blocks // hw.cores)
            cycles = turns * -(-panels // panel_blocks) * (made * produced + share * summed)
            whole = cycles if row_blocks * panel_blocks * first.batch == 1 else cycles + launch
            if found is None or whole < found[0] * 0.98:
                found = (whole, row_blocks, panel_blocks)
    assert found is not None
    cycles, row_blocks, panel_blocks = found
    block = _block(second.rows, row_bytes, hw, -(-second.rows.out // row_blocks))
    ideal = pair.flops / 2 / lanes / hw.fma_per_cycle / hw.cores
    return PairPlan(
        lanes,
        vectors,
        panels,
        pixels,
        swept,
        block,
        _reach(second.rows, block),
        row_blocks,
        panel_blocks,
        cycles,
        min(1.0, ideal / cycles),
        hw.multiplies_by_element,
    )


def _reach(axis: Axis, outputs: int) -> int:
    """Inputs under the windows of `outputs` neighbouring outputs."""
    return (outputs - 1) * axis.stride + axis.dilation * (axis.kernel - 1) + 1


def _block(rows: Axis, row_bytes: int, hw: Hardware, most: int) -> int:
    """Output rows whose rows in between stay in half of L1, or else in an eighth of L2."""
    l1 = hw.cache(1)
    room = (l1.size_bytes if l1 else 32 * 1024) // 2
    if _reach(rows, 2) * row_bytes > room:
        room = core_l2_bytes(hw) // 8
    block = 1
    while block < most and _reach(rows, block + 1) * row_bytes <= room:
        block += 1
    return -(-most // -(-most // block))


def _product_cycles(pair: Pair, hw: Hardware, vectors: int, pixels: int) -> float:
    """Cycles of one row of one panel of the image in between."""
    first = pair.first
    tile = TILE_CYCLES + 1.5 * pixels * vectors
    heavy = HEAVY_CYCLES * vectors * first.columns.out if first.activation_is_heavy else 0.0
    if first.pointwise:
        return first.columns.out / pixels * (pair.depth * step_cycles(hw, pixels, vectors) + tile) + heavy
    cycles = heavy
    for run in runs(first.columns, pixels):
        steps = sum(step_cycles(hw, s.high - s.low, vectors) * s.taps for s in run.spans)
        cycles += run.count * (first.channels * first.kernel[0] * steps + tile)
    return cycles


def _depthwise_cycles(pair: Pair, hw: Hardware, vectors: int, swept: int) -> float:
    """Cycles of one row of one panel of the result."""
    second = pair.second
    tiles = -(-second.columns.out // swept)
    heavy = HEAVY_CYCLES * second.columns.out if second.activation_is_heavy else 0.0
    return vectors * (tiles * PASS_CYCLES + second.columns.out * pair.taps / hw.fma_per_cycle * 1.2 + heavy)


def pack_product(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """Rearrange weight[K, C, KH, KW] into panels [ceil(K / columns)][KH][KW][C][columns], flat, zeros past K."""
    filters = weight.shape[0]
    panels = -(-filters // columns)
    padded = weight.new_zeros((panels * columns, *weight.shape[1:]))
    padded[:filters] = weight
    return padded.view(panels, columns, *weight.shape[1:]).permute(0, 3, 4, 2, 1).flatten()


def pack_taps(weight: torch.Tensor, columns: int) -> torch.Tensor:
    """Rearrange weight[C, 1, KH, KW] into panels [ceil(C / columns)][KH * KW][columns], flat, zeros past C."""
    return pack_product(weight.flatten(1)[:, :, None, None], columns)


def pack_bias(bias: torch.Tensor, columns: int) -> torch.Tensor:
    """The bias, zeros up to whole panels."""
    return torch.nn.functional.pad(bias, (0, -bias.shape[0] % columns))
