"""An explanation as one self-contained page: the graph as captured and as it was lowered, side by side.

The drawings are inline SVG made here; details lie in the page as JSON, which its script shows with textContent only.
Everything else goes through jinja2's escaping: names of models, inputs and source lines are not to be trusted.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, FileSystemLoader
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import predict_seconds
from ...passes import dialect
from ...passes.moves.copies import is_copy
from ...passes.printer import format_type
from .graph_drawing import HEIGHT, Drawing, draw

if TYPE_CHECKING:
    from ...backends.lowering.registry import KernelCall
    from .explain import Explanation

aten = torch.ops.aten

LETTER = 7.0  # width of one, in the box's font
LONGEST_LABEL = 34
TRACE_LINES = 12

_PRODUCTS = frozenset(
    {
        dialect.conv2d,
        dialect.conv_transpose2d,
        dialect.linear,
        dialect.matmul,
        dialect.attention,
        dialect.strided_attention,
        aten.linear.default,
        aten.matmul.default,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.scaled_dot_product_attention.default,
    }
)


@dataclass(frozen=True)
class _Box:
    """A node as the template draws it."""

    number: int
    kind: str
    label: str
    type: str
    x: float
    y: float
    width: float
    heat: float  # of the longest predicted time


@dataclass(frozen=True)
class _Pane:
    """One of the two graphs."""

    name: str
    heading: str
    drawing: Drawing
    boxes: list[_Box]
    details: list[dict[str, Any]]


def page(explanation: Explanation, title: str) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    traces = _Traces()
    before = _pane("before", "as captured", explanation.captured, _captured_details(explanation), explanation, traces)
    after = _pane("after", "as lowered", explanation.rewritten, _lowered_details(explanation), explanation, traces)
    data = {"before": before.details, "after": after.details, "traces": traces.texts}
    grouped = Counter((r.rule, r.operator, r.reason) for r in explanation.refusals)
    return environment.get_template("page.html").render(
        title=title,
        explanation=explanation,
        savings=explanation.savings(),
        panes=(before, after),
        refusals=[(*key, count) for key, count in grouped.most_common()],
        box_height=HEIGHT,
        data=data,
    )


class _Traces:
    """Stack traces by number: layers of one class share theirs."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, node: fx.Node) -> int:
        lines = str(node.meta.get("stack_trace") or "").rstrip().splitlines()
        return self.numbers.setdefault("\n".join(lines[-TRACE_LINES:]), len(self.numbers))

    @property
    def texts(self) -> list[str]:
        return list(self.numbers)


Details = Mapping[str, dict[str, Any]]


def _captured_details(explanation: Explanation) -> Details:
    """By node: what stands for it now, and why passes refused it."""
    found: dict[str, dict[str, Any]] = {}
    for name, (_, origins) in explanation.origins.items():
        for origin in origins:
            found.setdefault(origin, {"to": []})["to"].append(name)
    return found


def _lowered_details(explanation: Explanation) -> Details:
    """By node: the pass that made it, what it stands for, its kernel."""
    found: dict[str, dict[str, Any]] = {
        name: {"pass": made, "to": origins} for name, (made, origins) in explanation.origins.items()
    }
    for node in explanation.rewritten.graph.nodes:
        call: KernelCall | None = node.meta.get("kernel_call")
        if call is not None:
            found.setdefault(node.name, {}).update(_kernel(call, explanation.hw))
    return found


def _kernel(call: KernelCall, hw: Hardware) -> dict[str, Any]:
    seconds = call.predicted_seconds if call.predicted_seconds is not None else predict_seconds(hw, call.work)
    return {"kernel": f"{call.algorithm}: {call.choice}", "us": None if seconds is None else round(seconds * 1e6, 2)}


def _pane(
    name: str, heading: str, graph: fx.GraphModule, details: Details, explanation: Explanation, traces: _Traces
) -> _Pane:
    nodes = [n for n in graph.graph.nodes if n.op != "get_attr"]
    numbers = {node: i for i, node in enumerate(nodes)}
    edges = [(numbers[a], numbers[b]) for b in nodes for a in dict.fromkeys(b.all_input_nodes) if a in numbers]
    labels = [_label(node) for node in nodes]
    types = [_short(format_type(node.meta.get("val"))) if node.op != "output" else "" for node in nodes]
    widths = [LETTER * max(len(a), len(b)) + 20 for a, b in zip(labels, types, strict=True)]
    drawing = draw(widths, edges)
    refused: dict[str, list[str]] = {}
    for r in explanation.refusals:
        refused.setdefault(r.node, []).append(f"{r.rule}: {r.reason}")
    rows = [_detail(node, details.get(node.name, {}), refused.get(node.name, []), traces) for node in nodes]
    for a, b in drawing.far:
        rows[b].setdefault("far", []).append(nodes[a].name)
    longest = max((row.get("us") or 0.0 for row in rows), default=0.0) or 1.0
    boxes = [
        _Box(i, _kind(node), labels[i], types[i], x, y, widths[i], (rows[i].get("us") or 0.0) / longest)
        for i, (node, (x, y)) in enumerate(zip(nodes, drawing.places, strict=True))
    ]
    return _Pane(name, heading, drawing, boxes, rows)


def _detail(node: fx.Node, known: dict[str, Any], refused: Sequence[str], traces: _Traces) -> dict[str, Any]:
    row: dict[str, Any] = {"name": node.name, "operator": str(node.target) if node.op != "output" else "output"}
    row["type"] = format_type(node.meta.get("val")) if node.op != "output" else ""
    row["call"] = _call(node)
    row["trace"] = traces.number(node)
    if refused:
        row["refused"] = list(dict.fromkeys(refused))
    return {**row, **known}


def _call(node: fx.Node) -> str:
    """The operands, constants with their types."""
    shown: dict[fx.Node, str] = {
        n: f"{n.name}: {format_type(n.meta.get('val'))}" if n.op == "get_attr" else n.name for n in node.all_input_nodes
    }

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return shown[value]
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(text(v) for v in value)}]"
        return str(value)

    arguments = [text(a) for a in node.args] + [f"{k}={text(v)}" for k, v in node.kwargs.items()]
    return "" if node.op == "placeholder" else ", ".join(arguments)


def _label(node: fx.Node) -> str:
    if node.op != "call_function":
        return _short(node.name if node.op == "placeholder" else "output")
    name = str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        name = name.split(".")[1]
        parts = {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)}
        extra = ["add"] if parts.get("residual") is not None else []
        extra += [str(parts[k]) for k in ("activation", "activation2") if parts.get(k, "none") != "none"]
        name = " + ".join([name, *extra])
    else:
        name = getattr(node.target, "__name__", name)
    return _short(name.removeprefix("_"))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


def _kind(node: fx.Node) -> str:
    """What the box's colour says."""
    if node.op != "call_function":
        return "edge"
    if node.target is operator.getitem:
        return "view"
    if node.target in _PRODUCTS or "conv" in str(node.target):
        return "product"
    if is_copy(node):
        return "move"
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.is_view or node.target in (aten.reshape.default, aten.clone.default):
            return "view"
        if torch.Tag.pointwise in node.target.tags:
            return "pointwise"
    return "other"
