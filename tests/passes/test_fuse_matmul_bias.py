"""Matrix products take up transposes, reshapes, biases, residuals and activations, and nothing else."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from rewriting import HW, assert_kept, assert_rewrite, assert_same_numbers, check_values, text_of, trace, trace_core

from graphwright.compiler.pipeline import copy_graph
from graphwright.passes import dialect
from graphwright.passes.fuse_matmul_bias import fuse_matmul_bias

linear, matmul = torch.ops.graphwright.linear, torch.ops.graphwright.matmul
aten = torch.ops.aten
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # bias and sum are rounded in another order
X = torch.randn(2, 3, 4)


class Weights(torch.nn.Module):
    """A function of x and constants named w, b, ..."""

    def __init__(self, function, **constants):
        super().__init__()
        self.function = function
        for name, tensor in constants.items():
            self.register_buffer(name, tensor)

    def forward(self, *inputs):
        return self.function(*inputs, **dict(self.named_buffers()))


def product_of(graph):
    (node,) = [n for n in graph.graph.nodes if n.target in dialect.OPERATORS]
    return node


def test_linear_with_everything():
    weights = {"w": torch.randn(5, 4), "b": torch.randn(5)}

    def before(x, y, w, b):
        return F.gelu(F.linear(x, w, b) + y)

    def after(x, y, w, b):
        return linear(x, w, b, y, "gelu", [])

    inputs = [X, torch.randn(2, 3, 5)]
    assert_rewrite(Weights(before, **weights), Weights(after, **weights), inputs, fuse_matmul_bias, 1, **CLOSE)


@pytest.mark.parametrize(
    "before",
    [
        lambda x, w, b: aten.addmm(b, x, w.t()),
        lambda x, w, b: aten.mm(x, w.t()) + b,
        lambda x, w, b: b + aten.mm(x, w.t()),
        lambda x, w, b: x @ w.t() + b,
        lambda x, w, b: aten.mm(x, w.t()) + b.reshape(1, 5),
        lambda x, w, b: F.linear(x, w) + b,
    ],
)
def test_products_with_a_constant_are_linear(before):
    weights = {"w": torch.randn(5, 4), "b": torch.randn(5)}
    graph = trace_core(Weights(before, **weights), [X[0]])
    original = copy_graph(graph)
    assert fuse_matmul_bias(graph, HW) == 1
    node = product_of(graph)
    assert node.target is dialect.linear
    assert node.args[1].op == "get_attr"
    assert_same_numbers(original, graph, [X[0]], **CLOSE)
    assert fuse_matmul_bias(graph, HW) == 0


def test_a_constant_lying_the_other_way_is_transposed():
    """GPT-2's Conv1D: the weight is [K, N], and the product is of a matrix between two reshapes."""
    weights = {"w": torch.randn(4, 5), "b": torch.randn(5)}

    def before(x, y, w, b):
        return F.relu(aten.addmm(b, x.reshape(-1, 4), w).reshape(2, 3, 5) + y)

    def after(x, y, w, b):
        flat = x.reshape(6, 4)
        return linear(flat.reshape(2, 3, 4), w.permute(1, 0), b, y, "relu", [])

    inputs = [X, torch.randn(2, 3, 5)]
    graph = trace(Weights(before, **weights), inputs)
    original = copy_graph(graph)
    assert fuse_matmul_bias(graph, HW) == 1
    # The second transpose of the way there undoes the first, and the constant is read once.
    assert text_of(graph) == text_of(trace_core(Weights(after, **weights), inputs, pre_dispatch=True))
    assert_same_numbers(original, graph, inputs, **CLOSE)
    assert fuse_matmul_bias(graph, HW) == 0


def test_computed_operands_are_a_matmul():
    def before(a, b, c):
        return torch.bmm(a, b.transpose(1, 2)).sin(), torch.bmm(a.mT, c)

    def after(a, b, c):
        absorbed = matmul(a, b, None, None, False, True, "none", []).sin()
        return absorbed, matmul(a, c, None, None, True, False, "none", [])

    inputs = [X, torch.randn(2, 5, 4), torch.randn(2, 3, 6)]
    assert_rewrite(before, after, inputs, fuse_matmul_bias, 2, **CLOSE)


def test_batches_are_unfolded():
    """torch.matmul of rank 4 is traced as bmm between reshapes."""

    def model(a, b):
        return torch.relu(a @ b.transpose(-1, -2))

    inputs = [torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5)]
    graph = trace(model, inputs)
    original = copy_graph(graph)
    assert fuse_matmul_bias(graph, HW) == 1
    node = product_of(graph)
    assert tuple(node.meta["val"].shape) == (2, 3, 4, 6)
    assert node.args[6] == "relu"
    assert_same_numbers(original, graph, inputs, **CLOSE)


def test_a_batch_of_residuals():
    def before(c, a, b):
        return torch.baddbmm(c, a, b).tanh()

    def after(c, a, b):
        return matmul(a, b, None, c, False, False, "tanh", [])

    assert_rewrite(before, after, [torch.randn(2, 3, 5), X, torch.randn(2, 4, 5)], fuse_matmul_bias, 1, **CLOSE)


def test_a_weight_from_outside_is_a_matmul():
    graph = trace(F.linear, [X, torch.randn(5, 4)])
    original = copy_graph(graph)
    assert fuse_matmul_bias(graph, HW) == 1
    assert product_of(graph).target is dialect.matmul
    assert product_of(graph).args[4:6] == (False, True)
    assert_same_numbers(original, graph, [X, torch.randn(5, 4)], **CLOSE)


def test_a_reshape_that_splits_columns_stays():
    weights = {"w": torch.randn(6, 4)}
    graph = trace(Weights(lambda x, w: F.linear(x, w).reshape(2, 3, 2, 3).sin(), **weights), [X])
    assert fuse_matmul_bias(graph, HW) == 1
    assert tuple(product_of(graph).meta["val"].shape) == (2, 3, 6)


def test_a_reshape_across_rows_of_a_matmul_stays():
    graph = trace(lambda a, b: torch.bmm(a, b).reshape(6, 5).sin(), [X, torch.randn(2, 4, 5)])
    assert fuse_matmul_bias(graph, HW) == 1
    assert tuple(product_of(graph).meta["val"].shape) == (2, 3, 5)


REFUSED_WHOLE = [
    (lambda x, y, w: aten.addmm(y, x, w, beta=0.5), "beta is 0.5"),
    (lambda x, y, w: aten.addmm(y, x, w, alpha=2), "alpha is 2"),
    (lambda x, y, w: aten.addmm(y[:, :1], x, w), "neither one number a column"),
    (lambda x, y, w: aten.mm(x.int(), w.int()), "not floating point"),
    (lambda x, y, w: torch.matmul(x, w[:, 0]), ""),
]


@pytest.mark.parametrize(("model", "reason"), REFUSED_WHOLE)
def test_products_that_are_kept(model, reason, caplog):
    inputs = [X[0], torch.randn(3, 5), torch.randn(4, 5)]
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert_kept(model, inputs, fuse_matmul_bias)
    assert reason in caplog.text


REFUSED_BEHIND = [
    (lambda c, y: [c, torch.relu(c)], "read by 2 nodes"),
    (lambda c, y: torch.add(c, y, alpha=2), "scales what it adds"),
    (lambda c, y: c + y[:, :1], "no free bias or residual"),
    (lambda c, y: c + y[0, 0], "no free bias or residual"),
    (lambda c, y: c + 3.0, "adds a number"),
    (lambda c, y: c + c, "the product to itself"),
    (lambda c, y: c + y.double(), "mixes dtypes"),
    (lambda c, y: c.t() + y.t(), ""),
    (lambda c, y: torch.softmax(c, -1), "is no activation"),
]


@pytest.mark.parametrize(("behind", "reason"), REFUSED_BEHIND)
def test_what_is_not_taken_up(behind, reason, caplog):
    inputs = [X[0], torch.randn(3, 5)]
    graph = trace_core(Weights(lambda x, y, w: behind(F.linear(x, w), y), w=torch.randn(5, 4)), inputs)
    before = copy_graph(graph)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert fuse_matmul_bias(graph, HW) == 1
    assert reason in caplog.text
    assert product_of(graph).args[2:5] == (None, None, "none")
    assert_same_numbers(before, graph, inputs, **CLOSE)


def test_a_column_is_no_bias():
    """[N, 1] broadcasts over columns, even where it is as long as there are columns."""
    graph = trace_core(Weights(lambda x, w, b: x @ w + b, w=torch.randn(4, 3), b=torch.randn(3, 1)), [X[0]])
    before = copy_graph(graph)
    assert fuse_matmul_bias(graph, HW) == 1
    assert product_of(graph).args[2] is None
    assert_same_numbers(before, graph, [X[0]], **CLOSE)


def test_a_bias_that_widens_the_result_is_none():
    graph = trace_core(Weights(lambda x, w, b: x @ w + b, w=torch.randn(4, 1), b=torch.randn(3)), [X[0]])
    before = copy_graph(graph)
    assert fuse_matmul_bias(graph, HW) == 1
    assert product_of(graph).args[2] is None
    assert_same_numbers(before, graph, [X[0]], **CLOSE)


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 3, 5)])
def test_an_addition_that_broadcasts_the_product_stays(shape, caplog):
    graph = trace_core(Weights(lambda x, w, b: x @ w + b, w=torch.randn(4, 5), b=torch.randn(shape)), [X[0]])
    before = copy_graph(graph)
    with caplog.at_level("DEBUG", logger="graphwright.passes"):
        assert fuse_matmul_bias(graph, HW) == 1
    assert "broadcasts the product" in caplog.text
    assert_same_numbers(before, graph, [X[0]], **CLOSE)


def test_no_inner_extent():
    """A product over nothing is zero, and its rows cannot be found by counting elements."""
    graph = trace_core(Weights(lambda x, w: (x @ w).reshape(1, 3, 5).relu(), w=torch.randn(0, 5)), [torch.randn(3, 0)])
    before = copy_graph(graph)
    fuse_matmul_bias(graph, HW)
    assert_same_numbers(before, graph, [torch.randn(3, 0)])


STEPS = ["bias", "residual", "reshape", "transpose", "activation", "read", "scale"]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["linear", "mm", "addmm", "computed", "bmm"]),
    st.lists(st.sampled_from(STEPS), max_size=5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_any_neighbourhood_keeps_its_numbers(kind, steps, dtype):
    x, w, b = (torch.randn(s).to(dtype) for s in ((4, 6), (6, 4), (4,)))

    def model(x):
        outputs = []
        c = {
            "linear": lambda: F.linear(x, w.t(), b),
            "mm": lambda: x @ w,
            "addmm": lambda: torch.addmm(b, x, w),
            "computed": lambda: x @ x.t(),
            "bmm": lambda: torch.bmm(x.reshape(1, 4, 6), w.reshape(1, 6, 4)).reshape(4, 4),
        }[kind]()
        for step in steps:
            if step == "bias":
                c = c + b
            elif step == "residual":
                c = torch.full_like(c, 0.5) + c
            elif step == "reshape":
                c = c.reshape(2, 2, 4) if c.dim() == 2 else c.reshape(4, 4)
            elif step == "transpose":
                c = c.t() if c.dim() == 2 else c
            elif step == "activation":
                c = F.silu(c)
            elif step == "read":
                outputs.append(c)
            else:
                c = c * 2
        return (*outputs, c)

    graph = trace_core(model, [x])
    before = copy_graph(graph)
    assert fuse_matmul_bias(graph, HW) == 1
    graph.graph.lint()
    check_values(graph, [x])
    # bfloat16 has 8 bits: a sum of 6 terms rounded in another place.
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else CLOSE
    assert_same_numbers(before, graph, [x], **tolerance)
    assert fuse_matmul_bias(graph, HW) == 0


def test_a_reshape_goes_in_front_of_a_chain_of_products():
    """The second product hands it to the first, which was looked at before."""
    first, second = torch.randn(1, 6), torch.randn(3, 1)

    def before(x):
        return F.linear(F.linear(x, first), second).flatten(0, 2)

    graph = trace_core(before, [torch.randn(1, 1, 2, 6)], pre_dispatch=True)
    original = copy_graph(graph)
    assert fuse_matmul_bias(graph, HW) == 3
    assert_same_numbers(original, graph, [torch.randn(1, 1, 2, 6)], **CLOSE)
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [
        aten.reshape.default, dialect.linear, dialect.linear
    ]  # fmt: skip
    assert fuse_matmul_bias(graph, HW) == 0
