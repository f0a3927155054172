"""Every promise that a pass can break: a pass that breaks it, and what the check says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from rewriting import HW

from graphwright.passes import rewrite
from graphwright.passes.default import PASSES
from graphwright.testing import PassFault, check_pass, check_passes, trace_quickly

aten = torch.ops.aten
X = torch.randn(2, 3)


def graph_of(function, *inputs):
    return trace_quickly(function, inputs, True, HW)


def the(graph, target):
    return next(n for n in graph.graph.nodes if n.target is target)


def swapped(old, new):
    """A pass that takes one operator for another."""

    def swap(graph, hw):
        found = [n for n in graph.graph.nodes if n.target is old]
        for node in found:
            node.target = new
        return rewrite.finish(graph, len(found))

    return swap


def test_an_honest_pass_passes():
    graph = graph_of(lambda x: torch.relu(x), X)
    result = check_pass(swapped(aten.relu.default, aten.relu6.default), graph, [X.clamp(max=1)], exact=True, hw=HW)
    assert the(result, aten.relu6.default)
    assert the(graph, aten.relu.default)  # the graph given stays as it is


def test_wrong_numbers_are_seen():
    with pytest.raises(PassFault, match="swap: result 0: relative L2 error"):
        check_pass(swapped(aten.relu.default, aten.neg.default), lambda x: torch.relu(x), [X], hw=HW)


def test_numbers_wrong_by_less_than_float32_shows_are_seen():
    def nudge(graph, hw):
        mul = the(graph, aten.mul.Tensor)
        if mul.args[1] != 3.0:
            return 0
        mul.args = (mul.args[0], 3.0 * (1 + 1e-9))
        return rewrite.finish(graph, 1)

    with pytest.raises(PassFault, match="in float64: relative L2 error"):
        check_pass(nudge, lambda x: x * 3.0, [X], hw=HW)
    check_pass(nudge, lambda x: x * 3.0, [X], rounds=True, hw=HW)


def test_a_lost_sign_of_zero_is_seen():
    x = torch.tensor([-0.0, 1.0])
    graph = graph_of(lambda x: x.neg().neg(), x)

    def add_zero(graph, hw):
        found = [n for n in graph.graph.nodes if n.target is aten.neg.default]
        for node in found:
            rewrite.replace(node, rewrite.call(graph, aten.add.Tensor, (node.args[0], 0), before=node))
        return rewrite.finish(graph, len(found))

    check_pass(add_zero, graph, [x], hw=HW)
    with pytest.raises(PassFault, match="not the same bits"):
        check_pass(add_zero, graph, [x], exact=True, hw=HW)


def test_a_count_of_nothing_beside_a_change_is_seen():
    def silent(graph, hw):
        the(graph, aten.relu.default).target = aten.relu6.default
        return 0

    with pytest.raises(PassFault, match="counted no rewrite and changed the graph"):
        check_pass(silent, lambda x: torch.relu(x), [X], hw=HW)


def test_a_second_rewrite_is_seen():
    def restless(graph, hw):
        node = the(graph, aten.relu.default)
        rewrite.replace(node, rewrite.call(graph, aten.relu.default, node.args, before=node))
        return rewrite.finish(graph, 1)

    with pytest.raises(PassFault, match="second run finds 1 more"):
        check_pass(restless, lambda x: torch.relu(x), [X], hw=HW)


def test_a_count_that_is_none_is_seen():
    with pytest.raises(PassFault, match="returned None"):
        check_pass(lambda graph, hw: None, lambda x: torch.relu(x), [X], hw=HW)


def once(change):
    """A pass that does `change` the first time."""
    done = []

    def act(graph, hw):
        if done:
            return 0
        done.append(1)
        change(graph)
        return rewrite.finish(graph, 1)

    return act


def test_a_malformed_graph_is_seen():
    def early(graph):
        the(graph, aten.neg.default).append(the(graph, aten.relu.default))

    with pytest.raises(PassFault, match="malformed"):
        check_pass(once(early), lambda x: torch.relu(x).neg(), [X], hw=HW)


@pytest.mark.parametrize(
    ("value", "message"), [(None, "has no meta"), (torch.empty(3, 2), "says"), (torch.empty(2, 3).int(), "says")]
)
def test_a_wrong_account_of_a_node_is_seen(value, message):
    def lie(graph):
        the(graph, aten.relu.default).meta["val"] = value

    with pytest.raises(PassFault, match=message):
        check_pass(once(lie), lambda x: torch.relu(x), [X], hw=HW)


def test_a_result_that_becomes_an_input_is_seen():
    def drop(graph):
        node = the(graph, aten.clone.default)
        rewrite.replace(node, node.args[0])

    with pytest.raises(PassFault, match="shares memory"):
        check_pass(once(drop), lambda x: x.clone(), [X], hw=HW)


def test_a_result_that_becomes_a_constant_is_seen():
    w = torch.randn(3)

    def drop(graph):
        node = the(graph, aten.clone.default)
        rewrite.replace(node, node.args[0])

    with pytest.raises(PassFault, match="shares memory"):
        check_pass(once(drop), lambda x: (x + w, w.clone()), [X], hw=HW)


def test_results_that_become_one_are_seen():
    def merge(graph):
        first, second = [n for n in graph.graph.nodes if n.target is aten.relu.default]
        rewrite.replace(second, first)

    with pytest.raises(PassFault, match="shares memory"):
        check_pass(once(merge), lambda x: (x.relu(), x.relu()), [X], hw=HW)


def test_a_changed_input_is_seen():
    with pytest.raises(PassFault, match="changes the inputs"):
        check_pass(swapped(aten.relu.default, aten.relu_.default), lambda x: torch.relu(x), [X.clone()], hw=HW)


def test_a_changed_constant_is_seen():
    w = torch.tensor([-1.0, 0.5, 2.0])
    with pytest.raises(PassFault, match="changes a constant"):
        check_pass(swapped(aten.relu.default, aten.relu_.default), lambda x: x + torch.relu(w), [X], hw=HW)


def test_the_first_guilty_pass_of_a_sequence_is_named():
    passes = [*PASSES[:2], swapped(aten.relu.default, aten.neg.default)]
    with pytest.raises(PassFault, match=r"swap after .*remove_dead: result 0"):
        check_passes(passes, lambda x: torch.relu(x.detach()), [X], hw=HW)


def test_a_sequence_without_end_is_seen():
    def up(graph, hw):
        return swapped(aten.relu.default, aten.relu6.default)(graph, hw)

    def down(graph, hw):
        return swapped(aten.relu6.default, aten.relu.default)(graph, hw)

    with pytest.raises(PassFault, match="after 4 rounds there is still something for up, down"):
        check_passes([up, down], lambda x: torch.relu(x), [X.clamp(max=1)], settled=True, hw=HW)


def test_without_hypothesis_the_import_says_what_to_install():
    code = "import sys; sys.modules['hypothesis'] = None; import graphwright.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode
    assert "pip install 'graphwright[testing]'" in done.stderr
