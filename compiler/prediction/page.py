"""Predictions as one self-contained page: a roofline plot, the ranking with its error bands, and the table.

The plots are inline SVG made here: no script, nothing fetched. Names of models and devices pass jinja2's escaping.

    roofline     x: FLOPs for each byte that moves; y: FLOP/s. A device's roof is min(peak, bandwidth * x). Dots are
                 the operators of the model on the first device shown, as large as their share of the time. Winograd
                 convolutions are counted as direct sums, and may lie above a roof.
    ranking      predicted milliseconds, and the band that measurements are to be expected in
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from ...hwdb import Hardware
from ...hwdb.dtypes import BITS
from .predict import Prediction, Predictor, supported

MOST_ROOFS = 6
MOST_BARS = 60
COLORS = ("#175cd3", "#b42318", "#067647", "#6941c6", "#b54708", "#0e7090")

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT = 860.0, 430.0, 64.0, 16.0, 26.0


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis from pixel `start` to pixel `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of `value`, kept within the axis."""
        share = (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Pixels and labels of the powers of ten."""
        powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
        return [(self.at(10.0**power), f"{10.0**power:g}") for power in powers]


@dataclass(frozen=True)
class Dot:
    """An operator, or the whole model."""

    x: float
    y: float
    radius: float
    title: str


@dataclass(frozen=True)
class Roof:
    """One device: its roof as a path, and the model under it."""

    name: str
    color: str
    path: str
    whole: Dot | None


@dataclass(frozen=True)
class Bar:
    """One row of the ranking."""

    label: str
    kind: str
    y: float
    width: float
    low: float
    high: float
    text: str


def page(
    title: str, predictor: Predictor, targets: Sequence[Hardware], rows: Sequence[Prediction], dtype: str, chosen: bool
) -> str:
    """The page as HTML; `chosen` says that the user named the devices, which then are those of the roofline plot."""
    known = [row for row in rows if row.milliseconds is not None]
    by_id = {("native" if hw.native else hw.id): hw for hw in targets}
    shown = [by_id[row.id] for row in (known if chosen else _examples(known))][:MOST_ROOFS]
    x, y = _scales(predictor, shown, dtype)
    roofs = [_roof(predictor, hw, dtype, color, x, y) for hw, color in zip(shown, COLORS, strict=False)]
    bars, axis = _bars(_spread(known))
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("page.html").render(
        title=title,
        dtype=dtype,
        x=x,
        y=y,
        width=_WIDTH,
        height=_HEIGHT,
        roofs=roofs,
        dots=_dots(predictor, shown[0], dtype, x, y) if shown else [],
        first=shown[0].name if shown else "",
        bars=bars,
        axis=axis,
        left_out=len(known) - len(bars),
        rows=rows,
        work=predictor.workload(shown[0]) if shown else None,
    )


def _examples(known: Sequence[Prediction]) -> list[Prediction]:
    """This machine, the fastest of each kind, and the one in the middle of the boards: what people compare."""
    boards = [row for row in known if row.kind == "board"]
    wanted = [row for row in known if row.id == "native"]
    for kind in ("gpu", "npu", "cpu"):
        wanted += [row for row in known if row.kind == kind and row.id != "native"][:1]
    wanted += [*boards[:1], *boards[len(boards) // 2 :][:1]]
    return list({row.id: row for row in wanted}.values())


def _spread(known: Sequence[Prediction]) -> list[Prediction]:
    """At most MOST_BARS rows: the fastest half of them, this machine, and of the slower ones every so many."""
    if len(known) <= MOST_BARS:
        return list(known)
    first = MOST_BARS // 2
    step = -(-(len(known) - first) // (MOST_BARS - first - 1))
    return [row for i, row in enumerate(known) if i < first or (i - first) % step == 0 or row.id == "native"]


def _rates(hw: Hardware, dtype: str) -> tuple[float, float] | None:
    """GFLOP/s at the peak and GB/s of memory, 0 where that is not known."""
    peak = hw.peak_flops(supported(hw, dtype) or dtype)
    return None if peak is None else (peak / 1e9, hw.dram_gbs or 0.0)


def _intensities(predictor: Predictor, hw: Hardware, dtype: str) -> list[tuple[float, float, float, str]]:
    """FLOPs a byte, GFLOP/s, seconds and name of every operator that multiplies, on `hw`."""
    own = supported(hw, dtype)
    item = BITS[own or dtype] / 8
    found = []
    for time in (predictor.times(hw, own) if own is not None else None) or ():
        operation = time.operation
        moved = item * (operation.read + operation.written + operation.weights)
        if operation.product_flops and moved and time.seconds:
            rate = operation.count * operation.product_flops / time.seconds / 1e9
            name = f"{operation.count} x {operation.name}" if operation.count > 1 else operation.name
            found.append((operation.product_flops / moved, rate, time.seconds, name))
    return found


def _scales(predictor: Predictor, shown: Sequence[Hardware], dtype: str) -> tuple[Scale, Scale]:
    rates = [found for hw in shown if (found := _rates(hw, dtype)) is not None] or [(1.0, 1.0)]
    points = _intensities(predictor, shown[0], dtype) if shown else []
    xs = [1.0] * (not points) + [x for x, *_ in points] + [peak / bandwidth for peak, bandwidth in rates if bandwidth]
    ys = [y for _, y, *_ in points] + [peak for peak, _ in rates]
    return (
        Scale(
            10 ** math.floor(math.log10(min(xs)) - 0.3),
            10 ** math.ceil(math.log10(max(xs)) + 0.3),
            _LEFT,
            _WIDTH - _RIGHT,
        ),
        Scale(
            10 ** math.floor(math.log10(min(ys)) - 0.2), 10 ** math.ceil(math.log10(max(ys)) + 0.1), _HEIGHT - 44, _TOP
        ),
    )


def _roof(predictor: Predictor, hw: Hardware, dtype: str, color: str, x: Scale, y: Scale) -> Roof:
    rates = _rates(hw, dtype)
    path = ""
    if rates is not None:
        peak, bandwidth = rates
        corners = [(x.low, peak), (x.high, peak)]
        if bandwidth:
            start = max(x.low, y.low / bandwidth)
            corners = [(start, min(peak, bandwidth * start)), (peak / bandwidth, peak), (x.high, peak)]
        path = "M" + " L".join(f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in corners)
    points = predictor.times(hw, supported(hw, dtype) or dtype) or []
    work, item = predictor.workload(hw), BITS[supported(hw, dtype) or dtype] / 8
    seconds = sum(time.seconds for time in points)
    moved = item * sum(o.count * (o.read + o.written + o.weights) for o in work.operations)
    whole = None
    if seconds and moved and work.flops:
        rate = work.flops / seconds / 1e9
        whole = Dot(x.at(work.flops / moved), y.at(rate), 6, f"the whole model on {hw.name}: {seconds * 1e3:.3g} ms")
    return Roof(hw.name, color, path, whole)


def _dots(predictor: Predictor, hw: Hardware, dtype: str, x: Scale, y: Scale) -> list[Dot]:
    points = _intensities(predictor, hw, dtype)
    total = sum(seconds for _, _, seconds, _ in points) or 1.0
    return [
        Dot(
            x.at(intensity),
            y.at(rate),
            2 + 22 * math.sqrt(seconds / total),
            f"{name}: {seconds * 1e6:.1f} us, {rate:.3g} GFLOP/s, {intensity:.3g} FLOPs a byte",
        )
        for intensity, rate, seconds, name in sorted(points, key=lambda point: -point[2])
    ]


def _bars(rows: Sequence[Prediction]) -> tuple[list[Bar], Scale]:
    times = [(row.least_ms or 1.0, row.milliseconds or 1.0, row.most_ms or 1.0) for row in rows] or [(1.0, 1.0, 1.0)]
    low = 10 ** math.floor(math.log10(min(least for least, _, _ in times)))
    high = max(10.0 * low, 10 ** math.ceil(math.log10(max(most for _, _, most in times))))
    axis = Scale(low, high, 250.0, _WIDTH - _RIGHT)
    bars = []
    for i, (row, (least, time, most)) in enumerate(zip(rows, times, strict=False)):
        text = f"{row.name}: {time:.3g} ms predicted, {least:.3g} to {most:.3g} ms expected ({row.precision})"
        place = axis.at(time)
        bars.append(Bar(row.id, row.kind, 24 + 17 * i, place - axis.start, axis.at(least), axis.at(most), text))
    return bars, axis
