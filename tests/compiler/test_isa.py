"""The code of a whole model stays within the instruction set of its target, and uses all of its vector width."""

from __future__ import annotations

from typing import Any

import pytest

import graphwright
from graphwright.backends.aot import codegen
from graphwright.compiler import zoo


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "has", "lacks"),
    [("x86-64-v3", "%ymm", "%zmm"), ("x86-64-v4", "%zmm", "%tmm"), ("x86-64-v2", "%xmm", "%ymm")],
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
    assert any(has in text for text in emitted)
    guilty = [text for text in emitted if lacks in text]
    assert not guilty, guilty[0][:2000]
