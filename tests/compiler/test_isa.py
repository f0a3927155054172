"""The code of a whole model stays within the instruction set of its target, and uses all of its vector width."""

from __future__ import annotations

import re
from typing import Any

import pytest

import graphwright
from graphwright.backends.aot import codegen
from graphwright.compiler.benchmarking import zoo

# Instructions of 64-bit Arm that came after its first version: of int8 and float16 arithmetic, of atomics, of SVE.
LATER = r"\b(sdot|udot|usdot|smmla|ummla|bfdot|bfmmla|sqrdmlah|ldadd\w*|swp\w*|cas\w*)\s|\bz\d+\.|"
HALF = r"\b(fadd|fsub|fmul|fmla|fmls|fmax|fmin|fdiv)\s+v\d+\.[48]h"
X86 = r"%[xyz]mm|%r[abcd]x"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "has", "lacks"),
    [
        ("x86-64-v3", "%ymm", "%zmm"),
        ("x86-64-v4", "%zmm", "%tmm"),
        ("x86-64-v2", "%xmm", "%ymm"),
        ("raspberry-pi-4b", r"fmla\s+v\d+\.4s, v\d+\.4s, v\d+\.s\[\d\]", f"{LATER}{HALF}|{X86}"),
        ("raspberry-pi-5", r"fmla\s+v\d+\.4s, v\d+\.4s, v\d+\.s\[\d\]", rf"\bz\d+\.|\b(smmla|bfdot)\s|{X86}"),
    ],
)
@pytest.mark.parametrize("name", ["resnet18", "bert"])
def test_registers(name: str, target: str, has: str, lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emitted: list[str] = []
    emit = codegen._emit

    def record(module: Any, machine: Any) -> bytes:
        import tvm

        emitted.append(tvm.get_global_func("target.build.llvm")(module, machine).inspect_source("asm"))
        return emit(module, machine)

    monkeypatch.setattr(codegen, "_emit", record)
    model, inputs = zoo.build(name, small=True)
    graphwright.compile(model, inputs, target=target, cache=False, verify=False)
    assert any(re.search(has, text) for text in emitted)
    guilty = [found[0] for text in emitted if (found := re.search(lacks, text))]
    assert not guilty, guilty
