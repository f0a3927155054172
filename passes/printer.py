"""Graphs as text: one node a line, type first, renumbered, so that equal graphs print equally.

%0: f32[1, 3, 8, 8] = input
%1: f32[4, 3, 3, 3] = constant conv_weight
%2: f32[1, 4, 6, 6] = aten.conv2d.default(%0, %1)
return [%2]
"""

from __future__ import annotations

import difflib
import re
from typing import Any

import torch
from torch import fx

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def format_graph(graph: fx.GraphModule, constant_names: bool = True) -> str:
    """The graph as text; without `constant_names`, graphs that differ only in those print equally."""
    numbers: dict[fx.Node, str] = {}
    lines = []
    for node in graph.graph.nodes:
        if node.op == "output":
            lines.append(f"return {_format(_plain(node.args[0]), numbers)}")
            continue
        numbers[node] = f"%{len(numbers)}"
        lines.append(f"{numbers[node]}: {format_type(node.meta.get('val'))} = {_call(node, numbers, constant_names)}")
    return "\n".join(lines)


def format_type(value: Any) -> str:
    """`f32[1, 3]` for a tensor, `(f32[1], i64[1])` for several."""
    if isinstance(value, torch.Tensor):
        name = _DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{name}[{', '.join(str(d) for d in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(format_type(v) for v in value)})"
    return "?" if value is None else type(value).__name__


def diff_graphs(before: str, after: str) -> str:
    """The lines that a rewrite took away (-) and brought (+).

    Numbers change behind the first edit, so lines are compared without them and printed with them.
    """
    old, new = before.splitlines(), after.splitlines()
    matcher = difflib.SequenceMatcher(None, [_unnumbered(x) for x in old], [_unnumbered(x) for x in new], False)
    lines = []
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag != "equal":
            lines += [f"- {line}" for line in old[i:j]] + [f"+ {line}" for line in new[k:m]]
    return "\n".join(lines)


def _unnumbered(line: str) -> str:
    return re.sub(r"%\d+", "%", line)


def _call(node: fx.Node, numbers: dict[fx.Node, str], constant_names: bool) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return f"constant {node.target}" if constant_names else "constant"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if isinstance(node.target, torch._ops.OpOverload):
        target = str(node.target)
    arguments = [_format(a, numbers) for a in node.args]
    arguments += [f"{k}={_format(v, numbers)}" for k, v in sorted(node.kwargs.items())]
    return f"{target}({', '.join(arguments)})"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def _format(value: Any, numbers: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_format(v, numbers) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_format(v, numbers)}' for k, v in value.items())}}}"
    return repr(value) if isinstance(value, str) else str(value)
