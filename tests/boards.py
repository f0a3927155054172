"""Bundles run on a software model of their processor: QEMU's user mode, where `-cpu` checks the instruction set.

run(bundle, "cortex-a72", "--input", "x.npy")      # what the program printed; skips the test where QEMU is missing
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

EMULATORS = {"aarch64": "qemu-aarch64-static", "armv7": "qemu-arm-static"}
# Where Debian's libc6-arm64-cross and libc6-armhf-cross put a glibc for programs that are not static.
ROOTS = {"aarch64": Path("/usr/aarch64-linux-gnu"), "armv7": Path("/usr/arm-linux-gnueabihf")}


class Doubled(nn.Module):
    """Matrices of ones: the result is known by counting."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(64, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.weight) * 2


def emulator(isa: str) -> str:
    """The path of the emulator of `isa`; skips the test where it is not installed."""
    name = EMULATORS[isa]
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed (Debian: apt-get install qemu-user-static)")
    return path


def run(bundle: Path, cpu: str, *arguments: str | Path, program: str = "run") -> subprocess.CompletedProcess[str]:
    """Run the bundle's program on `cpu` (a name of `qemu-aarch64-static -cpu help`)."""
    isa = json.loads((bundle / "manifest.json").read_text())["target"]["isa"]
    command = [emulator(isa), "-cpu", cpu, str(bundle / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def call(bundle: Path, cpu: str, inputs: dict[str, torch.Tensor], work: Path, *more: str) -> list[np.ndarray]:
    """The results for `inputs` by name, through .npy files in `work`."""
    arguments: list[str] = []
    for name, tensor in inputs.items():
        np.save(work / f"{name}.npy", tensor.numpy())
        arguments += ["--input", f"{name}={work / name}.npy"]
    described = run(bundle, cpu, "--describe").stdout
    count = sum(line.startswith("output ") for line in described.splitlines())
    files = [work / f"result{i}.npy" for i in range(count)]
    done = run(bundle, cpu, *arguments, *(a for f in files for a in ("--output", str(f))), *more)
    assert done.returncode == 0, done.stderr
    return [np.load(file) for file in files]


def assert_like_float64(found: np.ndarray, model: nn.Module, inputs: dict[str, torch.Tensor], rtol: float) -> None:
    """Compare with the model in float64: `rtol` is the relative L2 error."""
    with torch.no_grad():
        wide = [t.double() if t.is_floating_point() else t for t in inputs.values()]
        result = model.double()(*wide)
        model.float()
    expected = result.numpy()
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= rtol * np.linalg.norm(expected)


def refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """The program said why, and left with status 1: it was not killed."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert done.stderr.startswith("run: ") or "\nrun: " in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
