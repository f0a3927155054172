"""Bundles run on a software model of their processor: QEMU's user mode, where `-cpu` checks the instruction set.

run(bundle, "cortex-a72", "--input", "x.npy")      # what the program printed; skips the test where QEMU is missing
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphwright.backends.aot import toolchain
from graphwright.backends.aot.codegen import compile_object
from graphwright.hwdb import Hardware

EMULATORS = {"aarch64": "qemu-aarch64-static", "armv7": "qemu-arm-static"}
# Where these packages of Debian put a glibc for programs that are not static.
PACKAGES = {"aarch64": "libc6-arm64-cross", "armv7": "libc6-armhf-cross"}
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


KERNEL_CALLER = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef int (*task_function)(int, void *, void *);
static int launch(task_function f, void *data, int tasks) {
    struct { void *sync; int32_t count; } environment = { 0, tasks ? tasks : 1 };
    for (int i = 0; i < environment.count; ++i) { int failed = f(i, &environment, data); if (failed) return failed; }
    return 0;
}
static void *take(int a, int b, uint64_t bytes, int c, int d) {
    void *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    memset(p, 0x5A, bytes);
    return p;
}
static int give(int a, int b, void *p) { free(p); return 0; }
void gw_extent(int32_t iterations) {}
int (*__TVMBackendParallelLaunch)(task_function, void *, int) = launch;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = take;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = give;
int kernel(PARAMETERS);
int main(int argc, char **argv) {
    static const size_t sizes[] = { SIZES };
    void *at[COUNT];
    FILE *file = fopen(argv[1], "r+b");
    for (int i = 0; i < COUNT; i++) {
        at[i] = aligned_alloc(64, (sizes[i] + 127) / 64 * 64);
        if (fread(at[i], 1, sizes[i], file) != sizes[i]) return 2;
    }
    int failed = kernel(ARGUMENTS);
    rewind(file);
    for (int i = 0; i < COUNT; i++) fwrite(at[i], 1, sizes[i], file);
    return fclose(file) || failed;
}
"""


def run_kernel_on(func: Any, hw: Hardware, cpu: str, work: Path, *tensors: torch.Tensor) -> None:
    """Compile a kernel for the 64-bit Arm machine `hw` and run it on `cpu`, its tasks one after another; tensors are
    changed in place. Scratch memory is filled with noise first."""
    (work / "kernel.o").write_bytes(compile_object({"kernel": func}, hw.tvm_target()))
    count = len(tensors)
    text = KERNEL_CALLER.replace("PARAMETERS", ", ".join(["void *"] * count)).replace("COUNT", str(count))
    text = text.replace("SIZES", ", ".join(str(t.numel() * t.element_size()) for t in tensors))
    (work / "caller.c").write_text(text.replace("ARGUMENTS", ", ".join(f"at[{i}]" for i in range(count))))
    target = ("cc", "-target", "aarch64-linux-musl")
    toolchain.zig(*target, "-O2", "-c", str(work / "caller.c"), "-o", str(work / "caller.o"))
    made = [str(work / name) for name in ("caller.o", "kernel.o")]
    toolchain.zig(*target, "-static", "-s", *made, "-o", str(work / "caller"))  # as a bundle's, whose musl is there
    flat = [t.reshape(-1).view(torch.uint8) for t in tensors]
    (work / "tensors").write_bytes(b"".join(t.numpy().tobytes() for t in flat))
    command = [emulator("aarch64"), "-cpu", cpu, str(work / "caller"), str(work / "tensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr)
    content = (work / "tensors").read_bytes()
    for tensor in flat:
        tensor.copy_(torch.frombuffer(bytearray(content[: tensor.numel()]), dtype=torch.uint8))
        content = content[tensor.numel() :]
