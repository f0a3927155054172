"""`make bench`: the models of the zoo against the peers; the JSON goes to docs/measurements/."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from pathlib import Path

from graphwright.compiler import bench

MODELS = ("resnet18", "resnet50", "mobilenetv2", "bert", "gpt2", "vit", "minilm")

if __name__ == "__main__":
    bench.bench_models(MODELS, json_path=Path(__file__).parent.parent / "docs" / "measurements" / "models.json")
