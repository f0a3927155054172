"""What a bundle says on a machine that it cannot run on: processors that lack instructions, and a C library too old."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from boards import PACKAGES, ROOTS, Doubled, emulator, refused, run

import graphwright
from graphwright.backends.aot import toolchain


def bundle(target: str, path: Path) -> Path:
    return graphwright.compile(Doubled().eval(), (torch.ones(8, 64),), target=target).bundle(path)


@pytest.mark.parametrize(
    ("target", "cpu", "missing"),
    [
        ("raspberry-pi-5", "cortex-a53", ("dotprod", "fullfp16", "lse")),
        ("cortex-a55", "cortex-a72", ("dotprod", "fullfp16")),
        ("neoverse-v1", "neoverse-n1", ("sve", "i8mm", "bf16")),
        ("neoverse-n2", "cortex-a76", ("sve2", "i8mm", "bf16")),
        ("raspberry-pi-2b", "cortex-a8", ("vfp4", "hwdiv")),
        ("raspberry-pi-2b", "cortex-a9", ("vfp4", "hwdiv")),
    ],
)
def test_instructions_that_a_processor_lacks(target: str, cpu: str, missing: tuple[str, ...], tmp_path: Path) -> None:
    """Never an illegal instruction: even what runs before the check keeps to the first version of the architecture."""
    made = bundle(target, tmp_path / "out")
    refused(run(made, cpu), target, "lacks instructions", *missing)
    assert run(made, cpu, "--describe").returncode == 0


def test_processors_without_neon_or_older_than_armv7(tmp_path: Path) -> None:
    """32-bit: the C library's start, the program and the constructors run there, as far as to say why."""
    made = bundle("armv7", tmp_path / "out")
    for cpu in ("cortex-a9,neon=off", "cortex-a8,neon=off"):
        refused(run(made, cpu), "armv7", "lacks instructions", "neon")
        assert run(made, cpu, "--describe").returncode == 0
    refused(run(made, "arm1176"), "older than ARMv7")
    refused(run(made, "arm1136"), "older than ARMv7")
    assert run(made, "cortex-a8").returncode == 0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_glibc("aarch64")
    return bundle("raspberry-pi-5", tmp_path_factory.mktemp("library") / "out")


def need_glibc(isa: str) -> None:
    if not (ROOTS[isa] / "lib").is_dir():
        pytest.skip(f"glibc for {isa} is not installed (Debian: apt-get install {PACKAGES[isa]})")


def with_example(made: Path, work: Path, cpu: str) -> subprocess.CompletedProcess[str]:
    """Compile example.c against the library, and run it with the system's glibc for ARM."""
    program, triple = work / "example", target_of(made)["triple"]
    toolchain.zig(
        "cc", "-target", f"{toolchain.zig_target(triple)}.2.28", *toolchain.start_flags(triple), "-O1", f"-I{made}",
        str(made / "example.c"), str(made / "model.so"), f"-Wl,-rpath,{work}", "-o", str(program),
    )  # fmt: skip
    shutil.copyfile(made / "model.so", work / "model.so")
    return example(program, made, cpu)


def example(program: Path, made: Path, cpu: str) -> subprocess.CompletedProcess[str]:
    isa = target_of(made)["isa"]
    command = [emulator(isa), "-cpu", cpu, "-L", str(ROOTS[isa]), str(program), str(made / "weights.safetensors")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def target_of(made: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((made / "manifest.json").read_text())["target"]
    return found


def test_a_library_on_a_processor_that_lacks_instructions(library: Path, tmp_path: Path) -> None:
    done = with_example(library, tmp_path, "cortex-a72")
    assert (done.returncode, done.stdout) == (1, "")
    assert "this processor lacks instructions that the model, compiled for raspberry-pi-5, uses" in done.stderr
    assert with_example(library, tmp_path, "cortex-a76").returncode == 0


@pytest.mark.parametrize(
    ("target", "cpus", "missing"),
    [("armv7", ("cortex-a9,neon=off", "cortex-a8,neon=off"), "neon"), ("raspberry-pi-2b", ("cortex-a9",), "vfp4")],
)
def test_a_32_bit_library_on_processors_without(
    target: str, cpus: tuple[str, ...], missing: str, tmp_path: Path
) -> None:
    """Loading it, its constructors and what it takes from the compiler's library (memcpy) run there."""
    need_glibc("armv7")
    made = bundle(target, tmp_path / "out")
    assert with_example(made, tmp_path, "cortex-a7").returncode == 0
    for cpu in cpus:
        done = example(tmp_path / "example", made, cpu)
        assert (done.returncode, done.stdout) == (1, "")
        assert (
            f"this processor lacks instructions that the model, compiled for {target}, uses: {missing}" in done.stderr
        )


def test_a_library_that_was_cut(tmp_path: Path) -> None:
    need_glibc("aarch64")
    inside = (torch.nn.Linear(512, 512).eval(), (torch.ones(2, 512),))
    made = graphwright.compile(*inside, target="raspberry-pi-4b").bundle(tmp_path / "out", single_file=True)
    assert with_example(made, tmp_path, "cortex-a72").returncode == 0
    content = (made / "model.so").read_bytes()
    (tmp_path / "model.so").write_bytes(content[: len(content) // 2])
    done = example(tmp_path / "example", made, "cortex-a72")
    assert done.returncode == 1
    assert "this file is truncated" in done.stderr


def _hash(name: str) -> int:
    """Of a symbol version (System V ABI, section on the hash table)."""
    value = 0
    for letter in name.encode():
        value = (value << 4) + letter
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high
    return value


def test_a_glibc_older_than_the_library_asks_for(library: Path, tmp_path: Path) -> None:
    """The loader names the version before any code runs. Here the library asks for what no glibc has yet."""
    assert with_example(library, tmp_path, "cortex-a76").returncode == 0
    content = (library / "model.so").read_bytes()
    for old, new in (
        (b"GLIBC_2.17\0", b"GLIBC_2.99\0"),
        *[tuple(struct.pack("<I", _hash(f"GLIBC_2.{n}")) for n in (17, 99))],
    ):
        assert old in content
        content = content.replace(old, new)
    (tmp_path / "model.so").write_bytes(content)
    done = example(tmp_path / "example", library, "cortex-a76")
    assert done.returncode not in (0, -4, -11)
    assert "version `GLIBC_2.99' not found (required by" in done.stderr
    assert run(library, "cortex-a76").returncode == 0  # the static program needs none
