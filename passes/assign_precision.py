"""linear(x, w) -> linear_bf16(x, bfloat16(w)), conv2d likewise, where the machine gains by it.

Two steps with a table between them, so that another way to decide can take the place of the first:

    choices = choose_precisions(graph, hw, "bf16")     # one Choice an operator, with its reason
    assign_precision(graph, choices)                   # rewrites those whose dtype is bfloat16

dot products   where vectors multiply bfloat16, every product does, with inputs rounded too; a result that only such
               operators read (as input, or as residual of one) is stored as bfloat16
weights only   elsewhere, weights are bfloat16 in memory where the product waits for them: its float32 weights stream
               from memory (all weights of the graph are more than the last cache) and few rows use them

Refused: operators that are not products (softmax, norms, reductions, exp: float32), products of two computed operands,
other dtypes than float32, grouped convolutions (a group is narrower than a dot product), 3x3 convolutions where
Winograd's algorithm in float32 takes fewer cycles, and whatever the caller lists in `keep`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from ..hwdb import Hardware
from ..hwdb.cost import Work, predict_seconds
from . import dialect, mixed
from .rewrite import arguments, constant, shape_of, value_of

log = logging.getLogger(__name__)
aten = torch.ops.aten

PRODUCTS = frozenset({dialect.linear, aten.linear.default, dialect.conv2d})
COMPUTED = frozenset(
    {
        dialect.matmul,
        dialect.attention,
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.matmul.default,
        aten.convolution.default,
        aten.scaled_dot_product_attention.default,
    }
)
# F(4x4, 3x3) multiplies a quarter as often; measured it is 2.4 to 3.4 times as fast as the direct float32 sum, and
# needs channels enough to fill its tiles. A dot product twice as fast as float32 loses to that.
WINOGRAD_GAIN, WINOGRAD_CHANNELS = 2.4, 32
GAIN = 0.8  # weights are kept as bfloat16 for a predicted gain of a fifth


@dataclass(frozen=True)
class Choice:
    """The precision of one operator, and why. `round_input`: its input is rounded too, for dot products."""

    node: str
    operator: str
    dtype: str  # "bfloat16" or "float32"
    reason: str
    round_input: bool = False


def choose_precisions(
    graph: fx.GraphModule, hw: Hardware, precision: str, keep: Collection[str] = ()
) -> tuple[Choice, ...]:
    """Decide for every product of the graph; the nodes named in `keep` stay float32."""
    if precision == "fp32":
        return ()
    assert precision == "bf16", precision
    nodes = [n for n in graph.graph.nodes if n.op == "call_function" and n.target in PRODUCTS | COMPUTED]
    weights = {n.args[1].target: 4 * prod(shape_of(n.args[1])) for n in nodes if _weight(graph, n) is not None}
    return tuple(_choose(graph, n, hw, sum(weights.values()), keep) for n in nodes)


def _choose(graph: fx.GraphModule, node: fx.Node, hw: Hardware, streamed: int, keep: Collection[str]) -> Choice:
    operator = str(node.target).removesuffix(".default")
    refusal = _refusal(graph, node, keep)
    if refusal is not None:
        return Choice(node.name, operator, "float32", refusal)
    family = hw.vector_dot_product("bfloat16")
    if family is not None:
        winograd = _winograd_wins(node, hw)
        if winograd is not None:
            return Choice(node.name, operator, "float32", winograd)
        return Choice(node.name, operator, "bfloat16", f"dot products ({family}), sums in float32", True)
    reason, pays = _streaming(node, hw, streamed)
    return Choice(node.name, operator, "bfloat16" if pays else "float32", reason)


def _refusal(graph: fx.GraphModule, node: fx.Node, keep: Collection[str]) -> str | None:
    if node.target in COMPUTED or _weight(graph, node) is None:
        return "both operands are computed: there are no weights to round, and its sums feed a softmax or the like"
    if node.name in keep:
        return "kept in float32: it costs more accuracy than the tolerance leaves"
    for operand in (node, *node.all_input_nodes):
        value = value_of(operand)
        if value is None or value.dtype != torch.float32:
            return f"{operand.name} is not float32"
    if not prod(shape_of(node)) or not shape_of(node.all_input_nodes[0]):
        return "the result has no elements"
    given = arguments(node)
    if node.target is dialect.conv2d:
        if given["groups"] != 1:
            return f"{given['groups']} groups: a group's channels are fewer than a dot product takes"
        if given["layout"] != "NHWC":
            return f"the layout is {given['layout']}"
    bias, residual = given.get("bias"), given.get("residual")
    if bias is not None and shape_of(bias) != shape_of(node)[-1:]:
        return f"the bias has shape {shape_of(bias)}, not one value a column"
    if residual is not None and shape_of(residual) != shape_of(node):
        return f"the residual has shape {shape_of(residual)}, the result {shape_of(node)}"
    return None


def _weight(graph: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    return constant(graph, node.args[1]) if node.target in PRODUCTS else None


def _winograd_wins(node: fx.Node, hw: Hardware) -> str | None:
    if node.target is not dialect.conv2d:
        return None
    given = arguments(node)
    weight = shape_of(given["weight"])
    simple = list(given["stride"]) == list(given["dilation"]) == [1, 1] and weight[2:] == (3, 3)
    if not simple or min(weight[:2]) < WINOGRAD_CHANNELS:
        return None
    narrow, wide = hw.peak_flops("bfloat16"), hw.peak_flops("float32")
    rate = min(2.0, narrow / wide) if narrow and wide else 2.0  # of a vector instruction
    if rate >= WINOGRAD_GAIN:
        return None
    return f"Winograd in float32 is {WINOGRAD_GAIN} times as fast as a direct sum, a dot product {rate:.0f} times"


def _streaming(node: fx.Node, hw: Hardware, streamed: int) -> tuple[str, bool]:
    """Whether bfloat16 weights alone pay, and the reason; `streamed`: bytes of all weights of the graph."""
    if node.target is dialect.conv2d:
        return "no bfloat16 arithmetic on this machine, and a convolution uses each weight for many pixels", False
    last = hw.caches[-1] if hw.caches else None
    if last is not None and streamed <= last.size_bytes:
        return f"no bfloat16 arithmetic on this machine, and all weights ({streamed >> 20} MB) stay in its cache", False
    if hw.dram_gbs is None or hw.peak_flops() is None:
        return "no bfloat16 arithmetic on this machine, whose memory bandwidth is not known", False
    weight = prod(shape_of(node.all_input_nodes[1]))
    rows = prod(shape_of(node)[:-1])

    def seconds(item_bytes: int) -> float:
        arithmetic = predict_seconds(hw, Work({"float32": 2.0 * weight * rows}, launches=0))
        assert arithmetic is not None
        assert hw.dram_gbs is not None
        return max(arithmetic, weight * item_bytes / (hw.dram_gbs * 1e9))

    gain = seconds(2) / seconds(4)
    if gain > GAIN:
        return f"no bfloat16 arithmetic on this machine, and {rows} rows keep it busy while weights arrive", False
    return (
        f"weights only: {rows} rows wait for {4 * weight >> 20} MB of weights; half the bytes take {gain:.2f}",
        True,
    )


def assign_precision(graph: fx.GraphModule, choices: Collection[Choice]) -> int:
    """Rewrite the operators chosen to be bfloat16; returns how many."""
    chosen = {c.node: c for c in choices if c.dtype == "bfloat16"}
    nodes = [n for n in graph.graph.nodes if n.name in chosen and n.target in PRODUCTS]
    rounded: dict[str, fx.Node] = {}
    for node in nodes:
        given = arguments(node)
        weight = given["weight"]
        name = f"{weight.target}_bf16"
        if name not in rounded:
            tensor = constant(graph, weight)
            assert tensor is not None
            graph.register_buffer(name, tensor.to(torch.bfloat16))
            with graph.graph.inserting_before(weight):
                rounded[name] = graph.graph.get_attr(name)
            rounded[name].meta["val"] = weight.meta["val"].to(torch.bfloat16)
        node.args = _arguments(node, rounded[name], chosen[node.name].round_input)
        node.kwargs = {}
        node.target = mixed.conv2d_bf16 if node.target is dialect.conv2d else mixed.linear_bf16
        log.debug("%s: bfloat16, %s", node.name, chosen[node.name].reason)
    for node in nodes:
        if chosen[node.name].round_input and _read_narrow(node):
            node.args = (*node.args[:-1], True)
            node.meta["val"] = node.meta["val"].to(torch.bfloat16)
    if nodes:
        graph.graph.eliminate_dead_code()
        graph.recompile()
    return len(nodes)


def _arguments(node: fx.Node, weight: fx.Node, round_input: bool) -> tuple[object, ...]:
    given = arguments(node)
    given["weight"] = weight
    if node.target is aten.linear.default:
        return (given["input"], weight, given["bias"], None, "none", [], round_input, False)
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return (*[given[name] for name in names], round_input, False)


def _read_narrow(node: fx.Node) -> bool:
    """Whether every reader rounds what it reads, or adds it as its residual; and at least one rounds."""
    rounds = False
    for user in node.users:
        if user.target not in (mixed.linear_bf16, mixed.conv2d_bf16):
            return False
        given = arguments(user)
        if given["bias"] is node or not given["round_input"]:
            return False
        rounds |= given["input"] is node
    return rounds
