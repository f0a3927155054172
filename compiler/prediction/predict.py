"""Predicted latency, memory and energy of a model on machines of the database: always predicted, never measured.

Nothing is compiled or run. The graph is captured once and rewritten by the passes once for each width of vector, not
once a device; every operator is then costed for every device: on CPUs by the plan its kernel would choose, on GPUs and
NPUs by a roofline. What is predicted is well-scheduled code, so that the figure is a lower bound to hold measurements
against rather than a promise; `BANDS` says how far above it they are to be expected.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from ...errors import InputError, suggest
from ...hwdb import Hardware, lookup
from ...hwdb.dtypes import BITS, dtype_name
from ...hwdb.loader import database
from .. import pipeline
from ..capture import capture, export
from .workload import Operation, Workload, workload

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
_NARROWER = {
    "float32": ("bfloat16", "float16", "int8"),
    "bfloat16": ("float16", "int8"),
    "float16": ("bfloat16", "int8"),
}

# What measurements are to be expected within, as multiples of the prediction, by how sure the facts are: as wide as
# published figures of good libraries lie above predictions (docs/predictions.md). Cores of boards are narrow, often in
# order, with little cache: nothing hides there, and libraries differ most.
BANDS: dict[tuple[str, str], tuple[float, float]] = {
    ("cpu", "high"): (0.9, 1.8),
    ("cpu", "medium"): (0.8, 2.2),
    ("cpu", "low"): (0.6, 4.0),
    ("board", "high"): (0.9, 4.0),
    ("board", "medium"): (0.8, 5.0),
    ("board", "low"): (0.6, 6.0),
    ("accelerator", "high"): (0.9, 5.0),
    ("accelerator", "medium"): (0.8, 6.0),
    ("accelerator", "low"): (0.5, 8.0),
}
_NATIVE_BAND = (0.85, 1.3)


@dataclass(frozen=True)
class Prediction:
    """What one call of the model is predicted to take on one machine; None where the machine's facts do not say."""

    id: str
    name: str
    kind: str  # cpu, board, gpu, npu
    precision: str  # dtype of the products: what was asked for, or the widest the machine has
    milliseconds: float | None
    least_ms: float | None  # the band measurements are to be expected in
    most_ms: float | None
    memory_share: float  # of the time, in operators that wait for memory
    launch_share: float
    joules: float | None  # no more than: the device's power limit for the whole time
    memory_bytes: int  # weights and the activations alive at one time
    fits: bool | None  # in the device's memory
    confidence: str
    plannable_only: bool  # no code can be made for it here

    @staticmethod
    def heading() -> str:
        """What the columns of `line` are."""
        return (
            f"{'predicted, not measured':26s} {'latency':>9s}     {'measured within':>18s}  {'dtype':8s} "
            f"{'waiting for':11s} {'launching':11s}  {'energy':>10s}  {'memory':9s} {'facts':6s}  name"
        )

    def line(self) -> str:
        """The prediction for reading."""
        if self.milliseconds is None:
            time, band = "unknown", ""
        else:
            time, band = _ms(self.milliseconds), f"{_ms(self.least_ms or 0)} to {_ms(self.most_ms or 0)}"
        energy = "" if self.joules is None else f"<= {self.joules * 1e3:.3g} mJ"
        room = {True: "fits", False: "too large", None: "?"}[self.fits]
        return (
            f"{self.id:26s} {time:>9s} ms  {band:>18s}  {self.precision:8s} {self.memory_share:4.0%} memory "
            f"{self.launch_share:4.0%} launch  {energy:>12s}  {room:9s} {self.confidence:6s}  {self.name}"
        )


def predict_latency(
    model: Any, example_inputs: Any, targets: Iterable[Hardware] | None = None, precision: str = "fp32"
) -> list[Prediction]:
    """Predict `model` on `targets` (this machine and every device by default), fastest first.

    `precision` is "fp32", "fp16", "bf16" or "int8"; a machine without arithmetic for it is predicted in the widest
    that it has, which its row says. Raises CaptureError where the model cannot be one graph, InputError for an unknown
    precision.
    """
    wanted = precision_dtype(precision)
    return ranked(Predictor(model, example_inputs), devices() if targets is None else targets, wanted)


def ranked(predictor: Predictor, targets: Iterable[Hardware], dtype: str = "float32") -> list[Prediction]:
    """Predictions for `targets`, fastest first; those that are unknown come last."""
    rows = [predictor.predict(hw, dtype) for hw in targets]
    return sorted(rows, key=lambda row: float("inf") if row.milliseconds is None else row.milliseconds)


def precision_dtype(precision: str) -> str:
    """The dtype of `precision`; raises InputError where it is none of PRECISIONS."""
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}{suggest(precision, PRECISIONS)}")
    return dtype_name(precision)


def devices() -> list[Hardware]:
    """This machine, and every device of the database."""
    ids = [id for id, record in database().records.items() if record.kind == "device"]
    return [lookup(id) for id in ("native", *ids)]


class Predictor:
    """A model, captured once, and its workloads: rewritten once for each width of vector."""

    def __init__(self, model: Any, example_inputs: Any) -> None:
        program = model if isinstance(model, ExportedProgram) else _export(model, example_inputs)
        self.graph: fx.GraphModule = capture(program).graph
        self._workloads: dict[int, Workload] = {}

    def workload(self, hw: Hardware) -> Workload:
        """The operators of the graph as the passes leave it for machines like `hw`."""
        bits = hw.vector_bits if hw.kind in ("cpu", "board") else 256
        if bits not in self._workloads:
            from ...passes.default import PASSES

            like = hw if hw.kind in ("cpu", "board") else lookup("x86-64-v3")
            self._workloads[bits] = workload(pipeline.run(self.graph, like, PASSES)[0])
        return self._workloads[bits]

    def predict(self, hw: Hardware, dtype: str = "float32") -> Prediction:
        """Predict one call on `hw` with products in `dtype`, or the widest narrower one that the machine has."""
        own = supported(hw, dtype)
        times = None if own is None else self.times(hw, own)
        work = self.workload(hw)
        total = waiting = launching = None if times is None else 0.0
        if times is not None:
            total = sum(time.seconds for time in times)
            waiting = sum(time.seconds for time in times if time.waits)
            launching = sum(time.launch for time in times)
        item = BITS[own or dtype] / 8
        memory = int(item * (work.weight_elements + work.activation_elements))
        low, high = band(hw)
        return Prediction(
            "native" if hw.native else hw.id,
            hw.name,
            hw.kind,
            own or dtype,
            None if total is None else total * 1e3,
            None if total is None else total * 1e3 * low,
            None if total is None else total * 1e3 * high,
            waiting / total if total and waiting else 0.0,
            launching / total if total and launching else 0.0,
            None if total is None or hw.tdp_watts is None else total * hw.tdp_watts,
            memory,
            None if hw.dram_bytes is None else memory <= hw.dram_bytes,
            hw.confidence,
            hw.refusal() is not None,
        )

    def times(self, hw: Hardware, dtype: str) -> list[Time] | None:
        """Seconds of every operator on `hw`, or None where the machine's rates are unknown."""
        return operation_times(self.workload(hw), hw, dtype)


@dataclass(frozen=True)
class Time:
    """Seconds of all calls of one operator of the workload."""

    operation: Operation
    seconds: float
    launch: float
    waits: bool  # for memory


def operation_times(work: Workload, hw: Hardware, dtype: str) -> list[Time] | None:
    """Seconds of every operator on `hw`, or None where the machine's rates are unknown."""
    if hw.kind in ("cpu", "board"):
        return _cpu_times(work, hw, dtype)
    from .accelerator import Accelerated, launch_seconds

    device = Accelerated(work, hw, dtype)
    if not device.known:
        return None
    found = []
    for operation in work.operations:
        cost = device.cost(operation)
        launch = operation.launches * launch_seconds(hw)
        count = operation.count
        found.append(Time(operation, count * cost.seconds, count * launch, cost.memory >= cost.arithmetic))
    return found


def _cpu_times(work: Workload, hw: Hardware, dtype: str) -> list[Time] | None:
    from ...hwdb.cost import launch_seconds, memory_bandwidth_gbs
    from .cpu import narrowed, operation_seconds, waking_seconds

    like = narrowed(hw, dtype)
    found = []
    for operation in work.operations:
        seconds = operation_seconds(operation, like)
        if seconds is None:
            return None
        moved = 4.0 * (operation.read + operation.written + operation.weights)
        rate = memory_bandwidth_gbs(like, moved)
        waits = rate is not None and moved / (rate * 1e9) >= 0.7 * seconds
        launch = min(seconds, launch_seconds(hw)) * operation.launches
        found.append(Time(operation, operation.count * seconds, operation.count * launch, waits))
    if not found:
        return []
    first = found[0]
    woken = waking_seconds(hw)
    return [Time(first.operation, first.seconds + woken, first.launch + woken, first.waits), *found[1:]]


def band(hw: Hardware) -> tuple[float, float]:
    """The least and the most that measurements are to be expected at, as multiples of a prediction."""
    if hw.native:
        return _NATIVE_BAND
    return BANDS[hw.kind if hw.kind in ("cpu", "board") else "accelerator", hw.confidence]


def supported(hw: Hardware, dtype: str) -> str | None:
    """`dtype`, else on CPUs float32 (nothing is gained), on others the widest narrower dtype with a known rate."""
    if hw.kind in ("cpu", "board"):
        return dtype if hw.supports(dtype) else "float32"
    wider = () if dtype == "float32" else ("float16", "bfloat16", "float32")
    for own in (dtype, *(_NARROWER.get(dtype, ()) if dtype == "float32" else wider), *_NARROWER.get(dtype, ())):
        if hw.supports(own) and hw.peak_flops(own) is not None:
            return own
    return None


def _export(model: Any, example_inputs: Any) -> ExportedProgram:
    if isinstance(example_inputs, dict):
        return export(model, (), example_inputs)
    return export(model, example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,))


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
