"""Where to draw the boxes and lines of a graph: in layers, operands above their readers.

Layers are longest paths from the inputs; a line over several layers passes each at a place of its own; the order within
a layer is that of the means of what lies above and below, swept a few times (Sugiyama, Tagawa and Toda, 1981). Lines
over more than LONGEST layers are not drawn: what the reader reads is written beside it instead. Linear in the nodes
and drawn layers, but for the sorting within a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

LONGEST = 32
ROW = 58.0
HEIGHT = 38.0
GAP = 14.0
LANE = 10.0  # width that a passing line takes
SWEEPS = 4
MARGIN = 16.0

Point = tuple[float, float]


@dataclass(frozen=True)
class Drawing:
    """Centres of the boxes' top edges, lines from bottom edges to top edges, and pairs too far apart for a line."""

    width: float
    height: float
    places: list[Point]
    lines: list[tuple[int, int, list[Point]]]
    far: list[tuple[int, int]]


def draw(widths: Sequence[float], edges: Sequence[tuple[int, int]]) -> Drawing:
    """Place boxes of these widths, numbered so that edges go from lower to higher numbers."""
    ranks = _ranks(len(widths), edges)
    sizes, rank_of = list(widths), list(ranks)
    far: list[tuple[int, int]] = []
    chains: list[list[int]] = []
    for a, b in edges:
        if ranks[b] - ranks[a] > LONGEST:
            far.append((a, b))
            continue
        chain = [a]
        for rank in range(ranks[a] + 1, ranks[b]):
            chain.append(len(sizes))
            sizes.append(LANE)
            rank_of.append(rank)
        chains.append([*chain, b])
    above: list[list[int]] = [[] for _ in sizes]
    below: list[list[int]] = [[] for _ in sizes]
    for chain in chains:
        for a, b in pairwise(chain):
            above[b].append(a)
            below[a].append(b)
    layers: list[list[int]] = [[] for _ in range(max(rank_of, default=-1) + 1)]
    for item, rank in enumerate(rank_of):
        layers[rank].append(item)
    x = _columns(layers, sizes, above, below)
    left = min((x[i] - sizes[i] / 2 for i in range(len(sizes))), default=0.0) - MARGIN
    width = max((x[i] + sizes[i] / 2 for i in range(len(sizes))), default=0.0) - left + MARGIN

    def top(item: int) -> Point:
        return round(x[item] - left, 1), MARGIN + rank_of[item] * ROW

    def path(chain: list[int]) -> list[Point]:
        start, end = top(chain[0]), top(chain[-1])
        middle = [(px, py + HEIGHT / 2) for px, py in map(top, chain[1:-1])]
        return [(start[0], start[1] + HEIGHT), *middle, end]

    lines = [(chain[0], chain[-1], path(chain)) for chain in chains]
    height = 2 * MARGIN + len(layers) * ROW
    return Drawing(width, height, [top(i) for i in range(len(widths))], lines, far)


def _ranks(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """The layer of every box: below its operands; what has none, just above its first reader."""
    ranks, nearest = [0] * count, [-1] * count
    fed = [False] * count
    for a, b in sorted(edges, key=lambda edge: edge[1]):
        ranks[b] = max(ranks[b], ranks[a] + 1)
        fed[b] = True
    for a, b in edges:
        nearest[a] = ranks[b] if nearest[a] < 0 else min(nearest[a], ranks[b])
    return [rank if fed[i] or nearest[i] < 1 else nearest[i] - 1 for i, rank in enumerate(ranks)]


def _columns(
    layers: list[list[int]], sizes: Sequence[float], above: list[list[int]], below: list[list[int]]
) -> list[float]:
    """The centre of every item."""
    x = [0.0] * len(sizes)
    for layer in layers:
        _spread(layer, [0.0] * len(layer), sizes, x)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            neighbours = above if down else below
            wanted = {item: _mean([x[n] for n in neighbours[item]], x[item]) for item in layer}
            layer.sort(key=wanted.__getitem__)
            _spread(layer, [wanted[item] for item in layer], sizes, x)
    return x


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default


def _spread(layer: Sequence[int], wanted: Sequence[float], sizes: Sequence[float], x: list[float]) -> None:
    """Place a layer's items in their order near the wanted places, none upon another.

    Pushed to the right from the left, and to the left from the right, neither overlaps; nor does the mean of the two.
    """
    count = len(layer)
    distance = [(sizes[layer[i]] + sizes[layer[i + 1]]) / 2 + GAP for i in range(count - 1)]
    right, left = list(wanted), list(wanted)
    for i in range(1, count):
        right[i] = max(right[i], right[i - 1] + distance[i - 1])
    for i in range(count - 2, -1, -1):
        left[i] = min(left[i], left[i + 1] - distance[i])
    for item, a, b in zip(layer, right, left, strict=True):
        x[item] = (a + b) / 2
