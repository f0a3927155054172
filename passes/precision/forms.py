"""What each operator may be computed in on a machine, what that is predicted to cost, and what stays float32 and why.

class         operators                            precisions
product       linear, conv2d with constant weights all forms below that the machine gains by
attention     of the dialect, on GPUs              rounded on the way into matrix units; else as below
computed      attention, matmul of two results     float32: no kernel takes them narrow, and their sums feed a softmax
fused         other operators of the dialect       float32: no kernel takes them narrow
sensitive     softmax, norms, reductions, exp, log float32: their errors grow with what they add up or exponentiate
pointwise     everything else that computes        float32: registers hold floats, and it joins a kernel around it

form              operands                         seconds of a product
float32                                            max(flops / rate, weight bytes / bandwidth)
bfloat16          both rounded, dot products       half the arithmetic, half the bytes
bfloat16 weights  weights rounded                  the same arithmetic, half the bytes
float16 weights   weights rounded                  the same; an eighth of bfloat16's error, within float16's range
float16 sums      both rounded, sums too           HALF_RATE of the arithmetic, half the bytes; on cores that multiply
                                                   halves by element: dialect_half.py has its error

Weights come from memory where all weights of the graph are more than the last cache; a product with a few rows then
waits for them. Sums are float32 in every other form. tf32 and fp8 are arithmetic of GPUs: no CPU here has it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work, memory_bandwidth_gbs, predict_seconds
from .. import dialect
from ..dialect_half import BLOCK
from ..dialect_joined import joined_rows
from ..rewrite import Operator, arguments, constant, other_than, shape_of, value_of

aten = torch.ops.aten

PRODUCTS = frozenset({dialect.linear, aten.linear.default, dialect.conv2d})
COMPUTED = frozenset(
    {
        dialect.matmul,
        dialect.attention,
        dialect.strided_attention,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.matmul.default,
        aten.convolution.default,
        aten.scaled_dot_product_attention.default,
    }
)
_SENSITIVE = frozenset(
    {
        aten.softmax.int,
        aten._softmax.default,
        aten.log_softmax.int,
        aten._log_softmax.default,
        aten.layer_norm.default,
        aten.native_layer_norm.default,
        aten.rms_norm.default,
        aten.group_norm.default,
        aten.native_group_norm.default,
        aten.batch_norm.default,
        aten._native_batch_norm_legit_no_training.default,
        aten.logsumexp.default,
        aten.cumsum.default,
        aten.cumprod.default,
        aten.exp.default,
        aten.exp2.default,
        aten.expm1.default,
        aten.log.default,
        aten.pow.Tensor_Tensor,
        aten.pow.Tensor_Scalar,
        aten.pow.Scalar,
    }
)


_MOVES = frozenset({dialect.permute, joined_rows})


@dataclass(frozen=True)
class Label:
    """One of the forms above: the dtype weights are rounded to, that of the result, and whether inputs are rounded."""

    dtype: str
    stored: str
    round_input: bool = False


LABELS = {
    "float32": Label("float32", "float32"),
    "bfloat16": Label("bfloat16", "bfloat16", True),
    "float16 weights": Label("float16", "float32"),
    "bfloat16 weights": Label("bfloat16", "float32"),
    "float16 products": Label("float16", "float32", True),
    "bfloat16 products": Label("bfloat16", "float32", True),
    "float16 sums": Label("float16", "float32", True),
}
IN_PLACE = ("float16 products", "bfloat16 products")  # round on the way into a GPU's matrix units
_PIECE = 8  # elements of 16 bits that a GPU loads at a time
FEWEST = 16  # rows and columns of a product that a tile of matrix units pays for
DEEPEST = 128  # heads that attention on matrix units has the registers for
DEEPEST_TWICE = 88  # where two lanes hold the same part of an operand: heads of 96 spilled 36 bytes on gfx1100
ASKED = {
    "bf16": ("bfloat16", "bfloat16 weights", "bfloat16 products"),
    "fp16": ("float16 weights", "float16 products", "float16 sums"),
    "auto": ("bfloat16", "float16 weights", "bfloat16 weights", "float16 sums"),
}
# Relative error of a product where nothing was measured: a rounded operand errs by u / sqrt(3) in the mean, with u the
# unit roundoff (2^-8 and 2^-11 of the spacing's half, Higham, section 2.2), and two of them independently.
UNMEASURED = {"bfloat16": 3.2e-3, "bfloat16 weights": 2.3e-3, "float16 weights": 2.8e-4}
UNMEASURED |= {"float16 products": 4.0e-4, "bfloat16 products": UNMEASURED["bfloat16"]}
UNMEASURED |= {"float16 sums": 9.0e-4}  # dialect_half.py
# Products of halves in the time of one of floats: twice as many an instruction; after BLOCK of those, two
# conversions and two additions of 4 floats add a sum to that in float32.
HALF_RATE = 2 * BLOCK / (BLOCK + 4)
# Of the speed at which the direct float32 sum multiplies, what Winograd's products and transforms reach: measured 0.76
# to 0.85 on 64x56x56 to 512x7x7. It needs channels enough to fill its tiles.
WINOGRAD_EFFICIENCY, WINOGRAD_CHANNELS = 0.8, 32
GAIN = 0.8  # weights are kept in 16 bits for a predicted gain of a fifth
_WITHOUT_CLOCK = 1e9  # FLOP/s where the machine's are unknown: only the ratio of two forms counts then
_HALF_ROUNDING = 2.0**-10  # of float16 weights, relative in L2: more means that they are among its denormals


@dataclass(frozen=True)
class Form:
    """One way to compute an operator: predicted seconds, and why it is possible or pays."""

    seconds: float
    reason: str


def is_arithmetic(node: fx.Node) -> bool:
    """Whether the node rounds: floating point results, computed rather than moved."""
    value = value_of(node)
    if node.op != "call_function" or value is None or not value.is_floating_point():
        return False
    if node.target in PRODUCTS | COMPUTED | _SENSITIVE:
        return True
    if not isinstance(node.target, Operator):
        return False
    fused = node.target.namespace == "graphwright" and node.target not in _MOVES
    return fused or torch.Tag.pointwise in node.target.tags or torch.Tag.reduction in node.target.tags


def is_reducible(node: fx.Node, hw: Hardware) -> bool:
    """Whether `forms` says what the node may be computed in: products, and attention on GPUs."""
    return node.target in PRODUCTS or (node.target is dialect.attention and hw.kind == "gpu")


def class_reason(node: fx.Node) -> str | None:
    """Why an operator that is no product stays float32; None for a product."""
    if node.target in PRODUCTS:
        return None
    if node.target in COMPUTED:
        return _COMPUTED_REASON
    if node.target in _SENSITIVE or (isinstance(node.target, Operator) and torch.Tag.reduction in node.target.tags):
        return "softmax, norms, reductions and exponentials stay float32: they add up or enlarge errors"
    if isinstance(node.target, Operator) and node.target.namespace == "graphwright":
        return "no kernel of this fused operator takes narrow operands"
    return "its arithmetic is float32 in registers in any case, and it joins a kernel around it"


_COMPUTED_REASON = "both operands are computed: there are no weights to round, and its sums feed a softmax or the like"


def streamed_bytes(graph: fx.GraphModule, nodes: Collection[Any]) -> int:
    """Bytes of the float32 weights of all these products."""
    weights = {n.args[1].target: 4 * prod(shape_of(n.args[1])) for n in nodes if weight_of(graph, n) is not None}
    return sum(weights.values())


def weight_of(graph: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """The constant weights of a product."""
    return constant(graph, node.args[1]) if node.target in PRODUCTS else None


def forms(
    graph: fx.GraphModule, node: fx.Node, hw: Hardware, asked: Collection[str], streamed: int
) -> tuple[dict[str, Form], str]:
    """The forms of a product among `asked` that pay, float32 always; and why there are no more.

    `streamed`: bytes of all weights of the graph.
    """
    if node.target is dialect.attention:
        return _attention_forms(node, hw, asked)
    times = Times(node, hw, streamed)
    found = {"float32": Form(times.seconds(), "float32")}
    refusal = _refusal(graph, node, hw)
    if refusal is not None:
        return found, refusal
    if hw.kind == "gpu":
        if any(LABELS[label].dtype == "float16" for label in asked):
            refusal = _beyond_half(graph, node, hw)
        return found, refusal or _on_matrix_units(node, hw, asked, times, found)
    asked = [label for label in asked if label not in IN_PLACE]
    halves = _half_sums(graph, node, hw, times, found) if "float16 sums" in asked else ""
    asked = [label for label in asked if label != "float16 sums"]
    family = hw.vector_dot_product("bfloat16") if "bfloat16" in asked else None
    reason = halves
    if family is not None:
        reason = _winograd_wins(node, times, _bfloat16_rate(hw)) or ""
        if not reason:
            text = f"dot products ({family}), sums in float32"
            found["bfloat16"] = Form(times.seconds(item_bytes=2, rate=2.0), text)
    for label in asked:
        if LABELS[label].round_input or (family is not None and LABELS[label].dtype == "bfloat16"):
            continue
        why, pays = _weights_only(graph, node, hw, LABELS[label].dtype, times)
        if pays:
            found[label] = Form(times.seconds(item_bytes=2), why)
        else:
            reason = reason or why
    return found, reason


def cast_seconds(hw: Hardware, node: fx.Node) -> float:
    """Predicted seconds of casting a value: four bytes an element come in, two go out, or the other way round."""
    moved = 6.0 * prod(shape_of(node))
    bandwidth = memory_bandwidth_gbs(hw, moved) if hw.clock_mhz is not None else None
    return moved / (bandwidth * 1e9 if bandwidth else 4 * _WITHOUT_CLOCK)


def _on_matrix_units(node: fx.Node, hw: Hardware, asked: Collection[str], times: Times, found: dict[str, Form]) -> str:
    """Add the forms that a GPU's matrix units have to `found`; why there are none."""
    operands: list[Any] = node.all_input_nodes
    columns, depth, *_ = shape_of(operands[1])  # filters and channels of a convolution
    rows = prod(shape_of(node)) // columns
    if rows < FEWEST <= columns and node.target is not dialect.conv2d and depth % _PIECE == 0:
        for label in asked:
            if label.endswith(" weights"):
                found[label] = Form(times.seconds(item_bytes=2), "few rows: weights are read in 16 bits, once")
        return f"{rows} rows are too few for matrix units"
    if min(rows, columns) < FEWEST:
        return f"a product of {rows} rows and {columns} columns is too narrow for matrix units"
    return _in_place(hw, asked, lambda rate: times.seconds(rate=rate), found)


def _attention_forms(node: fx.Node, hw: Hardware, asked: Collection[str]) -> tuple[dict[str, Form], str]:
    """As `forms` for attention on a GPU: q, k, v and the powers of the scores are rounded."""
    given = arguments(node)
    (*_, heads, queries, depth), (*_, keys, width) = shape_of(given["q"]), shape_of(given["v"])
    flops = 2.0 * prod(shape_of(node)[:-3]) * heads * queries * keys * (depth + width) / (1 + given["is_causal"])
    work = predict_seconds(hw, Work({"float32": flops}, launches=0))
    seconds = flops / _WITHOUT_CLOCK if work is None else work
    found = {"float32": Form(seconds, "float32")}
    if (operand := other_than(torch.float32, node, given["q"], given["k"], given["v"])) is not None:
        return found, f"{operand.name} is not float32"
    if min(queries, keys) < FEWEST or not prod(shape_of(node)) * depth:
        return found, f"attention of {queries} queries and {keys} keys is too narrow for matrix units"
    if max(depth, width) > (DEEPEST if getattr(hw, "operand_copies", 1) == 1 else DEEPEST_TWICE):
        return found, f"heads of {depth} and {width} are more than registers hold beside the sums"
    return found, _in_place(hw, asked, lambda rate: seconds / rate, found)


def _in_place(hw: Hardware, asked: Collection[str], seconds: Callable[[float], float], found: dict[str, Form]) -> str:
    """Add the forms that round on the way into matrix units, of `seconds(gain of the rate)`; why there are none."""
    for label in asked:
        dtype = LABELS[label].dtype
        shapes = hw.matrix_instructions(dtype)
        if hw.isa == "amdgcn" and shapes and not any((s.m, s.n) == (16, 16) and s.k >= 16 for s in shapes):
            return f"no kernel has fragments of {shapes[0]}, which {hw.id} multiplies"
        narrow, wide = hw.peak_flops(dtype), hw.peak_flops("float32")
        if label in IN_PLACE and shapes and narrow and wide and narrow > wide:
            text = "matrix units, operands rounded on the way, sums in float32"
            found[label] = Form(seconds(narrow / wide), text)
    return f"{hw.id} has no faster matrix instructions for it"


def _refusal(graph: fx.GraphModule, node: fx.Node, hw: Hardware) -> str | None:
    if weight_of(graph, node) is None:
        return _COMPUTED_REASON
    if (operand := other_than(torch.float32, node, *node.all_input_nodes)) is not None:
        return f"{operand.name} is not float32"
    if not prod(shape_of(node)):
        return "the result has no elements"
    given = arguments(node)
    if node.target is dialect.conv2d:
        if given["groups"] != 1:
            return f"{given['groups']} groups: a group's channels are fewer than a dot product takes"
        if hw.kind != "gpu" and given["layout"] != "NHWC":
            return f"the layout is {given['layout']}"
    bias, residual = given.get("bias"), given.get("residual")
    planar = given.get("layout") == "NCHW"
    if bias is not None and shape_of(bias) != (shape_of(node)[1:2] if planar else shape_of(node)[-1:]):
        return f"the bias has shape {shape_of(bias)}, not one value a column"
    if residual is not None and shape_of(residual) != shape_of(node):
        return f"the residual has shape {shape_of(residual)}, the result {shape_of(node)}"
    return None


def _half_sums(graph: fx.GraphModule, node: fx.Node, hw: Hardware, times: Times, found: dict[str, Form]) -> str:
    """Add the form with products and sums in float16 to `found`; why there is none."""
    if not (hw.supports("float16") and hw.multiplies_by_element):
        return ""
    columns = shape_of(node)[-1]
    if columns < FEWEST:
        return f"a product of {columns} columns is too narrow for rounding its input first"
    refusal = _winograd_wins(node, times, HALF_RATE) or _beyond_half(graph, node, hw)
    if refusal is None:
        text = f"float16 arithmetic, sums of {BLOCK} products added up in float32"
        found["float16 sums"] = Form(times.seconds(item_bytes=2, rate=HALF_RATE), text)
    return refusal or ""


def _bfloat16_rate(hw: Hardware) -> float:
    """How many times as fast as float32 dot products of bfloat16 are, by vector instructions."""
    narrow, wide = hw.peak_flops("bfloat16"), hw.peak_flops("float32")
    return min(2.0, narrow / wide) if narrow and wide else 2.0


def _winograd_wins(node: fx.Node, times: Times, rate: float) -> str | None:
    """Why the float32 form of a convolution is Winograd's and faster than `rate` times the direct sum, or None."""
    if node.target is not dialect.conv2d:
        return None
    given = arguments(node)
    weight = shape_of(given["weight"])
    simple = list(given["stride"]) == list(given["dilation"]) == [1, 1] and weight[2:] == (3, 3)
    if not simple or min(weight[:2]) < WINOGRAD_CHANNELS:
        return None
    _, height, width, _ = shape_of(node)
    seconds, gain = min(_winograd(times, height, width, m) for m in (2, 4))
    if seconds >= times.seconds(item_bytes=2, rate=rate):
        return None
    return f"Winograd in float32 is {gain:.1f} times as fast as a direct sum, 16 bits {rate:.1f} times"


def _winograd(times: Times, height: int, width: int, m: int) -> tuple[float, float]:
    """Seconds of F(m x m, 3 x 3) and its gain over the direct sum: n * n = (m + 2)^2 products for m * m outputs.

    Tiles reach beyond the edge, and weights are n * n / 9 times as large: small images gain least.
    """
    n = m + 2
    outputs = -(-height // m) * -(-width // m) * n * n
    gain = WINOGRAD_EFFICIENCY * 9 * height * width / outputs
    return times.seconds(item_bytes=4 * n * n / 9, rate=gain), gain


def _weights_only(graph: fx.GraphModule, node: fx.Node, hw: Hardware, dtype: str, times: Times) -> tuple[str, bool]:
    """Whether weights of `dtype` alone pay, and the reason."""
    lacking = f"no {dtype} arithmetic on this machine, and"
    if hw.supports(dtype):
        lacking = f"sums in float32 do not use this machine's {dtype} arithmetic, and"
    if node.target is dialect.conv2d:
        return f"{lacking[:-5]}, and a convolution uses each weight for many pixels", False
    last = hw.caches[-1] if hw.caches else None
    if last is not None and times.streamed <= last.size_bytes:
        return f"{lacking} all weights ({times.streamed >> 20} MB) stay in its cache", False
    if hw.dram_gbs is None or hw.peak_flops() is None:
        return f"{lacking[:-5]}, whose memory bandwidth is not known", False
    gain = times.seconds(item_bytes=2) / times.seconds()
    if gain > GAIN:
        return f"{lacking} {times.rows} rows keep it busy while weights arrive", False
    if dtype == "float16":
        refusal = _beyond_half(graph, node, hw)
        if refusal is not None:
            return refusal, False
    size = 4 * times.weight >> 20
    return f"weights only: {times.rows} rows wait for {size} MB of weights; half the bytes take {gain:.2f}", True


def _beyond_half(graph: fx.GraphModule, node: fx.Node, hw: Hardware) -> str | None:
    """Why float16 cannot hold the weights, or is not converted here."""
    if hw.isa == "x86_64" and "f16c" not in hw.features:
        return "this machine does not convert float16"
    weight = weight_of(graph, node)
    assert weight is not None
    narrow = weight.to(torch.float16)
    if not bool(narrow.isfinite().all()):
        return f"weights up to {float(weight.abs().max()):.3g} are beyond float16's 65504"
    error = float(torch.linalg.vector_norm(weight - narrow)) / max(float(torch.linalg.vector_norm(weight)), 1e-300)
    return f"weights so small that float16 errs by {error:.1e}" if error > _HALF_ROUNDING else None


class Times:
    """Predicted seconds of a product by the bytes of a weight and the rate of its arithmetic."""

    def __init__(self, node: fx.Node, hw: Hardware, streamed: int) -> None:
        operands: list[Any] = node.all_input_nodes
        self.weight = prod(shape_of(operands[1])) if len(operands) > 1 and value_of(operands[1]) is not None else 0
        self.streamed = streamed
        shape = shape_of(node) if value_of(node) is not None else (0,)
        if node.target is dialect.conv2d:
            self.rows = prod(shape) // max(1, shape_of(operands[1])[0])
        else:
            self.rows = prod(shape[:-1])
        work = predict_seconds(hw, Work({"float32": 2.0 * self.weight * self.rows}, launches=0))
        self.arithmetic = 2.0 * self.weight * self.rows / _WITHOUT_CLOCK if work is None else work
        self.last = hw.caches[-1].size_bytes if hw.caches else 0
        self.per_byte = 1e-9 / hw.dram_gbs if hw.dram_gbs and work is not None else 0.0

    def seconds(self, item_bytes: float = 4, rate: float = 1.0) -> float:
        """Whichever takes longer, arithmetic or the weights, where all of the graph's in that size leave the cache."""
        waits = self.streamed * item_bytes / 4 > self.last
        return max(self.arithmetic / rate, self.weight * item_bytes * self.per_byte * waits)
