"""Small questions about fx nodes, and the few edits that passes make.

A graph module here is flat: constants are buffers of the root, every node has meta["val"] (a fake tensor, or
a tuple of them), and nothing mutates anything.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TypeGuard

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

Operator = torch._ops.OpOverload

FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


def calls(node: object, *operators: Operator) -> TypeGuard[fx.Node]:
    """Whether `node` is a call of one of `operators`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in operators


def value_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor of a node with one strided result of known shape; None for everything else."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    return value if all(isinstance(d, int) for d in value.shape) else None


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node that `value_of` knows."""
    value = value_of(node)
    assert value is not None, node
    return tuple(value.shape)


def is_float(*nodes: object) -> bool:
    """Whether all are tensors of one and the same real floating point dtype, of known shape."""
    values = [value_of(n) if isinstance(n, fx.Node) else None for n in nodes]
    first = values[0]
    return first is not None and first.dtype in FLOATS and all(v is not None and v.dtype == first.dtype for v in values)


def other_than(dtype: torch.dtype, *nodes: fx.Node) -> fx.Node | None:
    """The first of the nodes that is no tensor of `dtype` and known shape."""
    for node in nodes:
        value = value_of(node)
        if value is None or value.dtype != dtype:
            return node
    return None


def sole_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one; None where there are several, or where that is the output."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.op == "call_function" else None


def feeds_output(node: fx.Node) -> bool:
    """Whether the graph returns this very node."""
    return any(user.op == "output" for user in node.users)


def constant(graph: fx.GraphModule, node: object) -> torch.Tensor | None:
    """The tensor a get_attr node stands for, or None where `node` is anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = operator.attrgetter(str(node.target))(graph)
    return value.detach() if isinstance(value, torch.Tensor) else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by the names of its operator's schema, defaults filled in."""
    assert isinstance(node.target, Operator), node
    bound = dict(node.kwargs)
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            bound[argument.name] = node.args[i]
        elif argument.name not in bound:
            bound[argument.name] = argument.default_value
    return bound


def is_random(node: fx.Node) -> bool:
    """Whether two runs of the node may differ."""
    return isinstance(node.target, Operator) and torch.Tag.nondeterministic_seeded in node.target.tags


def is_pure(node: fx.Node) -> bool:
    """Whether the node only computes: same operands, same result, and nothing else changes."""
    if node.target is operator.getitem:
        return True
    if node.op != "call_function" or not isinstance(node.target, Operator) or is_random(node) or "effect" in node.meta:
        return False
    return not node.target._schema.is_mutable and len(node.target._schema.returns) > 0


def repeated(value: int | Sequence[int], count: int) -> list[int]:
    """An int[] argument as torch reads it: one number stands for all dims."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * count if len(numbers) == 1 else numbers


def fake_mode(*nodes: fx.Node) -> FakeTensorMode:
    """The mode that made these nodes' values; a new one where they have none."""
    for node in nodes:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, (tuple, list)) else (value,):
            if (mode := fake_mode_of(tensor)) is not None:
                return mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def call(
    graph: fx.GraphModule,
    target: Operator,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    before: fx.Node,
    value: object = None,
    source: fx.Node | None = None,
) -> fx.Node:
    """Insert a call in front of `before`; its stack trace is that of `source`, or of `before`.

    `value` is its meta["val"] where the caller has one of the right shape and dtype; otherwise the operator
    is run on the fake operands.
    """
    with graph.graph.inserting_before(before):
        node = graph.graph.call_function(target, args, kwargs or {})
    if value is None:
        value = run_fake(node)
    node.meta["val"] = value
    trace = (source or before).meta.get("stack_trace")
    if trace is not None:
        node.meta["stack_trace"] = trace
    return node


def run_fake(node: fx.Node) -> object:
    """The node's value, computed from its operands' fake values."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target)
    with fake_mode(*node.all_input_nodes), torch.no_grad():
        return node.target(*args, **kwargs)


def packed(value: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
    """A fake tensor like `value`, in another shape on request, whose elements lie in order."""
    if shape is None and value.is_contiguous():
        return value
    with fake_mode_of(value) or nullcontext():
        return value.new_empty(list(value.shape if shape is None else shape))


def fake_mode_of(value: object) -> FakeTensorMode | None:
    """The mode that made a fake tensor."""
    mode = getattr(value, "fake_mode", None)
    return mode if isinstance(mode, FakeTensorMode) else None


def add_constant(graph: fx.GraphModule, name: str, tensor: torch.Tensor, before: fx.Node) -> fx.Node:
    """Store `tensor` under a free name like `name`, and insert a get_attr node that reads it."""
    free, count = name, 0
    while hasattr(graph, free):
        count += 1
        free = f"{name}_{count}"
    graph.register_buffer(free, tensor)
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(free)
    mode = fake_mode(before, *before.all_input_nodes)
    node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    if (trace := before.meta.get("stack_trace")) is not None:
        node.meta["stack_trace"] = trace
    return node


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let the readers of `old` read `new`, and erase `old`."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def replace_chain(first: fx.Node, last: fx.Node, new: fx.Node) -> None:
    """Let the readers of `last` read `new`, and erase `last` with what only it and the chain up to `first` read."""
    last.replace_all_uses_with(new)
    erase_cone(last)
    assert first._erased, first


def erase_unused(*nodes: fx.Node) -> None:
    """Erase the calls that nobody reads any more, in the order given (readers first)."""
    for node in nodes:
        if node.op == "call_function" and not node.users and not node._erased:
            node.graph.erase_node(node)


def erase_cone(node: fx.Node) -> None:
    """Erase a node that nobody reads, and then the calls that only it read."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.op != "call_function" or node.users or node._erased:
            continue
        operands = node.all_input_nodes
        node.graph.erase_node(node)
        waiting += operands


def finish(graph: fx.GraphModule, count: int) -> int:
    """Let the module run its new graph; returns `count`."""
    if count:
        graph.recompile()
    return count
