"""Which operators become bfloat16 on which machine, why others do not, and what the rewritten graph computes."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import trace_core
from torch import fx, nn

from graphwright.compiler import pipeline
from graphwright.compiler.build import default_passes
from graphwright.compiler.capture import capture, export
from graphwright.compiler.reference import relative_l2, run_eager, run_float64
from graphwright.hwdb import Hardware, lookup
from graphwright.passes import dialect, dialect_mixed
from graphwright.passes.assign_precision import Choice, assign_precision, plan_precisions
from graphwright.passes.precision.forms import ASKED, PRODUCTS, forms

DOTS, PLAIN = "znver4", "x86-64-v3"


def choose_precisions(*asked) -> tuple[Choice, ...]:
    return plan_precisions(*asked).choices


def captured(model: nn.Module, *inputs: torch.Tensor, hw: Hardware) -> fx.GraphModule:
    return pipeline.run(capture(export(model.eval(), inputs, {})).graph, hw, default_passes(hw))[0]


def decide(model: nn.Module, *inputs: torch.Tensor, machine: str = DOTS) -> tuple[fx.GraphModule, tuple[Choice, ...]]:
    hw = lookup(machine)
    graph = captured(model, *inputs, hw=hw)
    return graph, products(choose_precisions(graph, hw, "bf16"))


def products(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """Without the operators that are float32 because of what they are."""
    return tuple(c for c in choices if "stay float32" not in c.reason and "in registers" not in c.reason)


class Net(nn.Module):
    """Convolutions with a residual, then linears: results between them are read by products only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(24, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 16, 1)
        self.last = nn.Conv2d(16, 8, 5, padding=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = (self.inner(x) + x).relu()
        return torch.softmax(self.head(self.last(x).mean((2, 3))), -1)


def test_products_become_bfloat16_where_dot_products_are() -> None:
    graph, choices = decide(Net(), torch.randn(1, 24, 8, 8))
    assert [c.dtype for c in choices] == ["bfloat16"] * 4
    assert all("dot products" in c.reason and c.round_input for c in choices)
    before = {n.target for n in graph.graph.nodes}
    assert assign_precision(graph, choices) == 4
    graph.graph.lint()
    after = {n.target for n in graph.graph.nodes}
    assert {dialect.conv2d, dialect.linear} <= before
    assert not {dialect.conv2d, dialect.linear} & after
    kinds = {
        n.name: n.meta["val"].dtype
        for n in graph.graph.nodes
        if n.target in (dialect_mixed.conv2d_bf16, dialect_mixed.linear_bf16)
    }
    # The mean reads the last convolution, the softmax the linear; only convolutions read the other two.
    assert list(kinds.values()) == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert next(n for n in graph.graph.nodes if n.op == "output").args[0][0].meta["val"].dtype == torch.float32


def test_the_rewritten_graph_runs_in_pytorch_near_the_original() -> None:
    x = torch.randn(2, 24, 8, 8)
    graph, choices = decide(Net(), x)
    exact = run_float64(graph, [x])
    assign_precision(graph, choices)
    # Four products, each with both operands and some results rounded at 2^-8.
    assert 0.0 < relative_l2(run_eager(graph, [x])[0], exact[0]) < 1e-2
    assert assign_precision(graph, choices) == 0


def test_shared_weights_are_rounded_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x).sin())

    graph, choices = decide(Twice(), torch.randn(3, 8))
    assert assign_precision(graph, choices) == 2
    assert sum(n.op == "get_attr" and n.meta["val"].dtype == torch.bfloat16 for n in graph.graph.nodes) == 1


def reason(model: nn.Module, *inputs: torch.Tensor, machine: str = DOTS) -> str:
    graph, choices = decide(model, *inputs, machine=machine)
    (choice,) = choices
    assert choice.dtype == "float32"
    assert assign_precision(graph, choices) == 0
    return choice.reason


class Product(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b


def test_refusals_say_why() -> None:
    image, row = torch.randn(1, 64, 12, 12), torch.randn(1, 64)
    assert "groups" in reason(nn.Conv2d(64, 64, 3, groups=64), image)
    assert "Winograd" in reason(nn.Conv2d(64, 64, 3, padding=1), image)
    assert "not float32" in reason(nn.Linear(64, 8).double(), row.double())
    assert "computed" in reason(Product(), torch.randn(4, 5), torch.randn(5, 6))
    assert "stay in its cache" in reason(nn.Linear(64, 8), row, machine="zen3")
    assert "uses each weight for many pixels" in reason(nn.Conv2d(64, 64, 1), image, machine="zen3")


def by_hand(body, *inputs: torch.Tensor, machine: str = DOTS, hw: Hardware | None = None) -> str:
    """Why the one product of a graph is float32, the graph being as it was written."""
    hw = hw or lookup(machine)
    graph = trace_core(body, inputs, pre_dispatch=True)
    (node,) = [n for n in graph.graph.nodes if n.target in PRODUCTS]
    (choice,) = [c for c in choose_precisions(graph, hw, "bf16") if c.node == node.name]
    assert choice.dtype == "float32"
    return choice.reason


MATRIX, COLUMN, KERNEL = torch.randn(64, 32), torch.randn(64), torch.randn(64, 32, 1, 1)


def test_products_that_no_narrow_kernel_takes() -> None:
    x = torch.randn(16, 32)

    def linear(x, b=None, r=None):
        return dialect.linear(x, MATRIX, b, r, "none", [])

    def conv(x, b=None, layout="NCHW"):
        return dialect.conv2d(x, KERNEL, b, None, [1, 1], [0] * 4, [1, 1], 1, "none", [], layout)

    assert "no elements" in by_hand(linear, x[:0])
    assert "the bias has shape (1,)" in by_hand(lambda x: linear(x, COLUMN[:1]), x)
    assert "the residual has shape (64,)" in by_hand(lambda x, r: linear(x, None, r), x, COLUMN)
    image = torch.randn(1, 32, 8, 8)
    assert "the layout is NCHW" in by_hand(conv, image)
    assert "not one value a column" in by_hand(lambda x: conv(x, COLUMN[:1]), image, machine="a100")
    narrow = MATRIX[:8]
    assert "16 rows and 8 columns is too narrow" in by_hand(lambda x: F.linear(x, narrow), x, machine="a100")
    odd = torch.randn(64, 33)
    assert "3 rows and 64 columns is too narrow" in by_hand(
        lambda x: F.linear(x, odd), x.new_ones(3, 33), machine="a100"
    )
    few = trace_core(linear, [x[:3]], pre_dispatch=True)
    (node,) = [n for n in few.graph.nodes if n.target in PRODUCTS]
    found, reason = forms(few, node, lookup("a100"), ASKED["bf16"], 1 << 40)
    assert "bfloat16 weights" in found
    assert reason == "3 rows are too few for matrix units"
    assert "no kernel has fragments of m16n16k8:bfloat16" in by_hand(linear, x, machine="gfx908")
    unknown = dataclasses.replace(starved(), clock_mhz=None)
    large = torch.randn(256, 256)
    assert "bandwidth is not known" in by_hand(lambda x: F.linear(x, large), torch.randn(4, 256), hw=unknown)


def test_few_columns_are_not_summed_in_float16() -> None:
    x, narrow = torch.randn(64, 512), torch.randn(8, 512)
    graph = trace_core(lambda x: F.linear(x, narrow), [x], pre_dispatch=True)
    (choice,) = choose_precisions(graph, lookup("raspberry-pi-5"), "fp16")
    assert (choice.dtype, choice.reason) == (
        "float32",
        "a product of 8 columns is too narrow for rounding its input first",
    )


def test_operators_of_the_dialect_stay_float32() -> None:
    def pool(x):
        return dialect.max_pool2d(x, [2, 2], [2, 2], [0] * 4, [1, 1], False, "NCHW")

    graph = trace_core(pool, [torch.randn(2, 3, 8, 8)], pre_dispatch=True)
    (choice,) = choose_precisions(graph, lookup(DOTS), "bf16")
    assert "no kernel of this fused operator" in choice.reason


def test_winograd_keeps_a_convolution_only_where_its_tiles_fill_the_image() -> None:
    for size, expected in ((14, "float32"), (7, "bfloat16")):
        graph = captured(nn.Conv2d(512, 512, 3, padding=1), torch.randn(1, 512, size, size), hw=lookup(DOTS))
        (choice,) = choose_precisions(graph, lookup(DOTS), "bf16")
        assert choice.dtype == expected, choice.reason


def test_weights_alone_where_a_few_rows_wait_for_them() -> None:
    small = dataclasses.replace(lookup("zen3"), caches=lookup("zen3").caches[:1])  # the weights are beyond its cache
    for rows, expected in ((1, "bfloat16"), (4096, "float32")):
        graph = captured(nn.Linear(512, 512), torch.randn(rows, 512), hw=small)
        (choice,) = choose_precisions(graph, small, "bf16")
        assert choice.dtype == expected, choice.reason
        assert f"{rows} rows" in choice.reason
        assert not choice.round_input
    unknown = dataclasses.replace(small, dram_gbs=None)
    assert "bandwidth is not known" in choose_precisions(graph, unknown, "bf16")[0].reason


def test_every_floating_point_operator_has_a_row() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.last(self.norm(x).sin()).exp().sum(-1, keepdim=True) * x, -1)

    hw = lookup(DOTS)
    graph = captured(Mixed(), torch.randn(2, 8), hw=hw)
    rows = {c.operator.split(".")[-1]: c for c in choose_precisions(graph, hw, "bf16")}
    for name in ("layer_norm", "exp", "dim_IntList", "int"):
        assert "softmax, norms, reductions and exponentials stay float32" in rows[name].reason
    assert "in registers" in rows["sin"].reason
    assert rows["linear"].dtype == "bfloat16"


def test_a_budget_keeps_what_costs_too_much() -> None:
    hw = lookup(DOTS)
    graph = captured(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8), hw=hw)
    first, second = choose_precisions(graph, hw, "bf16")
    errors = {(first.node, "bfloat16"): 3e-3, (second.node, "bfloat16"): 1e-3}
    kept, other = choose_precisions(graph, hw, "bf16", errors, 2e-3)
    assert (kept.dtype, other.dtype) == ("float32", "bfloat16")
    assert "tolerance" in kept.reason
    assert other.error == 1e-3
    assert choose_precisions(graph, hw, "fp32") == ()
    plan = plan_precisions(graph, hw, "bf16", errors, 4e-3)
    assert plan.reduced == 2
    assert plan.error == pytest.approx(1e-5**0.5)
    assert plan.seconds < plan.float32_seconds


def starved(machine: str = "zen3") -> Hardware:
    """A machine with one small cache: weights come from memory."""
    return dataclasses.replace(lookup(machine), caches=lookup(machine).caches[:1])


def test_float16_weights() -> None:
    x = torch.randn(1, 256)
    graph = captured(nn.Linear(256, 256), x, hw=starved())
    (choice,) = choose_precisions(graph, starved(), "fp16")
    assert (choice.dtype, choice.form, choice.round_input) == ("float16", "float16 weights", False)
    exact = run_float64(graph, [x])
    errors = {}
    for name in ("fp16", "bf16"):
        copy = pipeline.copy_graph(graph)
        assert assign_precision(copy, choose_precisions(copy, starved(), name)) == 1
        copy.graph.lint()
        errors[name] = relative_l2(run_eager(copy, [x])[0], exact[0])
    # Three more bits of mantissa.
    assert 0 < errors["fp16"] < errors["bf16"] / 4 < 1e-3


def test_auto_takes_the_more_exact_of_equally_fast_forms() -> None:
    graph = captured(nn.Linear(256, 256), torch.randn(1, 256), hw=starved())
    assert products(choose_precisions(graph, starved(), "auto"))[0].form == "float16 weights"
    hw = lookup(DOTS)
    graph = captured(nn.Linear(256, 256), torch.randn(256, 256), hw=hw)
    assert products(choose_precisions(graph, hw, "auto"))[0].form == "bfloat16"


@pytest.mark.parametrize(("scale", "reason"), [(1e8, "beyond float16's 65504"), (1e-7, "float16 errs by")])
def test_weights_that_float16_cannot_hold(scale: float, reason: str) -> None:
    layer = nn.Linear(256, 256)
    with torch.no_grad():
        layer.weight.mul_(scale)
    graph = captured(layer, torch.randn(1, 256), hw=starved())
    (choice,) = choose_precisions(graph, starved(), "fp16")
    assert choice.dtype == "float32"
    assert reason in choice.reason
    assert choose_precisions(graph, starved(), "auto")[0].form == "bfloat16 weights"


@pytest.mark.parametrize("rows", [3, 32])
@pytest.mark.parametrize(("scale", "reason"), [(1e8, "beyond float16's 65504"), (1e-7, "float16 errs by")])
def test_weights_that_float16_cannot_hold_stay_float32_on_matrix_units(rows: int, scale: float, reason: str) -> None:
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.mul_(scale)
    hw = lookup("a100")
    graph = captured(layer, torch.randn(rows, 64), hw=hw)
    (choice,) = choose_precisions(graph, hw, "fp16")
    assert choice.dtype == "float32"
    assert reason in choice.reason


def test_machines_that_do_not_convert_float16() -> None:
    hw = dataclasses.replace(starved(), features=starved().features - {"f16c"})
    graph = captured(nn.Linear(256, 256), torch.randn(1, 256), hw=hw)
    (choice,) = choose_precisions(graph, hw, "fp16")
    assert "does not convert" in choice.reason


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([3, 8, 16]), min_size=2, max_size=5), st.booleans(), st.sampled_from([DOTS, PLAIN]))
def test_chains_of_linears_stay_close(widths: list[int], residual: bool, machine: str) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                y = layer(x)
                x = (y + x if residual and y.shape == x.shape else y).tanh()
            return x

    torch.manual_seed(len(widths))
    x = torch.randn(3, widths[0])
    graph, choices = decide(Chain(), x, machine=machine)
    exact = run_float64(graph, [x])
    chosen = sum(c.dtype == "bfloat16" for c in choices)
    assert assign_precision(graph, choices) == chosen
    graph.graph.lint()
    assert relative_l2(run_eager(graph, [x])[0], exact[0]) <= 1e-2 * chosen**0.5 + 1e-6


def test_the_operators_keep_torchs_contract() -> None:
    w = torch.randn(5, 8).bfloat16()
    torch.library.opcheck(
        dialect_mixed.linear_bf16, (torch.randn(3, 8), w, torch.randn(5), None, "relu", [], True, True)
    )
    kernel = torch.randn(4, 8, 3, 3).bfloat16()
    sizes = ([1, 1], [1, 1, 1, 1], [1, 1], 1)
    torch.library.opcheck(
        dialect_mixed.conv2d_bf16,
        (torch.randn(1, 6, 6, 8), kernel, None, None, *sizes, "none", [], "NHWC", True, False),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_are_as_wide_as_the_operands(dtype: torch.dtype) -> None:
    w = torch.ones(1, 1, dtype=torch.bfloat16)
    x = torch.tensor([[1 + 2.0**-20]], dtype=dtype)
    assert dialect_mixed.linear_bf16(x, w, None, None, "none", [], False, False).item() == x.item()
    assert dialect_mixed.linear_bf16(x, w, None, None, "none", [], True, False).item() == 1.0


def heads(queries: int = 32, keys: int = 48, depth: int = 24, groups: int = 1) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    k = torch.randn(2, 4 // groups, keys, depth)
    return torch.randn(2, 4, queries, depth), k, torch.randn(*k.shape[:3], 16)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return dialect.attention(q, k, v, None, False, 0.25)


def test_attention_is_rounded_on_the_matrix_units_of_gpus_alone() -> None:
    def choice(machine: str, precision: str = "fp16", *, body=attended, inputs=None) -> Choice:
        graph = trace_core(body, inputs or list(heads()), pre_dispatch=True)
        (found,) = choose_precisions(graph, lookup(machine), precision)
        assert assign_precision(graph, (found,)) == (found.dtype != "float32")
        targets = {node.target for node in graph.graph.nodes}
        assert (dialect.attention in targets) == (found.dtype == "float32")
        return found

    machines = ("a100", "mi300x", "rx-7900-xtx", "rx-9070")
    for machine, precision in (*((m, p) for m in machines for p in ("fp16", "bf16")), ("t4", "fp16")):
        assert choice(machine, precision).dtype == {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert "both operands are computed" in choice(DOTS, "bf16").reason
    assert "no faster matrix instructions" in choice("t4", "bf16").reason
    assert "no kernel has fragments of m16n16k8:bfloat16" in choice("mi100", "bf16").reason
    assert "no faster matrix instructions" in choice("rx-6800").reason
    assert "15 queries and 48 keys is too narrow" in choice("a100", inputs=list(heads(15))).reason
    assert "32 queries and 12 keys is too narrow" in choice("a100", inputs=list(heads(keys=12))).reason
    assert choice("rx-7900-xtx", inputs=list(heads(depth=88))).dtype == "float16"
    assert "heads of 96 and 16 are more" in choice("rx-7900-xtx", inputs=list(heads(depth=96))).reason
    assert choice("rx-9070", inputs=list(heads(depth=128))).dtype == "float16"
    assert "heads of 136 and 16 are more" in choice("a100", inputs=list(heads(depth=136))).reason
    assert "too narrow" in choice("a100", inputs=[x[:0] for x in heads()]).reason
    assert "too narrow" in choice("a100", inputs=list(heads(depth=0))).reason
    double = choice("a100", inputs=[x.double() for x in heads()])
    assert "is not float32" in double.reason


@pytest.mark.parametrize(
    ("operator", "dtype"),
    [(dialect_mixed.attention_f16, torch.float16), (dialect_mixed.attention_bf16, torch.bfloat16)],
)
def test_attention_of_16_bits_rounds_its_operands_and_the_powers_of_its_scores(operator, dtype) -> None:
    q, k, v = heads(32, 32, groups=2)
    stopped = torch.ones(32, 32).tril() == 0
    stopped[5] = True  # a row of which nothing is let through
    q, k, v = (x.to(dtype).double() for x in (q, k, v))
    exact = dialect.attention(q, k, v, ~stopped, False, 0.25)
    found = operator(q.float(), k.float(), v.float(), ~stopped, False, 0.25)
    unit = torch.finfo(dtype).eps / 2
    assert torch.equal(found[:, :, 5], torch.zeros_like(found[:, :, 5]))
    assert 0 < (found - exact).abs().max() < 2 * unit * v.abs().max()  # powers and their sum
    causal = torch.ones(32, 32, dtype=torch.bool).tril()
    assert torch.equal(operator(q, k, v, None, True, 0.25), operator(q, k, v, causal, False, 0.25))
    assert operator(q, k, v, ~stopped, False, 0.25, -math.inf).isnan()[:, :, 5].all()
