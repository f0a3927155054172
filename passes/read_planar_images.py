"""A convolution of few channels reads its image in NCHW, where the model gets it so.

    conv2d(permute(x, NCHW -> NHWC), W, b, ..., NHWC) -> planar_conv2d(x, W, b, ...)

With fewer channels than a vector has lanes the kernel reads single values of its image and runs over output channels,
so that it may find them anywhere; the permuted copy of the largest image of a network is never made.

Kept: permutes that somebody else reads as well, images of more channels or in another dtype than float32, convolutions
that are grouped or not in NHWC, computed weights, and windows wider than MOST_TAPS. Reading planes costs a wide window
more than the permute: of 224 x 224 x 3, a 3 x 3 or 4 x 4 convolution takes 0 to 5 us longer (of 109 to 184) and saves a
permute of 66; 7 x 7 x 64 takes 135 us longer (of 1394).
"""

from __future__ import annotations

import logging

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .dialect_planar import planar_conv2d
from .fuse_reshape_transpose import map_of
from .moves.index_map import identity
from .refusals import keep

log = logging.getLogger(__name__)

MOST_TAPS = 4


def read_planar_images(graph: fx.GraphModule, hw: Hardware) -> int:
    """Let convolutions take up the permute of their image; returns how many do."""
    count = 0
    for node in list(graph.graph.nodes):
        if not rewrite.calls(node, dialect.conv2d) or not _is_permuted(node.args[0]):
            continue
        a = rewrite.arguments(node)
        reason = _refused(a, hw)
        if reason is not None:
            keep(log, node, "%s", reason)
            continue
        permute = a["input"]
        tensors = (permute.args[0], a["weight"], a["bias"], a["residual"])
        rest = (a["stride"], a["padding"], a["dilation"], a["activation"], a["activation_args"])
        new = rewrite.call(graph, planar_conv2d, (*tensors, *rest), before=node, value=node.meta["val"])
        rewrite.replace(node, new)
        rewrite.erase_unused(permute)
        count += 1
    return rewrite.finish(graph, count)


def _is_permuted(image: object) -> bool:
    """Whether the node permutes an NCHW image to NHWC."""
    moved = map_of(image) if isinstance(image, fx.Node) else None
    if moved is None or len(moved.source) != 4 or moved.keeps_order:
        return False
    return moved == identity(moved.source).permute([0, 2, 3, 1])


def _refused(a: dict[str, object], hw: Hardware) -> str | None:
    image, weight = a["input"], a["weight"]
    assert isinstance(image, fx.Node)
    assert isinstance(weight, fx.Node)
    if a["layout"] != "NHWC":
        return "it is not in NHWC itself"
    if image.meta["val"].dtype != torch.float32:
        return f"no kernel reads planes of {image.meta['val'].dtype}"
    if len(image.users) > 1:
        return "somebody else reads the permuted image as well"
    channels = rewrite.shape_of(image)[3]
    if channels >= hw.lanes("float32"):
        return f"{channels} channels are read as vectors"
    if a["groups"] != 1:
        return "it is grouped"
    if weight.op != "get_attr":
        return "its weight is computed"
    if rewrite.shape_of(weight)[3] > MOST_TAPS:
        return "its window is so wide that reading planes costs more than the permute"
    return None
