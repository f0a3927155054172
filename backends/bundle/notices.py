"""The texts of a bundle: how to use it, and whose code is in it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ...errors import ToolMissing
from .table import Table

_MACOS = (
    "The code is for macOS 12 and newer on Apple's processors, and was run on none (graphwright's docs/arm.md).",
    "It is signed ad hoc. What a browser has downloaded is in quarantine: xattr -dr com.apple.quarantine DIRECTORY",
    "To build the example: cc example.c model.dylib -Wl,-rpath,@executable_path -o example",
)
_PACKAGE = Path(__file__).resolve().parents[2]


def readme(table: Table, executable: bool, single_file: bool, macos: bool = False) -> str:
    """How to run this bundle."""
    first = f" --input {table.inputs[0].name}.npy" if table.inputs else ""
    result = f" --output {table.outputs[0].name}.npy" if table.outputs else ""
    lines = [f"A model compiled by graphwright for {table.target}.", ""]
    lines += [f"    ./run{first}{result} --repeat 10", "    ./run --describe", ""]
    for kind, tensors in (("input", table.inputs), ("output", table.outputs)):
        lines += [f"{kind} {t.name}: {t.dtype}[{', '.join(map(str, t.shape))}]" for t in tensors]
    lines.append("")
    lines += _MACOS if macos else ["run is static and needs no library."]
    library = "model.dylib" if macos else "model.so"
    if not executable:
        needed = "To graphwright_init" if macos else "It needs glibc 2.28 or newer;"
        weights = "NULL" if single_file or not table.weights_bytes else '"weights.safetensors"'
        lines += [
            f"{library} is for your own program: graphwright.h has its calls, example.c and example.py use them.",
            f"{needed} the path of its weights is {weights}.",
        ]
    if table.weights_bytes and not single_file:
        lines.append("weights.safetensors is mapped by both; keep it beside run.")
    lines += ["manifest.json has the SHA-256 of every file.", ""]
    return "\n".join(lines)


def android_readme(table: Table) -> str:
    """How to use the bundle in an app."""
    lines = [
        f"A model compiled by graphwright for {table.target}: an Android library module (API 24 and newer, arm64-v8a).",
        "",
        'settings.gradle.kts:  include(":model"); project(":model").projectDir = file("this/directory")',
        'the app:              dependencies { implementation(project(":model")) }',
        "Kotlin:               org.graphwright.Model().use { it.run(listOf(buffer)) }",
        "",
        *(f"{kind} {t.name}: {t.dtype}[{', '.join(map(str, t.shape))}]"
          for kind, tensors in (("input", table.inputs), ("output", table.outputs)) for t in tensors),
        "",
        "libmodel.so holds the weights and has the calls of graphwright.h. graphwright_jni.c and Model.kt are sources,",
        "which the NDK and Kotlin compile. None of this has been run on Android; docs/arm.md of graphwright says more.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def write_notices(path: Path, musl: bool = True) -> None:
    """Write the licences of what is linked into a bundle. Raises ToolMissing without the ziglang package."""
    found = importlib.util.find_spec("ziglang")
    if found is None or found.origin is None:
        raise ToolMissing("bundles need the ziglang package: pip install ziglang")
    zig = Path(found.origin).parent
    c_library = ("musl, the C library inside the program `run`", zig / "lib" / "libc" / "musl" / "COPYRIGHT")
    parts = (
        ("graphwright: its runtime and the code it generates", _PACKAGE / "LICENSE"),
        *((c_library,) if musl else ()),
        ("zig, whose compiler run-time library (compiler_rt) is inside the program `run`", zig / "LICENSE"),
    )
    text = [f"{title}\n{'=' * len(title)}\n\n{source.read_text()}\n" for title, source in parts]
    path.write_text("\n".join(text))
