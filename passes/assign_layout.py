"""Images lie in NHWC between convolutions.

    conv2d(x, W, b, y, NCHW)        -> permute(conv2d(permute(x), W, b, permute(y), NHWC))
    pointwise, concat, reduction,
    pooling, slice, pad (permute x) -> permute(the same in NHWC)
    permute(permute(x))             -> x
    x permuted to NCHW by the model -> x is its form in NHWC

A 1 x 1 convolution is then a plain matrix product, channels are what vectors run over, and a concat over channels
copies whole runs. Every value gets at most one permute each way: an image network keeps one at its input, and one
at an output that is an image itself.

A node follows its operands into NHWC where `nhwc_rules` knows how, and where the operands that are in NHWC already
are at least as large as those that would have to be permuted. Sums over an image are added in another order;
everything else is bit exact.
"""

from __future__ import annotations

import logging

from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .nhwc_rules import RULES, Images, pointwise

log = logging.getLogger(__name__)


def assign_layout(graph: fx.GraphModule, hw: Hardware) -> int:
    """Bring convolutions and what hangs together with them to NHWC; returns the number of nodes brought over."""
    convolutions = (dialect.conv2d, dialect.conv_transpose2d)
    if not any(rewrite.calls(n, *convolutions) and n.args[-1] == "NCHW" for n in graph.graph.nodes):
        return 0
    images = Images(graph)
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        twin = RULES.get(node.target, pointwise)(node, images)
        if twin is not None:
            images.nhwc[node] = twin
            images.computed[node] = None
        elif any(images.has(source) for source in node.all_input_nodes):
            log.debug("stop at %s: it cannot follow its operands into NHWC", node)
    # Readers first, so that what is left to read a value are those that stay in NCHW.
    for node in reversed(images.computed):
        if node.users:
            node.replace_all_uses_with(images.back(node))
        graph.graph.erase_node(node)
    return rewrite.finish(graph, len(images.computed))
