"""How a compiled model runs: calls of compiled regions and of PyTorch operators over numbered values.

A plan is plain data, so that it can be saved as JSON beside the machine code and loaded without unpickling anything.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..errors import LEAVES, ArtifactError, UnsupportedOp
from .partition import Part

_FUNCTIONS: dict[str, Any] = {"operator": operator, "math": math, "torch": torch}


@dataclass(frozen=True)
class RegionCall:
    """A call of compiled region `region`: reads and writes slots; shapes and dtypes are of the results."""

    region: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True)
class OperatorCall:
    """A call of a PyTorch operator; arguments refer to slots and constants."""

    operator: str  # "aten.nonzero.default", "operator:getitem"
    args: Any  # encoded, see _encode
    kwargs: Any
    output: int


@dataclass(frozen=True)
class Plan:
    """Calls in running order. Slots 0..inputs-1 hold the tensor inputs; `outputs` are slots."""

    calls: tuple[RegionCall | OperatorCall, ...]
    inputs: int
    outputs: tuple[int, ...]
    slots: int
    constants: dict[int, str]  # slot -> name in the weights file


def make_plan(graph: fx.GraphModule, parts: Sequence[Part]) -> tuple[Plan, dict[str, torch.Tensor]]:
    """The plan of a partitioned graph, and the constants that PyTorch's operators read (by name)."""
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    slots: dict[fx.Node, int] = {n: i for i, n in enumerate(placeholders)}
    constants: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}

    def slot(node: fx.Node) -> int:
        if node not in slots:
            slots[node] = len(slots)
            if node.op == "get_attr":
                name = f"eager.{node.target}"
                constants[slots[node]] = name
                tensors[name] = getattr(graph, str(node.target))
        return slots[node]

    calls: list[RegionCall | OperatorCall] = []
    regions = 0
    for part in parts:
        if part.compiled:
            values = [n.meta["val"] for n in part.outputs]
            calls.append(
                RegionCall(
                    regions,
                    tuple(slot(n) for n in part.inputs),
                    tuple(slot(n) for n in part.outputs),
                    tuple(tuple(int(d) for d in v.shape) for v in values),
                    tuple(v.dtype for v in values),
                )
            )
            regions += 1
            continue
        for node in part.nodes:
            try:
                args, kwargs = _encode(node.args, slot), _encode(node.kwargs, slot)
            except UnsupportedOp as error:
                raise UnsupportedOp(f"{called(node)}: {error.what}{_where(node)}", error.split) from error
            calls.append(OperatorCall(_name_of(node.target), args, kwargs, slot(node)))
    output = next(n for n in graph.graph.nodes if n.op == "output")
    outputs = tuple(slot(n) for n in output.args[0])
    return Plan(tuple(calls), len(placeholders), outputs, len(slots), constants), tensors


def called(node: fx.Node) -> str:
    """The operator that a node calls; of one that writes to its arguments, not the wrapper that copies them first."""
    inner = node.args[0] if isinstance(node.target, torch._ops.HigherOrderOperator) and node.args else None
    return str(inner if isinstance(inner, torch._ops.OpOverload) else node.target)


def _name_of(target: Any) -> str:
    """The name `resolve` finds an operator by; arithmetic on sizes uses functions of Python and torch."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target}"
    module = {"_operator": "operator"}.get(str(target.__module__), str(target.__module__))
    name = str(target.__name__)
    if module in _FUNCTIONS and getattr(_FUNCTIONS[module], name, None) is target:
        return f"{module}:{name}"
    raise UnsupportedOp(f"the model calls {module}.{name}, which is not an operator of PyTorch")


def resolve(name: str) -> Callable[..., Any]:
    """The operator called `name`, or ArtifactError where this PyTorch does not have it."""
    module, _, function = name.partition(":")
    found: Any = _FUNCTIONS.get(module, torch.ops)
    if name.startswith("graphwright."):
        from ..passes import dialect

        assert dialect is not None
    try:
        for part in (function or name).split("."):
            found = getattr(found, part)
    except (AttributeError, RuntimeError) as error:
        raise ArtifactError(
            f"the model calls torch.ops.{name}, which this PyTorch ({torch.__version__}) does not have; "
            "import the package that defines it, or compile the model again here"
        ) from error
    return found  # type: ignore[no-any-return]


def decode(value: Any, slots: list[Any]) -> Any:
    """The arguments of an operator call with tensors in the place of slot references."""
    if isinstance(value, list):
        return [decode(v, slots) for v in value]
    if not isinstance(value, dict):
        return value
    kind, content = value["kind"], value["value"]
    if kind == "slot":
        return slots[content]
    if kind == "dict":
        return {k: decode(v, slots) for k, v in content.items()}
    if kind == "tuple":
        return tuple(decode(v, slots) for v in content)
    if kind == "complex":
        return complex(*content)
    if kind == "device":
        return torch.device(content)
    if kind == "torch":
        return getattr(torch, content)
    if kind == "operator":
        return resolve(content)
    raise ArtifactError(f"unknown kind of argument {kind!r}; the artifact was written by another version")


def _encode(value: Any, slot: Callable[[fx.Node], int]) -> Any:
    if isinstance(value, fx.Node):
        return {"kind": "slot", "value": slot(value)}
    if isinstance(value, dict):
        return {"kind": "dict", "value": {k: _encode(v, slot) for k, v in value.items()}}
    if isinstance(value, tuple):
        return {"kind": "tuple", "value": [_encode(v, slot) for v in value]}
    if isinstance(value, list):
        return [_encode(v, slot) for v in value]
    if isinstance(value, complex):
        return {"kind": "complex", "value": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"kind": "device", "value": str(value)}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"kind": "torch", "value": str(value).removeprefix("torch.")}
    if isinstance(value, torch._ops.OpOverload):
        return {"kind": "operator", "value": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UnsupportedOp(
        f"an argument is a {type(value).__name__}, which a compiled model cannot keep; leave the operator out of "
        "the model",
        split=LEAVES,
    )


def _where(node: fx.Node) -> str:
    trace = node.meta.get("stack_trace")
    return f"\nwhere the model says:\n{trace.rstrip()}" if trace else ""


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON data."""
    calls: list[dict[str, Any]] = []
    for call in plan.calls:
        if isinstance(call, RegionCall):
            dtypes = [str(d).removeprefix("torch.") for d in call.dtypes]
            calls.append(
                {
                    "region": call.region,
                    "inputs": list(call.inputs),
                    "outputs": list(call.outputs),
                    "shapes": [list(s) for s in call.shapes],
                    "dtypes": dtypes,
                }
            )
        else:
            calls.append({"operator": call.operator, "args": call.args, "kwargs": call.kwargs, "output": call.output})
    return {
        "calls": calls,
        "inputs": plan.inputs,
        "outputs": list(plan.outputs),
        "slots": plan.slots,
        "constants": {str(k): v for k, v in plan.constants.items()},
    }


def from_json(data: dict[str, Any]) -> Plan:
    """The plan that `to_json` wrote."""
    calls: list[RegionCall | OperatorCall] = []
    for call in data["calls"]:
        if "region" in call:
            calls.append(
                RegionCall(
                    call["region"],
                    tuple(call["inputs"]),
                    tuple(call["outputs"]),
                    tuple(tuple(s) for s in call["shapes"]),
                    tuple(getattr(torch, d) for d in call["dtypes"]),
                )
            )
        else:
            calls.append(OperatorCall(call["operator"], call["args"], call["kwargs"], call["output"]))
    constants = {int(k): v for k, v in data["constants"].items()}
    return Plan(tuple(calls), data["inputs"], tuple(data["outputs"]), data["slots"], constants)
