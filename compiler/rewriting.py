"""A captured graph -> the graph that is lowered: passes, then precisions, then what follows from them.

fp32, bf16, ...   passes to a fixpoint; every product in its precision (assign_precision)
int8              passes without those that hide a product in a larger kernel that takes floats only; the products that
                  pay in 8 bits (int8_plan.py), or none where the model as a whole gains nothing; then those passes, for
                  what stays float32
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..hwdb import Hardware
from ..passes.precision.int8_forms import NOT_FOUR, is_product
from . import pipeline
from .compression import int8_plan
from .compression.int8_method import LEARNED
from .compression.migrate import migrated
from .compression.observe import NOT_FINITE, ONLY
from .pass_checks import Pass
from .precision import MARGIN, Precision, Sample, check_tolerance, reduce

if TYPE_CHECKING:
    from ..passes.assign_precision import Choice

log = logging.getLogger(__name__)

WHOLE_GAIN = 0.95  # of the model's float32 time: a twentieth less is within what the cost model errs by
UNLIKE = 4.0  # times what calibration saw of an input: beyond it, ranges say little of the example
NOTHING_GAINED = "the model as a whole gains nothing by 8 bits"


@dataclass(frozen=True)
class Rewritten:
    """The graph, what the passes did, the precisions, and notes on them."""

    graph: fx.GraphModule
    runs: tuple[pipeline.PassRun, ...]
    precisions: tuple[Choice, ...] = ()
    notes: tuple[str, ...] = ()


def rewrite(graph: fx.GraphModule, hw: Hardware, passes: Sequence[Pass], precision: Precision) -> Rewritten:
    """Rewrite a copy of the captured `graph`, and decide precisions. Raises InputError for a hopeless tolerance."""
    if precision.name != "int8":
        rewritten, runs = pipeline.run(graph, hw, passes)
        precisions, reduced, notes = reduce(rewritten, hw, precision)
        return Rewritten(rewritten, (*runs, *reduced), precisions, notes)
    early, late = divided(passes)
    wide, runs = pipeline.run(graph, hw, early)
    wide, said = migrated(wide, hw, precision.method, precision.observed)
    plan, notes = _decide(wide, hw, precision)
    notes = (*notes[:1], *said, *notes[1:])
    trained = precision.method.activation == LEARNED  # what was trained is what is asked for, faster or not
    if plan.chosen and not trained and (reason := _gains_nothing(wide, hw, late, plan)) is not None:
        log.warning("precision='int8': %s", reason)
        plan, notes = plan.without(plan.chosen, NOTHING_GAINED), (*notes, reason)
    elif not plan.chosen:
        _say_nothing_is_narrow(wide, plan)
    return _joined(wide, hw, late, runs, plan, notes)


def rewrite_again(
    graph: fx.GraphModule,
    hw: Hardware,
    passes: Sequence[Pass],
    precision: Precision,
    precisions: Collection[Choice],
) -> fx.GraphModule:
    """The graph that `rewrite` made when it decided on `precisions`."""
    from ..passes.assign_precision import assign_precision

    if precision.name != "int8":
        rewritten = pipeline.run(graph, hw, passes)[0]
        assign_precision(rewritten, precisions)
        return rewritten
    early, late = divided(passes)
    wide, runs = pipeline.run(graph, hw, early)
    wide, _ = migrated(wide, hw, precision.method, precision.observed)
    chosen = {choice.node: choice.form for choice in precisions if choice.dtype in int8_plan.NARROW}
    plan = int8_plan.plan_int8(wide, hw, precision.method, precision.observed, only=chosen)
    return _joined(wide, hw, late, runs, plan, ()).graph


def divided(passes: Sequence[Pass]) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """The passes in front of the decision on int8, and those behind it, which hide products."""
    from ..passes.fuse_conv_depthwise import fuse_conv_depthwise
    from ..passes.read_planar_images import read_planar_images
    from ..passes.skip_gated_rows import skip_gated_rows
    from ..passes.skip_zero_blocks import skip_zero_blocks

    hiding = (fuse_conv_depthwise, read_planar_images, skip_gated_rows, skip_zero_blocks)
    return tuple(p for p in passes if p not in hiding), tuple(p for p in passes if p in hiding)


def _gains_nothing(wide: fx.GraphModule, hw: Hardware, late: Sequence[Pass], plan: int8_plan.Int8Plan) -> str | None:
    """Why the model as a whole stays float32, or None: the products gain too little of its predicted time.

    What products of 8 bits cost beside themselves counts: fusions that float32 has, and they hide.
    """
    from ..passes.dialect_sparse import sparse_linear

    apart = _seconds(wide, hw)
    float32 = pipeline.run(wide, hw, late)[0]
    if any(node.target is sparse_linear for node in float32.graph.nodes):
        return None  # each product was weighed against skipping its zeros, which `apart` knows nothing of
    whole = _seconds(float32, hw)
    if apart is None or whole is None or plan.tables.keys() & plan.chosen:
        return None  # nothing is known; or tables are smaller, which is gained in any case
    share = (apart - plan.seconds_gained) / whole
    if share <= WHOLE_GAIN:
        return None
    return (
        f"the model gains nothing by int8 on {hw.id}: {len(plan.chosen)} products in 8 bits are predicted to take it "
        f"to {share:.2f} of its float32 time, and {WHOLE_GAIN} or less is worth it; everything stays float32"
    )


def _seconds(graph: fx.GraphModule, hw: Hardware) -> float | None:
    """Predicted seconds of the whole graph in float32; None where the machine's rates are unknown."""
    from .prediction.predict import operation_times
    from .prediction.workload import workload

    times = operation_times(workload(graph), hw, "float32")
    return None if times is None else sum(time.seconds for time in times)


def _joined(
    wide: fx.GraphModule,
    hw: Hardware,
    late: Sequence[Pass],
    runs: tuple[pipeline.PassRun, ...],
    plan: int8_plan.Int8Plan,
    notes: tuple[str, ...],
) -> Rewritten:
    made, joining = int8_plan.apply(wide, hw, plan)
    made, rest = pipeline.run(made, hw, late)
    return Rewritten(made, (*runs, *joining, *rest), plan.choices, notes)


def _decide(graph: fx.GraphModule, hw: Hardware, precision: Precision) -> tuple[int8_plan.Int8Plan, tuple[str, ...]]:
    """The plan that keeps the tolerance on the samples, and what to say of it."""
    plan = int8_plan.plan_int8(graph, hw, precision.method, precision.observed)
    method = precision.method
    how = (
        f"ranges by {method.ranges} on {len(precision.observed)} sets of inputs, {method.scheme} activations, "
        f"{method.weight.replace('_', ' ')} weights"
    )
    if method.dynamic:
        rows = "inputs of linear layers by a scale for each row, of convolutions for each image, found at run time"
        how = f"{rows}; of other products {how}" if precision.observed else rows
    if method.activation == LEARNED:
        how = "ranges and steps as training learned them"
    blind = _blind(plan)
    if not plan.chosen:
        said = _in_four(plan) if method.weights_only == "int4" else ()
        why = "no ranges are known" if blind else f"nothing gains by int8 on {hw.id}"
        return plan, (f"{why}: everything stays float32", *blind, *said)
    if not precision.strictness:
        plan = plan.without(plan.chosen, "machine code erred by too much in 8 bits")
        return plan, (how, "everything stays float32: machine code erred by too much")
    if not precision.samples:
        said = _in_four(plan) if method.weights_only == "int4" else ()
        return plan, (how, plan.text(), *said, "errors were not measured")
    how = "; ".join((how, *blind, *_unlike(graph, precision)))
    allowed = precision.allowed
    assert allowed is not None
    check_tolerance(precision.samples, precision.tolerance)
    wanted = MARGIN * allowed * precision.strictness
    plan, measured, found = int8_plan.within_tolerance(graph, hw, plan, precision.samples, wanted)
    said = _in_four(plan) if method.weights_only == "int4" else ()
    return plan, (how, *found, plan.text(), *said, kept(measured, allowed, precision.samples))


def _say_nothing_is_narrow(graph: fx.GraphModule, plan: int8_plan.Int8Plan) -> None:
    """Warn where 8 bits were asked for and no product has them; `_blind` has said so of calibration."""
    products = {node.name for node in graph.graph.nodes if is_product(node)}
    reasons = Counter(choice.reason for choice in plan.choices if choice.node in products)
    if reasons and not any(reason.startswith((ONLY, NOT_FINITE)) for reason in reasons):
        (reason, count), *_ = reasons.most_common(1)
        log.warning(
            "precision='int8': all %d products stay float32, %d of them: %s", sum(reasons.values()), count, reason
        )


def _in_four(plan: int8_plan.Int8Plan) -> tuple[str]:
    """How many linear layers took the 4 bits that were asked for, and why the others did not."""
    layers = [choice for choice in plan.choices if "linear" in choice.operator]
    wide = [choice for choice in layers if choice.dtype != "int4"]
    reasons = Counter(
        "in 8 bits it is not predicted to wait for its weights: products of bytes"
        if choice.form == "int8"
        else choice.reason.partition(f"{NOT_FOUR}: ")[2] or choice.reason
        for choice in wide
    )
    text = f"weights of 4 bits in {len(layers) - len(wide)} of {len(layers)} linear layers"
    text += "".join(f"; {count} not: {reason}" for reason, count in reasons.most_common())
    if len(wide) == len(layers):
        log.warning("weights_only='int4': %s", text)
    return (text,)


def _blind(plan: int8_plan.Int8Plan) -> list[str]:
    """What to say where calibration was too uniform, or not finite, to find a range by."""
    reasons = [choice.reason for choice in plan.choices if choice.reason.startswith((ONLY, NOT_FINITE))]
    if not reasons:
        return []
    text = f"{reasons[0]}: {len(reasons)} products stay float32; calibrate with inputs like those the model will get"
    log.warning("precision='int8': %s", text)
    return [text]


def _unlike(graph: fx.GraphModule, precision: Precision) -> list[str]:
    """Inputs that reach further where errors are measured than calibration saw."""
    found: list[str] = []
    if not precision.observed:
        return found
    names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    for place, name in enumerate(names):
        measured = _reach([inputs[place] for inputs, _ in precision.samples])
        seen = _reach([inputs[place] for inputs in precision.observed])
        if measured > UNLIKE * seen:
            text = (
                f"{name} reaches {measured:.3g} in the example and {seen:.3g} in calibration: its data are not like it"
            )
            log.warning("precision='int8': %s", text)
            found.append(text)
    return found


def _reach(tensors: Sequence[torch.Tensor]) -> float:
    floats = [t for t in tensors if t.is_floating_point() and t.numel()]
    return max((float(t.abs().max()) for t in floats), default=0.0)


def kept(measured: float, allowed: float, samples: Sequence[Sample]) -> str:
    """The error of a decision, in words."""
    inputs = "the example inputs" if len(samples) == 1 else f"{len(samples)} sets of inputs"
    return f"error against float64 {measured:.1e} in PyTorch on {inputs}, {allowed:.1e} allowed"
