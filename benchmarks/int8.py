"""8 bits against float32, and against ONNX Runtime and OpenVINO in 8 bits.

    python benchmarks/int8.py prepare DIR MODEL ...      compiles, quantises and exports into DIR
    python benchmarks/int8.py ours DIR MODEL ...         our builds only
    python benchmarks/int8.py measure DIR MODEL ...      prints JSON: a row for each model, of what DIR holds

ONNX Runtime quantises the exported model by its own calibration (quantize_static: extremes, uint8 values, int8 weights
with a scale a channel, QDQ nodes), on the inputs ours has; OpenVINO runs that very file, whose QDQ nodes it turns into
its own integer kernels. Calibration and measured inputs are noise: the weights of all models but MiniLM are random.
MODEL is one of the zoo, or feed-forward. Linear layers by ranges that are found at run time are a build of their own.
Milliseconds are medians of rounds in turns; `relative_l2` is the error of the first result against eager in float32.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

import graphwright
from graphwright.compiler.benchmarking import zoo
from graphwright.compiler.benchmarking.bench import Runner, interleave, onnxruntime, openvino

# Builds of ours, and of some models others besides.
BUILDS: dict[str, dict[str, Any]] = {"fp32": {}, "int8": {"precision": "int8"}}
DYNAMIC: dict[str, Any] = {"precision": "int8", "int8": {"activation": "dynamic"}}
MORE: dict[str, dict[str, dict[str, Any]]] = {
    "mobilenetv2": {"int8-all": {"precision": "int8", "tolerance": 0.3}},
    "bert": {"dynamic": DYNAMIC},
    "feed-forward": {"dynamic": DYNAMIC},
    "minilm": {"dynamic": DYNAMIC},
    "gpt2-decode": {"int4": {"precision": "int8", "tolerance": 0.7, "int8": {"weights_only": "int4"}}},
}
SAMPLES = 8
ROUNDS = 15
THREADS = torch.get_num_threads()


def build_model(name: str) -> zoo.Built:
    """A model of the zoo, or "feed-forward": four blocks with norms of BERT-base's size, of 128 tokens."""
    if name != "feed-forward":
        return zoo.build(name)
    torch.manual_seed(0)
    blocks = [(nn.LayerNorm(768), nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)) for _ in range(4)]
    return nn.Sequential(*[layer for block in blocks for layer in block]).eval(), (torch.randn(1, 128, 768),)


def samples(inputs: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    """Noise like the example inputs."""
    generator = torch.Generator().manual_seed(7)

    def like(x: torch.Tensor) -> torch.Tensor:
        if x.is_floating_point():
            return torch.randn(x.shape, generator=generator)
        return torch.randint(0, int(x.max()) + 1, x.shape, generator=generator, dtype=x.dtype)

    return [tuple(like(x) for x in inputs) for _ in range(SAMPLES)]


class Feeds:
    """The samples as ONNX Runtime's calibration reads them."""

    def __init__(self, names: Sequence[str], given: Sequence[tuple[torch.Tensor, ...]]) -> None:
        self.left: Iterator[dict[str, np.ndarray[Any, Any]]] = iter(
            [{n: x.numpy() for n, x in zip(names, tensors, strict=True)} for tensors in given]
        )

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """The next set of inputs, None at the end."""
        return next(self.left, None)


def prepare(name: str, work: Path, peers: bool) -> None:
    """Leave both builds of ours in `work`, and for `peers` the quantised ONNX file."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quant_pre_process, quantize_static

    model, inputs = build_model(name)
    given = samples(inputs)
    for build, options in (BUILDS | MORE.get(name, {})).items():
        calibration = {"calibration": given} if "precision" in options and options is not DYNAMIC else {}
        compiled = graphwright.compile(model, inputs, threads=THREADS, **calibration, **options)
        compiled.save(work / f"{name}-{build}.gw")
        (work / f"{name}-{build}.txt").write_text(compiled.report().text())
    if not peers:
        return
    plain = work / f"{name}.onnx"
    onnxruntime(model, inputs, THREADS, plain)
    names = [i.name for i in onnx.load(plain, load_external_data=False).graph.input]
    ready = work / f"{name}-ready.onnx"
    quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready),
        str(work / f"{name}-int8.onnx"),
        Feeds(names, given),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def measure(name: str, work: Path) -> dict[str, Any]:
    """One row."""
    model, inputs = build_model(name)
    files = {build: work / f"{name}-{build}.gw" for build in (BUILDS | MORE.get(name, {}))}
    ours = {build: graphwright.load(file, threads=THREADS) for build, file in files.items() if file.exists()}
    with torch.no_grad():
        exact = first(model(*inputs))

    def run(build: str) -> Runner:
        args, kwargs = ours[build].arguments(list(inputs))
        return lambda: ours[build](*args, **kwargs)

    file = work / f"{name}-int8.onnx"  # stands at its place already: nothing is exported again
    runners: dict[str, Runner] = {build: run(build) for build in ours}
    if file.exists():
        runners["onnxruntime int8"] = onnxruntime(model, inputs, THREADS, file)
        runners["openvino int8"] = openvino(model, inputs, THREADS, file)
    errors = {n: float((first(r()) - exact).norm() / exact.norm()) for n, r in runners.items()}
    reports = {p: c.report() for p, c in ours.items()}
    parameters = sum(p.numel() * 4 for p in {*model.parameters(), *model.buffers()})
    return {
        "model": name,
        "threads": THREADS,
        "milliseconds": interleave(runners, ROUNDS),
        "relative_l2": errors,
        "weights_bytes": {p: r.weights_bytes for p, r in reports.items()},
        "parameters_bytes": parameters,
        "products_in_int8": sum(c.dtype == "int8" for c in reports["int8"].precisions),
        "products": sum("linear" in c.operator or "conv2d" in c.operator for c in reports["int8"].precisions),
    }


def first(results: Any) -> torch.Tensor:
    """The first tensor of a result."""
    return torch.as_tensor(next(x for x in pytree.tree_leaves(results) if not isinstance(x, (int, float, type(None)))))


def main() -> None:
    """Run the command line."""
    command, work, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if command in ("prepare", "ours"):
        work.mkdir(parents=True, exist_ok=True)
        for name in names:
            started = time.perf_counter()
            prepare(name, work, peers=command == "prepare")
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    else:
        print(json.dumps([measure(name, work) for name in names], indent=1))


if __name__ == "__main__":
    main()
