"""Which products of a graph run in 8 bits: scales by calibration, refusals with reasons, damage, and a tolerance kept.

    plan = plan_int8(graph, hw, method, inputs)            # table, choices, each with its SQNR
    plan, notes = within_tolerance(graph, hw, plan, samples, wanted)

The damage of a product is its signal to quantisation noise ratio: 10 log10(|y|^2 / |y8 - y|^2) in dB, with y its
float32 result on the operands it had and y8 what 8 bits make of the same operands. Where all products together err by
more than `wanted` at the outputs, those go back to float32 that cost the most error for the time (int8_budget.py);
errors at the outputs are those of sensitivity.py, to first order, and what is left is measured as a whole.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import fx

from ...errors import InputError, suggest
from ...hwdb import Hardware
from ...passes import dialect
from ...passes.assign_precision import Choice
from ...passes.hoist_quantise import hoist_quantise
from ...passes.merge_duplicates import merge_duplicates
from ...passes.precision.forms import class_reason, is_arithmetic, streamed_bytes
from ...passes.precision.int8_forms import DYNAMIC, Int8Form, int8_form, is_product, table_reason
from ...passes.precision.int8_scales import Scale, Table, scale_between
from ...passes.precision.learned_codes import learned_scales
from ...passes.quantise import quantise
from ...passes.remove_dead import remove_dead
from ...passes.requantise import requantise, requantise_alone
from ...passes.rewrite import arguments, shape_of
from .. import compare, pipeline
from ..reference import run_eager
from ..sensitivity import error_of, sensitivities
from .damage import with_damage
from .int8_attention import attention_choice, attention_form, is_attention
from .int8_budget import budget_problem, over_budget, shared_inputs, source_of
from .int8_method import LEARNED, Method
from .observe import Observed, observe
from .ranges import METHODS

log = logging.getLogger(__name__)

Sample = tuple[Sequence[torch.Tensor], compare.Reference]
SECONDS_PER_BYTE = 1e-10  # that a table saves: as if it were read once, at 10 GB/s
TRIES = 6  # assignments measured
ENOUGH = 0.85  # of the allowed error, after which no larger budget is tried
LOOKED_AT = 4  # inputs whose damage is averaged
NARROW = ("int8", "int4")
HALVED = "int4 weights"
UNCALIBRATED = "its range is found on calibration inputs, and there are none: pass calibration=[inputs, ...]"
_UNTRAINED = "training did not round its input and weights to 8 bits"
_DECIDED = "it was decided so when the model was compiled"
# Behind `quantise`: rounding moves to the front, products give bytes, what came twice is merged.
JOINING = (hoist_quantise, requantise, merge_duplicates, remove_dead)
# Where rounding what nobody rounded in training would change what was trained.
TRAINED = (hoist_quantise, requantise_alone, merge_duplicates, remove_dead)


@dataclass(frozen=True)
class Int8Plan:
    """What is rounded by what, and the decision for every operator that computes."""

    table: Table
    choices: tuple[Choice, ...]
    forms: Mapping[str, Int8Form] = field(default_factory=dict)
    tables: Mapping[str, float] = field(default_factory=dict)  # embeddings: what their bytes count for, in seconds
    trained: bool = False  # for exactly these roundings, and no others
    group: int = 0  # of 4-bit weights

    @property
    def halved(self) -> dict[str, int]:
        """Those of the chosen whose weights have 4 bits, and their groups."""
        return {choice.node: self.group for choice in self.choices if choice.form == HALVED}

    @property
    def weights_only(self) -> frozenset[str]:
        """Those of the chosen whose inputs stay float32."""
        return frozenset(choice.node for choice in self.choices if choice.form == "int8 weights")

    @property
    def by_rows(self) -> frozenset[str]:
        """Those of the chosen whose inputs are rounded at run time."""
        return frozenset(choice.node for choice in self.choices if choice.form == DYNAMIC)

    def quantise(self, graph: fx.GraphModule, some: Collection[str] | None = None) -> int:
        """Rewrite the products in 8 bits, or those of `some`; returns how many."""
        names = self.chosen if some is None else some
        return quantise(graph, self.table, names, self.weights_only, self.halved, self.by_rows)

    @property
    def chosen(self) -> frozenset[str]:
        """The products in 8 bits."""
        return frozenset(choice.node for choice in self.choices if choice.dtype in NARROW)

    def without(self, names: Collection[str], reason: str) -> Int8Plan:
        """The same with these products in float32."""
        choices = tuple(
            replace(c, dtype="float32", form="float32", reason=reason) if c.node in names else c for c in self.choices
        )
        return replace(self, choices=choices)

    @property
    def seconds_gained(self) -> float:
        """What the chosen products are predicted to save."""
        chosen = self.chosen
        return sum(form.float32_seconds - form.seconds for name, form in self.forms.items() if name in chosen)

    def text(self) -> str:
        """What is gained, in a line."""
        wide = sum(form.float32_seconds for form in self.forms.values())
        share = 1.0 - self.seconds_gained / wide if wide else 1.0
        count = len(self.chosen & set(self.forms))
        fewer = f", {len(self.halved)} of them with weights of 4" if self.halved else ""
        return f"{count} products in 8 bits{fewer}; the products are predicted to take {share:.2f} of float32"


def plan_int8(
    graph: fx.GraphModule,
    hw: Hardware,
    method: Method,
    inputs: Sequence[Sequence[torch.Tensor]],
    only: Mapping[str, str] | None = None,
) -> Int8Plan:
    """Scales from `inputs`, and every product in 8 bits that the machine gains by; with `only`, those named, as there.

    Raises InputError for a pattern of `method.keep` that fits no product.
    """
    products = [n for n in graph.graph.nodes if is_product(n)]
    trained = learned_scales(graph, products) if method.activation == LEARNED else None
    tables = {n: why for n in graph.graph.nodes if trained is None and (why := table_reason(graph, n)) is not None}
    attentions = {n: attention_form(n, hw) for n in graph.graph.nodes if method.attention and is_attention(n)}
    kept = _kept([*products, *tables, *attentions], method.keep)
    if trained is not None:
        kept |= dict.fromkeys([n for n in products if n not in trained], _UNTRAINED)
    streamed = streamed_bytes(graph, products)
    group = method.group if method.weights_only == "int4" else 0
    asked = (streamed, group, method.dynamic)
    first = {n: int8_form(graph, n, hw, (), *asked) for n in products}
    possible = [n for n in products if first[n].possible]
    paying = [n for n in possible if first[n].name == "int8" and n not in kept]
    while True:  # a product that does not pay rounds no input for others: until all that are left do
        forms = {n: int8_form(graph, n, hw, shared_inputs(paying), *asked) for n in possible}
        before = len(paying)
        paying = [n for n in paying if forms[n].pays and forms[n].name == "int8"]
        if len(paying) == before:
            break
    wanted = list(dict.fromkeys(v for n in paying for v in _rounded(n, paying)))
    observed = observe(graph, inputs, wanted) if wanted and trained is None else Observed({}, {}, {})
    table = _table(observed, method) if trained is None else _trained_table(trained)
    choices = []
    for node in graph.graph.nodes:
        operator = str(node.target).removesuffix(".default")
        if node in attentions:
            named = only is None or node.name in only
            choices.append(attention_choice(node, attentions[node], kept.get(node), named))
            continue
        if node in tables:
            reason = kept.get(node) or (None if only is None or node.name in only else _DECIDED)
            form_of = ("int8", tables[node], False, None, "int8 weights") if reason is None else ("float32", reason)
            choices.append(Choice(node.name, operator, *form_of))
            continue
        if not is_arithmetic(node):
            continue
        reason = class_reason(node) or kept.get(node)
        if reason is None:
            form = forms.get(node, first[node])
            source = arguments(node)["input"].name
            reason = form.reason
            inputs_too = form.name == "int8"
            known = not inputs_too or source in table.scales
            if form.pays and known and (only is None or node.name in only):
                name = form.name if only is None else only[node.name]
                dtype = "int4" if name == HALVED else "int8"
                rounds = inputs_too or name == DYNAMIC
                choices.append(Choice(node.name, operator, dtype, reason, round_input=rounds, form=name))
                continue
            if form.pays:
                reason = observed.unknown.get(source, _DECIDED)
                reason = reason if inputs else UNCALIBRATED
        choices.append(Choice(node.name, operator, "float32", reason))
    saved = {n.name: 3.0 * prod(shape_of(n.args[0])) * SECONDS_PER_BYTE for n in tables}
    by_name = {n.name: form for n, form in (forms | attentions).items()}
    plan = Int8Plan(table, tuple(choices), by_name, saved, trained is not None, group)
    return plan if only is not None or not inputs else with_damage(graph, plan, inputs[:LOOKED_AT])


def _kept(products: Sequence[fx.Node], patterns: Sequence[str]) -> dict[fx.Node, str]:
    """The products that `keep` names, and by which pattern."""
    found: dict[fx.Node, str] = {}
    names = {n: (n.name, *(str(o.target) for o in n.all_input_nodes if o.op == "get_attr")) for n in products}
    for pattern in patterns:
        fitting = [n for n, known in names.items() if any(fnmatchcase(k, pattern) for k in known)]
        if not fitting:
            known = [k for pair in names.values() for k in pair]
            raise InputError(
                f"keep: no product is called {pattern!r}{suggest(pattern, known)}; names are those of the report's "
                "precisions, or of weights"
            )
        found |= dict.fromkeys(fitting, f"kept in float32 as keep={pattern!r} asks")
    return found


def _rounded(node: fx.Node, products: Collection[fx.Node]) -> list[fx.Node]:
    """The values that a product reads in 8 bits: its input, and a convolution's residual that products make."""
    given = arguments(node)
    values = [given["input"]]
    residual = given.get("residual")
    if node.target is dialect.conv2d and residual is not None and source_of(residual) in products:
        values.append(residual)
    return values


def _trained_table(trained: Mapping[fx.Node, Scale]) -> Table:
    return Table({arguments(node)["input"].name: scale for node, scale in trained.items()})


def _table(observed: Observed, method: Method) -> Table:
    ranges: dict[int, tuple[float, float]] = {}  # values that are linked share what was seen of them
    scales = {}
    for name, seen in observed.seen.items():
        key = id(seen.counts)
        if key not in ranges:
            ranges[key] = METHODS[method.ranges](seen)
        scales[name] = scale_between(*ranges[key], symmetric=method.scheme == "symmetric")
    return Table(scales, observed.means, method.weight == "per_channel")


def apply(graph: fx.GraphModule, hw: Hardware, plan: Int8Plan) -> tuple[fx.GraphModule, tuple[pipeline.PassRun, ...]]:
    """A copy of the graph with the plan's products in 8 bits, roundings joined; and what the passes did."""
    copied = pipeline.copy_graph(graph)
    started = time.perf_counter()
    count = plan.quantise(copied)
    run = pipeline.PassRun("quantise", count, time.perf_counter() - started)
    joined, runs = pipeline.run(copied, hw, TRAINED if plan.trained else JOINING)
    return joined, (run, *runs)


def within_tolerance(
    graph: fx.GraphModule, hw: Hardware, plan: Int8Plan, samples: Sequence[Sample], wanted: float
) -> tuple[Int8Plan, float, tuple[str, ...]]:
    """The plan with as many products back in float32 as an error of `wanted` needs, its measured error, and notes."""
    measured = _measured(graph, hw, plan, samples)
    if measured <= wanted or not plan.chosen:
        return plan, measured, ()
    if plan.halved:
        wider, measured = _widened(graph, hw, plan, samples, wanted)
        if measured <= wanted:
            return wider, measured, (f"{len(plan.halved) - len(wider.halved)} products in 8 bits instead of 4",)
        plan = wider
    started = time.perf_counter()
    candidates = [c for c in plan.choices if c.dtype in NARROW]
    found, method = sensitivities(
        graph, candidates, samples[:LOOKED_AT], lambda single, some: plan.quantise(single, {c.node for c in some})
    )
    errors = {name: error for (name, _), error in found.items()}
    plan = _with_errors(plan, errors)
    notes = (
        f"all in 8 bits err by {measured:.1e}; errors of {len(errors)} products by {method}, "
        f"in {time.perf_counter() - started:.1f} s",
    )
    problem = budget_problem(graph, hw, candidates, plan.forms, plan.tables, errors)
    # Products whose errors are not finite are over any budget.
    predicted = math.sqrt(sum(error**2 for error in errors.values() if math.isfinite(error)))
    # Predictions have the wrong scale where errors correlate: the budget is scaled by predicted over measured.
    budget = wanted * (predicted / measured if math.isfinite(measured) and measured and predicted else 1.0)
    reason = "kept in float32: it, or a product it shares a value with, costs more accuracy than the tolerance leaves"
    best, best_measured, kept_by = None, 0.0, 0.0
    failed = predicted
    for _ in range(TRIES):
        some = plan.without(over_budget(problem, budget), reason)
        if best is not None and some.chosen == best.chosen:
            break
        measured = _measured(graph, hw, some, samples)
        log.info("budget %.1e: %d products in 8 bits, error %.1e", budget, len(some.chosen), measured)
        if measured <= wanted:
            best, best_measured, kept_by = some, measured, budget
            if measured > ENOUGH * wanted:
                break
        else:
            failed = budget
        if best is not None:
            budget = math.sqrt(kept_by * failed)
        else:
            budget *= min(0.7, 0.9 * wanted / measured) if math.isfinite(measured) else 0.1
    if best is not None:
        return best, best_measured, notes
    nothing = plan.without(plan.chosen, reason)
    return nothing, _measured(graph, hw, nothing, samples), notes


def _widened(
    graph: fx.GraphModule, hw: Hardware, plan: Int8Plan, samples: Sequence[Sample], wanted: float
) -> tuple[Int8Plan, float]:
    """The plan with as few of its 4-bit weights in 8 bits as `wanted` needs, the most damaged first; and its error."""
    ranked = sorted((c for c in plan.choices if c.form == HALVED), key=lambda c: c.sqnr_db or 0.0)
    reason = "weights only, in 8 bits: in 4 it costs more accuracy than the tolerance leaves"

    def with_wide(count: int) -> Int8Plan:
        wide = {c.node for c in ranked[:count]}
        choices = tuple(
            replace(c, dtype="int8", form="int8 weights", reason=reason) if c.node in wide else c for c in plan.choices
        )
        return replace(plan, choices=choices)

    low, high = 0, len(ranked)  # `low` is too few
    best = with_wide(high)
    measured = _measured(graph, hw, best, samples)
    while measured <= wanted and high - low > 1:
        middle = (low + high) // 2
        tried = with_wide(middle)
        error = _measured(graph, hw, tried, samples)
        if error <= wanted:
            high, best, measured = middle, tried, error
        else:
            low = middle
    return best, measured


def _with_errors(plan: Int8Plan, errors: Mapping[str, float]) -> Int8Plan:
    return replace(plan, choices=tuple(replace(c, error=errors.get(c.node)) for c in plan.choices))


def _measured(graph: fx.GraphModule, hw: Hardware, plan: Int8Plan, samples: Sequence[Sample]) -> float:
    """The largest error against float64 of the graph with this plan, in PyTorch."""
    rewritten, _ = apply(graph, hw, plan)
    return max((error_of(run_eager(rewritten, inputs), expected) for inputs, expected in samples), default=0.0)
