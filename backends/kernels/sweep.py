"""The loop nest of operators that slide a window over each channel by itself: depthwise convolution and pooling, NHWC.

vectors run along channels; a register tile is a few neighbouring output pixels of one vector of channels

    tasks    row blocks x channel blocks
    strips   for each tile position along the row, for a strip of channels: walk down the rows, so that the
             input rows shared by neighbouring windows are still in L1
    taps     kh clipped by loop bounds, kw by the tile's own code (window.Run): nothing is padded
A last vector that would pass the final channel starts earlier instead and recomputes its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from .loops import between, share
from .window import Axis, Placement, Run, runs

WRITTEN_TAPS = 16  # of one row; of a whole window four times as many


@dataclass(frozen=True)
class Windows:
    """Windows over an [N, H, W, C] image."""

    batch: int
    rows: Axis
    columns: Axis
    channels: int

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """[N, H, W, C]."""
        return self.batch, self.rows.size, self.columns.size, self.channels

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """[N, OH, OW, C]."""
        return self.batch, self.rows.out, self.columns.out, self.channels

    @property
    def reads(self) -> int:
        """Inputs read over all outputs: taps on padding left out."""
        taps = self.batch * self.channels
        for axis in (self.rows, self.columns):
            taps *= sum(high - low for low, high in map(axis.taps, range(axis.out)))
        return taps


@dataclass(frozen=True)
class SweepPlan:
    """How the nest is cut."""

    lanes: int
    pixels: int
    strip: int  # vectors of channels walked down the rows together
    row_blocks: int
    channel_blocks: int

    @property
    def reason(self) -> str:
        """The choice in a few words."""
        blocks = f"{self.row_blocks} row x {self.channel_blocks} channel blocks"
        return f"{self.pixels}x{self.lanes}, strips of {self.strip * self.lanes} channels, {blocks}"

    @property
    def tasks(self) -> int:
        """Pieces of one image."""
        return self.row_blocks * self.channel_blocks


def choose_sweep(windows: Windows, hw: Hardware) -> SweepPlan:
    """Choose tile, strip and blocks for `windows`."""
    lanes = min(hw.lanes("float32"), windows.channels)
    vectors = -(-windows.channels // lanes)
    pixels = min(windows.columns.out, hw.vector_registers // 2)
    l1 = hw.cache(1)
    columns = (pixels - 1) * windows.columns.stride + windows.columns.dilation * (windows.columns.kernel - 1) + 1
    row_bytes = 4 * lanes * columns * windows.rows.kernel
    strip = max(1, min(vectors, (l1.size_bytes if l1 else 32 * 1024) // 2 // row_bytes))
    cycles = windows.reads / lanes / hw.fma_per_cycle
    if cycles / hw.cycles_per_us < 2 * hw.launch_us:
        return SweepPlan(lanes, pixels, strip, 1, 1)

    def busiest(row_blocks: int, channel_blocks: int) -> int:
        turns = -(-windows.batch * row_blocks * channel_blocks // hw.cores)
        return turns * -(-windows.rows.out // row_blocks) * -(-vectors // channel_blocks)

    rows_choices = range(1, min(windows.rows.out, 4 * hw.cores) + 1)
    channel_choices = range(1, min(vectors, 2 * hw.cores) + 1)
    row_blocks, channel_blocks = min(
        ((r, c) for r in rows_choices for c in channel_choices),
        key=lambda b: (busiest(*b), b[0] * b[1], b[1]),
    )
    return SweepPlan(lanes, pixels, strip, row_blocks, channel_blocks)


@dataclass(frozen=True)
class Tile:
    """One register tile: `run.pixels` neighbouring outputs of `lanes` channels, and where things lie."""

    run: Run
    lanes: int
    channel: Any  # the first
    row: Any
    column: Any
    corner: Any  # flat index of the input under tap (0, 0) of pixel 0; may lie outside the image
    out: Any  # flat index of pixel 0
    first_tap: Any  # of the rows that exist
    row_taps: Any
    tap_row: int  # flat distance between tap rows, tap columns, input pixels, output pixels
    tap_column: int
    pixel: int
    out_pixel: int


def sweep(windows: Windows, plan: SweepPlan, emit: Callable[[Any, Tile], None], place: Placement | None = None) -> None:
    """Emit the nest; emit(accumulators, tile) is called where a tile's code belongs.

    `place` puts the outputs into a larger image.
    """
    rows, columns, channels = windows.rows, windows.columns, windows.channels
    place = place or Placement(rows.out, columns.out)
    lanes = plan.lanes
    vectors = -(-channels // lanes)
    tasks = windows.batch * plan.tasks
    with (T.parallel if tasks > 1 else T.serial)(0, tasks) as task:
        acc = T.alloc_buffer((plan.pixels * lanes,), "float32", scope="local")
        image = T.bind(task // plan.tasks)
        first_row, last_row = share(rows.out, plan.row_blocks, task // plan.channel_blocks % plan.row_blocks)
        first, last = share(vectors, plan.channel_blocks, task % plan.channel_blocks)
        first, last = T.bind(first), T.bind(last)

        def tile(run: Run, column: Any, row: Any, vector: Any) -> None:
            channel = T.bind(vector * lanes if channels % lanes == 0 else tirx.min(vector * lanes, channels - lanes))
            first_tap, row_taps = rows.dynamic_taps(row)
            in_row = image * rows.size + rows.first(row)
            out_row = image * place.height + place.start[0] + row * place.step[0]
            out_column = place.start[1] + column * place.step[1]
            emit(
                acc,
                Tile(
                    run,
                    lanes,
                    channel,
                    row,
                    column,
                    T.bind((in_row * columns.size + columns.first(column)) * channels + channel),
                    T.bind((out_row * place.width + out_column) * channels + channel),
                    first_tap,
                    row_taps,
                    rows.dilation * columns.size * channels,
                    columns.dilation * channels,
                    columns.stride * channels,
                    place.step[1] * channels,
                ),
            )

        def walk(run: Run, column: Any) -> None:
            strips = -(-vectors // plan.strip)
            if plan.channel_blocks > 1:
                strips = tirx.floordiv(last - first + plan.strip - 1, plan.strip)
            with T.serial(0, strips) as strip:
                begin = T.bind(first + strip * plan.strip)
                end = T.bind(tirx.min(begin + plan.strip, last))
                with between(first_row, last_row) as row, between(begin, end) as vector:
                    tile(run, column, row, vector)

        for run in runs(columns, plan.pixels):
            if run.count == 1:
                walk(run, run.start)
            else:
                with T.serial(0, run.count) as i:
                    walk(run, run.start + i * run.pixels)


def each_tap(tile: Tile, emit: Callable[[int, Any, Any, Any], None]) -> None:
    """Emit the tile's taps; emit(pixel, flat input index, kh, kw) once for each tap a pixel reads.

    Few taps are written out, in the order of the input columns, so that one load serves all the windows that share it;
    many are loops.
    """
    spans = tile.run.spans
    in_row = sum(s.taps for s in spans)

    def row(kh: Any) -> None:
        line = T.bind(tile.corner + kh * tile.tap_row)
        if in_row <= WRITTEN_TAPS:
            reads = [(p, kw) for s in spans for kw in range(s.tap, s.tap + s.taps) for p in range(s.low, s.high)]
            for p, kw in sorted(reads, key=lambda r: (r[0] * tile.pixel + r[1] * tile.tap_column, r[1])):
                emit(p, line + (p * tile.pixel + kw * tile.tap_column), kh, kw)
            return
        for s in spans:
            with between(s.tap, s.tap + s.taps) as kw:
                at = T.bind(line + kw * tile.tap_column)
                for p in range(s.low, s.high):
                    emit(p, at + p * tile.pixel, kh, kw)

    if isinstance(tile.row_taps, int) and tile.row_taps * in_row <= 4 * WRITTEN_TAPS:
        for kh in range(tile.row_taps):
            row(tile.first_tap + kh)
    else:
        with T.serial(0, tile.row_taps) as i:
            row(tile.first_tap + i)
