"""When Winograd convolution pays, how its nest is cut, and the packed form of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from ...hwdb import Hardware
from ...hwdb.cost import overlapped
from ..tiling import ALIAS_BYTES, TILE_CYCLES, core_l2_bytes, step_cycles
from .conv_plan import Conv, memory_cycles, most_rows, widest
from .window import Axis, balanced
from .winograd_error import refusal

L3_BYTES_PER_CYCLE = 8.0  # of one core while all of them read
# Register tiles of a product from which on they ask for the next one's weights: fewer wait for memory, asked or not.
ASK_TILES = 3
# Share of the time of moving weights that arithmetic does not hide, by the register tiles that read them: one alone
# keeps pace with the hardware's prefetching. Fitted on 256x14x14 and 512x7x7, two cores of Zen 4.
EXPOSED_ONCE, EXPOSED = 0.2, 0.5

# The pairs +-p of points, for each m.
PAIRS = {2: (1.0,), 4: (0.75, 1.5)}


@dataclass(frozen=True)
class WinogradPlan:
    """How the nest is cut."""

    m: int
    lanes: int
    vectors: int  # of a panel
    rows: int  # of the register tile: tiles times vectors
    chunk: int  # rows of tiles
    split: bool
    parts: int  # of the tasks that transform the input in split mode: channel blocks
    cycles: float  # predicted, of the busiest core
    efficiency: float  # predicted, the direct sum's operations against the peak: may pass 1
    tile_rows: int  # of all images
    tile_columns: int
    panels: int
    by_element: bool = False  # V is read by vectors of channels, whose lanes are factors

    @property
    def n(self) -> int:
        """Points."""
        return self.m + 2

    @property
    def chunks(self) -> int:
        """Chunks of rows of tiles."""
        return -(-self.tile_rows // self.chunk)

    @property
    def tasks(self) -> int:
        """Pieces of the products that may run at once."""
        return self.chunks * (self.panels if self.split else 1)

    @property
    def asks(self) -> bool:
        """Whether a product asks for the next one's weights."""
        return self.split and len(balanced(self.chunk * self.tile_columns, self.rows)) >= ASK_TILES

    @property
    def reason(self) -> str:
        """The choice in a few words."""
        nr = self.vectors * self.lanes
        how = "split over chunks and panels" if self.split else "fused"
        return (
            f"F({self.m}x{self.m}), {self.rows}x{nr}, {self.chunks} chunks of {self.chunk * self.tile_columns} tiles, "
            f"{how}, predicted {self.efficiency:.2f} of the direct sum's peak"
        )

    @property
    def layout(self) -> str:
        """A name of the packed weight's arrangement."""
        return f"winograd_{self.m}_panels_{self.vectors * self.lanes}"


def filter_matrix(m: int) -> torch.Tensor:
    """G[n, 3], float64: the filter's values at the points, divided by the product of the points' distances."""
    points = [0.0, *(s * p for p in PAIRS[m] for s in (1.0, -1.0))]
    rows = []
    for p in points:
        scale = prod(p - q for q in points if q != p)
        rows.append([p**k / scale for k in range(3)])
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)


def pack_weight(weight: torch.Tensor, plan: WinogradPlan) -> torch.Tensor:
    """U = G w G^T of weight[K, C, 3, 3], computed in float64, as [K / NR, n * n, C, NR]."""
    filters, channels = weight.shape[:2]
    g = filter_matrix(plan.m)
    u = torch.einsum("ij,kcjl,ml->imck", g, weight.double(), g).float()
    nr = plan.vectors * plan.lanes
    return u.reshape(plan.n**2, channels, filters // nr, nr).permute(2, 0, 1, 3).contiguous()


def tile_axis(axis: Axis, m: int) -> Axis:
    """The tiles along an axis as windows of n inputs, m apart."""
    return Axis(axis.size, -(-axis.out // m), m + 2, m, axis.before)


def choose_winograd(conv: Conv, hw: Hardware) -> WinogradPlan | None:
    """The cheapest plan, or None where there is none."""
    return next(iter(rank_winograd(conv, hw)), None)


@lru_cache(maxsize=256)
def rank_winograd(conv: Conv, hw: Hardware) -> tuple[WinogradPlan, ...]:
    """All plans, the cheapest first."""
    return tuple(sorted(plans(conv, hw), key=lambda plan: plan.cycles))


def plans(conv: Conv, hw: Hardware) -> list[WinogradPlan]:
    """All plans; none unless the convolution is 3 x 3 of stride 1 in whole vectors of channels, and rounds little."""
    lanes = hw.lanes("float32")
    plain = conv.kernel == (3, 3) and conv.stride == conv.dilation == (1, 1) and conv.groups == 1
    if not plain or conv.channels % lanes or conv.filters % lanes:
        return []
    return [
        plan
        for m, pairs in PAIRS.items()
        if refusal(pairs, conv.channels) is None
        for vectors in range(1, widest(hw) + 1)
        if conv.filters % (vectors * lanes) == 0
        for plan in _plans_of(conv, hw, m, vectors)
    ]


def _plans_of(conv: Conv, hw: Hardware, m: int, vectors: int) -> list[WinogradPlan]:
    """The plans of one tile and panel size: every chunk, fused and split."""
    lanes, n = hw.lanes("float32"), m + 2
    rows, columns = tile_axis(conv.rows, m), tile_axis(conv.columns, m)
    tile_rows, panels = conv.batch * rows.out, conv.filters // (vectors * lanes)
    weights = 4 * n * n * conv.channels * conv.filters
    per_tile_in = conv.channels // lanes * 3.0 * n * n  # cycles: two passes, each a load and a store
    per_tile_out = 1.5 * (n * n + n * m) * vectors
    l2_bytes = core_l2_bytes(hw)
    streaming = memory_cycles(hw, weights)
    most_v = max(2 * 2**20, hw.caches[-1].size_bytes // 2 if hw.caches else 0)  # V stays in the last cache
    launch = hw.launch_us * hw.cycles_per_us
    found = []
    for chunk in sorted({-(-tile_rows // c) for c in range(1, tile_rows + 1)}):
        tiles, chunks = chunk * columns.out, -(-tile_rows // chunk)
        v_bytes, m_bytes = 4 * n * n * tiles * conv.channels, 4 * n * n * tiles * vectors * lanes
        size, product = _product_cycles(conv, hw, tiles, vectors)
        panel = n * n * product + tiles * per_tile_out
        exposed = EXPOSED_ONCE if tiles == size else EXPOSED
        if m_bytes > l2_bytes // 4:
            continue
        for split in (False, True):
            if split:
                if chunks * v_bytes > most_v:
                    continue
                parts = 1 if tile_rows % hw.cores == 0 else min(hw.cores, conv.channels // lanes)
                first = -(-tile_rows * parts // hw.cores) * columns.out * per_tile_in / parts
                turns = -(-chunks * panels // hw.cores)
                arithmetic = first + turns * panel
                # The chunks of a panel follow each other: its part of U is read once if it stays in L2.
                again = 1 if weights // panels <= l2_bytes // 2 else chunks
                moved = again * weights / hw.cores * exposed
                if chunks * v_bytes > l2_bytes * 3 // 4:
                    moved += turns * v_bytes
                elif v_bytes + weights // panels > l2_bytes * 3 // 4:  # U pushes V out of L2, panel by panel
                    moved += turns * v_bytes * EXPOSED
            else:
                parts = 1
                turns = -(-chunks // hw.cores)
                arithmetic = turns * (tiles * per_tile_in + panels * panel)
                moved = (1 if weights + v_bytes <= l2_bytes * 3 // 4 else turns) * weights * exposed
                if v_bytes > l2_bytes // 2:
                    moved += turns * panels * v_bytes
            # Cores that read all of U fetch it once for every two of them: they run side by side, but not in step.
            fetched = streaming if split else streaming * max(1.0, min(chunks, hw.cores) / 2)
            cycles = overlapped(hw, arithmetic + moved / L3_BYTES_PER_CYCLE, fetched) + launch * (1 + split)
            ideal = conv.flops / 2 / lanes / hw.fma_per_cycle / hw.cores
            found.append(
                WinogradPlan(
                    m,
                    lanes,
                    vectors,
                    size,
                    chunk,
                    split,
                    parts,
                    cycles,
                    ideal / cycles,
                    tile_rows,
                    columns.out,
                    panels,
                    hw.multiplies_by_element,
                )
            )
    return found


def _product_cycles(conv: Conv, hw: Hardware, tiles: int, vectors: int) -> tuple[int, float]:
    """The best register tile for `tiles` rows, and the cycles of one product with one panel."""
    aliased = conv.channels * 4 % ALIAS_BYTES == 0
    best: tuple[float, int] | None = None
    for rows in range(1, min(tiles, most_rows(hw, vectors), 8 if aliased else tiles) + 1):
        cycles = sum(
            conv.channels * step_cycles(hw, size, vectors) + TILE_CYCLES + size * vectors
            for size in balanced(tiles, rows)
        )
        if best is None or cycles < best[0]:
            best = cycles, rows
    assert best is not None
    return best[1], best[0]
