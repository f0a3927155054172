"""Object files -> the program `run` and the library `model.so` of a bundle, with the ziglang wheel alone.

The program is static: zig's own musl is in it, so it runs on any Linux of its processor. The first such link on a
machine builds musl and the compiler's run-time library (23 s of processor time for aarch64), which the cache keeps.

The library uses the C library of the process that loads it. It is linked against zig's stand-ins for glibc 2.28 (Debian
10, Raspberry Pi OS of 2019), so it asks for no symbol version that is newer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..aot import mach_o, toolchain

_HERE = Path(__file__).parent
_LIBRARY_SOURCES = ("bundle.c",)
_PROGRAM_SOURCES = ("bundle.c", "files.c", "run.c")
GLIBC_FLOOR = (2, 28)
# Pages of 16 KiB are what some ARM systems use; a file grows by little.
_OPTIONS = ("-s", "-Wl,--gc-sections", "-Wl,--build-id=none", "-Wl,-z,max-page-size=16384", "-Wl,-z,noexecstack")
# Weights inside come last in the file: one that was cut still starts, and says so.
_WEIGHTS_LAST = "SECTIONS { .weights : { *(.weights) } } INSERT AFTER .bss;\n"
_EXPORTS = (
    *toolchain.EXPORTS,
    "graphwright_init",
    "graphwright_inputs",
    "graphwright_outputs",
    "graphwright_run",
    "graphwright_free",
    "graphwright_error",
    "graphwright_target",
    "graphwright_threads",
)


def program(model: Path | None, table: str, triple: str, output: Path, files: Path) -> None:
    """Link `output`, a static program, from the model's object and the text of table.c_source.

    model: None where the model computes nothing. The table may name files of the directory `files`.
    """
    target = toolchain.zig_target(triple)
    if toolchain.is_macos(triple):
        with tempfile.TemporaryDirectory() as directory:
            objects = _objects(model, _PROGRAM_SOURCES, table, triple, Path(directory), files)
            mach_o.link_program(objects, output, triple)
        return
    musl = target.replace("gnu", "musl")
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        objects = _objects(model, _PROGRAM_SOURCES, table, musl, scratch, files)
        toolchain.zig(
            "cc", "-target", musl, *toolchain.start_flags(triple), "-static", *_OPTIONS,
            f"-Wl,-T,{_last(scratch)}", *map(str, objects), "-o", str(output), scratch=scratch,
        )  # fmt: skip
    output.chmod(0o755)


def library(model: Path | None, table: str, triple: str, output: Path, files: Path) -> None:
    """Link `output`, a shared library with the calls of graphwright.h and, for Python, those of runtime.h."""
    if toolchain.is_android(triple):
        _android_library(model, table, triple, output, files)
        return
    if toolchain.is_macos(triple):
        with tempfile.TemporaryDirectory() as directory:
            objects = _objects(model, _LIBRARY_SOURCES, table, triple, Path(directory), files)
            mach_o.link(objects, output, triple, _EXPORTS)
        return
    target = toolchain.zig_target(triple)
    glibc = f"{target}.{'.'.join(map(str, GLIBC_FLOOR))}"
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        objects = _objects(model, _LIBRARY_SOURCES, table, target, scratch, files)
        script = scratch / "exports.map"
        script.write_text(f"{{ global: {'; '.join(_EXPORTS)}; local: *; }};\n")
        toolchain.zig(
            "cc", "-target", glibc, *toolchain.start_flags(triple), "-shared", *_OPTIONS, "-Wl,-z,now",
            f"-Wl,-soname,{output.name}", f"-Wl,--version-script={script}", f"-Wl,-T,{_last(scratch)}",
            *map(str, objects), "-lm", "-lpthread", "-o", str(output), scratch=scratch,
        )  # fmt: skip


def _android_library(model: Path | None, table: str, triple: str, output: Path, files: Path) -> None:
    """As `library`, for bionic: a stand-in for its libc.so and libm.so has the names, and bionic has no versions."""
    target = toolchain.zig_target(triple)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        names = toolchain.c_library()
        stand_ins = []
        for soname, mathematics in (("libc.so", False), ("libm.so", True)):
            code = scratch / f"{soname}.s"
            chosen = [name for name in names if (name in toolchain.MATH) == mathematics]
            code.write_text("".join(f".globl {n}\n.type {n}, %function\n{n}:\n" for n in chosen))
            toolchain.zig("cc", "-target", target, "-c", str(code), "-o", f"{code}.o", scratch=scratch)
            toolchain.zig("ld.lld", "-shared", "-soname", soname, f"{code}.o", "-o", str(scratch / soname))
            stand_ins.append(scratch / soname)
        objects = _objects(model, _LIBRARY_SOURCES, table, triple, scratch, files)
        toolchain.link(objects, output, _EXPORTS, stand_ins, _last(scratch))


def _last(scratch: Path) -> Path:
    script = scratch / "last.ld"
    script.write_text(_WEIGHTS_LAST)
    return script


def _objects(
    model: Path | None, sources: Sequence[str], table: str, target: str, scratch: Path, files: Path
) -> list[Path]:
    """The generated code, the runtime, the bundle's own code, and the table."""
    sources = (*sources, "empty.c") if model is None else sources
    headers = [*toolchain.runtime_headers(), *(_HERE / name for name in ("graphwright.h", "bundle.h", "files.h"))]
    fixed = toolchain.c_objects([_HERE / name for name in sources], headers, target)
    made = scratch / "table.o"
    text = scratch / "table.c"
    text.write_text(table)
    toolchain.zig(
        "cc", "-O2", "-fPIC", "-g0", "-std=c11", f"-I{_HERE}", f"-I{files}", "-target", toolchain.zig_target(target),
        *toolchain.flags(target, text.name), "-c", str(text), "-o", str(made), scratch=scratch,
    )  # fmt: skip
    return [*([model] if model else ()), *toolchain.runtime_objects(target), *fixed, made]
