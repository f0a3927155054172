"""Plan of the depthwise convolution of bytes (dot_depthwise.py), and its constants as the kernel reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...hwdb import Hardware
from .conv_plan import Conv
from .dot_product import Dot, bytes_dot
from .in_lane import order

ROWS = 4  # taps of a dot product
SMALLEST = 16  # channels of a block: four lanes
MOST_PLACES = 12  # pixels of a tile, all rows together


@dataclass(frozen=True)
class Block:
    """`count` blocks of `width` channels from `start` on, of each of which the channels from `first` are stored."""

    start: int
    width: int
    count: int = 1
    first: int = 0
    last: int = 0  # one past those that exist; `width` but where all channels are fewer

    @property
    def lanes(self) -> int:
        """Lanes of one of its vectors."""
        return self.width // 4


@dataclass(frozen=True)
class DotDepthwisePlan:
    """How the nest is cut."""

    dot: Dot  # at full width
    blocks: tuple[Block, ...]
    rows: int  # output rows of a tile
    pixels: int  # of each of them
    row_blocks: int
    channel_blocks: int

    @property
    def instruction(self) -> bool:
        """Whether the machine's own instructions are used, rather than arithmetic in their place."""
        return self.dot.name == "vpdpbusd"

    @property
    def channels(self) -> int:
        """Channels of all blocks, those that two of them have counted twice."""
        return sum(block.count * block.width for block in self.blocks)

    @property
    def tasks(self) -> int:
        """Pieces of one image that may run at once."""
        return self.row_blocks * self.channel_blocks


def blocks_of(channels: int, widest: int) -> tuple[Block, ...]:
    """Channels in blocks of the widest kind, then halves; what is left goes to a block that begins earlier."""
    found, start, width = [], 0, widest
    while width >= SMALLEST:
        if count := (channels - start) // width:
            found.append(Block(start, width, count, 0, width))
            start += count * width
        width //= 2
    if start < channels and channels >= SMALLEST:
        found.append(Block(channels - SMALLEST, SMALLEST, 1, SMALLEST - (channels - start), SMALLEST))
    elif start < channels:
        found.append(Block(0, SMALLEST, 1, 0, channels))
    return tuple(found)


def choose_dot_depthwise(conv: Conv, hw: Hardware, *, emulated: bool = False) -> DotDepthwisePlan:
    """Blocks of channels, a tile that fits the registers, and a split over the cores."""
    dot = bytes_dot(hw, emulated=emulated)
    blocks = blocks_of(conv.channels, 4 * dot.lanes)
    rows = conv.rows.out
    together = min(rows, _together(conv))
    pixels = max(1, min(conv.columns.out, _pixels(hw, dot, together)))
    parts = 1
    if conv.flops / 2 / dot.lanes > 2 * hw.launch_us * hw.cycles_per_us:
        parts = hw.cores
    # Blocks of channels read nothing twice; rows where the blocks are too few to share out evenly.
    many = blocks[0].count
    shares = {
        (min(parts, rows), 1): -(-rows // min(parts, rows)) / rows,
        (1, min(parts, many)): -(-many // min(parts, many)) / many,
    }
    row_blocks, channel_blocks = min(shares, key=lambda k: (round(shares[k], 2), k[0]))
    return DotDepthwisePlan(dot, blocks, together, pixels, row_blocks, channel_blocks)


def _together(conv: Conv) -> int:
    """Output rows that the same words serve: as many as the rows of four that a window leaves over, at most two."""
    axis = conv.rows
    over = -axis.kernel % ROWS
    return 2 if axis.dilation == 1 and axis.stride <= over else 1


def _pixels(hw: Hardware, dot: Dot, rows: int) -> int:
    return min(MOST_PLACES, (hw.vector_registers - dot.spare) // 2) // rows


def image_width(conv: Conv) -> int:
    """Columns of the image that windows reach over, padding included."""
    axis = conv.columns
    return (axis.out - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1


def pack_depthwise(weight: torch.Tensor) -> torch.Tensor:
    """Rearrange weight[C, 1, KH, KW] (int8) as the kernel reads it: [KH * KW * C], filled up to SMALLEST channels."""
    missing = max(0, SMALLEST - len(weight))
    return torch.nn.functional.pad(weight[:, 0].permute(1, 2, 0), (0, missing)).reshape(-1)


def pack_channels(values: torch.Tensor, plan: DotDepthwisePlan) -> torch.Tensor:
    """Rearrange a number for each channel as the kernel reads it."""
    filled = values.new_zeros(max(values.numel(), SMALLEST))
    filled[: values.numel()] = values
    return torch.cat([filled[chosen] for chosen in _chosen(plan)])


def _chosen(plan: DotDepthwisePlan) -> Iterator[torch.Tensor]:
    """The channels of each block in their order."""
    for block in plan.blocks:
        for i in range(block.count):
            yield torch.tensor(order(block.lanes)) + (block.start + i * block.width)
