"""Operators of every family, of random shapes, as machine code for sm_80 and gfx90a: ours all work, no limit is passed.

Where a rule of TVM's fails (a convolution of four filters over twelve pixels is one), the next takes its place.

The code is generated, not run: numbers are tests/cuda_on_cpu's part. One build holds all the operators of a draw,
because starting a compiler costs more than compiling.
"""

from __future__ import annotations

import logging
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphwright
from graphwright.backends.gpu.launches import Description

EXTENTS = (1, 2, 3, 7, 13, 16, 17, 31, 48, 64, 67)


class Families(nn.Module):
    """One operator of each family on tensors of its own; the results are a tuple."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.draw = draw
        a, b, c, d = (draw.choice(EXTENTS) for _ in range(4))
        kernel, stride = draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 3))
        groups = draw.choice((1, 2))
        self.sizes = (a, b, c, d)
        self.linear = nn.Linear(c, d, bias=draw.random() < 0.5)
        self.conv = nn.Conv2d(2 * a, 2 * b, kernel, stride, padding=draw.choice((0, kernel // 2)), groups=groups)
        self.depthwise = nn.Conv2d(2 * a, 2 * a, 3, stride, padding=1, groups=2 * a)
        self.norm = nn.LayerNorm(c)
        self.causal = draw.random() < 0.5

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """x [a, b, c], an image [1, 2a, 9, 11], y to broadcast with x, queries and keys in groups."""
        a, b, c, d = self.sizes
        broadcast = tuple(self.draw.choice((1, extent)) for extent in (a, b, c))
        heads = 2 * a
        return (
            torch.randn(a, b, c),
            torch.randn(1, 2 * a, 9, 11),
            torch.randn(broadcast),
            torch.randn(1, heads, b, c),
            torch.randn(1, a, d, c),
            torch.randn(a, c, d),
        )

    def forward(self, x, image, y, queries, keys, right):
        attended = F.scaled_dot_product_attention(
            queries, keys, keys, is_causal=self.causal and queries.shape[2] == keys.shape[2], enable_gqa=True
        )
        return (
            F.gelu(self.linear(x)),
            F.relu(self.conv(image)),
            self.depthwise(image),
            x @ right,
            self.norm(x),
            torch.softmax(x, 1),
            torch.softmax(x * y, -1) - y.exp(),
            x.sum(0) + x.amax(1, keepdim=True),
            x.mean(),
            F.max_pool2d(image, 3, 2, 1),
            F.adaptive_avg_pool2d(image, (2, 3)),
            torch.cat([x, y.expand_as(x)], -1).transpose(0, 2),
            x[:, torch.arange(x.shape[1]).flip(0)],
            torch.sort(x, dim=-1).values.cumsum(1),
            attended,
        )


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "gfx90a"])
@pytest.mark.parametrize("seed", range(4))
def test_operators_of_random_shapes_become_machine_code_within_the_limits(seed, target, caplog, tmp_path):
    torch.manual_seed(seed)
    model = Families(random.Random(seed)).eval()
    with caplog.at_level(logging.WARNING, logger="graphwright.backends.gpu"):
        compiled = graphwright.compile(model, model.inputs(), target=target, cache=False)
    failures = [record.getMessage() for record in caplog.records if "cannot be lowered" in record.getMessage()]
    assert not failures
    compiled.save(tmp_path / "out")
    hw = graphwright.hwdb.lookup(target)
    for launch in Description.read(tmp_path / "out" / "device.json").kernels:
        assert launch.threads <= (1024 if target == "sm_80" else 256), launch
        assert launch.shared_bytes <= 48 << 10, launch
        assert launch.threads % 32 == 0 or launch.threads < hw.warp_threads, launch
