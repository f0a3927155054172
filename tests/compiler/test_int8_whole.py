"""A model that gains nothing as a whole by 8 bits stays float32, and says so."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import graphwright
from graphwright.compiler.rewriting import NOTHING_GAINED, WHOLE_GAIN

MACHINE = "znver4"  # its rates are known, and quantize() runs nothing of it
COPIES = 384


class Beside(nn.Module):
    """A product that gains by 8 bits, and a softmax over `copies` of its result that does not."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.product = nn.Linear(256, 256)
        self.copies = copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.product(x))
        return torch.softmax(y.repeat(self.copies, 1, 1), 0) if self.copies else y


def quantised(copies: int) -> graphwright.Quantized:
    torch.manual_seed(0)
    x = torch.randn(32, 256)
    return graphwright.quantize(Beside(copies).eval(), [x], target=MACHINE, tolerance=0.5)


def test_a_product_alone_is_worth_it() -> None:
    assert [c.dtype for c in quantised(0).report().precisions if "linear" in c.operator] == ["int8"]


def test_a_small_share_of_the_model_is_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "graphwright"):
        model = quantised(COPIES)
    report = model.report()
    product = next(c for c in report.precisions if "linear" in c.operator)
    assert (product.dtype, product.reason) == ("float32", NOTHING_GAINED)
    note = next(n for n in report.notes if "gains nothing by int8" in n)
    assert "everything stays float32" in note
    assert f"{WHOLE_GAIN} or less is worth it" in note
    assert note in caplog.text
    assert NOTHING_GAINED in report.text()
    # Nothing of 8 bits is left, and values are the model's own.
    assert "quantize" not in str(model.integers.graph)
    x = torch.randn(32, 256)
    with torch.no_grad():
        torch.testing.assert_close(model(x), Beside.forward(_same(), x), rtol=1e-5, atol=1e-6)


def _same() -> Beside:
    torch.manual_seed(0)
    torch.randn(32, 256)
    return Beside(COPIES).eval()
