"""Graphs as text."""

from __future__ import annotations

import torch
from rewriting import trace

from graphwright.passes.printer import diff_graphs, format_graph, format_type


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 3))

    def forward(self, x):
        a, b = torch.split(torch.nn.functional.linear(x, self.weight), 2, -1)
        return a + b.clamp(max=torch.inf)


TEXT = """\
%0: f32[4, 3] = constant p_weight
%1: f32[2, 3] = input
%2: f32[2, 4] = aten.linear.default(%1, %0)
%3: (f32[2, 2], f32[2, 2]) = aten.split_with_sizes.default(%2, [2, 2], -1)
%4: f32[2, 2] = getitem(%3, 0)
%5: f32[2, 2] = getitem(%3, 1)
%6: f32[2, 2] = aten.clamp.default(%5, None, inf)
%7: f32[2, 2] = aten.add.Tensor(%4, %6)
return [%7]"""


def test_one_node_a_line():
    graph = trace(Model(), [torch.randn(2, 3)])
    assert format_graph(graph) == TEXT
    assert "= constant\n" in format_graph(graph, constant_names=False)


def test_types():
    assert format_type(torch.empty(2, 3, dtype=torch.bfloat16)) == "bf16[2, 3]"
    assert format_type((torch.empty(()), None)) == "(f32[], ?)"
    assert format_type(torch.empty(1, dtype=torch.float8_e5m2)) == "float8_e5m2[1]"


def test_only_changed_lines_differ():
    after = TEXT.replace("%5: f32[2, 2] = getitem(%3, 1)\n", "").replace("%6", "%5").replace("%7", "%6")
    assert diff_graphs(TEXT, after) == "- %5: f32[2, 2] = getitem(%3, 1)"
    assert diff_graphs(TEXT, TEXT) == ""
