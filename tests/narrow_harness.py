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
from graphwright.hwdb import Hardware


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    """Reproducible noise."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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
