"""The passes as a whole: the fixpoint and its budget, and what is said about passes that break the contract."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch
from rewriting import HW, trace
from torch import fx

from graphwright.compiler.pass_checks import checked_passes
from graphwright.compiler.pipeline import Budget, PassRun, run
from graphwright.compiler.report import Report
from graphwright.errors import PassError
from graphwright.passes import rewrite
from graphwright.passes.default import PASSES
from graphwright.passes.remove_dead import remove_dead

aten = torch.ops.aten
X = torch.randn(2, 3)


def first_call(graph: fx.GraphModule, target: Any) -> fx.Node | None:
    return next(iter(graph.graph.find_nodes(op="call_function", target=target)), None)


def swap(graph: fx.GraphModule, old: Any, new: Any) -> int:
    """Turn one unary operator into another."""
    node = first_call(graph, old)
    if node is None:
        return 0
    rewrite.replace(node, rewrite.call(graph, new, node.args, before=node))
    return 1


def sines_to_cosines(graph: fx.GraphModule, hw: Any) -> int:
    return swap(graph, aten.sin.default, aten.cos.default)


def cosines_to_sines(graph: fx.GraphModule, hw: Any) -> int:
    return swap(graph, aten.cos.default, aten.sin.default)


def cosines_to_tangents(graph: fx.GraphModule, hw: Any) -> int:
    return swap(graph, aten.cos.default, aten.tan.default)


def test_rounds_until_nobody_rewrites() -> None:
    graph = trace(lambda x: x.sin() + x.mul(2).sin(), [X])
    seen: list[str] = []
    after, runs = run(graph, HW, [cosines_to_tangents, sines_to_cosines], lambda name, _: seen.append(name))
    assert not {aten.sin.default, aten.cos.default} & {n.target for n in after.graph.nodes}
    assert seen == ["sines_to_cosines", "cosines_to_tangents"] * 2
    # The first round's sines become tangents in the second. In the fourth, nothing changed since sines found nothing.
    assert [(r.rewrites, r.runs, r.unfinished) for r in runs] == [(2, 4, False), (2, 3, False)]


def test_a_pass_is_left_out_where_nothing_changed_since_it_found_nothing() -> None:
    calls: list[str] = []

    def counted(name: str, rewrites: int) -> Any:
        left = [rewrites]

        def rewrite_some(graph: fx.GraphModule, hw: Any) -> int:
            calls.append(name)
            left[0] -= 1
            return sines_to_cosines(graph, hw) if left[0] >= 0 else 0

        return rewrite_some

    a, b, c = counted("a", 0), counted("b", 1), counted("c", 0)
    run(trace(torch.sin, [X]), HW, [a, b, c, a, c])
    # The second round asks a and b about what b did; c and the second a have seen that graph.
    assert calls == ["a", "b", "c", "a", "b"]


@pytest.mark.parametrize(
    "budget", [Budget(rounds=3), Budget(rewrites=4, rewrites_per_node=0)], ids=["rounds", "rewrites"]
)
def test_a_spent_budget_is_logged_and_reported(budget: Budget, caplog: pytest.LogCaptureFixture) -> None:
    graph = trace(torch.sin, [X])
    with caplog.at_level(logging.WARNING):
        after, runs = run(graph, HW, [remove_dead, sines_to_cosines, cosines_to_sines], budget=budget)
    spent = "3 rounds" if budget.rounds == 3 else "5 rewrites"
    named = "sines_to_cosines, cosines_to_sines" if budget.rounds == 3 else "sines_to_cosines"
    assert f"the passes were stopped after {spent}, while {named} still rewrote" in caplog.text
    assert [r.name for r in runs if r.unfinished] == named.split(", ")
    after.graph.lint()
    text = Report("any", "fp32", 1, passes=runs).text()
    assert f"stopped by the budget of rounds and rewrites: {named} still rewrote" in text


def test_a_report_keeps_its_runs() -> None:
    report = Report("any", "fp32", 1, passes=(PassRun("a", 2, 0.5, 3, True),), fusions=("conv+relu",))
    assert Report.from_dict(report.to_dict()) == report
    assert "fusions: conv+relu, as kernel_fusion chose" in report.text()


# What breaks the contract, each with the message.


def returns_none(graph: fx.GraphModule, hw: Any) -> None:
    pass


def returns_true(graph: fx.GraphModule, hw: Any) -> bool:
    return True


def keeps_silent(graph: fx.GraphModule, hw: Any) -> int:
    sines_to_cosines(graph, hw)
    return 0


def reads_ahead(graph: fx.GraphModule, hw: Any) -> int:
    node = first_call(graph, aten.sin.default)
    assert node is not None
    node.prepend(graph.graph.call_function(aten.cos.default, (node,)))
    return 1


def forgets_values(graph: fx.GraphModule, hw: Any) -> int:
    node = first_call(graph, aten.sin.default)
    assert node is not None
    with graph.graph.inserting_before(node):
        node.replace_all_uses_with(graph.graph.call_function(aten.cos.default, node.args))
    return 1


def promises_another_shape(graph: fx.GraphModule, hw: Any) -> int:
    node = first_call(graph, aten.sin.default)
    assert node is not None
    rewrite.replace(node, rewrite.call(graph, aten.t.default, node.args, before=node, value=node.meta["val"]))
    return 1


def calls_wrongly(graph: fx.GraphModule, hw: Any) -> int:
    node = first_call(graph, aten.sin.default)
    assert node is not None
    rewrite.replace(
        node, rewrite.call(graph, aten.mm.default, (*node.args, *node.args), before=node, value=node.meta["val"])
    )
    return 1


def counts_down(graph: fx.GraphModule, hw: Any) -> int:
    return -1


def retypes(graph: fx.GraphModule, hw: Any) -> int:
    node = first_call(graph, aten.sin.default)
    assert node is not None
    node.meta["val"] = node.meta["val"].to(torch.float64)
    return 1


def cuts_silently(graph: fx.GraphModule, hw: Any) -> int:
    node = first_call(graph, aten.sin.default)
    assert node is not None
    node.meta["val"] = node.meta["val"][:1]
    return 0


def drops_an_output(graph: fx.GraphModule, hw: Any) -> int:
    output = graph.graph.output_node()
    output.args = ((),)
    return 1


def adds_an_input(graph: fx.GraphModule, hw: Any) -> int:
    (old,) = graph.graph.find_nodes(op="placeholder")
    with graph.graph.inserting_after(old):
        graph.graph.placeholder("more").meta = dict(old.meta)
    return 1


def reads_no_buffer(graph: fx.GraphModule, hw: Any) -> int:
    node = first_call(graph, aten.sin.default)
    assert node is not None
    with graph.graph.inserting_before(node):
        missing = graph.graph.get_attr("nowhere")
    missing.meta = dict(node.meta)
    node.replace_all_uses_with(missing)
    return 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (returns_none, r"returned None: return how many rewrites it made, 0 where it changed nothing"),
        (returns_true, r"returned True: return how many"),
        (keeps_silent, r"returned 0 although it changed the graph"),
        (reads_ahead, r"left a malformed graph: .*; nodes must stand behind what they read"),
        (forgets_values, r'left .*cos.* without meta\["val"\]: insert nodes with graphwright.passes.rewrite.call'),
        (promises_another_shape, r'left .*aten\.t.*, which gives f32\[3, 2\], with meta\["val"\] of f32\[2, 3\]'),
        (counts_down, r"returned -1: a count of rewrites is 0 or more"),
        (retypes, r'left .*aten\.sin.*, which gives f32\[2, 3\], with meta\["val"\] of f64\[2, 3\]'),
        (cuts_silently, r'left .*aten\.sin.*, which gives f32\[2, 3\], with meta\["val"\] of f32\[1, 3\]'),
        (calls_wrongly, r"left .*aten\.mm.*, which cannot be computed: "),
        (drops_an_output, r"changed the outputs of the graph from \['f32\[2, 3\]'\] to \[\]: a model is called as"),
        (adds_an_input, r"changed the inputs of the graph from \['args_0: f32\[2, 3\]'\] to "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_pass_that_breaks_the_contract_is_named(wrong: Any, message: str) -> None:
    graph = trace(lambda x: x.sin(), [X])
    with pytest.raises(PassError, match=f"pass {wrong.__name__}, after remove_dead, {message}"):
        run(graph, HW, [remove_dead, wrong])


def renews_a_value(graph: fx.GraphModule, hw: Any) -> int:
    node = first_call(graph, aten.sin.default)
    assert node is not None
    node.meta["val"] = rewrite.run_fake(node)
    return 0


def test_a_value_that_is_renewed_may_stay() -> None:
    _, (found,) = run(trace(lambda x: x.sin(), [X]), HW, [renews_a_value])
    assert found.rewrites == 0


def retypes_a_constant(graph: fx.GraphModule, hw: Any) -> int:
    node = next(iter(graph.graph.find_nodes(op="get_attr")))
    node.meta["val"] = node.meta["val"].to(torch.float64)
    return 0


def test_a_constant_has_the_dtype_it_is_said_to_have() -> None:
    with pytest.raises(PassError, match=r'left .*, which gives f32\[3, 3\], with meta\["val"\] of f64\[3, 3\]'):
        run(trace(torch.nn.Linear(3, 3, bias=False), [X]), HW, [retypes_a_constant])


@pytest.mark.parametrize("hidden", [False, True], ids=["version", "bytes"])
@pytest.mark.parametrize("count", [0, 1])
def test_a_constant_that_is_changed_in_place_is_named(hidden: bool, count: int) -> None:
    def scales(graph: fx.GraphModule, hw: Any) -> int:
        for name, tensor in graph.named_buffers():
            if "weight" in name:
                (tensor.data if hidden else tensor.detach()).mul_(1.5)
        return count

    message = r"pass scales, .*, changed the constant \w*weight in place, .* make a new tensor, .*rewrite\.add_constant"
    with pytest.raises(PassError, match=message):
        run(trace(torch.nn.Linear(3, 3), [X]), HW, [remove_dead, scales])


def test_of_many_passes_the_last_three_are_named() -> None:
    def named(name: str) -> Any:
        def nothing(graph: fx.GraphModule, hw: Any) -> int:
            return 0

        nothing.__name__ = name
        return nothing

    message = "pass returns_none, after 5 passes, the last of them c, d, e, returned None"
    with pytest.raises(PassError, match=message):
        run(trace(lambda x: x.sin(), [X]), HW, [*map(named, "abcde"), returns_none])


@pytest.mark.filterwarnings("ignore:.*no underlying reference")
def test_a_constant_that_is_not_there_is_a_malformed_graph() -> None:
    with pytest.raises(PassError, match=r"pass reads_no_buffer, .*, left a malformed graph: .*nowhere"):
        run(trace(lambda x: x.sin(), [X]), HW, [reads_no_buffer])


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (sines_to_cosines, r"passes is a list such as \[\*graphwright.passes.default.PASSES, mine\]"),
        ("remove_dead", r"passes is a list such as .*, got 'remove_dead'"),
        ([*PASSES[:2], "relu"], r"passes\[2\] is 'relu', which is not callable: a pass is a function of \(graph, hw\)"),
        ([lambda graph: 0], r"passes\[0\], <lambda>, cannot be called with \(graph, hw\): too many positional"),
        ([functools.partial(swap, old=1)], r"passes\[0\], swap, cannot be called with \(graph, hw\)"),
    ],
)
def test_what_is_no_list_of_passes(passes: Any, message: str) -> None:
    with pytest.raises(PassError, match=message):
        checked_passes(passes)


def test_objects_can_be_passes() -> None:
    class Sines:
        def __call__(self, graph: fx.GraphModule, hw: Any) -> int:
            return sines_to_cosines(graph, hw)

    runs = run(trace(torch.sin, [X]), HW, checked_passes([Sines()]))[1]
    assert [(r.name, r.rewrites) for r in runs] == [("Sines", 1)]
