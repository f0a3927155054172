"""What depends on constants only is computed once, within bounds."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from rewriting import HW, assert_kept, assert_rewrite, assert_same_numbers, text_of, trace, trace_core

from graphwright.compiler.pipeline import copy_graph
from graphwright.compiler.reference import run_eager
from graphwright.passes import fold_constants as module
from graphwright.passes.fold_constants import fold_constants
from graphwright.passes.remove_dead import remove_dead
from graphwright.testing import check_pass

aten = torch.ops.aten


def targets(graph):
    return [str(n.target) for n in graph.graph.nodes if n.op == "call_function"]


class Scaled(torch.nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(*shape))

    def forward(self, x):
        return x @ (self.weight.t() * 2).exp()


def test_a_constant_subgraph_is_one_constant():
    class After(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("folded", torch.randn(4, 3))

        def forward(self, x):
            return torch.mm(x, self.folded)

    # Numbers are bit exact: the same operators ran, only earlier.
    assert_rewrite(Scaled(3, 4), After(), [torch.randn(2, 4)], fold_constants, 1)


def test_the_stored_constant_is_not_changed():
    model = Scaled(3, 4)
    weight = model.weight.detach().clone()
    graph = trace(model, [torch.randn(2, 4)])
    fold_constants(graph, HW)
    assert torch.equal(model.weight, weight)
    (folded,) = [t for name, t in graph.named_buffers() if name == "p_weight_folded"]
    assert folded.is_contiguous()
    assert folded.untyped_storage().nbytes() == folded.nbytes


def test_a_view_of_a_constant_has_memory_of_its_own():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(100.0))

        def forward(self, x):
            return x + self.table[3:5]

    graph = trace(Model(), [torch.randn(2)])
    assert fold_constants(graph, HW) == 1
    remove_dead(graph, HW)
    ((_, stored),) = graph.named_buffers()
    assert stored.untyped_storage().nbytes() == 8


def test_masks_from_ranges_are_constants():
    def model(x):
        mask = torch.arange(4)[:, None] >= torch.arange(4)[None]
        return torch.where(mask, x, 0.0)

    graph = assert_rewrite(model, None, [torch.randn(4, 4)], fold_constants, 1)
    assert targets(graph)[-1] == "aten.where.self"
    assert len(targets(graph)) == 2  # the number it takes elsewhere is spelt in a few bytes as it is


def test_several_readers_share_one_value():
    class Model(Scaled):
        def forward(self, x):
            shared = self.weight.exp()
            return x @ shared.t(), x @ (shared + 1).t(), shared.sum() * x

    graph = assert_rewrite(Model(3, 4), None, [torch.randn(2, 4)], fold_constants, 3)
    assert "aten.exp.default" not in targets(graph)


def test_an_expanded_constant_stays_small():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("row", torch.randn(1, 4))

        def forward(self, x):
            return torch.cat([x, self.row.exp().expand(1000, 4), torch.zeros(9, 4)])

    graph = assert_rewrite(Model(), None, [torch.randn(2, 4)], fold_constants, 1)
    assert targets(graph) == ["aten.expand.default", "aten.full.default", "aten.cat.default"]


def test_what_depends_on_an_expanded_constant_is_folded():
    graph = assert_rewrite(
        lambda x: x + torch.ones(1, 4).expand(3, 4).cumsum(0), None, [torch.randn(3, 4)], fold_constants
    )
    assert targets(graph) == ["aten.add.Tensor"]


def test_growth_is_bounded(monkeypatch, caplog):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(16, 16))  # 1 KiB

        def forward(self, x):
            return x @ self.weight + x @ self.weight.t().contiguous()  # the original is read too: 1 KiB more

    monkeypatch.setattr(module, "_GROWTH", 1023)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert_kept(Model(), [torch.randn(2, 16)], fold_constants)
    assert "1024 more bytes" in caplog.text
    monkeypatch.setattr(module, "_GROWTH", 1024)
    assert fold_constants(trace(Model(), [torch.randn(2, 16)]), HW) == 1


def test_a_constant_that_is_freed_is_no_growth(monkeypatch):
    monkeypatch.setattr(module, "_GROWTH", 0)
    assert fold_constants(trace(Scaled(16, 16), [torch.randn(2, 16)]), HW) == 1


def test_one_constant_under_two_nodes_is_not_freed(monkeypatch):
    """Tied weights: the embedding still reads what the head has transposed."""

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.randn(16, 16))
            self.b = self.a

        def forward(self, x):
            return x @ self.a + x @ self.b.t().contiguous()

    monkeypatch.setattr(module, "_GROWTH", 1023)
    assert fold_constants(trace(Tied(), [torch.randn(2, 16)]), HW) == 0


@pytest.mark.parametrize(
    "drawn", [lambda: torch.rand(3), lambda: torch.ones(3).bernoulli(0.5), lambda: torch.randperm(3)]
)
def test_random_numbers_are_drawn_at_run_time(drawn):
    graph = trace_core(lambda x: x + drawn(), [torch.randn(3)])
    count = len(graph.graph.nodes)
    assert fold_constants(graph, HW) == 0
    assert len(graph.graph.nodes) == count


def test_uninitialised_memory_is_no_value():
    graph = trace_core(lambda x: x + aten.empty.memory_format([3]).mul(0), [torch.randn(3)])
    assert fold_constants(graph, HW) == 0


def test_operators_of_others_are_left_alone():
    with torch.library._scoped_library("graphwright_test", "DEF") as library:
        library.define("tick(Tensor x) -> Tensor")
        library.impl("tick", torch.clone, "CompositeExplicitAutograd")
        constant = torch.randn(3)
        graph = trace_core(lambda x: x + torch.ops.graphwright_test.tick(constant), [torch.randn(3)])
        assert fold_constants(graph, HW) == 0


def test_results_of_a_split_are_folded():
    constant = torch.arange(4.0)

    def model(x):
        a, b = torch.split(constant, 2)
        return x * a - b

    graph = trace_core(model, [torch.randn(2)])
    before = copy_graph(graph)
    assert fold_constants(graph, HW) == 2
    assert targets(graph) == ["aten.mul.Tensor", "aten.sub.Tensor"]
    assert_same_numbers(before, graph, [torch.randn(2)])


def test_a_graph_of_constants_alone():
    graph = trace_core(lambda x: (torch.arange(3) + 1,), [torch.randn(2)])
    assert fold_constants(graph, HW) == 1
    assert torch.equal(graph(torch.randn(2))[0], torch.tensor([1, 2, 3]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=10))
def test_any_graph_keeps_its_bits(steps):
    constant = torch.tensor([[1.0, -0.0, 2.5]])

    def model(x):
        values = [x, constant, torch.arange(3)]
        for kind, a, b in steps:
            a, b = values[a % len(values)], values[b % len(values)]
            result = [
                lambda a, b: a + b,
                lambda a, b: a * b,
                lambda a, b: a.neg(),
                lambda a, b: a.float().exp(),
                lambda a, b: a.expand(2, 3),
                lambda a, b: torch.stack([a.float().sum(), b.float().sum(), a.float().sum()]),
            ][kind](a, b)
            values.append(result)
        return tuple(v + 0 for v in values)

    x = torch.tensor([0.5, -0.0, torch.nan])
    graph = trace_core(model, [x])
    before = copy_graph(graph)
    fold_constants(graph, HW)
    graph.graph.lint()
    assert_same_numbers(before, graph, [x])
    text = text_of(graph)
    assert fold_constants(graph, HW) == 0
    assert text_of(graph) == text


def test_a_constant_that_is_returned_is_given_as_a_copy():
    """The caller may write to what the graph returns; the stored constant stays as it is."""
    graph = trace(lambda x: (x + 1, (torch.arange(4) * 2).reshape(2, 2)), [torch.ones(2)])
    assert fold_constants(graph, HW) == 1
    assert targets(graph) == ["aten.add.Tensor", "aten.clone.default"]
    assert fold_constants(graph, HW) == 0
    first, second = (run_eager(graph, [torch.ones(2)])[1] for _ in range(2))
    first.zero_()
    assert second.tolist() == [[0, 2], [4, 6]]
    assert run_eager(graph, [torch.ones(2)])[1].tolist() == [[0, 2], [4, 6]]


def test_what_is_returned_as_a_view_is_no_copy_of_what_it_is_a_view_of():
    def model(x):
        row = torch.arange(6, dtype=torch.float32)
        return x + row, row.reshape(3, 2).permute(1, 0)

    x = torch.randn(4, 6)
    graph = check_pass(fold_constants, trace_core(model, [x]), [x], exact=True, hw=HW)
    assert sum(n.target is torch.ops.aten.clone.default for n in graph.graph.nodes) == 1
