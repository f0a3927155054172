"""Arithmetic of float16 on cores that have it: its errors, its code, and where it is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boards import call
from kernel_harness import inner_loops
from torch import nn

import graphwright
from graphwright.backends.aot import codegen
from graphwright.backends.kernels.bf16_matmul import FloatFinish, bf16_matmul
from graphwright.backends.kernels.dot_product import choose_dot_tiling, f16_dot
from graphwright.hwdb import lookup
from graphwright.passes import dialect_half

HALF = re.compile(r"\b(fadd|fsub|fmul|fmla|fmls|fmax|fmin|fdiv)\s+v\d+\.[48]h")
BY_ELEMENT = re.compile(r"\bfmla\s+v\d+\.8h, v\d+\.8h, v\d+\.h\[\d\]")


class Mixed(nn.Module):
    """A stem, a pointwise and a strided convolution, and a product: 64 to 1152 terms; one result of few columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(9, 32, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.ReLU(),
            nn.Conv2d(64, 96, 3, stride=2, padding=(1, 0)), nn.GELU(), nn.Flatten(), nn.Linear(96 * 12, 70), nn.ReLU(),
            nn.Linear(70, 5),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


def compiled_for(target: str, patch: pytest.MonkeyPatch) -> tuple[Any, torch.Tensor, list[str]]:
    """The model in fp16, its input, and the assembly text of its kernels."""
    texts: list[str] = []
    emit = codegen._emit

    def noting(module: Any, machine: Any) -> bytes:
        import tvm

        texts.append(tvm.get_global_func("target.build.llvm")(module, machine).inspect_source("asm"))
        return emit(module, machine)

    patch.setattr(codegen, "_emit", noting)
    x = torch.randn(1, 9, 16, 16, generator=torch.Generator().manual_seed(1))
    return graphwright.compile(Mixed().eval(), x, target=target, precision="fp16", cache=False), x, texts


def test_a_core_with_half_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, x, texts = compiled_for("raspberry-pi-5", monkeypatch)
    algorithms = [k.algorithm for k in compiled.report().kernels if k.choice.startswith("fmla of halves")]
    assert algorithms == ["f16 conv", "f16 matmul", "f16 conv", "f16 matmul"]
    assert sum(bool(BY_ELEMENT.search(text)) for text in texts) >= 4
    choices = compiled.report().precisions
    assert {c.form for c in choices if c.dtype == "float16"} == {"float16 sums"}
    assert "too narrow" in choices[-1].reason
    (name,) = (spec.name for spec in compiled.inputs)
    (found,) = call(compiled.bundle(tmp_path / "out", executable=True), "cortex-a76", {name: x}, tmp_path)
    with torch.no_grad():
        exact = Mixed().eval().double()(x.double()).numpy()
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    # Four layers that err by 9e-4 each, one after the other; float32 would err by 1e-7 and not pass the lower bound.
    assert 2e-4 < error < 2e-3


def test_a_core_without_it_refuses_and_has_no_such_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, _, texts = compiled_for("raspberry-pi-4b", monkeypatch)
    choices = [c for c in compiled.report().precisions if c.operator in ("graphwright.conv2d", "graphwright.linear")]
    assert len(choices) == 5
    assert all(c.dtype == "float32" and "no float16 arithmetic on this machine" in c.reason for c in choices)
    assert texts
    assert not any(HALF.search(text) for text in texts)


def test_its_inner_loop_multiplies_by_element_and_spills_nothing() -> None:
    hw = lookup("raspberry-pi-5")
    dot = f16_dot(hw, dialect_half.BLOCK)
    assert dot is not None
    assert f16_dot(lookup("raspberry-pi-4b"), dialect_half.BLOCK) is None
    tiling = choose_dot_tiling(hw, dot, 196, 256, 256)
    func = bf16_matmul(196, 256, 256, hw, FloatFinish(196, 256, True), dot=dot, tiling=tiling)
    loop = max(inner_loops(func, hw), key=lambda loop: loop.multiply_adds)
    assert loop.stack == 0
    assert len(BY_ELEMENT.findall(loop.text)) == loop.multiply_adds >= 64
    assert len(re.findall(r"^\t[a-z]", loop.text, re.M)) <= 1.25 * loop.multiply_adds


def exactly(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Every sum of halves rounded, as `fmla` does: the sum of a product and a half is exact in float64."""
    x, w, total = x.half().double(), w.half().double(), torch.zeros(len(x), len(w))
    for start in range(0, x.shape[1], dialect_half.BLOCK):
        acc = torch.zeros(len(x), len(w), dtype=torch.float16)
        for k in range(start, min(start + dialect_half.BLOCK, x.shape[1])):
            acc = (acc.double() + x[:, k, None] * w[:, k]).half()
        total += acc.float()
    return total


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("depth", [7, 32, 100, 576])
def test_the_modelled_error_is_of_the_size_of_the_real_one(depth: int, positive: bool) -> None:
    generator = torch.Generator().manual_seed(depth)
    x, w = torch.randn(40, depth, generator=generator), torch.randn(50, depth, generator=generator).half().float()
    x = x.abs() if positive else x
    exact = x.double() @ w.double().t()
    real, modelled = (float((y - exact).norm() / exact.norm()) for y in (exactly(x, w), dialect_half.half_sums(x, w)))
    assert 0.6 * real < modelled < 1.7 * real
    assert real < 1.2e-3


def test_a_sum_beyond_the_range_is_infinite() -> None:
    x, w = torch.full((1, 40), 300.0), torch.full((1, 40), 300.0)
    assert dialect_half.half_sums(x, w).isinf().all()
    assert exactly(x, w).isinf().all()
