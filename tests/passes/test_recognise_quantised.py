"""Graphs that others quantised: which products become integers, that values agree within a step, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
import torch.nn.functional as F
from rewriting import assert_same_numbers, check_graph, check_values, trace, trace_core
from torch import fx, nn

from graphwright.compiler.pipeline import copy_graph, run
from graphwright.compiler.reference import run_eager
from graphwright.hwdb import lookup
from graphwright.passes import dialect, dialect_int8
from graphwright.passes.default import PASSES
from graphwright.passes.recognise_quantised import recognise_quantised
from graphwright.passes.refusals import recording

VNNI, AVX2 = lookup("znver4"), lookup("x86-64-v3")
qd = torch.ops.quantized_decomposed
FULL = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


class Rounded(nn.Module):
    """x as PT2E stores it: quantized by an observer of `seen`, and dequantized."""

    def __init__(self, seen: torch.Tensor, dtype: torch.dtype = torch.uint8, symmetric: bool = False) -> None:
        super().__init__()
        low, high = min(float(seen.min()), 0.0), max(float(seen.max()), 0.0)
        least, most = FULL[dtype]
        self.how: tuple[Any, ...] = ((high - low) / 255, round(least - low / ((high - low) / 255)), least, most, dtype)
        if symmetric:
            self.how = (max(-low, high) / 127, (least + most + 1) // 2, least, most, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return qd.dequantize_per_tensor(qd.quantize_per_tensor(x, *self.how), *self.how)


class Stored(nn.Module):
    """A linear layer or a convolution whose weights PT2E stored in int8."""

    def __init__(self, layer: Any, per_channel: bool = True, zero: int = 0, folded: bool = True) -> None:
        super().__init__()
        w = layer.weight.detach()
        largest = w.flatten(1).abs().amax(1) if per_channel else w.abs().max()[None]
        self.scale, self.zeros = nn.Buffer(largest / 120), nn.Buffer(torch.full(largest.shape, zero))
        rows = self.scale.view(-1, *[1] * (w.dim() - 1))
        self.w = nn.Buffer((w / rows).round().add(zero).clamp(-128, 127).to(torch.int8) if folded else w)
        self.layer, self.step, self.zero, self.folded = layer, None if per_channel else float(self.scale), zero, folded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w, end = self.w, (-128, 127, torch.int8)
        if self.step is None:
            how: tuple[Any, ...] = (self.scale, self.zeros, 0, *end)
            w = w if self.folded else qd.quantize_per_channel(w, *how)
            w = qd.dequantize_per_channel(w, *how)
        else:
            how = (self.step, self.zero, *end)
            w = w if self.folded else qd.quantize_per_tensor(w, *how)
            w = qd.dequantize_per_tensor(w, *how)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, w, self.layer.bias)
        a = self.layer
        return F.conv2d(x, w, a.bias, a.stride, a.padding, a.dilation, a.groups)


def passed(model: Any, x: torch.Tensor, hw: Any = VNNI) -> fx.GraphModule:
    """The graph behind all passes, checked."""
    graph = run(trace(model.eval(), (x,)), hw, PASSES)[0]
    check_graph(graph)
    check_values(graph, (x,))
    return graph


def names(graph: fx.GraphModule) -> list[str]:
    return [str(n.target).split(".")[-2] for n in graph.graph.nodes if n.op == "call_function"]


def assert_within_a_step(graph: fx.GraphModule, model: Any, x: torch.Tensor, step: float) -> None:
    """Results of the integers and of PyTorch's own operators."""
    with torch.no_grad():
        expected = model(x)
    (result,) = run_eager(graph, [x])
    assert float((result - expected).abs().max()) <= step + 1e-4 * float(expected.abs().max())


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def conv_net(dtype: torch.dtype, symmetric: bool = False) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = noise(1, 3, 16, 16)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 24, 1)]
    head = nn.Linear(24 * 8 * 8, 10)
    how = (dtype, symmetric)
    with torch.no_grad():
        seen = [x]
        for layer in layers:
            seen.append(layer(seen[-1]).relu())
    model = nn.Sequential(
        Rounded(x, *how),
        *(part for layer, after in zip(layers, seen[1:], strict=True)
          for part in (Stored(layer), nn.ReLU(), Rounded(after, *how))),
        *(nn.MaxPool2d(2), Rounded(seen[-1], *how), nn.Flatten(), Stored(head)),
    )  # fmt: skip
    return model, x


@pytest.mark.parametrize(("dtype", "symmetric"), [(torch.uint8, False), (torch.int8, False), (torch.int8, True)])
def test_a_network_of_convolutions_keeps_its_bytes(dtype: torch.dtype, symmetric: bool) -> None:
    model, x = conv_net(dtype, symmetric)
    graph = passed(model, x)
    found = names(graph)
    assert found.count("qconv2d") == 3
    assert found.count("qlinear") == 1
    assert found.count("quantize") == 1  # the input: every other rounding is a product's own
    assert "dequantize" not in found
    assert "dequantize_rows" not in found
    with torch.no_grad():
        expected = model(x)
    assert float((run_eager(graph, [x])[0] - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("zero", [0, 3])
def test_linear_weights_in_every_spelling(per_channel: bool, folded: bool, zero: int) -> None:
    torch.manual_seed(1)
    x = noise(5, 48)
    model = nn.Sequential(Rounded(x), Stored(nn.Linear(48, 20), per_channel, zero, folded), nn.ReLU()).eval()
    graph = passed(model, x)
    assert names(graph) == ["quantize", "qlinear"]
    assert_within_a_step(graph, model, x, 0.0)


def test_weights_alone_are_left_in_8_bits() -> None:
    model, x = nn.Sequential(Stored(nn.Linear(32, 24)), nn.GELU()).eval(), noise(4, 32)
    graph = passed(model, x)
    assert names(graph) == ["linear_w8"]
    assert_within_a_step(graph, model, x, 0.0)


def test_a_table_is_left_in_8_bits() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Buffer(torch.randint(-128, 128, (50, 16), dtype=torch.int8))
            self.scale, self.zeros = nn.Buffer(torch.rand(50)), nn.Buffer(torch.zeros(50, dtype=torch.int64))

        def forward(self, i: torch.Tensor) -> torch.Tensor:
            how = (self.scale, self.zeros, 0, -128, 127, torch.int8)
            return F.embedding(i, qd.dequantize_per_channel(self.w, *how))

    model, i = Table().eval(), torch.randint(0, 50, (2, 7))
    graph = passed(model, i)
    assert names(graph) == ["embedding_w8"]
    assert torch.equal(run_eager(graph, [i])[0], model(i))


def test_a_part_of_the_range_is_a_clamp_in_front() -> None:
    class Reduced(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return qd.quantize_per_tensor(x, 0.1, 5, 0, 127, torch.uint8)

    graph, x = passed(Reduced(), 10 * noise(40)), 10 * noise(40)
    assert names(graph) == ["clamp", "quantize"]
    assert torch.equal(run_eager(graph, [x])[0], Reduced()(x))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_scales_found_at_run_time_are_arithmetic(dtype: torch.dtype) -> None:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Stored(nn.Linear(32, 24))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            how = (*FULL[dtype], dtype)
            scale, zero = qd.choose_qparams.tensor(x, *FULL[dtype], 1e-6, dtype)
            q = qd.quantize_per_tensor.tensor(x, scale, zero, *how)
            return self.inner(qd.dequantize_per_tensor.tensor(q, scale, zero, *how))

    model, x = Dynamic().eval(), noise(4, 32)
    graph = passed(model, x)
    assert "linear_w8" in names(graph)
    assert_within_a_step(graph, model, x, 0.0)


def test_rows_are_quantised_one_by_one() -> None:
    class Tokens(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale, zero = qd.choose_qparams_per_token_asymmetric(x, torch.int8)
            q = qd.quantize_per_token(x, scale, zero, -128, 127, torch.int8)
            return qd.dequantize_per_token(q, scale, zero, -128, 127, torch.int8, torch.float32)

    x = noise(6, 32)
    assert float((run_eager(passed(Tokens(), x), [x])[0] - Tokens()(x)).abs().max()) < 1e-5


def refused(model: nn.Module, x: torch.Tensor, hw: Any = VNNI) -> tuple[list[str], str]:
    with recording() as found:
        graph = passed(model, x, hw)
    assert_within_a_step(graph, model, x, 0.0)
    return names(graph), "; ".join(r.reason for r in found if r.rule == "recognise_quantised")


def test_groups_keep_float32() -> None:
    x = noise(1, 8, 6, 6)
    model = nn.Sequential(Rounded(x), Stored(nn.Conv2d(8, 8, 3, groups=2))).eval()
    found, why = refused(model, x)
    assert "qconv2d" not in found
    assert "2 groups of channels" in why


def test_machines_without_dot_products_of_bytes_keep_float32() -> None:
    x = noise(1, 8, 6, 6)
    found, why = refused(nn.Sequential(Rounded(x), Stored(nn.Conv2d(8, 8, 3))).eval(), x, AVX2)
    assert "qconv2d" not in found
    assert "no dot products of bytes" in why


def test_zero_points_beyond_int8_keep_float32() -> None:
    x = noise(3, 16)
    stored = Stored(nn.Linear(16, 8), zero=100)
    stored.w[0, 0] = -128
    found, why = refused(nn.Sequential(Rounded(x), stored).eval(), x)
    assert "qlinear" not in found
    assert "beyond int8" in why


W8, SCALES = torch.randint(-128, 128, (24, 32), dtype=torch.int8), torch.rand(24) / 64
FULL_W8, LONG = torch.full((24, 32), 127, dtype=torch.int8), torch.ones(2, 70000, dtype=torch.int8)
MINUS, INFINITE, COLUMNS = torch.full((24,), -1, dtype=torch.int32), torch.full((24,), torch.inf), torch.rand(32)
KERNEL, BIAS = torch.randint(-128, 128, (8, 4, 1, 1), dtype=torch.int8), torch.randn(24)
rows, whole = dialect_int8.dequantize_rows, dialect_int8.dequantize


def linear(x: Any, w: Any, b: Any = None, r: Any = None) -> Any:
    return dialect.linear(x, w, b, r, "none", [])


ON_ITS_OWN = {
    "its scales are no constants": (lambda x, s: F.linear(x, rows(W8, s, None, 0)), (SCALES,)),
    "no constants, one a row": (lambda x, z: F.linear(x, rows(W8, SCALES, z, 0)), (MINUS,)),
    "constants, one a row": (lambda x: F.linear(x, rows(W8, COLUMNS, None, 1)), ()),
    "its zero points take the weights beyond int8": (lambda x: F.linear(x, rows(FULL_W8, SCALES, MINUS, 0)), ()),
    "or scales are not finite": (lambda x: F.linear(x, rows(W8, INFINITE, None, 0)), ()),
    "no product that takes weights": (lambda x: whole(W8, 0.1, 0).sin() + x.sum(), ()),
    "takes weights of 8 bits": (lambda x, w: F.linear(whole(W8, 0.1, 0), w), (torch.randn(5, 32),)),
    "the result has no elements": (lambda x: F.linear(x[:0], whole(W8, 0.1, 0)), ()),
    "terms do not fit 32 bits": (lambda x: F.linear(x[:, :1].expand(4, 70000), whole(LONG, 0.1, 0)), ()),
    "the layout is NCHW": (
        lambda x: dialect.conv2d(
            x.view(1, 4, 4, 8), whole(KERNEL, 0.1, 0), None, None, [1, 1], [0] * 4, [1, 1], 1, "none", [], "NCHW"
        ),
        (),
    ),
    "the bias has shape (1,)": (lambda x: linear(x, whole(W8, 0.1, 0), BIAS[:1]), ()),
    "the residual has shape (24,)": (lambda x, r: linear(x, whole(W8, 0.1, 0), None, r), (BIAS,)),
}


@pytest.mark.parametrize("reason", ON_ITS_OWN)
def test_readers_that_stay_in_float32(reason: str) -> None:
    model, others = ON_ITS_OWN[reason]
    inputs = [noise(4, 32), *others]
    graph = trace_core(model, inputs, pre_dispatch=True)
    before = copy_graph(graph)
    with recording() as found:
        recognise_quantised(graph, VNNI)
    assert any(reason in r.reason for r in found), list(found)
    assert not {"qlinear", "qconv2d", "linear_w8", "embedding_w8"} & set(names(graph))
    assert_same_numbers(before, graph, inputs, rtol=1e-6, atol=1e-6)


def test_gpus_read_weights_in_float32() -> None:
    x = noise(4, 32)
    graph = trace_core(lambda x: F.linear(x, whole(W8, 0.1, 0)), [x], pre_dispatch=True)
    before = copy_graph(graph)
    with recording() as found:
        recognise_quantised(graph, lookup("a100"))
    assert [r.reason for r in found] == ["8 bits have no kernel on a GPU"]
    assert "linear_w8" not in names(graph)
    assert_same_numbers(before, graph, [x], rtol=1e-6, atol=1e-6)


def test_a_second_run_finds_nothing() -> None:
    model, x = conv_net(torch.uint8)
    graph = passed(model, x)
    before = copy_graph(graph)
    assert recognise_quantised(graph, VNNI) == 0
    assert names(graph) == names(before)
