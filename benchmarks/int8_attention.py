"""Attention with products of bytes against the same in float32: 12 heads of 64, milliseconds of whole calls.

    python benchmarks/int8_attention.py prepare DIR      compiles into DIR
    python benchmarks/int8_attention.py measure DIR      medians of rounds in turns

`predicted` is int8's time over float32's by the cost model (attention_plan.py: BYTES_RATE, BYTES_PACK_CYCLES). Values
are normal noise, so that figures say what the products gain and nothing of a model's accuracy.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch
from torch import nn

import graphwright
from graphwright.compiler.benchmarking.bench import interleave
from graphwright.compiler.compiled import Compiled

TOKENS = (128, 512, 1024, 2048)
HEADS, DEPTH = 12, 64
INT8 = {"activation": "dynamic", "attention": True}


class Attention(nn.Module):
    """Nothing but scaled_dot_product_attention."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Softmax of q . k^T, times v."""
        return nn.functional.scaled_dot_product_attention(q, k, v)


def operands(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of one sequence."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, DEPTH, generator=generator) for _ in range(3))
    return q, k, v


def prepare(work: Path) -> None:
    """Leave both builds of every length in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    for tokens in TOKENS:
        graphwright.compile(Attention(), operands(tokens), cache=False).save(work / f"{tokens}-float32")
        made = graphwright.compile(Attention(), operands(tokens), cache=False, precision="int8", int8=INT8)
        made.save(work / f"{tokens}-int8")


def measure(work: Path) -> None:
    """Print a line for every length."""
    for tokens in TOKENS:
        given = operands(tokens)
        builds = {name: graphwright.load(work / f"{tokens}-{name}") for name in ("float32", "int8")}
        found = interleave({name: partial(build, *given) for name, build in builds.items()})
        wide, narrow = found["float32"], found["int8"]
        share = _predicted(builds["int8"]) / _predicted(builds["float32"])
        print(
            f"{tokens:5} tokens: float32 {wide:.2f} ms, int8 {narrow:.2f} ms, {narrow / wide:.2f} of it, "
            f"predicted {share:.2f}",
            flush=True,
        )


def _predicted(build: Compiled) -> float:
    return sum(kernel.predicted_us or 0.0 for kernel in build.report().kernels)


if __name__ == "__main__":
    {"prepare": prepare, "measure": measure}[sys.argv[1]](Path(sys.argv[2]))
