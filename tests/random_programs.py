"""What a random program is put through: each pass alone, the passes in any order, the whole pipeline, machine code."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import torch
from torch import fx

from graphwright import hwdb
from graphwright.compiler import pipeline
from graphwright.errors import CaptureError
from graphwright.passes.default import PASSES
from graphwright.passes.printer import format_graph
from graphwright.testing import Baseline, PassFault, Program, check_compile, check_passes, trace, trace_quickly

HW = hwdb.lookup("x86-64-v3")
DISTINCT = tuple(dict.fromkeys(PASSES))

# They move, delete and rename; all others add in another order, or round constants.
EXACT = {
    "fuse_head_moves",
    "fuse_reshape_transpose",
    "gather_rows",
    "merge_duplicates",
    "recognise_channel_moves",
    "remove_dead",
    "route_channels",
    "simplify",
    "sink_row_moves",
}
# They compute constants anew, or know a formula by constants that models round to float32.
ROUNDS = {
    "fold_batch_norm",
    "fold_constants",
    "fold_scale",
    "recognise_activations",
    "recognise_attention",
    "recognise_norms",
    "split_batch_norm",
}
_IN_PLACE = re.compile(r"\w_\(|inplace=True|^\w+\[|\)\[0\] = ", re.M)


class Subject:
    """A program and its graph, which all checks share: "whole", "core" (composites broken up) or "captured"."""

    def __init__(self, program: Program, how: str) -> None:
        """Raises CaptureError where torch.export refuses the program, which is asked for "captured" alone."""
        self.program, self.inputs = program, program.arguments()
        self.baseline = Baseline(graph_of(program, how), self.inputs)


def graph_of(program: Program, how: str) -> fx.GraphModule:
    """The program's graph; what changes values in place is broken up, which takes the changes out."""
    whole = how == "whole" and not _IN_PLACE.search("\n".join(program.lines))
    try:
        if how != "captured":
            graph = trace_quickly(program.module(), program.arguments(), whole, HW)
            if not any(_changes(node) for node in graph.graph.nodes):
                return graph
        return trace(program.module(), program.arguments(), HW)
    except RuntimeError as error:
        if "internal overlap" in str(error):  # windows changed in place: torch refuses to take the change out
            raise CaptureError(str(error)) from error
        raise


def _changes(node: fx.Node) -> bool:
    """Whether the node changes an operand: a step of a composite that quick tracing does not see into."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


# How operands lie in memory, which a move may change, decides in which order PyTorch adds, and whether it takes its
# vector or its scalar code for a function: the last bit may differ.
_BY_PLACE = re.compile(
    r"mm|linear|conv|matmul|sum|mean|var|std|norm|softm|softplus|attention|pool|prod|dot|addmv|lerp|addc|alpha"
    r"|sigmoid|tanh|exp|log|sin|cos|tan|(?<!r)elu|silu|mish|hardswish|erf|sqrt|pow|reciprocal|gamma|div|remainder|fmod"
)


def only_moves(graph: fx.GraphModule) -> bool:
    """Whether every element of the results is the same bits wherever it lies."""
    return not any(n.op == "call_function" and _BY_PLACE.search(str(n.target)) for n in graph.graph.nodes)


def check_capture(subject: Subject) -> None:
    """The graph gives what the model itself gives."""
    with torch.no_grad():
        results = subject.program.module()(*(x.clone() for x in subject.inputs))
    if reason := subject.baseline.expected().difference(results):
        raise PassFault(f"captured: {reason}\n\n{format_graph(subject.baseline.graph)}")


def check_alone(subject: Subject) -> None:
    """Every pass by itself, first thing after capture."""
    alone = only_moves(subject.baseline.graph)
    for rewrite in DISTINCT:
        name = rewrite.__name__
        exact = alone and name in EXACT
        check_passes([rewrite], subject.baseline, subject.inputs, exact=exact, rounds=name in ROUNDS, hw=HW)


def check_order(subject: Subject) -> None:
    """The passes in an order that the program's name decides; each leaves nothing for itself."""
    order = list(PASSES)
    random.Random(subject.program.digest).shuffle(order)
    check_passes(order, subject.baseline, subject.inputs, rounds=True, hw=HW)


def check_pipeline(subject: Subject) -> None:
    """The pipeline as `compile` runs it: it comes to an end, and then finds nothing."""
    finished: dict[str, bool] = {}

    def whole(target: fx.GraphModule, hw: hwdb.Hardware) -> int:
        result, runs = pipeline.run(target, hw, PASSES)
        finished.update({r.name: not r.unfinished for r in runs})
        if not (rewrites := sum(r.rewrites for r in runs)):
            return 0
        target.graph = result.graph
        for name in [name for name, _ in target.named_buffers()]:
            delattr(target, name)
        for name, tensor in result.named_buffers(remove_duplicate=False):
            target.register_buffer(name, tensor)
        target.recompile()
        return rewrites

    check_passes([whole], subject.baseline, subject.inputs, rounds=True, hw=HW)
    if late := [name for name, done in finished.items() if not done]:
        raise PassFault(f"the pipeline does not come to an end: {', '.join(late)} still rewrite")


def check_machine_code(subject: Subject) -> None:
    """The whole compiler."""
    check_compile(subject.program.module(), subject.inputs)


LEVELS: dict[str, Callable[[Subject], None]] = {
    "capture": check_capture,
    "alone": check_alone,
    "order": check_order,
    "pipeline": check_pipeline,
    "machine code": check_machine_code,
}


def settle_torch() -> None:
    """One thread, since threads that wait would cost more than those that work save; and no oneDNN.

    Its brgemm convolutions read beyond small images that are mostly padding, and crash.
    """
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)
