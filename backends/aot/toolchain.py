"""The C runtime's object files and the linker, both from the ziglang wheel: no compiler of the system is needed.

The runtime is compiled once per target and kept in the user's cache directory under the digest of its sources and
flags. Linking uses ld.lld alone and leaves C library symbols to the process that loads the result.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import importlib.metadata
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import platformdirs

from ...errors import GraphwrightError, ToolMissing, size
from . import elf

_SOURCES = ("runtime.c", "message.c", "pool.c", "scratch.c", "half.c")
_HERE = Path(__file__).parent
_FLAGS = ("-O2", "-fPIC", "-ffunction-sections", "-std=c11", "-D_GNU_SOURCE", "-g0", "-Wall", "-Wextra", "-Werror")
_FULL = ("No space left on device", "NoSpaceLeft", "Disk quota exceeded", "DiskQuota")  # of the system, and of zig
# Of 32-bit Arm: what runs before the processor is checked keeps to ARMv6 and the registers by which floating point is
# passed; the rest of the runtime has barriers, which ARMv6 has only as what newer systems emulate.
_ARM_FIRST, _ARM = "-mcpu=arm1176jzf_s", "-mcpu=generic+v7a-neon-d32"
_BEFORE_THE_CHECK = ("message.c", "bundle.c", "files.c", "run.c", "table.c")
# What the runtime, bundle.c, LLVM's lowering of plain C and TVM's intrinsics may ask of libc and libm.
_C_LIBRARY = """
    __tls_get_addr clock_gettime free getpid madvise memcpy memmove memset nanosleep posix_memalign pthread_create
    pthread_join pthread_sigmask sched_getcpu sigfillset strlen syscall getauxval abs labs
    abort calloc close lseek mmap munmap open pthread_getspecific pthread_key_create pthread_key_delete
    pthread_setspecific pipe read write
"""
_MATH = """
    acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp10 exp2 expm1 fabs floor fma
    fmax fmin fmod hypot j0 j1 ldexp lgamma log log10 log1p log2 lrint lround nearbyint nextafter pow remainder rint
    round roundeven sin sincos sinh sqrt tan tanh tgamma trunc y0 y1
"""
MATH = frozenset(name + ending for name in _MATH.split() for ending in ("", "f"))
EXPORTS = (
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
    sources = (*_SOURCES, "macos.c" if is_macos(triple) else "linux.c", *(("emutls.c",) if is_android(triple) else ()))
    return c_objects([_HERE / name for name in sources], runtime_headers(), triple)


def flags(triple: str, name: str) -> tuple[str, ...]:
    """What the C file `name` is compiled with for an LLVM triple.

    Android's loader knows thread-local variables since version 10 (API 29).
    """
    if zig_target(triple).startswith("arm-"):
        return (_ARM_FIRST if name in _BEFORE_THE_CHECK else _ARM,)
    return ("-femulated-tls",) if is_android(triple) else ()


def start_flags(triple: str) -> tuple[str, ...]:
    """What a bundle's files are linked with: the C library's start, and what is taken from the compiler's own library
    (memcpy), run on processors that are then refused."""
    return (_ARM_FIRST,) if zig_target(triple).startswith("arm-") else ()


def is_android(triple: str) -> bool:
    """Whether the C library is bionic."""
    return "android" in triple.rsplit("-", 1)[-1]


def is_macos(triple: str) -> bool:
    """Whether the system is macOS."""
    return "-macosx" in triple


def runtime_headers() -> list[Path]:
    """The headers of the runtime: runtime.h is what it offers, internal.h what its files share."""
    return [_HERE / name for name in ("runtime.h", "internal.h")]


def c_objects(sources: Sequence[Path], headers: Sequence[Path], triple: str) -> list[Path]:
    """C files compiled for an LLVM triple, kept under the digest of what they are made of.

    headers: every file the sources include in quotes; their directories are searched.
    """
    target = zig_target(triple)
    folders = dict.fromkeys(path.parent for path in headers)
    options = (*_FLAGS, *(f"-I{folder}" for folder in folders))
    digest = hashlib.sha256()
    chosen = [flags(triple, path.name) for path in sources]
    for part in (target, _zig_version(), *_FLAGS, *(flag for each in chosen for flag in each)):
        digest.update(part.encode() + b"\0")
    for path in (*headers, *sources):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    folder = f"runtime/{target}-{digest.hexdigest()[:24]}"
    return [
        kept(folder, f"{path.stem}.o", functools.partial(_compile, ("cc", *options, *each, "-target", target), path))
        for path, each in zip(sources, chosen, strict=True)
    ]


def _compile(command: Sequence[str], source: Path, directory: Path) -> None:
    zig(*command, "-c", str(source), "-o", str(directory / f"{source.stem}.o"))


def kept(folder: str, name: str, make: Callable[[Path], None]) -> Path:
    """The file `name` in a folder of the cache; where it is not there, `make(directory)` leaves it in `directory`."""
    path = _workshop() / folder / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            make(Path(scratch))
            # Another process may be doing the same: an equal file replaces an equal file.
            os.replace(Path(scratch, name), path)
    return path


def link(
    objects: Sequence[Path],
    output: Path,
    exports: Sequence[str] = (),
    libraries: Sequence[Path] = (),
    places: Path | None = None,
) -> None:
    """Link objects to a shared library that exports the calls of runtime.h, and `exports`, only.

    places: a linker script for sections of their own.

    The C library is left to the process that loads it, or is what `libraries` stand for. What it does not have is
    refused here: on the target it would be found missing only when loaded.
    """
    with tempfile.TemporaryDirectory() as directory:
        script = Path(directory, "exports.map")
        script.write_text(f"{{ global: {'; '.join((*EXPORTS, *exports))}; local: *; }};\n")
        # 16 KiB pages are what some ARM systems use; the file grows by little.
        options = ("-shared", "--gc-sections", "--strip-all", "--build-id=none", "--hash-style=gnu")
        limits = ("-z", "now", "-z", "noexecstack", "-z", "max-page-size=16384", "-soname", output.name)
        zig(
            "ld.lld",
            *options,
            *limits,
            "--version-script",
            str(script),
            *map(str, objects),
            "--as-needed",
            *map(str, libraries),
            *(("-T", str(places)) if places else ()),
            "-o",
            str(output),
        )

    known = set(c_library())
    # The compiler's run-time library for 32-bit Arm, which the program of a bundle has inside.
    unknown = {name for name in elf.read(output).undefined - known if not name.startswith("__aeabi_")}
    assert not unknown, f"generated code calls {sorted(unknown)}, which nothing provides"


def c_library() -> tuple[str, ...]:
    """What generated code, the runtime and the code of bundles may call of libc and libm."""
    return (*_C_LIBRARY.split(), *sorted(MATH))


def merge(objects: Sequence[Path], output: Path) -> None:
    """Link objects to one relocatable object."""
    zig("ld.lld", "-r", "--build-id=none", *map(str, objects), "-o", str(output))


def zig_target(triple: str) -> str:
    """Zig's spelling of an LLVM triple: no vendor, and a C library always.

    Android's headers do not come with zig: musl's stand for them, as the runtime uses what is the same in both.
    """
    parts = triple.split("-")
    if is_macos(triple):
        return f"{parts[0]}-macos.{parts[2].removeprefix('macosx')}"
    arch, system = "arm" if parts[0].startswith("armv7") else parts[0], "linux" if "linux" in parts else parts[-2]
    if is_android(triple):
        return f"{arch}-{system}-musl"
    return f"{arch}-{system}-{parts[-1] if parts[-1] != system else 'gnu'}"


def _zig_version() -> str:
    try:
        return importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError as error:
        raise ToolMissing("compiling needs the ziglang package: pip install ziglang") from error


def zig(*arguments: str, scratch: Path | None = None) -> None:
    """Run a command of the ziglang package; with `scratch`, what it makes for this run alone is kept there.

    Raises ToolMissing with what it printed where it fails, and GraphwrightError where a disk is full.
    """
    command = [sys.executable, "-m", "ziglang", *arguments]
    caches = _workshop() / "zig"
    local = str(scratch or caches)
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(caches), "ZIG_LOCAL_CACHE_DIR": local}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        if any(said in done.stderr for said in _FULL):
            written = [Path(path).parent for option, path in itertools.pairwise(arguments) if option == "-o"]
            raise GraphwrightError(_full_disk([caches, Path(local), *written]))
        raise ToolMissing(
            f"{' '.join(command[:4])} failed with {done.returncode}: {done.stderr.strip()[-2000:]}; "
            "`graphwright doctor` checks the ziglang package"
        )


def _full_disk(places: Sequence[Path]) -> str:
    """What to do about a full disk: the one of `places` with the least room is meant."""
    free = {place: shutil.disk_usage(place).free for place in places if place.is_dir()}
    place = min(free, key=free.__getitem__, default=places[0])
    return (
        f"the disk is full: {place} has {size(free.get(place, 0))} left; make room there, or name directories on "
        f"another disk by GRAPHWRIGHT_CACHE (now {cache_directory()}) and TMPDIR (now {tempfile.gettempdir()})"
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
