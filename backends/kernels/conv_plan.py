"""The sizes of a 2-D convolution, how its loop nest is cut, and the packed form of its constant operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ...hwdb import Hardware
from ...hwdb.cost import overlapped
from ..choices import SHORTLIST
from ..tiling import ALIAS_BYTES, TILE_CYCLES, core_l2_bytes, step_cycles
from .epilogue import is_heavy
from .window import Axis, runs

SHORT_RUN_BYTES = 1024  # of neighbouring channels, which cost twice what they would as part of a stream: an estimate
TAIL_GAIN = 0.03  # a narrower last panel is a second copy of the code: taken for a gain beyond this


@dataclass(frozen=True)
class Conv:
    """The problem: sizes of the NHWC operands and what follows the sum."""

    batch: int
    height: int
    width: int
    channels: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, bottom, left, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    bias: bool = False
    residual: bool = False
    activation: str = "none"
    args: tuple[float, ...] = ()

    @property
    def rows(self) -> Axis:
        """The vertical axis."""
        return self._axis(0, self.height)

    @property
    def columns(self) -> Axis:
        """The horizontal axis."""
        return self._axis(1, self.width)

    def _axis(self, i: int, size: int) -> Axis:
        before, after = self.padding[2 * i], self.padding[2 * i + 1]
        reach = self.dilation[i] * (self.kernel[i] - 1) + 1
        out = (size + before + after - reach) // self.stride[i] + 1
        return Axis(size, out, self.kernel[i], self.stride[i], before, self.dilation[i])

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """[N, H, W, C]."""
        return self.batch, self.height, self.width, self.channels

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """[N, OH, OW, K]."""
        return self.batch, self.rows.out, self.columns.out, self.filters

    @property
    def pointwise(self) -> bool:
        """Whether it is the matrix product of all pixels with the filters."""
        one = self.kernel == self.stride == (1, 1)
        return one and self.groups == 1 and not any(self.padding)

    @property
    def activation_is_heavy(self) -> bool:
        """Whether the activation costs as much as some dozen multiply-adds."""
        return is_heavy(self.activation)

    @property
    def group_channels(self) -> int:
        """Input channels of one group."""
        return self.channels // self.groups

    @property
    def group_filters(self) -> int:
        """Output channels of one group."""
        return self.filters // self.groups

    @property
    def flops(self) -> int:
        """Floating-point operations, the taps that fall on padding left out."""
        taps = 1
        for axis in (self.rows, self.columns):
            taps *= sum(high - low for low, high in map(axis.taps, range(axis.out)))
        return 2 * self.batch * taps * self.filters * self.group_channels


def problem_of(
    image: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Conv:
    """The convolution of an image [N, H, W, C] with a weight [K, C / groups, KH, KW], nothing behind it."""
    batch, height, width, channels = image
    filters, _, rows, columns = weight
    top, bottom, left, right = padding
    return Conv(
        batch,
        height,
        width,
        channels,
        filters,
        (rows, columns),
        (stride[0], stride[1]),
        (top, bottom, left, right),
        (dilation[0], dilation[1]),
        groups,
    )


@dataclass(frozen=True)
class Plan:
    """How the nest is cut."""

    batch: int
    lanes: int
    panels: int  # full panels of a group
    vectors: int  # of a full panel
    pixels: int  # of a full panel's tile
    tail_vectors: int  # of a group's last, narrower panel; 0: none
    tail_pixels: int
    row_blocks: int
    unit_blocks: int  # a unit is a panel, or with groups > 1 a group
    merged: int  # groups computed as one because each is narrower than a vector
    row_by_row: bool  # all groups of a row before the next row: a group alone reads and writes parts of cache lines
    efficiency: float  # share of a core's peak that the register tiles are predicted to reach
    cycles: float  # predicted, of the busiest core
    by_element: bool = False  # x is read by vectors of channels, whose lanes are factors

    @property
    def reason(self) -> str:
        """The choice in a few words."""
        nr = self.vectors * self.lanes
        text = f"{self.pixels}x{nr}, {self.panels} panels"
        if self.tail_vectors:
            text += f" and one {self.tail_pixels}x{self.tail_vectors * self.lanes}"
        if self.merged > 1:
            text += f", {self.merged} groups as one"
        if self.row_by_row:
            text += ", row by row"
        blocks = f"{self.row_blocks} row x {self.unit_blocks} channel blocks"
        return f"{text}, {blocks}, predicted {self.efficiency:.0%} of peak"

    @property
    def layout(self) -> str:
        """A name of the packed weight's arrangement."""
        return f"conv_panels_{self.lanes}x{self.vectors}x{self.panels}_{self.tail_vectors}_{self.merged}"

    @property
    def tasks(self) -> int:
        """Pieces of work that may run at once."""
        return self.batch * self.row_blocks * self.unit_blocks

    @property
    def padded_filters(self) -> int:
        """Output channels of a group as the packed operands hold them."""
        return (self.panels * self.vectors + self.tail_vectors) * self.lanes


def merge_groups(conv: Conv, lanes: int) -> tuple[Conv, int]:
    """Join groups narrower than a vector: as many multiply-adds, whole vectors instead of partial stores."""
    merged = max(
        m for m in range(1, conv.groups + 1) if conv.groups % m == 0 and (m == 1 or m * conv.group_filters <= lanes)
    )
    return replace(conv, groups=conv.groups // merged), merged


def choose_plan(conv: Conv, hw: Hardware) -> Plan:
    """The plan whose register tile is predicted to be the cheapest."""
    return rank_plans(conv, hw)[0]


@lru_cache(maxsize=256)
def rank_plans(conv: Conv, hw: Hardware) -> tuple[Plan, ...]:
    """Plans of the few cheapest register tiles by predicted cycles, each with the blocks that balance the cores."""
    lanes = hw.lanes("float32")
    conv, merged = merge_groups(conv, lanes)
    needed = -(-conv.group_filters // lanes)
    tiles: list[tuple[float, int, int, int, int]] = []
    for vectors in range(1, min(needed, widest(hw)) + 1):
        pixels, cycles = _best_pixels(conv, hw, vectors)
        cycles *= needed // vectors
        tail, tail_pixels = needed % vectors, 0
        if tail:
            tail_pixels, tail_cycles = _best_pixels(conv, hw, tail)
            cycles = (cycles + tail_cycles) * (1 + TAIL_GAIN)
        tiles.append((cycles, vectors, pixels, tail, tail_pixels))
    return tuple(_plan_of(conv, hw, merged, *tile) for tile in sorted(tiles)[:SHORTLIST])


def _plan_of(
    conv: Conv, hw: Hardware, merged: int, cycles: float, vectors: int, pixels: int, tail: int, tail_pixels: int
) -> Plan:
    lanes = hw.lanes("float32")
    needed = -(-conv.group_filters // lanes)
    ideal = conv.flops / 2 / lanes / hw.fma_per_cycle
    efficiency = min(1.0, ideal / (cycles * conv.batch * conv.rows.out * conv.groups))
    panels = needed // vectors
    units = conv.groups if conv.groups > 1 else panels + (1 if tail else 0)
    launch = hw.launch_us * hw.cycles_per_us
    if cycles * conv.groups * conv.batch * conv.rows.out < 2 * launch:  # not worth a parallel region
        row_blocks = unit_blocks = 1
    else:
        row_blocks, unit_blocks = _blocks(conv, hw, units)
    turns = -(-conv.batch * row_blocks * unit_blocks // hw.cores)
    busiest = turns * -(-conv.rows.out // row_blocks) * -(-units // unit_blocks) / units
    weights = 4 * conv.filters * conv.group_channels * conv.kernel[0] * conv.kernel[1]
    block_input = _input_bytes(conv, -(-conv.rows.out // row_blocks))
    busiest_cycles = overlapped(hw, cycles * conv.groups * busiest, memory_cycles(hw, weights)) + launch
    return Plan(
        conv.batch,
        lanes,
        panels,
        vectors,
        pixels,
        tail,
        tail_pixels,
        row_blocks,
        unit_blocks,
        merged,
        conv.groups > 1 and block_input > core_l2_bytes(hw) / 2 >= weights / unit_blocks,
        efficiency,
        busiest_cycles,
        hw.multiplies_by_element,
    )


def widest(hw: Hardware) -> int:
    """Most vectors of a register tile of at least two rows."""
    return max(1, (hw.vector_registers - (3 if hw.multiplies_by_element else 1)) // 3)


def most_rows(hw: Hardware, vectors: int) -> int:
    """Most rows of a register tile: rows * V + V + 1 <= registers, and by element one register a row besides.

    A tile one vector wide has one broadcast for each multiply-add, and LLVM keeps several of them in flight: with 14
    rows and 16 registers half of the accumulators were spilled, with 10 none.
    """
    spare = hw.vector_registers - vectors - 1
    spare -= 4 if vectors == 1 else 0
    return max(1, spare // (vectors + 1 if hw.multiplies_by_element else vectors))


def memory_cycles(hw: Hardware, constant_bytes: float) -> float:
    """Cycles in which weights stream from memory, where they are too large to stay in the last cache between runs."""
    last = hw.caches[-1].size_bytes if hw.caches else 0
    if constant_bytes <= last / 8 or not hw.dram_gbs:
        return 0.0
    return constant_bytes / (hw.dram_gbs * 1e9) * hw.cycles_per_us * 1e6


def _best_pixels(conv: Conv, hw: Hardware, vectors: int) -> tuple[int, float]:
    """The tile height whose row of tiles takes fewest cycles, and those cycles."""
    most = most_rows(hw, vectors)
    if conv.stride[1] * conv.channels * 4 % ALIAS_BYTES == 0:
        most = min(most, 8)  # the pixels of a tile fall on one set of L1
    sizes = range(1, min(most, conv.columns.out) + 1)
    costs = {m: _row_cycles(conv, hw, vectors, m) for m in sizes}
    best = min(sizes, key=lambda m: (costs[m], -m))
    return best, costs[best]


def _row_cycles(conv: Conv, hw: Hardware, vectors: int, pixels: int) -> float:
    """Predicted cycles of one row of tiles of one panel."""
    depth = conv.group_channels * conv.kernel[0]
    panel_bytes = 4 * depth * conv.kernel[1] * vectors * hw.lanes("float32")
    l1 = hw.cache(1)
    # A panel beyond L1 streams from L2 for every tile, at about three quarters of a vector per cycle.
    streaming = vectors / 0.75 if panel_bytes > (l1.size_bytes if l1 else 32 * 1024) / 2 else 0.0
    cycles = 0.0
    for run in runs(conv.columns, pixels):
        steps = sum(max(step_cycles(hw, s.high - s.low, vectors), streaming) * s.taps for s in run.spans)
        cycles += run.count * (depth * steps + TILE_CYCLES + 1.5 * run.pixels * vectors)
    return cycles


def _input_bytes(conv: Conv, out_rows: int) -> int:
    """Bytes of the input rows that so many neighbouring output rows read."""
    reach = (out_rows - 1) * conv.stride[0] + conv.dilation[0] * (conv.kernel[0] - 1) + 1
    return 4 * min(conv.height, reach) * conv.width * conv.channels


def _blocks(conv: Conv, hw: Hardware, units: int) -> tuple[int, int]:
    """Row blocks and unit blocks: even work for the cores, input rows and weights fetched seldom."""
    cores = hw.cores
    fits = core_l2_bytes(hw) / 2
    rows = conv.rows
    weights = 4 * conv.filters * conv.group_channels * conv.kernel[0] * conv.kernel[1]
    step_flops = conv.flops / (conv.batch * rows.out * units)
    flops_per_byte = 16.0  # a core's multiply-adds against its share of the last-level cache

    def cost(row_blocks: int, unit_blocks: int) -> float:
        tasks = conv.batch * row_blocks * unit_blocks
        block_rows, block_units = -(-rows.out // row_blocks), -(-units // unit_blocks)
        turns = -(-tasks // cores)
        flops = turns * block_rows * block_units * step_flops
        blocks_seen = -(-turns // unit_blocks)
        block_input = _input_bytes(conv, block_rows)
        if conv.groups > 1:
            # Every group reads channels of its own: runs too short for a prefetcher unless they are neighbours.
            run_bytes = 4 * block_units * conv.group_channels
            again = block_units / units * (1 if block_input <= fits else 1 + SHORT_RUN_BYTES / run_bytes)
        else:
            again = 1 if block_input <= fits else block_units
        fetched: float = blocks_seen * block_input * again
        share_of_weights = weights * min(1.0, turns / unit_blocks)
        fetched += share_of_weights * (1 if share_of_weights <= fits else blocks_seen)
        return flops + flops_per_byte * fetched

    row_choices = sorted({-(-rows.out // n) for n in range(1, rows.out + 1)})
    unit_choices = sorted({-(-units // n) for n in range(1, units + 1)})
    return min(
        ((r, u) for r in row_choices for u in unit_choices if r * u * conv.batch <= max(16 * cores, r * conv.batch)),
        key=lambda c: (cost(*c), c[0] * c[1]),
    )


def pack_weight(weight: torch.Tensor, conv: Conv, plan: Plan) -> torch.Tensor:
    """Rearrange weight[K, C / groups, KH, KW] into one flat tensor of panels, group after group."""
    kh, kw = conv.kernel
    w = weight.reshape(conv.groups, conv.group_filters, conv.group_channels, kh, kw)
    if plan.merged > 1:
        m = plan.merged
        wide = w.new_zeros((conv.groups // m, m, conv.group_filters, m, conv.group_channels, kh, kw))
        for i in range(m):
            wide[:, i, :, i] = w[i::m]
        w = wide.reshape(conv.groups // m, m * conv.group_filters, m * conv.group_channels, kh, kw)
    w = w.permute(0, 3, 4, 2, 1)  # [group][KH][KW][C][K]
    w = torch.nn.functional.pad(w, (0, plan.padded_filters - w.shape[-1]))
    nr = plan.vectors * plan.lanes
    full = w[..., : plan.panels * nr].reshape(*w.shape[:4], plan.panels, nr).permute(0, 4, 1, 2, 3, 5)
    tail = w[..., plan.panels * nr :]
    return torch.cat([full.reshape(w.shape[0], -1), tail.reshape(w.shape[0], -1)], dim=1).flatten()
