"""Refusals are logged and, where somebody asks, recorded."""

from __future__ import annotations

import logging

import torch
from rewriting import HW, trace

from graphwright.passes.fuse_attention import fuse_attention
from graphwright.passes.refusals import keep, recording


def test_recorded_once_with_rule_node_and_reason(caplog):
    graph = trace(torch.relu, [torch.ones(2)])
    node = next(n for n in graph.graph.nodes if n.op == "call_function")
    log = logging.getLogger("graphwright.passes.some_rule")
    with caplog.at_level(logging.DEBUG, log.name), recording() as refusals:
        keep(log, node, "read by %d nodes", 2)
        keep(log, node, "read by %d nodes", 2)
    assert [(r.rule, r.node, r.operator, r.reason) for r in refusals] == [
        ("some_rule", node.name, "aten.relu.default", "read by 2 nodes")
    ]
    assert f"keep {node}: read by 2 nodes" in caplog.messages


def test_nothing_is_kept_outside():
    graph = trace(torch.relu, [torch.ones(2)])
    with recording() as refusals:
        fuse_attention(graph, HW)
    node = next(n for n in graph.graph.nodes if n.op == "call_function")
    keep(logging.getLogger("some"), node, "later")
    assert not refusals
