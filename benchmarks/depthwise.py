"""Depthwise convolutions in 8 bits and in float32: milliseconds of one core, and the two constants of the cost model.

    python benchmarks/depthwise.py --json docs/measurements/depthwise.json

The shapes are those of MobileNetV2 and EfficientNet-B0 with relu6, values in L2 or L3 as they lie in a model. `rate` is
float32's time over that of 8 bits (passes/precision/int8_forms.py: DEPTHWISE_RATE), `efficiency` the share of the
machine's peak of byte products (backends/lowering/kernels_int8.py: DEPTHWISE_EFFICIENCY); the last lines have the
medians by stride.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tvm
from torch import fx

from graphwright.backends.lowering import kernels_conv, kernels_int8  # noqa: F401  (fill KERNELS)
from graphwright.backends.lowering.registry import KERNELS, KernelCall, Packed
from graphwright.hwdb import Hardware, detect
from graphwright.passes import dialect, dialect_int8

# Image, channels, window, stride.
SHAPES = (
    *((112, 32, 3, 1), (112, 96, 3, 2), (56, 144, 3, 1), (56, 144, 3, 2), (28, 192, 3, 1), (28, 192, 3, 2)),
    *((14, 384, 3, 1), (14, 576, 3, 1), (14, 576, 3, 2), (7, 960, 3, 1)),
    *((56, 144, 5, 2), (28, 240, 5, 1), (14, 480, 5, 1), (14, 672, 5, 2), (7, 1152, 5, 1)),
)
ROUNDS = 15


def kernel(op: Any, hw: Hardware, args: Sequence[Any], constants: Sequence[int]) -> tuple[Any, list[Any]]:
    """Machine code of a call of `op`, and its operands; `constants` are places of those that are packed."""
    graph, given = fx.Graph(), dict[fx.Node, torch.Tensor]()
    nodes: list[Any] = []
    for i, value in enumerate(args):
        if not isinstance(value, torch.Tensor):
            nodes.append(value)
            continue
        node = graph.get_attr(f"t{i}") if i in constants else graph.placeholder(f"t{i}")
        node.meta["val"], given[node] = value.to("meta"), value
        nodes.append(node)
    node = graph.call_function(op, tuple(nodes))
    result = op(*args)
    node.meta["val"] = result.to("meta")
    call = KERNELS[op](node, hw)
    assert isinstance(call, KernelCall), call
    module = tvm.IRModule({"main": call.func.with_attr("global_symbol", "main")})
    operands = [o.pack(given[o.constant]) if isinstance(o, Packed) else given[o] for o in call.operands]
    tensors = [tvm.runtime.from_dlpack(t.contiguous()) for t in (*operands, torch.empty_like(result))]
    return tvm.compile(module, target=tvm.target.Target(hw.tvm_target())), tensors


def measure(hw: Hardware, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """One row: both kernels in turns, each the best of ROUNDS."""
    size, channels, window, stride = shape
    pad = [window // 2] * 4
    geometry = ([stride, stride], pad, [1, 1], channels, "relu6", [])
    x = torch.randn(1, size, size, channels)
    weight, bias, scale = torch.randn(channels, 1, window, window), torch.randn(channels), torch.rand(channels) * 1e-3
    stored = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    bytes_ = torch.randint(-127, 128, weight.shape, dtype=torch.int8)
    float32 = kernel(dialect.conv2d, hw, (x, weight, bias, None, *geometry, "NHWC"), (1, 2))
    head = (stored, 0, bytes_, scale, bias, None, 1.0, 0)
    int8 = kernel(dialect_int8.qconv2d, hw, (*head, *geometry, 6 / 255, 0, torch.uint8), (2, 3, 4))
    timers = [compiled.mod.time_evaluator("main", tvm.cpu(), number=10) for compiled, _ in (float32, int8)]
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for timer, (_, tensors), found in zip(timers, (float32, int8), times, strict=True):
            found.append(timer(*tensors).mean)
    wide, narrow = (min(found) for found in times)
    out = (size + 2 * pad[0] - window) // stride + 1
    operations = 2.0 * out * out * channels * window * window
    peak = hw.peak_flops("int8")
    assert peak is not None, f"the clock of {hw.id} is unknown: `graphwright hw calibrate` measures it"
    return {
        "image": size,
        "channels": channels,
        "window": window,
        "stride": stride,
        "float32_us": round(float(wide * 1e6), 2),
        "int8_us": round(float(narrow * 1e6), 2),
        "rate": round(float(wide / narrow), 3),
        "efficiency": round(float(operations / narrow / peak), 3),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where rows are written")
    options = parser.parse_args()
    hw = replace(detect(), cores=1)
    rows = []
    for shape in SHAPES:
        rows.append(measure(hw, shape))
        print(rows[-1], flush=True)
    for stride in (1, 2):
        some = [row for row in rows if row["stride"] == stride]
        medians = {key: statistics.median(row[key] for row in some) for key in ("rate", "efficiency")}
        print(f"stride {stride}: " + ", ".join(f"{key} {value:.2f}" for key, value in medians.items()))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": hw.id, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
