"""Large channels scaled into the weights: the same function, and errors of 8 bits that drop by stated factors."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import graphwright
from graphwright.compiler import pipeline
from graphwright.compiler.capture import capture, export
from graphwright.compiler.compression.int8_method import Method
from graphwright.compiler.compression.int8_plan import apply, plan_int8
from graphwright.compiler.compression.migrate import found, migrated
from graphwright.errors import InputError
from graphwright.hwdb import Hardware, lookup
from graphwright.passes.default import PASSES


@pytest.fixture(scope="module")
def hw() -> Hardware:
    """A machine with dot products of bytes: nothing is run on it."""
    return lookup("znver4")


class Normed(nn.Module):
    """A feed-forward block behind a norm, as transformers have it, with some channels `outlier` times as large."""

    def __init__(self, outlier: float, *, norm: str = "layer") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm: nn.Module = nn.LayerNorm(128) if norm == "layer" else nn.RMSNorm(128)
        self.up = nn.Linear(128, 256)
        self.down = nn.Linear(256, 128)
        with torch.no_grad():
            self.norm.weight[::32] *= outlier
            self.up.weight[:, ::32] /= outlier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Unequal(nn.Module):
    """Two convolutions whose weights have rows of very different sizes: the same function as with equal ones."""

    def __init__(self, spread: float, activation: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.activation = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 64, 1), activation
        rows = torch.logspace(-1, 1, 64).pow(torch.log10(torch.tensor(spread)) / 2)
        with torch.no_grad():
            self.first.weight *= rows.view(-1, 1, 1, 1)
            self.first.bias *= rows
            self.second.weight /= rows.view(1, -1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.activation(self.first(x)))


def rows(seed: int = 1) -> torch.Tensor:
    return torch.randn(256, 128, generator=torch.Generator().manual_seed(seed))


def image(seed: int = 1) -> torch.Tensor:
    return torch.randn(1, 32, 32, 32, generator=torch.Generator().manual_seed(seed))


def wide(model: nn.Module, x: torch.Tensor, hw: Hardware) -> torch.fx.GraphModule:
    return pipeline.run(capture(export(model.eval(), (x,), {})).graph, hw, PASSES)[0]


def errors(
    model: nn.Module, seen: torch.Tensor, x: torch.Tensor, hw: Hardware, weight: str = "per_channel"
) -> dict[str, float]:
    """Of the model in 8 bits, by how large channels are migrated."""
    graph = wide(model, seen, hw)
    with torch.no_grad():
        exact = model(x)
        found = {}
        for way in ("none", "smooth", "equalise"):
            method = Method(weight=weight, migration=way)
            some, _ = migrated(graph, hw, method, [[seen]])
            torch.testing.assert_close(some(x)[0], exact, rtol=1e-4, atol=1e-4)  # weights are rounded once more
            rounded, _ = apply(some, hw, plan_int8(some, hw, method, [[seen]]))
            assert "graphwright.q" in str(rounded.graph)
            found[way] = float((rounded(x)[0] - exact).norm() / exact.norm())
    return found


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("outlier", "factor"), [(1e2, 5.0), (1e3, 20.0), (1e4, 20.0)])
def test_smoothing_takes_outliers_out_of_what_is_rounded(
    hw: Hardware, norm: str, outlier: float, factor: float
) -> None:
    found = errors(Normed(outlier, norm=norm), rows(), rows(2), hw)
    assert found["smooth"] < found["none"] / factor, found
    assert found["smooth"] < 1e-2
    assert found["equalise"] < found["none"] / factor  # the norm's own factors are the outliers


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.1)])
def test_equalising_serves_weights_with_one_scale(hw: Hardware, activation: nn.Module) -> None:
    found = errors(Unequal(1e2, activation), image(), image(2), hw, weight="per_tensor")
    assert found["equalise"] < found["none"] / 5.0, found


def test_auto_takes_what_lowers_the_damage(hw: Hardware) -> None:
    graph = wide(Normed(1e3), rows(), hw)
    method = Method(migration="auto")
    some, (note,) = migrated(graph, hw, method, [[rows()]])
    assert some is not graph
    assert "noise over signal" in note
    flat = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128))
    with torch.no_grad():
        flat[1].weight.copy_(flat[1].weight.sign() * 0.05)  # channels alike, read alike
    even = wide(flat, rows().sign(), hw)
    same, (note,) = migrated(even, hw, method, [[rows().sign()]])
    assert same is even
    assert note.startswith("migration none")


def test_what_others_read_or_bend_stays(hw: Hardware, caplog: pytest.LogCaptureFixture) -> None:
    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)
            self.last = nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norm(x)
            shared = torch.nn.functional.linear(torch.relu(self.last(x)), self.last.weight)
            return y + self.down(torch.nn.functional.gelu(self.up(y))) + shared

    with caplog.at_level(logging.DEBUG, "graphwright"):
        assert found(wide(Others(), torch.randn(64, 64), hw)) == []
    assert "gelu is bent elsewhere than in 0" in caplog.text
    assert "reads them" in caplog.text or "adds them" in caplog.text
    assert "is read by others too" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "graphwright"):
        assert found(wide(Unequal(10.0, nn.ReLU6()), image(), hw)) == []
    assert "relu6 is bent elsewhere than in 0" in caplog.text


def test_channels_of_zeros_are_left_alone(hw: Hardware) -> None:
    model = Normed(1e3)
    with torch.no_grad():
        model.norm.weight[5] = 0.0
        model.norm.bias[5] = 0.0
        model.up.weight[:, 9] = 0.0
        expected = model(rows())
    for way in ("smooth", "equalise"):
        some, _ = migrated(wide(model, rows(), hw), hw, Method(migration=way), [[rows()]])
        torch.testing.assert_close(some(rows())[0], expected, rtol=1e-4, atol=1e-4)


def test_the_option_reaches_quantize_and_says_what_there_is() -> None:
    quantised = graphwright.quantize(Normed(1e3).eval(), [rows()], migration="smooth", target="znver4")
    report = quantised.report()
    assert any(note.startswith("smooth: ") for note in report.notes)
    assert [c.dtype for c in report.precisions if "linear" in c.operator] == ["int8", "int8"]
    with pytest.raises(InputError, match=r"migration='smoth'.*'smooth'"):
        graphwright.quantize(Normed(1e3).eval(), [rows()], migration="smoth")
    with pytest.raises(InputError, match="migration"):
        graphwright.compile(
            Normed(1.0).eval(), rows(), precision="int8", calibration=[rows()], int8={"migrations": "smooth"}
        )
