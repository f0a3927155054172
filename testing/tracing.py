"""From a model to the graph that passes get: as `compile` captures it, or quickly, for tests of many small ones."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from ..compiler.capture import capture, export
from ..hwdb import Hardware, lookup
from ..passes.canonicalise import canonicalise
from ..passes.rewrite import fake_mode, run_fake

aten = torch.ops.aten
# Composite operators of torch reshape their own temporaries in place, which no functionalization sees.
_OUT_OF_PLACE = {
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.default: aten.squeeze.default,
    aten.unsqueeze_.default: aten.unsqueeze.default,
}


def trace(model: Any, inputs: Sequence[torch.Tensor], hw: Hardware | None = None) -> fx.GraphModule:
    """The graph that passes get: captured, without the constants that nobody reads, spelt canonically."""
    graph = capture(export(model, tuple(inputs))).graph
    return spelt(graph, hw)


def trace_quickly(
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    whole: bool = False,
    hw: Hardware | None = None,
) -> fx.GraphModule:
    """The graph of a function that changes nothing in place, composite operators broken up, spelt canonically.

    With `whole`, operators are those the function calls, none broken up.
    """
    graph = recorded(function, inputs, whole)
    return spelt(graph, hw)


def recorded(function: Callable[..., Any], inputs: Sequence[torch.Tensor], whole: bool = False) -> fx.GraphModule:
    """Like `trace_quickly`, in the spelling of the function."""
    with torch.no_grad():
        plain = function if whole else torch.func.functionalize(lambda *args: function(*args), remove="mutations")
        # The fake values that tracing makes of its own are those that nodes keep.
        graph = make_fx(
            lambda *args: plain(*args), tracing_mode="fake", pre_dispatch=whole, _allow_non_fake_inputs=True
        )(*inputs)
    mode = fake_mode(*graph.graph.nodes)
    for node in graph.graph.nodes:
        if node.op == "get_attr" and isinstance(tensor := getattr(graph, node.target), torch.Tensor):
            delattr(graph, node.target)
            graph.register_buffer(node.target, tensor)
            node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
        elif node.target in _OUT_OF_PLACE:
            node.target = _OUT_OF_PLACE[node.target]
            node.meta["val"] = run_fake(node)
    output = next(n for n in graph.graph.nodes if n.op == "output")
    if isinstance(output.args[0], fx.Node):
        output.args = ((output.args[0],),)
    return graph


def spelt(graph: fx.GraphModule, hw: Hardware | None = None) -> fx.GraphModule:
    """The graph in canonical spelling, without what tracers leave unread."""
    for node in reversed(list(graph.graph.nodes)):
        # Tracers write down every result of an operator with several.
        if not node.users and (node.op == "get_attr" or node.target is operator.getitem):
            graph.graph.erase_node(node)
    canonicalise(graph, hw or lookup("native"))
    graph.recompile()
    return graph
