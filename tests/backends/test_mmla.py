"""Products by smmla and usmmla: bit for bit the integer reference under QEMU, and the code of their inner loop."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

import pytest
import torch
from boards import run_kernel_on
from kernel_harness import compile_kernel
from narrow_harness import TORCH, integers, requantized

from graphwright.backends.kernels.conv_plan import Conv
from graphwright.backends.kernels.dot_conv import choose_dot_conv
from graphwright.backends.kernels.dot_product import int8_dot
from graphwright.backends.kernels.int8_product import Requantize, Residual, int8_conv, offsets, pack_conv
from graphwright.backends.kernels.mmla import choose_mmla, mmla_conv, mmla_dot, pack_mmla
from graphwright.hwdb import lookup
from graphwright.passes import dialect

PRODUCTS = [
    Conv(1, 1, 37, 70, 45, (1, 1)),  # rows, depth and columns that are no multiples of anything
    Conv(1, 1, 4, 8, 8, (1, 1)),
    Conv(1, 1, 9, 3, 2, (1, 1)),
    Conv(2, 9, 11, 20, 40, (3, 3), padding=(1, 1, 1, 1)),
    Conv(1, 12, 13, 3, 24, (7, 7), (2, 2), (3, 2, 3, 2)),
    Conv(1, 8, 9, 16, 12, (1, 1), (2, 2)),
    Conv(1, 9, 10, 17, 9, (3, 2), (1, 1), (2, 0, 1, 2), (1, 2)),
]


@pytest.mark.parametrize("source", ["int8", "uint8"])
@pytest.mark.parametrize("conv", PRODUCTS, ids=lambda conv: f"{conv.kernel}-{conv.channels}-{conv.filters}")
def test_bit_for_bit(conv: Conv, source: str, tmp_path: Path) -> None:
    hw, zero = lookup("neoverse-n2"), 7 if source == "int8" else 131
    dot = mmla_dot(hw, source)
    assert dot is not None
    x, w = integers(source, *conv.input_shape), integers("int8", conv.filters, conv.channels, *conv.kernel, seed=1)
    scale, bias = torch.linspace(1e-4, 1e-3, conv.filters), torch.linspace(-2, 2, conv.filters)
    added = integers("uint8", *conv.output_shape, seed=3)
    residual = Residual("uint8", 0.037, 5)
    how = Requantize(prod(conv.output_shape[:3]), conv.filters, "uint8", 100, 5.0, True, residual, "relu",
                     output_shape=conv.output_shape)  # fmt: skip
    plan = choose_mmla(conv, hw)
    out = torch.zeros(conv.output_shape, dtype=torch.uint8)
    func = mmla_conv(conv, source, dot, plan, how, fill=zero)
    run_kernel_on(
        func, hw, "max", tmp_path, x, pack_mmla(w, plan), offsets(w, zero, source, dot), scale, bias, added, out
    )
    sizes = (list(conv.stride), list(conv.padding), list(conv.dilation), 1)
    exact = dialect.conv2d((x.int() - zero).double(), w.double(), None, None, *sizes, "none", [], "NHWC")
    assert torch.equal(out, requantized(exact.to(torch.int32), scale, bias, added, how))
    assert TORCH["uint8"] == out.dtype


@pytest.mark.parametrize(("source", "instruction"), [("int8", "smmla"), ("uint8", "usmmla")])
def test_its_inner_loop(source: str, instruction: str) -> None:
    """Two loads serve four instructions or so, nothing is moved between them, and nothing spilled."""
    hw, conv = lookup("neoverse-n2"), Conv(1, 1, 196, 256, 256, (1, 1))
    dot = mmla_dot(hw, source)
    assert dot is not None
    how = Requantize(196, 256, "int8")
    text = compile_kernel(mmla_conv(conv, source, dot, choose_mmla(conv, hw), how), hw).mod.inspect_source("asm")
    blocks = re.split(r"^(\.L\w+):.*$", text, flags=re.M)
    loops = [
        re.findall(r"^\t([a-z].*)$", body[: end.end()], re.M)
        for label, body in zip(blocks[1::2], blocks[2::2], strict=True)
        if (end := re.search(rf"^\tb\.\w+\t{re.escape(label)}$", body, re.M)) and f"\t{instruction}\t" in body
    ]
    inner = max(loops, key=lambda lines: sum(line.startswith(instruction) for line in lines))
    products = sum(line.startswith(instruction) for line in inner)
    assert products >= 24
    assert len(inner) <= 1.75 * products, inner
    assert not [line for line in inner if "[sp" in line or line.startswith(("mov\tv", "zip", "ext"))]


LONG = [conv for conv in PRODUCTS if conv.dilation == (1, 1)][:5]


@pytest.mark.parametrize("source", ["int8", "uint8"])
@pytest.mark.parametrize("conv", LONG, ids=lambda conv: f"{conv.kernel}-{conv.channels}-{conv.filters}")
def test_pairs_of_bytes_on_cores_without_dot_products(conv: Conv, source: str, tmp_path: Path) -> None:
    """smull and sadalp, on the core that QEMU lets have nothing newer."""
    hw, zero = lookup("raspberry-pi-4b"), 7 if source == "int8" else 131
    dot = int8_dot(hw)
    assert dot.name == "smull and sadalp"
    x, w = integers(source, *conv.input_shape), integers("int8", conv.filters, conv.channels, *conv.kernel, seed=1)
    w.clamp_(min=-127)
    scale = torch.linspace(1e-4, 1e-3, conv.filters)
    how = Requantize(prod(conv.output_shape[:3]), conv.filters, "uint8", 100, 5.0, output_shape=conv.output_shape)
    plan = choose_dot_conv(conv, dot, hw)
    out = torch.zeros(conv.output_shape, dtype=torch.uint8)
    func = int8_conv(conv, hw, source, how, dot=dot, zero=zero, plan=plan)
    run_kernel_on(
        func, hw, "cortex-a72", tmp_path, x, pack_conv(w, dot, plan), offsets(w, zero, source, dot), scale, out
    )
    sizes = (list(conv.stride), list(conv.padding), list(conv.dilation), 1)
    exact = dialect.conv2d((x.int() - zero).double(), w.double(), None, None, *sizes, "none", [], "NHWC")
    assert torch.equal(out, requantized(exact.to(torch.int32), scale, None, None, how))


def test_only_where_there_are_such_instructions() -> None:
    assert mmla_dot(lookup("raspberry-pi-5"), "int8") is None
    assert mmla_dot(lookup("znver4"), "uint8") is None
