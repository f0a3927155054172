"""A bundle for macOS, as far as it can be checked here: its files as dyld and the kernel of a Mac read them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import mach_o_file
import pytest
import torch
from torch import nn

import graphwright
from graphwright.backends.aot import mach_o

SYSTEM = "/usr/lib/libSystem.B.dylib"
# What zig puts into every library: where it begins, for exit handlers and for the library itself.
OWN = {"__dso_handle", "_mh_dylib_header"}


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(16, 10), nn.Softmax(-1)).eval()


@pytest.fixture(scope="module")
def compiled() -> graphwright.CompiledModule:
    return graphwright.compile(network(), (torch.ones(1, 3, 32, 32),), target="apple-m1")


@pytest.fixture(scope="module")
def made(compiled: graphwright.CompiledModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.bundle(tmp_path_factory.mktemp("macos") / "out")


def test_the_directory_has_a_dylib_and_a_program(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {
        *("run", "model.dylib", "weights.safetensors", "graphwright.h", "example.c", "example.py"),
        *("README.txt", "LICENSES.txt", "manifest.json"),
    }
    target = json.loads((made / "manifest.json").read_text())["target"]
    assert (target["id"], target["triple"]) == ("apple-m1", "aarch64-apple-macosx12.0.0")
    about = (made / "README.txt").read_text()
    assert "glibc" not in about
    assert "static" not in about
    assert "musl" not in (made / "LICENSES.txt").read_text()


@pytest.mark.parametrize(("file", "kind"), [("model.dylib", "library"), ("run", "executable")])
def test_the_code_is_of_arm64_macos_and_needs_libsystem_alone(made: Path, file: str, kind: str) -> None:
    facts = mach_o_file.read(made / file)
    assert (facts.cpu, facts.kind, facts.platform, facts.oldest) == (mach_o_file.ARM64, kind, 1, (12, 0))
    assert facts.libraries == (SYSTEM,)
    assert facts.undefined
    assert set(facts.undefined.values()) == {1}
    assert not {"syscall", "__ulock_wait", "getauxval", "sched_getcpu"} & set(facts.undefined)
    assert facts.signed  # the kernel kills what is not, and what was changed since
    # dyld maps by pages of 16 KiB, and binds the pointers of thread-local variables as they lie.
    assert all(address % 16384 == offset % 16384 == 0 for address, offset in facts.segments.values())
    assert all(section.address % 8 == 0 for section in facts.sections if section.name == "__thread_vars")


def test_the_library_exports_its_headers_and_nothing_that_another_could_take_for_its_own(made: Path) -> None:
    facts = mach_o_file.read(made / "model.dylib")
    declared = set(re.findall(r"(graphwright_\w+)\(", (made / "graphwright.h").read_text()))
    assert {name for name in facts.exported - OWN if not name.startswith("gw_")} == declared
    assert "gw_run" in facts.exported
    assert not facts.weak
    assert facts.name == "@rpath/model.dylib"


def test_nothing_of_this_machine_is_inside(made: Path) -> None:
    for name in ("run", "model.dylib"):
        content = (made / name).read_bytes()
        for trace in (b"x86_64", b"linux", b"/proc/", str(Path.home()).encode() + b"/", b"/tmp/", str(made).encode()):
            assert trace not in content, trace


def test_weights_are_inside_on_a_page_of_their_own(compiled: graphwright.CompiledModule, tmp_path: Path) -> None:
    with_weights = compiled.bundle(tmp_path / "out", single_file=True, executable=True)
    assert {path.name for path in with_weights.iterdir()} == {"run", "README.txt", "LICENSES.txt", "manifest.json"}
    facts = mach_o_file.read(with_weights / "run")
    (weights,) = (section for section in facts.sections if section.name == "__weights")
    assert (weights.segment, weights.address % 16384, weights.offset % 16384) == ("__DATA_CONST", 0, 0)
    content = (with_weights / "run").read_bytes()[weights.offset : weights.offset + weights.bytes]
    assert network()[4].bias.detach().numpy().tobytes() in content
    assert facts.signed


def test_instructions_that_the_m1_lacks_are_asked_for(tmp_path: Path) -> None:
    model = nn.Linear(64, 64).eval()
    for target, asked in (("apple-m1", False), ("apple-m2", True)):
        out = graphwright.compile(model, (torch.ones(8, 64),), target=target).bundle(tmp_path / target)
        assert (b"hw.optional.arm.FEAT_I8MM" in (out / "model.dylib").read_bytes()) == asked
        assert "sysctlbyname" in mach_o_file.read(out / "model.dylib").undefined


def test_a_call_that_macos_lacks_is_refused_when_linking(tmp_path: Path) -> None:
    source, triple = tmp_path / "bad.c", "aarch64-apple-macosx12.0.0"
    source.write_text("int sched_getcpu(void); int gw_run(void) { return sched_getcpu(); }\n")
    (compiled,) = mach_o.toolchain.c_objects([source], [], triple)
    with pytest.raises(graphwright.errors.ToolMissing, match=r"undefined symbol.*sched_getcpu"):
        mach_o.link([compiled], tmp_path / "model.dylib", triple)
