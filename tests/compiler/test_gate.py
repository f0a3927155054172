"""A gate in a model: compiled code leaves out what it empties, and gives the numbers of PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from boards import assert_like_float64, call, emulator
from torch import nn

import graphwright
from graphwright.errors import InputError
from graphwright.hwdb import lookup
from graphwright.passes import dialect_gating

LEFT_OUT = "matmul of rows that are left"


class Block(nn.Module):
    """A transformer's feed-forward block of gated tokens, with its residual."""

    def __init__(self, width: int = 48, hidden: int = 200, by: str = "row", residual: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.by, self.residual = by, residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(nn.functional.gelu(self.up(graphwright.gate(x, 1.0, by=self.by, share=0.75))))
        return x + y if self.residual else y


def tokens(kind: str, shape: tuple[int, ...] = (2, 70, 48)) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    small = 0.01 * x
    if kind == "none":
        return x * 10.0
    if kind == "half":
        small[:, ::2] = x[:, ::2] * 3.0
    if kind == "one":
        small[1, 69, 47] = 1.0  # exactly the threshold, which is not below it
    if kind == "nan":
        small[0, 3, 7], small[1, 0, 0] = float("nan"), float("-inf")
    return small


@pytest.mark.parametrize(("by", "residual"), [("row", True), ("row", False), ("element", True)])
def test_any_tokens_may_be_empty(by: str, residual: bool) -> None:
    torch.manual_seed(0)
    model = Block(by=by, residual=residual).eval()
    compiled = graphwright.compile(model, (tokens("half"),))
    assert [k.algorithm for k in compiled.report().kernels].count(LEFT_OUT) == 2, compiled.report().text()
    for kind in ("half", "all", "none", "one", "nan"):
        x = tokens(kind)
        with torch.no_grad():
            expected = model(x)
        largest = float(expected.nan_to_num(posinf=0.0, neginf=0.0).abs().max())
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5 * largest, equal_nan=True)


def test_a_gate_that_nothing_follows() -> None:
    model = lambda_module(lambda x: graphwright.gate(x, 0.5, by="element").sin())
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(3, 5, dtype=dtype)
        x[0, 0] = float("nan")
        compiled = graphwright.compile(model, (x,))
        torch.testing.assert_close(compiled(x), model(x), equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "value", "threshold", "stays"),
    [
        (torch.bfloat16, 0.30078125, 0.3011, True),  # the threshold is 0.30078125 in 8 bits of mantissa
        (torch.float32, 0.7, 0.7, True),  # and the float next to 0.7 is less
        (torch.float64, 0.7, 0.7, True),
        (torch.float32, 2.0**-149, 1.6 * 2.0**-149, False),
        (torch.float16, 65504.0, 1e6, False),
        (torch.float32, float("inf"), 1e39, True),
    ],
)
def test_thresholds_are_of_the_dtype(dtype: torch.dtype, value: float, threshold: float, stays: bool) -> None:
    model = lambda_module(lambda x: graphwright.gate(x, threshold))
    x = torch.full((2, 4), value, dtype=dtype)
    compiled = graphwright.compile(model, (x,))
    assert compiled.report().kernels
    for found in (model(x), compiled(x)):
        assert torch.equal(found, x if stays else torch.zeros_like(x))
    (limit,) = (n.args[1] for n in torch.export.export(model, (x,)).graph.nodes if n.op == "call_function")
    assert limit == float(torch.tensor(threshold, dtype=dtype))
    assert bool(dialect_gating.there(x.double(), limit, True).all()) is stays  # what verification compares with


def lambda_module(function):
    class Made(nn.Module):
        def forward(self, x):
            return function(x)

    return Made().eval()


def test_through_torch_compile_and_in_8_bits() -> None:
    model = Block().eval()
    x = tokens("half")
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, backend="graphwright")(x), expected, rtol=1e-4, atol=1e-4)
    quantised = graphwright.quantize(model, [x, tokens("none")], target="znver4")
    assert float((quantised(x) - expected).norm() / expected.norm()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("board", "cpu"), [("raspberry-pi-4b", "cortex-a72"), ("raspberry-pi-2b", "cortex-a7")])
def test_on_a_board(board: str, cpu: str, tmp_path: Path) -> None:
    emulator(lookup(board).isa)
    model = Block().eval()
    compiled = graphwright.compile(model, (tokens("half"),), target=board)
    assert [k.algorithm for k in compiled.report().kernels].count(LEFT_OUT) == 2, compiled.report().text()
    made = compiled.bundle(tmp_path / "out", executable=True)
    for kind in ("half", "all"):
        found = call(made, cpu, {"x": tokens(kind)}, tmp_path, "--threads", "2")
        assert_like_float64(found[0], model, {"x": tokens(kind)}, 1e-6)  # sums of 200 terms, and a residual


def test_gradients_pass_where_values_stay() -> None:
    x = torch.tensor([[0.1, 0.2], [0.1, 3.0], [float("nan"), 0.0]], requires_grad=True)
    graphwright.gate(x, 1.0).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threshold": -1.0}, "finite number from 0"),
        ({"threshold": float("nan")}, "finite number from 0"),
        ({"threshold": "1"}, "finite number from 0"),
        ({"share": 2.0}, "share of the rows"),
        ({"by": "rows"}, "did you mean 'row'"),
        ({"x": torch.arange(4)}, "tensor of floats"),
        ({"x": torch.tensor(1.0)}, "last dim"),
        ({"x": [1.0]}, "got list"),
    ],
)
def test_what_is_refused(change: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        graphwright.gate(**{"x": torch.randn(2, 2), "threshold": 1.0} | change)
