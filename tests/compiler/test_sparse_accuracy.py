"""What zeros and training for 8 bits cost in accuracy, on scikit-learn's digits."""

from __future__ import annotations

import torch
from digits import Digits, network

import graphwright
from graphwright.hwdb import lookup

VNNI = lookup("znver4")


def test_digits_pruned_and_trained_again() -> None:
    """2:4 at most one point lost; three quarters of the blocks zero and 8 bits at most two."""
    digits = Digits.load()
    model = digits.train(network())
    exact = digits.points(model)
    assert exact > 90.0

    pruned = graphwright.prune(model, "2:4", importance="wanda", calibration=digits.calibration)
    digits.train(pruned, 2, 1e-3, graphwright.keep_zeros)
    assert float((pruned[3].weight == 0).float().mean()) == 0.5
    assert digits.points(pruned) >= exact - 1.0

    blocks = graphwright.prune(model, "16x16", 0.75, keep=["11"])
    digits.train(blocks, 4, 3e-3, graphwright.keep_zeros)
    assert float((blocks[7].weight == 0).float().mean()) == 0.75
    quantised = graphwright.quantize(blocks, digits.calibration, target=VNNI)
    stored = [t for n, t in quantised.named_buffers() if t.dtype == torch.int8 and t.shape == (64, 64, 3, 3)]
    assert [float((t == 0).float().mean()) >= 0.75 for t in stored] == [True]
    assert digits.points(quantised) >= exact - 2.0


def test_digits_trained_for_8_bits() -> None:
    """At most 0.2 points lost."""
    digits = Digits.load()
    model = digits.train(network())
    prepared = graphwright.prepare_qat(model, digits.calibration)
    digits.train(prepared, 2, 3e-4)
    converted = graphwright.convert(prepared, digits.test, target=VNNI)
    assert sum(c.dtype == "int8" for c in converted.report().precisions) >= 3, converted.report().text()
    assert digits.points(converted) >= digits.points(model) - 0.2
