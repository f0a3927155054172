"""What the records say to LLVM: names it knows, features it agrees with, and no instruction that is masked."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from graphwright import hwdb
from graphwright.hwdb import isa
from graphwright.hwdb.loader import database


@pytest.fixture(scope="module")
def codegen():
    return pytest.importorskip("tvm.target.codegen")


def llvm_features(codegen, triple: str, cpu: str, attributes: list[str] = ()) -> set[str]:
    from tvm.target import Target

    return set(
        codegen.llvm_get_cpu_features(Target({"kind": "llvm", "mtriple": triple, "mcpu": cpu, "mattr": attributes}))
    )


def test_llvm_knows_every_cpu_and_agrees_on_features(codegen):
    for id, record in database().records.items():
        hw = hwdb.lookup(id)
        if record.kind != "architecture" or hw.kind != "cpu":
            continue
        assert codegen.llvm_is_valid_cpu(hw.llvm_cpu, hw.triple), id
        llvm = llvm_features(codegen, hw.triple, hw.llvm_cpu) & set(isa.FLAGS[hw.isa])
        assert hw.features == llvm, id


def test_llvm_knows_every_gpu_processor_and_tvm_takes_the_target(codegen):
    from tvm.target import Target

    for id in hwdb.names():
        hw = hwdb.lookup(id)
        if hw.kind != "gpu" or hw.isa == "none":
            continue
        if hw.isa in ("nvptx", "amdgcn"):
            assert codegen.llvm_is_valid_cpu(hw.llvm_cpu, hw.triple), id
        assert Target(hw.tvm_target()).attrs["thread_warp_size"] == hw.warp_threads, id


def test_the_attributes_leave_exactly_the_features(codegen):
    for name in ("native", "raspberry-pi-4", "zen4", "x86-64"):
        hw = hwdb.lookup(name)
        target = hw.tvm_target()
        left = llvm_features(codegen, target["mtriple"], target["mcpu"], target["mattr"])
        assert left & set(isa.FLAGS[hw.isa]) == hw.features


ASSEMBLY = """
import json, sys
import tvm
from tvm import te
from graphwright import hwdb

a = te.placeholder((4096,), name="a")
b = te.compute((4096,), lambda i: a[i] * a[i] + tvm.tirx.const(1, "float32"), name="b")
schedule = tvm.s_tir.Schedule(te.create_prim_func([a, b]))
outer, inner = schedule.split(schedule.get_loops(schedule.get_sblock("b"))[0], [None, 16])
schedule.vectorize(inner)
for name in sys.argv[1:]:
    module = tvm.compile(schedule.mod, target=tvm.target.Target(hwdb.lookup(name).tvm_target()))
    print("ASM", json.dumps([name, module.mod.inspect_source("asm")]))
"""


def test_the_machine_code_uses_the_registers_the_record_says(codegen):
    """In a process of its own, since LLVM ends the process when it dislikes a target."""
    out = subprocess.run(
        [sys.executable, "-c", ASSEMBLY, "native", "zen4", "x86-64-v3", "x86-64-v2", "cortex-a72"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    code = dict(json.loads(line[4:]) for line in out.splitlines() if line.startswith("ASM "))
    registers = {name: set(re.findall(r"\b[xyz]mm", text)) for name, text in code.items()}
    assert "zmm" in registers["zen4"]
    assert "zmm" not in registers["x86-64-v3"]
    assert "ymm" in registers["x86-64-v3"]
    assert registers["x86-64-v2"] == {"xmm"}
    assert "fmla" in code["cortex-a72"]
    if hwdb.detect().vector_bits < 512:
        assert "zmm" not in registers["native"]
