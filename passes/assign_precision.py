"""linear(x, w) -> linear_bf16(x, bfloat16(w)) or linear_f16(x, float16(w)), conv2d likewise, where the machine gains.

attention(q, k, v) -> attention_bf16(q, k, v) or attention_f16(q, k, v) on GPUs, which round on the way.

Two steps with a table between them, so that another way to decide can take the place of the first:

    plan = plan_precisions(graph, hw, "auto")     # one Choice an operator that computes, with its reason
    assign_precision(graph, plan.choices)         # rewrites those whose dtype is not float32

The forms an operator may have, and their predicted seconds, are in precision_forms.py; the least predicted seconds
within a budget of error are found by precision_cut.py. "bf16" and "fp16" choose between float32 and the one precision,
"auto" among all that the machine has.

Stored      a product of rounded inputs stores its result as bfloat16 where only such products read it (as input, or as
            residual of one); a value that is read in another format than it is stored in is cast, which costs seconds.
            On GPUs: store_rounded.py

Refused: operators that are no products (softmax, norms, reductions, exp: float32), other products of computed operands,
other dtypes than float32, grouped convolutions (a group is narrower than a dot product), 3x3 convolutions where
Winograd's algorithm in float32 takes fewer cycles, weights that float16 cannot hold, and forms that gain nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, dialect_half, dialect_mixed
from .precision.cut import Cost, Problem, Value, within
from .precision.forms import (
    ASKED,
    IN_PLACE,
    LABELS,
    PRODUCTS,
    UNMEASURED,
    Form,
    cast_seconds,
    class_reason,
    forms,
    is_arithmetic,
    is_reducible,
    streamed_bytes,
)
from .rewrite import arguments, constant
from .store_rounded import store_rounded

log = logging.getLogger(__name__)
aten = torch.ops.aten

# (node, form) -> relative L2 error at the outputs that this alone causes
Errors = Mapping[tuple[str, str], float]

_ELSEWHERE = "float32 around the products"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Choice:
    """The precision of one operator, and why. `round_input`: its input is rounded too, for dot products."""

    node: str
    operator: str
    dtype: str  # "float32", "bfloat16", "float16", "int8" or "int4"
    reason: str
    round_input: bool = False
    error: float | None = None  # predicted at the outputs, of this operator alone
    form: str = "float32"  # of precision_forms.LABELS, or "int8"
    sqnr_db: float | None = None  # of int8: its result in float32 against what 8 bits change


@dataclass(frozen=True)
class Plan:
    """The choices of a graph, what the cost model expects of them, and what else they were chosen from."""

    choices: tuple[Choice, ...]
    seconds: float = 0.0  # of the products and the casts between them
    float32_seconds: float = 0.0
    error: float = 0.0  # predicted, where errors were measured
    candidates: tuple[Choice, ...] = ()  # every reduced form that pays

    @property
    def reduced(self) -> int:
        """How many operators are not float32."""
        return sum(choice.dtype != "float32" for choice in self.choices)


def plan_precisions(
    graph: fx.GraphModule,
    hw: Hardware,
    precision: str,
    errors: Errors | None = None,
    budget: float = math.inf,
) -> Plan:
    """The fastest precisions by the cost model whose errors, added as if independent, stay within `budget`.

    `errors` were measured; without them those of rounding alone decide between equally fast forms.
    """
    if precision == "fp32":
        return Plan(())
    nodes = [n for n in graph.graph.nodes if is_arithmetic(n)]
    products = [n for n in nodes if is_reducible(n, hw)]
    streamed = streamed_bytes(graph, products)
    possible = {n: forms(graph, n, hw, ASKED[precision], streamed) for n in products}
    problem = _problem(hw, {n: found for n, (found, _) in possible.items()}, errors)
    labels = within(problem, budget)
    choices = []
    for node in nodes:
        reason = None if node in possible else class_reason(node)
        if reason is not None:
            choices.append(Choice(node.name, _operator(node), "float32", reason))
            continue
        found, why_not = possible[node]
        choices.append(_choice(problem, node, labels[node], found, why_not, errors, math.isfinite(budget)))
    first = dict.fromkeys(problem.nodes, problem.first)
    candidates = [
        _choice(problem, node, label, found, "", errors, False)
        for node, (found, _) in possible.items()
        for label in found
        if label != problem.first
    ]
    seconds, before = problem.seconds(labels), problem.seconds(first)
    return Plan(tuple(choices), seconds, before, problem.error(labels), tuple(candidates))


def _problem(hw: Hardware, possible: Mapping[fx.Node, Mapping[str, Form]], errors: Errors | None) -> Problem:
    """The products with their forms, and the values between them; all else is one operator in float32."""
    problem = Problem({label: form.stored for label, form in LABELS.items()})
    problem.nodes[_ELSEWHERE] = {"float32": Cost(0.0)}
    for node, found in possible.items():
        problem.nodes[node] = {label: Cost(form.seconds, _error(node, label, errors)) for label, form in found.items()}
    products = [node for node in possible if node.target in PRODUCTS]
    narrow = [node for node in products if any(LABELS[label].round_input for label in possible[node])]
    touched = dict.fromkeys(value for node in narrow for value in (node, arguments(node)["input"]))
    among = set(narrow)
    for value in touched:
        readers = [user for user in value.users if not _adds_only(user, value, among)]
        if readers:
            named = tuple(reader if reader in possible else _ELSEWHERE for reader in readers)
            producer = value if value in possible else _ELSEWHERE
            problem.values.append(Value(producer, named, cast_seconds(hw, value)))
    return problem


def _adds_only(user: fx.Node, value: fx.Node, narrow: Collection[fx.Node]) -> bool:
    """Whether the value is no more than a residual there, which dot products take in either format."""
    return user in narrow and arguments(user)["input"] is not value and arguments(user)["bias"] is not value


def _error(node: fx.Node, label: str, errors: Errors | None) -> float:
    if label == "float32":
        return 0.0
    return UNMEASURED[label] if errors is None else errors.get((node.name, label), math.inf)


def _choice(
    problem: Problem,
    node: fx.Node,
    label: str,
    found: Mapping[str, Form],
    why_not: str,
    errors: Errors | None,
    bounded: bool,
) -> Choice:
    form = LABELS[label]
    if label != "float32":
        error = None if errors is None else problem.nodes[node][label].error
        return Choice(node.name, _operator(node), form.dtype, found[label].reason, form.round_input, error, label)
    if len(found) == 1:
        reason = why_not
    elif bounded:
        reason = "kept in float32: it costs more accuracy than the tolerance leaves"
    else:
        reason = "kept in float32: casting what it reads takes as long as it would gain"
    return Choice(node.name, _operator(node), "float32", reason)


def _operator(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


_TARGETS = {
    (torch.bfloat16, False): dialect_mixed.linear_bf16,
    (torch.bfloat16, True): dialect_mixed.conv2d_bf16,
    (torch.float16, False): dialect_mixed.linear_f16,
    (torch.float16, True): dialect_mixed.conv2d_f16,
}
_ATTENTIONS = {"bfloat16": dialect_mixed.attention_bf16, "float16": dialect_mixed.attention_f16}
_HALF = {False: dialect_half.linear_half, True: dialect_half.conv2d_half}
_BFLOAT16 = (dialect_mixed.linear_bf16, dialect_mixed.conv2d_bf16)
_OF_SAME: dict[object, tuple[object, ...]] = {
    dialect_mixed.linear_bf16: _BFLOAT16,
    dialect_mixed.conv2d_bf16: _BFLOAT16,
    dialect_mixed.linear_f16: (dialect_mixed.linear_f16,),
    dialect_mixed.conv2d_f16: (),
}


def assign_precision(graph: fx.GraphModule, choices: Collection[Choice]) -> int:
    """Rewrite the operators chosen to be reduced; returns how many."""
    chosen = {c.node: c for c in choices if c.dtype != "float32"}
    nodes = [n for n in graph.graph.nodes if n.name in chosen and n.target in PRODUCTS]
    rounded: dict[str, fx.Node] = {}
    for node in nodes:
        given = arguments(node)
        weight, dtype = given["weight"], _DTYPES[chosen[node.name].dtype]
        name = f"{weight.target}_{'f16' if dtype == torch.float16 else 'bf16'}"
        if name not in rounded:
            tensor = constant(graph, weight)
            assert tensor is not None
            graph.register_buffer(name, tensor.to(dtype))
            with graph.graph.inserting_before(weight):
                rounded[name] = graph.graph.get_attr(name)
            rounded[name].meta["val"] = weight.meta["val"].to(dtype)
        node.args = _arguments(node, rounded[name], chosen[node.name].round_input)
        node.kwargs = {}
        spatial = node.target is dialect.conv2d
        node.target = _HALF[spatial] if chosen[node.name].form == "float16 sums" else _TARGETS[dtype, spatial]
        log.debug("%s: %s, %s", node.name, chosen[node.name].dtype, chosen[node.name].reason)
    for node in nodes:
        if chosen[node.name].round_input and LABELS[chosen[node.name].form].stored != "float32" and _read_narrow(node):
            node.args = (*node.args[:-1], True)
            node.meta["val"] = node.meta["val"].to(_DTYPES[chosen[node.name].dtype])
    if nodes:
        graph.graph.eliminate_dead_code()
    attentions = [n for n in graph.graph.nodes if n.name in chosen and n.target is dialect.attention]
    for node in attentions:
        node.target = _ATTENTIONS[chosen[node.name].dtype]
    store_rounded(graph, [n for n in (*nodes, *attentions) if chosen[n.name].form in IN_PLACE])
    if nodes or attentions:
        graph.recompile()
    return len(nodes) + len(attentions)


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
        if user.target not in _OF_SAME[node.target]:
            return False
        given = arguments(user)
        if given["bias"] is node or not given["round_input"]:
            return False
        rounds |= given["input"] is node
    return rounds
