"""Machine code for AMD's GPUs, as its text and its notes say: tiles in shared memory, spills. No GPU is needed."""

from __future__ import annotations

import dataclasses
import re
import subprocess

import pytest
import torch
from torch import nn

import graphwright
from graphwright.backends.gpu import evidence, instructions
from graphwright.backends.gpu.launches import Description


class _Attended(nn.Module):
    """Products whose weights are 16 bits, and attention whose queries lie where keys come."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = self.inner(x).reshape(2, 48, 3, 4, 16).permute(2, 0, 3, 1, 4).unbind(0)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.outer(attended.transpose(1, 2).reshape(2, 48, 64))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("target", ["gfx942", "gfx1100", "gfx1201"])
def test_tiles_are_written_to_shared_memory_on_amd(target, precision, tmp_path):
    """And nothing to memory before the last barrier: a pointer of the wrong address space points anywhere. Barriers do
    not wait for what is on its way to shared memory: waits do."""
    tool = instructions.amd_disassembler()
    if tool is None:
        pytest.skip("no disassembler: a package llvm")
    compiled = graphwright.compile(
        _Attended().eval(), (torch.randn(2, 48, 64),), target=target, precision=precision, cache=False, tolerance=1.0
    )
    folder = compiled.save(tmp_path / "out")
    described = Description.read(folder / "device.json")
    command = [str(tool), "-d", "--no-show-raw-insn", str(folder / described.image)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^[0-9a-f]+ <(\w+)>:", text, flags=re.MULTILINE)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    shared = [launch.name for launch in described.kernels if launch.shared_bytes]
    assert len(shared) >= 3
    for name in shared:
        waiting = bodies[name][: bodies[name].rindex("s_barrier")]
        assert re.search(r"\bds_(write|store)", waiting), name
        assert re.search(r"\bds_(read|load)", bodies[name]), name
        assert not re.search(r"\b(global|flat)_store", waiting), name
        *steps, _ = re.split(r"\bs_barrier(?:_signal)?\b.*\n", bodies[name])
        for step in steps:
            *before, last = re.split(r"\bds_(?:read|write|load|store)", step)  # not shuffles, which go past memory
            assert not before or re.search(r"lgkmcnt\(0\)|s_wait(_\w+)?_dscnt 0x0", last), name


@pytest.mark.parametrize("target", ["gfx90a", "gfx1100"])
def test_short_sums_are_not_unrolled_over_their_tiles_for_amd(target, tmp_path):
    """Nine tiles of a sum: LLVM made 865 loads of them, and 3,156 bytes of spills on gfx90a."""
    conv = nn.Conv2d(34, 4, 2, padding=1).eval()
    few = dataclasses.replace(graphwright.hwdb.lookup(target), cores=2)  # for which the tile is large
    compiled = graphwright.compile(conv, (torch.ones(1, 34, 9, 11),), target=few, cache=False)
    (kernel,) = compiled.report().kernels
    assert "32x64x16 a block" in kernel.choice
    folder = compiled.save(tmp_path / "out")
    described = Description.read(folder / "device.json")
    (found,) = evidence.evidence(
        (folder / described.image).read_bytes(), described.kernels, graphwright.hwdb.lookup(target)
    ).values()
    assert found.spilled == 0
    assert found.registers < 240


def spilled(model, inputs, target, precision, folder):
    """Bytes a thread by the kernels' algorithms."""
    compiled = graphwright.compile(model.eval(), inputs, target=target, precision=precision, cache=False, tolerance=1.0)
    described = Description.read(compiled.save(folder) / "device.json")
    found = evidence.evidence(
        (folder / described.image).read_bytes(), described.kernels, graphwright.hwdb.lookup(target)
    )
    return {kernel.algorithm: found[f"{kernel.name}_kernel"].spilled for kernel in compiled.report().kernels}


@pytest.mark.parametrize("target", ["gfx1100", "gfx1201"])
def test_a_sum_of_one_turn_does_not_spill_behind_the_condition_of_its_stores(target, tmp_path):
    """Unrolled as a whole it had 256 registers, and 76 bytes of spills."""
    model = nn.Linear(32, 16)
    assert spilled(model, (torch.ones(32, 32),), target, "fp32", tmp_path / "out") == {"tiled product": 0}


class _Heads(nn.Module):
    def forward(self, q, k):
        return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("depth", [40, 88, 96])
def test_attention_with_heads_in_groups_does_not_spill_on_rdna_3(depth, precision, tmp_path):
    q, k = torch.randn(1, 4, 200, depth), torch.randn(1, 2, 200, depth)
    found = spilled(_Heads(), (q, k), "gfx1100", precision, tmp_path / "out")
    narrow = {"fp32": "", "fp16": "float16 ", "bf16": "bfloat16 "}[precision] if depth <= 88 else ""
    assert found == {f"{narrow}online attention": 0}
