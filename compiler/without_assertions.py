"""torch._assert_async(condition) -> nothing, for machines without PyTorch.

F.one_hot asserts that its indices are in range. Where PyTorch cannot take over nobody raises, and nothing else reads
the assertion. Refused where PyTorch runs beside the code: there it does raise.
"""

from __future__ import annotations

import logging

import torch
from torch import fx

from ..hwdb import Hardware
from .obstacle import obstacle

log = logging.getLogger(__name__)

_ASSERTIONS = frozenset({torch.ops.aten._assert_async.default, torch.ops.aten._assert_async.msg})


def without_assertions(graph: fx.GraphModule, hw: Hardware) -> int:
    """Remove assertions, with what is computed for them alone; returns how many. Changes `graph`."""
    found = [node for node in graph.graph.nodes if node.op == "call_function" and node.target in _ASSERTIONS]
    if not found or obstacle(hw) is None:
        return 0
    for node in found:
        log.info("%s is left out: nobody raises on %s", node, hw.id)
        _erase(node)
    graph.recompile()
    return len(found)


def _erase(node: fx.Node) -> None:
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for each in inputs:
        if each.op == "call_function" and not each.users:
            _erase(each)
