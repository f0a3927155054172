"""What the tests of the narrow kernels share: running one here or on the emulated processor, and reading its code."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm
from kernel_harness import compile_kernel

from graphwright.backends.aot.codegen import compile_object
from graphwright.backends.kernels.dot_product import Dot, int8_dot
from graphwright.backends.kernels.int8_product import RANGES, Requantize
from graphwright.hwdb import Hardware, detect
from graphwright.passes import dialect

TORCH = {"uint8": torch.uint8, "int8": torch.int8, "float32": torch.float32}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Reproducible noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(dtype: str, *shape: int, seed: int = 0) -> torch.Tensor:
    low, high = RANGES[dtype]
    values = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))
    # The extremes, where an instruction that saturates would show it.
    values.view(-1)[:: max(2, values.numel() // 7)] = high
    return values.to(TORCH[dtype])


def byte_machine(kind: str) -> tuple[Hardware, Dot]:
    """This machine and its dot product of bytes, "emulated", on vectors of "512" bits, or Arm's "pairs"."""
    hw = detect()
    if kind == "pairs":
        return hw, int8_dot(replace(hw, isa="aarch64", features=frozenset()))
    if kind == "512":
        hw = replace(hw, vector_bits=512, vector_registers=32)
    return hw, int8_dot(hw, emulated=kind != "own")


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None) -> torch.Tensor:
    """a * b + c rounded once: the product is exact in float64."""
    product = a.double() * b.double()
    return (product if c is None else product + c.double()).float()


def requantized(
    sums: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, how: Requantize
) -> torch.Tensor:
    """The reference, in the order of operations that int8_product.py states."""
    addend = bias
    if residual is not None:
        assert how.residual is not None
        if how.residual.dtype == "float32":
            addend = residual if addend is None else addend + residual
        else:
            steps = (residual.int() - how.residual.zero).float()
            addend = fma(steps, torch.tensor(how.residual.scale), addend)
    y = fma(sums.float(), scale, addend)
    y = dialect.ACTIVATIONS[how.activation](y, list(how.args))
    if how.result == "float32":
        return y
    low, high = RANGES[how.result]
    y = (y * torch.tensor(how.inverse)).clamp(low - how.zero, high - how.zero).round()
    return (y.int() + how.zero).to(TORCH[how.result])


def run(func: Any, hw: Hardware, *tensors: torch.Tensor) -> None:
    """Compile and run here; bfloat16 tensors are passed as their bits."""
    compile_kernel(func, hw)["main"](*[tvm.runtime.from_dlpack(bits(t)) for t in tensors])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """bfloat16 seen as the integers that kernels take; other tensors as they are."""
    return tensor.view(torch.int16).view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor


def run_emulated(func: Any, hw: Hardware, work: Path, *tensors: torch.Tensor) -> None:
    """Compile for another machine and run on the emulated processor; skips where the emulator is not installed."""
    try:
        importlib.import_module("bochscpu")
    except ImportError as error:
        pytest.skip(f"the emulator is not there: {error}")
    from emulator import call

    content = compile_object({"kernel": func}, hw.tvm_target())
    plain = [t.view(torch.int16) if t.element_size() == 2 else t for t in tensors]
    assert call([content], "kernel", plain, work) == 0


def one_core(hw: Hardware) -> Hardware:
    """The machine with a single core: the emulator runs tasks one after another."""
    return replace(hw, cores=1)


@dataclass(frozen=True)
class Loop:
    """An innermost loop of machine code."""

    count: int  # of the instruction looked for
    spills: int  # vector instructions that touch the stack
    text: str


def loops_with(func: Any, hw: Hardware, instruction: str) -> list[Loop]:
    """The innermost loops that hold `instruction` in the code compiled for `hw`."""
    lines = compile_kernel(func, hw).mod.inspect_source("asm").splitlines()
    starts: dict[str, int] = {}
    found = []
    for i, line in enumerate(lines):
        if label := re.match(r"(\.L\w+):", line):
            starts[label.group(1)] = i
        jump = re.match(r"\tj\w+\s+(\.L\w+)", line)
        if not jump or jump.group(1) not in starts:
            continue
        body = lines[starts[jump.group(1)] : i + 1]
        if any(re.match(r"\.LBB\w+:", inner) for inner in body[1:]):
            continue
        count = sum(f"\t{instruction}\t" in inner for inner in body)
        spills = sum("(%rsp" in inner and re.search(r"[xyz]mm\d", inner) is not None for inner in body)
        if count:
            found.append(Loop(count, spills, "\n".join(body)))
    return found
