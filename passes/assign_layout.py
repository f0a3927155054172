"""Images lie in NHWC where that costs less.

    conv2d(x, W, b, y, NCHW)        -> permute(conv2d(permute(x), W, b, permute(y), NHWC))
    pointwise, concat, reduction,
    pooling, slice, pad (permute x) -> permute(the same in NHWC)
    permute(permute(x))             -> x
    x permuted to NCHW by the model -> x is its form in NHWC

A 1 x 1 convolution is then a plain matrix product, channels are what vectors run over, and a concat over channels
copies whole runs. Every value gets at most one permute each way: an image network keeps one at its input, and one
at an output that is an image itself.

Every node that `nhwc_rules` knows gets a twin that computes in NHWC. Which twins stay is a minimum cut (`layout_cut`)
over the predicted seconds of nodes and permutes (`layout_costs`); it stands in graph.meta["layout"] for `explain`. Sums
over an image are added in another order; everything else is bit exact.

Refused: graphs without convolutions in NCHW, where no layout is better than the model's own.
"""

from __future__ import annotations

import logging
import math
import operator

from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .layout.costs import node_seconds, permute_seconds
from .layout.cut import Problem, Value, assignment, minimum_cut
from .layout.nhwc_rules import RULES, Images, pointwise, wants_nhwc
from .refusals import keep

log = logging.getLogger(__name__)

# Whatever has no choice reads and computes images in NCHW, but for the model's own permutes between the two.
_NCHW, _NHWC = "fixed in NCHW", "fixed in NHWC"


def assign_layout(graph: fx.GraphModule, hw: Hardware) -> int:
    """Bring convolutions and what hangs together with them to NHWC; returns the number of nodes brought over."""
    convolutions = (dialect.conv2d, dialect.conv_transpose2d)
    if not any(rewrite.calls(n, *convolutions) and n.args[-1] == "NCHW" for n in graph.graph.nodes):
        return 0
    nodes = list(graph.graph.nodes)
    images = _twins(graph, nodes)
    problem = _problem(nodes, images, hw)
    nhwc = minimum_cut(problem)
    shown = [node for node in nodes if node in images.computed or node in images.equal]
    graph.meta["layout"] = assignment(problem, nhwc, shown)
    # Readers first, so that what is left to read a value are those that stay in the other layout.
    for node in reversed(shown):
        if node in nhwc:
            _replace(node, images)
        else:
            _drop_twin(node, images)
    _sweep(graph, images)
    return rewrite.finish(graph, len(nhwc & images.computed.keys()))


def _twins(graph: fx.GraphModule, nodes: list[fx.Node]) -> Images:
    """A twin for every node that can have one, whether it stays or not."""
    images = Images(graph, frozenset(nodes))
    for node in nodes:
        if node.op != "call_function":
            continue
        twin = RULES.get(node.target, pointwise)(node, images)
        if twin is not None:
            images.nhwc[node] = twin
            images.computed[node] = None
        elif node not in images.equal and any(images.has(source) for source in node.all_input_nodes):
            keep(log, node, "it cannot follow its operands into NHWC")
    return images


def _problem(nodes: list[fx.Node], images: Images, hw: Hardware) -> Problem:
    """The nodes that have a choice, and every value one of them reads or computes."""
    problem = Problem({_NCHW: (0.0, math.inf), _NHWC: (math.inf, 0.0)})
    choices = {node for node in nodes if node in images.computed or node in images.equal}
    for node in nodes:
        if node in choices:
            problem.nodes[node] = (node_seconds(node, False, hw), node_seconds(node, True, hw))
        if node.target is operator.getitem and node in choices:
            problem.together.append((node.all_input_nodes[0], node))
        value = rewrite.value_of(node)
        if value is None or value.dim() > 4 or node.op == "get_attr" or node in images.equal:
            continue
        if choices.isdisjoint((node, *node.users)):
            continue
        producer = node if node in choices else _NHWC if node in images.free else _NCHW
        readers = {u if u in choices else _NHWC if wants_nhwc(u) else _NCHW for u in node.users}
        seconds = permute_seconds(value.shape, value.element_size(), hw)
        problem.values.append(Value(producer, tuple(readers), seconds))
    return problem


def _replace(node: fx.Node, images: Images) -> None:
    """Let the twin take the node's place; who still reads the node stays in NCHW."""
    if node in images.equal:
        node.replace_all_uses_with(images.equal[node])
    elif node.users:
        node.replace_all_uses_with(images.back(node))
    node.graph.erase_node(node)


def _drop_twin(node: fx.Node, images: Images) -> None:
    """Let the twin's readers, which are in NHWC, read the node through a permute."""
    twin = images.equal.get(node) or images.nhwc[node]
    if twin.users and node not in images.equal:
        twin.replace_all_uses_with(images.forth(node))
    twins = {*images.nhwc.values(), *images.equal.values()}
    waiting = [twin]
    while waiting:  # with what was inserted on the way from other twins
        current = waiting.pop()
        operands = current.all_input_nodes
        node.graph.erase_node(current)
        waiting += [n for n in operands if n not in images.known and n not in twins and not n.users]


def _sweep(graph: fx.GraphModule, images: Images) -> None:
    """Erase permutes that were inserted for twins that are gone."""
    for node in reversed(list(graph.graph.nodes)):
        if node not in images.known and not node.users:
            graph.graph.erase_node(node)
