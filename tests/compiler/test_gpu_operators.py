"""Operators of every family, of drawn shapes, as machine code of six architectures: no error, no limit passed.

Where a rule of TVM's fails (a convolution of four filters over twelve pixels is one), the next takes its place; a
kernel of ours may not fail. The code is generated, not run: numbers are tests/cuda_on_cpu's part. One build holds all
the operators of a draw, because starting a compiler costs more than compiling.

    GRAPHWRIGHT_GPU_EXAMPLES=50 pytest tests/compiler/test_gpu_operators.py       other shapes each time, for longer
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import graphwright
from graphwright.backends.gpu.evidence import evidence
from graphwright.backends.gpu.launches import Description

EXAMPLES = int(os.environ.get("GRAPHWRIGHT_GPU_EXAMPLES", "0"))
EXTENTS = (1, 2, 3, 7, 13, 16, 17, 31, 48, 64, 67)
HUGE = 100_003
OURS = (
    "tiled product",
    "tiled conv",
    "tiled pointwise conv",
    "online attention",
    "few queries",
    "sums of parts",
    "few rows",
)


@dataclass(frozen=True)
class Draw:
    """Sizes of the operands, and what the operators are told."""

    sizes: tuple[int, int, int, int]
    kernel: int
    stride: int
    groups: int
    bias: bool
    padded: bool
    causal: bool
    broadcast: tuple[bool, bool, bool]
    precision: str


extents = st.sampled_from(EXTENTS)
draws = st.builds(
    Draw,
    sizes=st.tuples(extents, extents, extents, extents),
    kernel=st.sampled_from((1, 2, 3, 5)),
    stride=st.sampled_from((1, 2, 3)),
    groups=st.sampled_from((1, 2)),
    bias=st.booleans(),
    padded=st.booleans(),
    causal=st.booleans(),
    broadcast=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    precision=st.sampled_from(("fp32", "fp16", "bf16")),
)


class Families(nn.Module):
    """One operator of each family on tensors of its own; the results are a tuple."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw
        a, b, c, d = draw.sizes
        padding = draw.kernel // 2 if draw.padded else 0
        self.linear = nn.Linear(c, d, bias=draw.bias)
        self.conv = nn.Conv2d(2 * a, 2 * b, draw.kernel, draw.stride, padding=padding, groups=draw.groups)
        self.depthwise = nn.Conv2d(2 * a, 2 * a, 3, draw.stride, padding=1, groups=2 * a)
        self.norm = nn.LayerNorm(c)

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """x [a, b, c], an image [1, 2a, 9, 11], y to broadcast with x, queries, keys in groups, c x d, a long line."""
        a, b, c, d = self.draw.sizes
        spread = [1 if one else extent for one, extent in zip(self.draw.broadcast, (a, b, c), strict=True)]
        return (
            torch.randn(a, b, c),
            torch.randn(1, 2 * a, 9, 11),
            torch.randn(spread),
            torch.randn(1, 2 * a, b, c),
            torch.randn(1, a, d, c),
            torch.randn(a, c, d),
            torch.randn(2, HUGE),
        )

    def forward(self, x, image, y, queries, keys, right, line):
        causal = self.draw.causal and queries.shape[2] == keys.shape[2]
        long = keys.repeat(1, 1, 200, 1)
        attended = F.scaled_dot_product_attention(queries, keys, keys, is_causal=causal, enable_gqa=True)
        return (
            F.gelu(self.linear(x)),
            self.linear(x[:1, :1]),
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
            F.scaled_dot_product_attention(queries[:, :, :1], long, long, enable_gqa=True),
            torch.softmax(line * 2 + 1, -1),
        )


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx90a", "gfx942", "gfx1100", "gfx1201"])
def test_operators_of_any_shapes_become_machine_code_within_the_limits(target, caplog, tmp_path_factory):
    hw = graphwright.hwdb.lookup(target)

    @settings(
        max_examples=EXAMPLES or 2,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
        phases=[Phase.generate],  # a smaller example would take minutes
    )
    @given(draws)
    def check(draw: Draw) -> None:
        torch.manual_seed(0)
        model = Families(draw).eval()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="graphwright"):
            compiled = graphwright.compile(
                model, model.inputs(), target=target, precision=draw.precision, tolerance=1.0, cache=False
            )
        failures = [record.getMessage() for record in caplog.records if "cannot be lowered" in record.getMessage()]
        assert not failures
        folder = tmp_path_factory.mktemp(target) / "out"
        compiled.save(folder)
        described = Description.read(folder / "device.json")
        found = evidence((folder / described.image).read_bytes(), described.kernels, hw)
        ours = {row.name for row in compiled.report().kernels if any(name in row.algorithm for name in OURS)}
        for launch in described.kernels:
            assert launch.threads <= (1024 if target.startswith("sm") else 256), launch
            assert launch.shared_bytes <= 48 << 10, launch
            assert launch.threads % 32 == 0 or launch.threads < (hw.warp_threads or 32), launch
            if launch.name.rsplit("_kernel", 1)[0] in ours:
                assert found[launch.name].spilled == 0, (launch, found[launch.name])

    check()
