"""Which products are computed in 8 bits on a machine, which keep float32, and why.

form         operands                        seconds
float32                                      max(arithmetic, weights), by Winograd's algorithm where that serves, and
                                             without the blocks of zeros that skip_zero_blocks skips
int8         both in 8 bits, exact sums      arithmetic at 4 times the rate (depthwise: DEPTHWISE_RATE), a quarter of
                                             the weights' bytes; rounding the input, where no other product of 8 bits
                                             makes or reads it
int8 dynamic both in 8 bits, inputs by a scale    the same arithmetic and bytes; every product rounds its own input,
             for each row, or image          a convolution after it has read it once more: where asked for
int8 weights float32 inputs and sums         the same arithmetic, a quarter of the bytes: linear layers whose few rows
                                             wait for weights. As fast as int8 there, and inputs are not rounded
int4 weights inputs in int8, row by row      an eighth of the bytes, and scales: the same layers, where asked for

Weights come from memory where all weights of the graph are more than the last cache.

The rows of an embedding are stored in 8 bits too, with a scale a row: no faster, but a quarter of the bytes.

Refused: a machine without dot products of bytes (pairs of 16 bits take as many instructions as float32; where products
of bytes and sums of pairs have a pipe each, Hardware.byte_rate, they serve all but depthwise convolutions), groups that
are not depthwise, NCHW, weights that are computed or not finite, biases that are computed, biases and residuals that
broadcast, sums of more terms than 32 bits hold, values that calibration found no scale for, operators that are no
products, and what gains nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work, predict_seconds
from .. import dialect, dialect_int8
from ..rewrite import arguments, constant, other_than, shape_of
from ..skip_zero_blocks import skipping_seconds
from .forms import PRODUCTS, WINOGRAD_CHANNELS, Times

DYNAMIC = "int8 dynamic"
GAIN = 0.9  # of the float32 time: less is not worth the rounding
WINOGRAD_GAIN = 2.4  # times as fast as the direct float32 sum, where its tiles fit the image well
RATE = 4.0  # products of bytes in the time of one of floats, by vector instructions
LONG_EFFICIENCY = 0.9  # of Hardware.byte_rate: the same pipes bring a pair of bytes into all lanes
# RATE for depthwise convolutions, whose bytes are brought into words first, by stride: medians of
# benchmarks/depthwise.py on Zen 4 with AVX-512 VNNI.
DEPTHWISE_RATE = {1: 1.24, 2: 1.05}
INT4_RATE = (
    1.0  # products with weights of four bits in the time of one of floats: 190 GFLOP/s of one row, two Zen 4 cores
)
INT4_GAIN = 0.8  # of the time that weights of eight bits take: less is not worth their error
ENTRY_SECONDS = 0.5e-6  # a kernel more, which rounds the input
LEAST_TABLE = 1 << 16  # elements of an embedding: smaller ones are not worth a rounding
MANY = 10  # times as long: beyond, reasons give no figure
NEARLY = 1.1  # weights alone are taken for as much more time: inputs keep their precision


@dataclass(frozen=True)
class Int8Form:
    """Predicted seconds of a product in float32 and in 8 bits, and why it is one of the two."""

    possible: bool
    reason: str
    float32_seconds: float = 0.0
    seconds: float = 0.0
    name: str = "int8"  # or DYNAMIC, "int8 weights", "int4 weights"
    worth: float = GAIN  # of the float32 time, or less

    @property
    def pays(self) -> bool:
        """Whether the product is computed in 8 bits."""
        return self.possible and self.seconds <= self.worth * self.float32_seconds


def int8_form(
    graph: fx.GraphModule,
    node: fx.Node,
    hw: Hardware,
    shared: Collection[fx.Node] = (),
    streamed: int | None = None,
    group: int = 0,
    dynamic: bool = False,
) -> Int8Form:
    """What 8 bits are for one product; values in `shared` are rounded for other products in any case.

    `streamed`: bytes in float32 of all weights of the graph; None: of this product's. `group`: of the inputs that share
    a scale, where weights may have four bits; 0: they may not. `dynamic`: linear layers round their inputs row by row,
    and convolutions image by image, but depthwise ones.
    """
    why_not = _refusal(graph, node)
    if why_not is not None:
        return Int8Form(False, why_not)
    given = arguments(node)
    weight, x = given["weight"], given["input"]
    times = Times(node, hw, 4 * prod(shape_of(weight)) if streamed is None else streamed)
    skipping = skipping_seconds(graph, node, hw, times.streamed)
    wide = times.seconds(rate=_winograd(node)) if skipping is None else skipping
    alone = Int8Form(True, _WEIGHTS, wide, times.seconds(item_bytes=1), "int8 weights")
    family = hw.vector_dot_product("int8")
    pairs = family is None and hw.byte_rate > 1 and not is_depthwise(node)
    if family is None and not pairs:
        if node.target is not dialect.conv2d and alone.pays:
            return alone
        return Int8Form(False, f"{hw.id} has no dot product of bytes: pairs of 16 bits are as slow as float32")
    narrow = times.seconds(item_bytes=1, rate=LONG_EFFICIENCY * hw.byte_rate if pairs else _rate(node))
    # Between products of 8 bits, a depthwise convolution that is no slower saves them the rounding.
    worth = 1.0 if x in shared and is_depthwise(node) else GAIN
    image = node.target is dialect.conv2d
    at_run_time = dynamic and not is_depthwise(node)
    if at_run_time or x not in shared:
        elements = prod(shape_of(x))
        narrow += 0.0 if at_run_time and not image else ENTRY_SECONDS  # rows are rounded by the product itself
        read = 8.0 if at_run_time and image else 4.0  # the largest of an image is found first
        narrow += predict_seconds(hw, Work({}, read * elements, 1.0 * elements, launches=0)) or 0.0
    if node.target is not dialect.conv2d and alone.pays and alone.seconds <= NEARLY * narrow:
        if not group:
            return alone
        fewer = times.seconds(item_bytes=0.5 + 4 / group, rate=INT4_RATE)
        if shape_of(weight)[1] % group:
            why_not = f"its {shape_of(weight)[1]} inputs are no multiple of {group}"
        elif fewer > INT4_GAIN * alone.seconds:
            why_not = f"predicted to take {fewer / alone.seconds:.2f} of their time, and {INT4_GAIN} is worth the error"
        else:
            return Int8Form(True, _HALVES, wide, fewer, "int4 weights")
        return replace(alone, reason=f"{_WEIGHTS}; {NOT_FOUR}: {why_not}")
    how = "products of bytes (smull, sadalp)" if pairs else f"dot products of bytes ({family})"
    if at_run_time:
        each = "image" if image else "row"
        form = Int8Form(True, f"{how}, exact sums; inputs by a scale for each {each}", wide, narrow, DYNAMIC)
    else:
        form = Int8Form(True, f"{how}, exact sums", wide, narrow, worth=worth)
    if form.pays:
        return form
    share = narrow / wide if wide else 1.0
    what = "float32" if skipping is None else "float32, which skips blocks of zeros"
    taken = f"{share:.2f} of" if share < MANY else f"more than {MANY} times as long as"
    return Int8Form(True, f"gains nothing: rounding its input and 8 bits take {taken} {what}", wide, narrow)


NOT_FOUR = "not 4 bits"
_HALVES = "weights only, in 4 bits: its few rows wait for them; inputs are rounded to 8 bits row by row"
_WEIGHTS = "weights only: its few rows wait for them, a quarter of the bytes; inputs are not rounded"


def _refusal(graph: fx.GraphModule, node: fx.Node) -> str | None:
    given = arguments(node)
    weight = constant(graph, given["weight"])
    if weight is None:
        return "its weights are computed"
    if (operand := other_than(torch.float32, node, *node.all_input_nodes)) is not None:
        return f"{operand.name} is not float32"
    if not prod(shape_of(node)):
        return "the result has no elements"
    if not bool(weight.isfinite().all()):
        return f"the weights {given['weight'].target} hold infinities or NaN"
    if node.target is dialect.conv2d:
        if given["layout"] != "NHWC":
            return f"the layout is {given['layout']}"
        if given["groups"] != 1 and not is_depthwise(node):
            return f"{given['groups']} groups: a group's channels are fewer than a dot product takes"
    if prod(shape_of(given["weight"])[1:]) > dialect_int8.MOST_TERMS:
        return f"sums of {prod(shape_of(given['weight'])[1:])} terms do not fit 32 bits"
    bias, residual = given.get("bias"), given.get("residual")
    if bias is not None and constant(graph, bias) is None:
        return "its bias is computed"
    if bias is not None and shape_of(bias) != shape_of(node)[-1:]:
        return f"the bias has shape {shape_of(bias)}, not one value a column"
    if residual is not None and shape_of(residual) != shape_of(node):
        return f"the residual has shape {shape_of(residual)}, the result {shape_of(node)}"
    return None


def table_reason(graph: fx.GraphModule, node: fx.Node) -> str | None:
    """Why the rows of an embedding are stored in 8 bits, a scale a row; None where they are not, or it is none."""
    if node.op != "call_function" or node.target is not torch.ops.aten.embedding.default:
        return None
    weight = constant(graph, node.args[0])
    if weight is None or weight.dtype != torch.float32 or weight.numel() < LEAST_TABLE:
        return None
    return "weights only: rows of a table, a quarter of the bytes" if bool(weight.isfinite().all()) else None


def is_product(node: fx.Node) -> bool:
    """Whether the node is one of the operators that have a form in 8 bits."""
    return node.op == "call_function" and node.target in PRODUCTS


def is_depthwise(node: fx.Node) -> bool:
    """Whether the node is a convolution with one filter for each channel."""
    if node.target is not dialect.conv2d:
        return False
    given = arguments(node)
    weight = shape_of(given["weight"])
    return bool(given["groups"] > 1 and given["groups"] == weight[0] and weight[1] == 1)


def _rate(node: fx.Node) -> float:
    """How many times as fast as in float32 the arithmetic of a product is in 8 bits."""
    if not is_depthwise(node):
        return RATE
    return DEPTHWISE_RATE[1 if max(arguments(node)["stride"]) == 1 else 2]


def _winograd(node: fx.Node) -> float:
    """How many times as fast as a direct sum the convolution is in float32."""
    if node.target is not dialect.conv2d:
        return 1.0
    given = arguments(node)
    weight = shape_of(given["weight"])
    simple = list(given["stride"]) == list(given["dilation"]) == [1, 1] and weight[2:] == (3, 3)
    return WINOGRAD_GAIN if simple and min(weight[:2]) >= WINOGRAD_CHANNELS else 1.0
