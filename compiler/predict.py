"""Predicted latency of a model on machines of the database: the roofline of hwdb.cost, summed over its operators.

Nothing is compiled or run: the graph is captured once, operators are counted on fake tensors, and each machine's rates
turn the counts into seconds. Views cost nothing; an elementwise operator or an inference batch norm joins the operator
that computes its operand, and only its other operands are read. What is predicted is well-scheduled code, so that the
figure is a lower bound to hold measurements against rather than a promise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils.flop_counter import FlopCounterMode

from ..hwdb import Hardware, lookup
from ..hwdb.cost import Work, launch_seconds, memory_bandwidth_gbs, predict_seconds
from ..hwdb.loader import database
from .capture import capture, export

# Multiplications and additions of one element of a transcendental or a normalisation, as polynomials compute them.
_ELEMENT_FLOPS = 10.0

_FOLDED = {torch.ops.aten.batch_norm.default, torch.ops.aten._native_batch_norm_legit_no_training.default}


@dataclass(frozen=True)
class Prediction:
    """Predicted milliseconds of one call on one machine, and the share of it that waits for memory."""

    id: str
    name: str
    milliseconds: float | None  # None where the machine's rates are unknown
    memory_share: float
    weights_bytes: int
    confidence: str

    def line(self) -> str:
        """The prediction for reading."""
        time = "unknown" if self.milliseconds is None else f"{self.milliseconds:9.2f} ms"
        return (
            f"{self.id:24s} {time:>12s}  {self.memory_share:4.0%} waiting for memory  {self.confidence:6s}  {self.name}"
        )


def predict_latency(model: Any, example_inputs: Any, targets: Sequence[Hardware] | None = None) -> list[Prediction]:
    """Predict `model` on `targets` (this machine and every device by default), fastest first.

    Raises CaptureError where the model cannot be one graph.
    """
    if targets is None:
        devices = [id for id, record in database().records.items() if record.kind == "device"]
        targets = [lookup(id) for id in ("native", *devices)]
    program = model if isinstance(model, ExportedProgram) else _export(model, example_inputs)
    graph = capture(program).graph
    works = [work for node in graph.graph.nodes if (work := work_of(node)) is not None]
    weights = sum(tensor.nbytes for tensor in {id(t): t for t in _constants(graph)}.values())
    rows = [_predict(hw, works, weights) for hw in targets]
    return sorted(rows, key=lambda row: float("inf") if row.milliseconds is None else row.milliseconds)


def work_of(node: fx.Node) -> Work | None:
    """Count one node of a captured graph; None where it computes nothing of its own."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or node.target.is_view:
        return None
    values = [v for v in _tensors(node.meta.get("val")) if v.numel()]
    if not values:
        return None
    operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    sizes = sorted((n.meta["val"].nbytes for n in operands), reverse=True)
    elements = sum(v.numel() for v in values)
    if node.target in _FOLDED or (torch.Tag.pointwise in node.target.tags and _computed(operands)):
        return Work(_element_flops(values[0], elements), bytes_read=float(sum(sizes[1:])), launches=0)
    counted = _flops(node)
    flops = {_dtype(values[0]): counted} if counted else _element_flops(values[0], elements)
    written = float(sum(v.nbytes for v in values))
    return Work(flops, bytes_read=float(sum(sizes)), bytes_written=written)


def _predict(hw: Hardware, works: Sequence[Work], weights: int) -> Prediction:
    id = "native" if hw.native else hw.id
    total = waiting = 0.0
    for work in works:
        seconds = predict_seconds(hw, work)
        if seconds is None:
            return Prediction(id, hw.name, None, 0.0, weights, hw.confidence)
        total += seconds
        moved = work.bytes_read + work.bytes_written
        bandwidth = memory_bandwidth_gbs(hw, moved)
        if bandwidth and moved / (bandwidth * 1e9) >= seconds - work.launches * launch_seconds(hw) - 1e-12:
            waiting += seconds
    return Prediction(id, hw.name, total * 1e3, waiting / total if total else 0.0, weights, hw.confidence)


def _export(model: Any, example_inputs: Any) -> ExportedProgram:
    if isinstance(example_inputs, dict):
        return export(model, (), example_inputs)
    return export(model, example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,))


def _flops(node: fx.Node) -> float:
    """Floating point operations of products and convolutions, by torch's own counter; 0 for other operators."""
    arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    args, kwargs = arguments
    mode = next((v.fake_mode for n in node.all_input_nodes for v in _tensors(n.meta.get("val"))), None)
    if mode is None or not callable(node.target):
        return 0.0
    with mode, FlopCounterMode(display=False) as counter:
        node.target(*args, **kwargs)
    return float(counter.get_total_flops())


def _computed(operands: Sequence[fx.Node]) -> bool:
    return any(n.op == "call_function" for n in operands)


def _element_flops(value: torch.Tensor, elements: int) -> dict[str, float]:
    return {_dtype(value): _ELEMENT_FLOPS * elements} if value.is_floating_point() else {}


def _dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _tensors(value: Any) -> list[Any]:
    found = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in found if isinstance(v, torch.Tensor)]


def _constants(graph: fx.GraphModule) -> list[torch.Tensor]:
    names = {str(n.target) for n in graph.graph.nodes if n.op == "get_attr"}
    return [tensor for name in names if isinstance(tensor := getattr(graph, name), torch.Tensor)]
