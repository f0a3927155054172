"""The C runtime's object files and the linker, both from the ziglang wheel: no compiler of the system is needed.

The runtime is compiled once per target and kept in the user's cache directory under the digest of its sources and
flags. Linking uses ld.lld alone and leaves C library symbols to the process that loads the result.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.metadata
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from ...errors import ToolMissing

_SOURCES = ("runtime.c", "pool.c", "scratch.c", "half.c")
_HEADERS = ("runtime.h", "internal.h")
_FLAGS = ("-O2", "-fPIC", "-ffunction-sections", "-std=c11", "-D_GNU_SOURCE", "-g0", "-Wall", "-Wextra", "-Werror")
# What runtime.c, LLVM's lowering of plain C and TVM's intrinsics may ask of libc and libm.
_C_LIBRARY = """
    __tls_get_addr clock_gettime free getpid madvise memcpy memmove memset nanosleep posix_memalign pthread_create
    pthread_join pthread_sigmask sched_getcpu sigfillset strlen syscall sysconf abs labs
"""
_MATH = """
    acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp10 exp2 expm1 fabs floor fma
    fmax fmin fmod hypot j0 j1 ldexp lgamma log log10 log1p log2 lrint lround nearbyint nextafter pow remainder rint
    round roundeven sin sincos sinh sqrt tan tanh tgamma trunc y0 y1
"""
_EXPORTS = (
    "gw_init",
    "gw_run",
    "gw_free",
    "gw_error",
    "gw_set_threads",
    "gw_get_threads",
    "gw_trace",
    "gw_share_callers",
)


def runtime_objects(triple: str) -> list[Path]:
    """The runtime compiled for an LLVM triple; from the cache where it is there."""
    target = zig_target(triple)
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for part in (target, _zig_version(), *_FLAGS):
        digest.update(part.encode() + b"\0")
    for name in (*_HEADERS, *_SOURCES):
        digest.update((here / name).read_bytes())
    kept = _workshop() / "runtime" / f"{target}-{digest.hexdigest()[:24]}"
    objects = [kept / f"{Path(name).stem}.o" for name in _SOURCES]
    if all(path.is_file() for path in objects):
        return objects
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept) as scratch:
        for name, path in zip(_SOURCES, objects, strict=True):
            made = Path(scratch, path.name)
            _zig("cc", *_FLAGS, "-target", target, "-c", str(here / name), "-o", str(made))
            os.replace(made, path)  # another process may be doing the same: an equal file replaces an equal file
    return objects


def link(objects: Sequence[Path], output: Path) -> None:
    """Link objects to a shared library that exports the calls of runtime.h only.

    What the C library does not have is refused here: on the target it would be found missing only when loaded.
    """
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory, "exports.map")
        script.write_text(f"{{ global: {'; '.join(_EXPORTS)}; local: *; }};\n")
        # 16 KiB pages are what some ARM systems use; the file grows by little.
        options = ("-shared", "--gc-sections", "--strip-all", "--build-id=none", "--hash-style=gnu")
        limits = ("-z", "now", "-z", "noexecstack", "-z", "max-page-size=16384", "-soname", output.name)
        _zig(
            "ld.lld",
            *options,
            *limits,
            "--version-script",
            str(script),
            *map(str, objects),
            "-o",
            str(output),
        )

    unknown = undefined_symbols(output) - {*_C_LIBRARY.split(), *_MATH.split(), *(f"{name}f" for name in _MATH.split())}
    assert not unknown, f"generated code calls {sorted(unknown)}, which nothing provides"


def undefined_symbols(library: Path) -> set[str]:
    """The names a 64-bit little-endian ELF library expects to find in the process that loads it."""
    content = library.read_bytes()
    (sections,) = struct.unpack_from("<Q", content, 0x28)
    size, count = struct.unpack_from("<HH", content, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", content, sections + i * size) for i in range(count)]
    names = set()
    for _, kind, _, _, offset, length, link, _, _, entry in headers:
        if kind == 11:  # SHT_DYNSYM; its `link` is the section of its names
            strings = headers[link][4]
            for start in range(offset + entry, offset + length, entry):
                name, _, _, section = struct.unpack_from("<IBBH", content, start)
                if section == 0:  # SHN_UNDEF
                    end = content.index(b"\0", strings + name)
                    names.add(content[strings + name : end].decode())
    return names


def zig_target(triple: str) -> str:
    """Zig's spelling of an LLVM triple: no vendor, and a C library always."""
    parts = triple.split("-")
    arch, system = parts[0], "linux" if "linux" in parts else parts[-2]
    return f"{arch}-{system}-{parts[-1] if parts[-1] != system else 'gnu'}"


def _zig_version() -> str:
    try:
        return importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError as error:
        raise ToolMissing("compiling needs the ziglang package: pip install ziglang") from error


def _zig(*arguments: str) -> None:
    command = [sys.executable, "-m", "ziglang", *arguments]
    caches = _workshop() / "zig"
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(caches), "ZIG_LOCAL_CACHE_DIR": str(caches)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ToolMissing(
            f"{' '.join(command[:4])} failed with {done.returncode}: {done.stderr.strip()[-2000:]}; "
            "`graphwright doctor` checks the ziglang package"
        )


def cache_directory() -> Path:
    """Where things are kept between runs: GRAPHWRIGHT_CACHE, or the user's cache directory. It may be read-only."""
    return Path(os.environ.get("GRAPHWRIGHT_CACHE") or platformdirs.user_cache_dir("graphwright"))


def _workshop() -> Path:
    """The cache directory, or one of this process alone where that cannot be written."""
    wanted = cache_directory()
    try:
        wanted.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError:
        return _own_directory()


@functools.lru_cache(maxsize=1)
def _own_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="graphwright-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory
