"""What 8 bits cost in accuracy: a network trained here on scikit-learn's digits, and MiniLM with its real weights."""

from __future__ import annotations

import torch
from digits import Digits, network
from minilm import MiniLM

import graphwright
from graphwright.hwdb import lookup

VNNI = lookup("znver4")  # quantised for such a machine, and run in PyTorch: the exact integers of its kernels


def test_digits_lose_at_most_half_a_point() -> None:
    digits = Digits.load()
    model = digits.train(network())
    quantised = graphwright.quantize(model, digits.calibration, target=VNNI)
    products = [c for c in quantised.report().precisions if "conv2d" in c.operator or "linear" in c.operator]
    assert sum(c.dtype == "int8" for c in products) >= 3, quantised.report().text()
    exact = digits.points(model)
    assert exact > 90.0
    assert digits.points(quantised) >= exact - 0.5


def test_minilm_keeps_its_embeddings() -> None:
    """Cosine of the embeddings of 200 sentences at least 0.995, and their rankings agree."""
    minilm = MiniLM.load()
    quantised = graphwright.quantize(minilm.model, minilm.batches[:2], target=VNNI)
    exact, rounded = minilm.embedded(minilm.model), minilm.embedded(quantised)
    assert sum(c.dtype == "int8" for c in quantised.report().precisions) >= 10, quantised.report().text()
    assert float((exact * rounded).sum(1).min()) >= 0.995
    theirs, ours = exact @ exact.t(), rounded @ rounded.t()
    agree = [
        torch.corrcoef(torch.stack([a.argsort().argsort(), b.argsort().argsort()]).float())[0, 1]
        for a, b in zip(theirs, ours, strict=True)
    ]
    assert float(torch.stack(agree).mean()) >= 0.98  # of Spearman, one sentence against all
