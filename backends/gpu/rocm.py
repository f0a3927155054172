"""What TVM's AMDGPU code generation needs from outside: device-library bitcode, and a linker.

AMD's device libraries hold exp, erf, tanh and their like as LLVM bitcode. They are looked for in HIP_DEVICE_LIB_PATH,
ROCM_PATH and /opt/rocm, where Debian puts them, and in the wheel of triton. A file for the wrong architecture is never
linked: where there is none for this one, kernels have to do without.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import GraphwrightError, ToolMissing

INSTALL = (
    "install ROCm's device libraries (package rocm-device-libs) or the triton wheel, "
    "or set HIP_DEVICE_LIB_PATH to the folder with ocml.bc"
)


def bitcode_folder() -> Path | None:
    """The first of the known places that has ocml.bc, or None."""
    return next((folder for folder in _places() if (folder / "ocml.bc").is_file()), None)


def bitcode(arch: str, wave_threads: int) -> list[Path]:
    """The device libraries to link for `arch` ("gfx942"); none where there are none, or none of this architecture.

    Controls: denormals kept, IEEE square root, NaN and infinity possible, waves of `wave_threads`.
    """
    folder = bitcode_folder()
    if folder is None:
        return []
    names = [
        "ocml",
        "oclc_daz_opt_off",
        "oclc_finite_only_off",
        "oclc_unsafe_math_off",
        "oclc_correctly_rounded_sqrt_on",
        f"oclc_wavefrontsize64_{'on' if wave_threads == 64 else 'off'}",
        f"oclc_isa_version_{arch.removeprefix('gfx')}",
        "oclc_abi_version_500",
    ]
    return [folder / f"{name}.bc" for name in names if (folder / f"{name}.bc").is_file()]


def with_device_functions(module: Any) -> Any:
    """The kernels with C's functions of one number or two, which no GPU has, under their names in ocml: tanf, atan2."""
    import tvm_ffi
    from tvm import ir, tirx

    extern = ir.Op.get("tirx.call_pure_extern")

    def renamed(call: Any) -> Any:
        if not call.op.same_as(extern) or not str(call.ty.dtype).startswith("float"):
            return call
        bits = str(call.ty.dtype).removeprefix("float")
        name = str(call.args[0].value)
        if name.startswith("__") or bits not in ("32", "64"):
            return call
        symbol = f"__ocml_{name.removesuffix('f') if bits == '32' else name}_f{bits}"
        return tirx.call_pure_extern(str(call.ty.dtype), symbol, *call.args[1:])

    functions = {
        variable: function.with_body(tvm_ffi.structural_map(function.body, (ir.Call, renamed)))
        for variable, function in module.functions_items()
    }
    return ir.IRModule(functions)


def with_loops(module: Any) -> Any:
    """The kernels with loops around barriers whose number of turns LLVM cannot see, so that it leaves them loops.

    It unrolls loops with arrays in registers up to 2,700 instructions (AMDGPUTargetTransformInfo.cpp of LLVM,
    amdgpu-unroll-threshold-private): all nine tiles of a convolution's sum then load at a time, and spill. In a
    kernel with barriers and no loop around them, whose sums are of one turn, inner loops are left loops too: unrolled,
    a product of 32 x 16 x 32 with a condition around its stores spilled 76 bytes a thread on gfx1100.
    """
    import tvm_ffi
    from tvm import ir, tirx

    barrier = ir.Op.get("tirx.tvm_storage_sync")

    def waits(statement: Any) -> bool:
        found: list[Any] = []
        tvm_ffi.structural_walk(statement, [(ir.Call, lambda call: found.extend([1] * call.op.same_as(barrier)))])
        return bool(found)

    def around_barriers(body: Any) -> bool:
        found: list[Any] = []
        tvm_ffi.structural_walk(body, [(tirx.For, lambda loop: found.extend([1] * waits(loop.body)))])
        return bool(found)

    def counted(loop: Any, inner: bool) -> Any:
        if loop.kind != tirx.ForKind.SERIAL or not isinstance(loop.extent, tirx.IntImm):
            return loop
        if not (inner or waits(loop.body)):
            return loop
        # Bytes of shared memory, which the last stage of LLVM puts in: not negative, so nothing is added.
        number = tirx.op.call_llvm_pure_intrin("int32", "llvm.amdgcn.groupstaticsize")
        extent = loop.extent + tirx.Cast(str(loop.extent.ty.dtype), tirx.shift_right(number, tirx.const(31, "int32")))
        return tirx.For(loop.loop_var, loop.min, extent, loop.kind, loop.body)

    functions = {
        variable: function.with_body(
            tvm_ffi.structural_map(
                function.body,
                (tirx.For, partial(counted, inner=waits(function.body) and not around_barriers(function.body))),
            )
        )
        for variable, function in module.functions_items()
    }
    return ir.IRModule(functions)


def generated(kernels: Any, target: Any) -> Any:
    """The kernels, as `lower` leaves them, as TVM's module of machine code for AMD's GPUs; inside `callbacks`."""
    import tvm

    from .amd_barriers import with_fences
    from .guarded_loads import with_guarded_loads

    finished = with_fences(with_loops(with_guarded_loads(with_device_functions(kernels))))
    return tvm.get_global_func("target.build.rocm")(finished, target)


@contextmanager
def callbacks(arch: str, wave_threads: int) -> Iterator[list[bytes]]:
    """Let TVM use our bitcode, barriers and linker while inside; the list gets the code objects it links.

    Raises what `link` raises, when it is left.
    """
    import tvm_ffi

    from .amd_barriers import write_fences

    names = ("tvm_callback_rocm_bitcode_path", "tvm_callback_rocm_link")
    before = [tvm_ffi.get_global_func(name, allow_missing=True) for name in names]
    failures: list[GraphwrightError] = []
    made: list[bytes] = []

    def linked(content: Any) -> bytes:
        try:
            made.append(link(bytes(content)))
        except GraphwrightError as error:  # the way through TVM would make another error of it
            failures.append(error)
            return b""
        return made[-1]

    with tempfile.TemporaryDirectory() as scratch:
        files = [str(path) for path in (*bitcode(arch, wave_threads), write_fences(Path(scratch)))]
        for name, function in zip(names, (lambda *_: files, linked), strict=True):
            tvm_ffi.register_global_func(name, function, override=True)
        try:
            yield made
        finally:
            for name, function in zip(names, before, strict=True):
                if function is not None:
                    tvm_ffi.register_global_func(name, function, override=True)
    if failures:
        raise failures[0]


def link(content: bytes) -> bytes:
    """An object file as a code object (hsaco), by ziglang's ld.lld; raises ToolMissing for functions nobody defines."""
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch, "kernels.o"), Path(scratch, "kernels.hsaco")
        source.write_bytes(content)
        command = [sys.executable, "-m", "ziglang", "ld.lld", "--no-undefined", "-shared", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        missing = sorted(set(re.findall(r"undefined symbol: (\w+)", done.stderr)))
        if missing:
            where = bitcode_folder()
            found = "none are here" if where is None else f"those in {where} lack them"
            raise ToolMissing(f"kernels call {', '.join(missing)} of AMD's device libraries and {found}: {INSTALL}")
        if done.returncode:
            raise GraphwrightError(f"ld.lld failed: {done.stderr.strip()[-2000:]}")
        return out.read_bytes()


def _places() -> Iterator[Path]:
    if given := os.environ.get("HIP_DEVICE_LIB_PATH"):
        yield Path(given)
    for root in (os.environ.get("ROCM_PATH"), "/opt/rocm"):
        if root:
            yield Path(root, "amdgcn", "bitcode")
    yield from (Path("/usr/lib", f"{machine}-linux-gnu", "amdgcn", "bitcode") for machine in ("x86_64", "aarch64"))
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / "backends" / "amd" / "lib"
