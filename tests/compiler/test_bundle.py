"""A bundle runs without Python on its board, gives the model's numbers, and refuses what cannot be right."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boards import assert_like_float64, call, refused, run
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

import graphwright
from graphwright.backends.aot import elf, library
from graphwright.compiler.capture import capture, export
from graphwright.compiler.cli import app
from graphwright.compiler.without_assertions import without_assertions
from graphwright.errors import ArtifactError, InputError, UnsupportedOp
from graphwright.hwdb import detect, lookup

ROUNDING = 1e-6  # a few sums of float32, each within 6e-8 of its terms
GLIBC_FLOOR = (2, 28)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(16, 10)).eval()


def bundle(model: Any, inputs: Any, path: Path, target: str = "raspberry-pi-4b", **options: bool) -> Path:
    return graphwright.compile(model, inputs, target=target).bundle(path, **options)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, image: torch.Tensor) -> Path:
    return bundle(network(), (image,), tmp_path_factory.mktemp("made") / "out")


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.mark.parametrize("cpu", ["cortex-a72", "cortex-a53", "max"])
def test_the_program_gives_the_models_numbers(made: Path, image: torch.Tensor, tmp_path: Path, cpu: str) -> None:
    (found,) = call(made, cpu, {"input": image}, tmp_path, "--threads", "3", "--repeat", "2")
    assert found.dtype == np.float32
    assert_like_float64(found, network(), {"input": image}, ROUNDING)


def test_the_program_prints_what_it_did(made: Path) -> None:
    done = run(made, "cortex-a72", "--repeat", "3", "--threads", "2")
    assert done.returncode == 0
    assert "2 threads" in done.stdout
    assert "inputs: noise" in done.stdout
    assert "output linear: float32[1, 10]" in done.stdout
    assert "ms of 3" in done.stdout
    described = run(made, "cortex-a72", "--describe").stdout
    assert (
        described == "compiled for raspberry-pi-4b\ninput input: float32[1, 3, 32, 32]\noutput linear: float32[1, 10]\n"
    )


def test_bare_bytes_go_in_and_out(made: Path, image: torch.Tensor, tmp_path: Path) -> None:
    (expected,) = call(made, "cortex-a72", {"input": image}, tmp_path)
    (tmp_path / "x.bin").write_bytes(image.numpy().tobytes())
    done = run(made, "cortex-a72", "--input", tmp_path / "x.bin", "--output", tmp_path / "y.bin")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "y.bin").read_bytes() == expected.tobytes()


def test_the_files_are_of_the_board_and_ask_for_nothing_newer(made: Path) -> None:
    program, shared = elf.read(made / "run"), elf.read(made / "model.so")
    assert program.machine == shared.machine == "aarch64"
    assert (program.kind, program.interpreter, program.needed) == ("executable", None, ())
    assert shared.kind == "shared"
    assert set(shared.needed) <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-aarch64.so.1"}
    versions = {tuple(map(int, version.removeprefix("GLIBC_").split("."))) for _, version in shared.versions}
    assert versions
    assert max(versions) <= GLIBC_FLOOR
    for facts in (program, shared):
        assert all(alignment % 16384 == 0 for alignment in facts.alignments)
        assert not facts.executable_stack
        assert not facts.text_relocations


def test_the_library_exports_its_header_and_nothing_else(made: Path) -> None:
    defined = elf.read(made / "model.so").defined
    header = (made / "graphwright.h").read_text()
    declared = set(re.findall(r"(graphwright_\w+)\(", header))
    assert {name for name in defined if not name.startswith("gw_")} == declared


def test_the_code_beyond_the_weights_is_small(made: Path) -> None:
    # The bars of the project; a whole ResNet-18 is held to them in test_boards.py.
    assert (made / "run").stat().st_size <= 300_000
    assert (made / "model.so").stat().st_size <= 150_000


def test_the_manifest_has_the_digest_of_every_file(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    names = {path.name for path in made.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == names
    for name, known in manifest["files"].items():
        assert hashlib.sha256((made / name).read_bytes()).hexdigest() == known["sha256"]
    assert manifest["target"]["id"] == "raspberry-pi-4b"
    assert "neon" in manifest["target"]["features"]


def test_the_licences_of_what_is_inside(made: Path) -> None:
    text = (made / "LICENSES.txt").read_text()
    assert all(part in text for part in ("Apache License", "musl as a whole is licensed", "Zig"))


def test_one_file_and_one_program(image: torch.Tensor, tmp_path: Path) -> None:
    alone = bundle(network(), (image,), tmp_path / "alone", executable=True, single_file=True)
    assert not list(alone.glob("*.safetensors"))
    assert not (alone / "model.so").exists()
    assert (alone / "run").stat().st_mode & 0o111
    (found,) = call(alone, "cortex-a72", {"input": image}, tmp_path)
    assert_like_float64(found, network(), {"input": image}, ROUNDING)
    refused(run(alone, "cortex-a72", "--weights", tmp_path / "w"), "the weights are inside this program; leave it out")
    other = network()
    with torch.no_grad():
        other[5].bias += 1.0  # equal code and weights of equal size: the old weights must not be taken from a cache
    again = bundle(other, (image,), tmp_path / "again", executable=True, single_file=True)
    (shifted,) = call(again, "cortex-a72", {"input": image}, tmp_path)
    np.testing.assert_allclose(shifted, found + 1.0, rtol=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 1 MB inside a program and a library."""
    torch.manual_seed(0)
    model = nn.Linear(512, 512).eval()
    return bundle(model, (torch.ones(2, 512),), tmp_path_factory.mktemp("whole") / "out", single_file=True)


@pytest.mark.parametrize("keep", [0.3, 0.9, -8192, "last byte"])
def test_a_program_that_was_cut(whole: Path, tmp_path: Path, keep: float | str) -> None:
    """Not killed by the first page that is missing (SIGBUS): what runs lies in front of the weights."""
    content = (whole / "run").read_bytes()
    last = content.rindex(b"end of the weights")
    assert last > 0.95 * len(content)
    size = last + 17 if isinstance(keep, str) else int(keep * len(content)) if keep > 0 else last + int(keep)
    cut = Path(shutil.copytree(whole, tmp_path / "cut"))
    (cut / "run").write_bytes(content[:size])
    refused(run(cut, "cortex-a72"), "this file is truncated")
    assert run(cut, "cortex-a72", "--describe").returncode == 0
    assert run(whole, "cortex-a72").returncode == 0


class Odd(nn.Module):
    """Several inputs and outputs: an input, a constant, one value twice, other dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(3.0))

    def forward(self, size: torch.Tensor, ids: torch.Tensor, flags: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total = size + ids.float()
        return total, size, self.table, total, ids * 2, ~flags, size.double().sum()


def test_outputs_that_are_no_result_of_a_kernel(tmp_path: Path) -> None:
    arguments = (torch.randn(2, 3), torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([True, False]))
    model = Odd()
    made = bundle(model, arguments, tmp_path / "odd")
    found = call(made, "cortex-a72", dict(zip(("size", "ids", "flags"), arguments, strict=True)), tmp_path)
    for value, expected in zip(found, model(*arguments), strict=True):
        assert value.dtype == expected.numpy().dtype
        np.testing.assert_allclose(value, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool])
def test_noise_of_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    made = bundle(nn.Identity(), (torch.zeros(40, 50, dtype=dtype),), tmp_path / "same", executable=True)
    assert run(made, "cortex-a53", "--output", tmp_path / "y.bin").returncode == 0
    noise = torch.frombuffer(bytearray((tmp_path / "y.bin").read_bytes()), dtype=dtype).double()
    assert noise.numel() == 2000
    if dtype == torch.bool:
        assert 0.4 < noise.mean() < 0.6
    else:
        assert noise.abs().max() <= 1
        assert abs(noise.mean()) < 0.05  # a standard deviation of 0.577 / sqrt(2000) = 0.013
        assert abs(noise.std() - 3**-0.5) < 0.03


def test_a_model_that_computes_nothing(tmp_path: Path) -> None:
    x = torch.randn(2, 3)
    made = bundle(nn.Identity(), (x,), tmp_path / "identity")
    (found,) = call(made, "cortex-a53", {"input": x}, tmp_path)
    np.testing.assert_array_equal(found, x.numpy())
    refused(run(made, "cortex-a53", "--weights", "w"), "--weights w: this model has no weights; leave it out")


@pytest.mark.parametrize(
    ("keep", "message"), [(0, "0 bytes"), (100, "100 bytes"), (-1, "copy the file of this bundle again")]
)
def test_truncated_weights(copy: Path, keep: int, message: str) -> None:
    file = copy / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(run(copy, "cortex-a72"), "weights.safetensors", message)


def test_missing_weights_and_those_of_another_model(copy: Path) -> None:
    file = copy / "weights.safetensors"
    content = file.read_bytes()
    file.unlink()
    refused(run(copy, "cortex-a72"), "cannot be opened")
    file.write_bytes(content.replace(b"F32", b"I32"))  # of the same size
    refused(run(copy, "cortex-a72"), "another model")
    file.write_bytes(content)
    assert run(copy, "cortex-a72", "--weights", file).returncode == 0


def test_weights_of_the_same_model_trained_on(made: Path, image: torch.Tensor, tmp_path: Path) -> None:
    other = network()
    with torch.no_grad():
        other[0].bias[0] += 1
    trained = bundle(other, (image,), tmp_path / "trained")
    refused(run(made, "cortex-a72", "--weights", trained / "weights.safetensors"), "another model")


class Keys(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"a": x + 1, "a=b": x + 2}


def test_names_with_a_sign_of_equality(tmp_path: Path) -> None:
    made = bundle(Keys(), (torch.zeros(3),), tmp_path / "keys", executable=True)
    assert run(made, "cortex-a53", "--output", f"a=b={tmp_path}/2", "--output", f"a={tmp_path}/1").returncode == 0
    first, second = (np.frombuffer((tmp_path / name).read_bytes(), np.float32) for name in "12")
    np.testing.assert_allclose(second - first, 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file holds 0"),
        (bytes(12289), "the file holds 12289"),
        (b"\x93NUMPY", "the file holds 6"),
        (b"\x93NUMPY\x01\x00\xff\xff{'descr'", "ends within its header"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "cannot be right"),
        (b"\x93NUMPY\x01\x00\x04\x00abc\n", "no 'descr'"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4'\n", "no 'fortran_order'"),
    ],
)
def test_inputs_that_are_no_arrays(made: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(content)
    refused(run(made, "cortex-a72", "--input", tmp_path / "x"), message)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 3, 32, 31), np.float32), "the file has shape (1, 3, 32, 31)"),
        (np.zeros((1, 3, 32), np.float32), "the file has shape (1, 3, 32)"),
        (np.zeros((1, 3, 32, 32, 1), np.float32), "the file has shape (1, 3, 32, 32, 1)"),
        (np.float32(0), "the file has shape ()"),
        (np.zeros((1, 3, 32, 32)), "the file has '<f8'"),
        (np.zeros((1, 3, 32, 32), ">f4"), "the file has '>f4'"),
        (np.zeros((1, 3, 32, 32), [("a", "<f4")]), "convert it"),
        (np.asfortranarray(np.zeros((1, 3, 32, 32), np.float32)), "Fortran"),
    ],
)
def test_arrays_of_another_kind(made: Path, tmp_path: Path, array: Any, message: str) -> None:
    np.save(tmp_path / "x.npy", array)
    refused(run(made, "cortex-a72", "--input", tmp_path / "x.npy"), message)


def test_an_array_that_ends_early(made: Path, image: torch.Tensor, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", image.numpy())
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-4])
    refused(run(made, "cortex-a72", "--input", tmp_path / "x.npy"), "12288 bytes, and the file holds 12284")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fast", "1"), "there is no option --fast"),
        (("--input",), "--input needs a value"),
        (("--repeat", "0"), "a whole number of at least 1"),
        (("--threads", "two"), "a whole number of at least 1"),
        (("--input", "/nowhere/x.npy"), "cannot be opened"),
        (("--input", "/nowhere=/x.npy"), "cannot be opened"),
        (("--input", "image=x.npy"), "there is no input image; the model has input"),
        (("--output", "scores=y.npy"), "there is no output scores; the model has linear"),
        (("--output", "a", "--output", "b"), "the model has 1 output"),
        (("--input", "/"), "/: is a directory, not a file of input"),
        (("--input", "/dev/zero"), "/dev/zero: is a pipe or device, not a file of input"),
        (("--input", "a.npy", "--input", "input=b.npy"), "--input input=b.npy: input has a.npy already"),
        (("--threads", "257"), "--threads 257: at most 256"),
    ],
)
def test_wrong_arguments(made: Path, arguments: tuple[str, ...], message: str) -> None:
    refused(run(made, "cortex-a72", *arguments), message)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("/nowhere/y.npy", "cannot be written into /nowhere/: No such file or directory"),
        ("/", "/: is a directory: name a file for linear"),
        ("/proc/version/y", "/proc/version/y: cannot be written"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(made: Path, output: str, message: str) -> None:
    done = run(made, "cortex-a72", "--output", output)
    refused(done, message)
    assert done.stdout == ""  # not even loaded


def test_the_time_of_each_kernel(made: Path) -> None:
    done = run(made, "cortex-a72", "--profile", "--repeat", "3", "--threads", "1")
    times = [float(us) for us in re.findall(r"^step \d+: ([\d.]+) us$", done.stdout, re.MULTILINE)]
    assert len(times) > 1
    found = re.search(r"min ([\d.]+), median ([\d.]+)", done.stdout)
    assert found is not None
    assert 0 < sum(times) <= 1e3 * float(found[2]) * 3  # medians one by one, of three calls


def test_what_is_not_bundled(image: torch.Tensor, made: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bundles are made for aarch64"):
        bundle(network(), (image,), tmp_path / "x86", target="x86-64-v3")
    with pytest.raises(InputError, match=r"does not end in \.gw"):
        bundle(network(), (image,), tmp_path / "out.gw")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="choose another name"):
        bundle(network(), (image,), tmp_path / "taken")
    assert (tmp_path / "taken" / "letter.txt").read_text() == "mine"


class Halves(nn.Module):
    """To float16 and from it, which 32-bit Arm without VFPv4 does by calls of the runtime."""

    def forward(self, single: torch.Tensor, double: torch.Tensor, half: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return single.half(), double.half(), half.float(), torch.softmax(half[:1000], 0)


def test_halves_on_a_processor_that_has_none(tmp_path: Path) -> None:
    """Every half, the midpoints between neighbours, and what lies just beside those: numpy's bits."""
    halves = np.arange(0x10000, dtype=np.uint16).view(np.float16)
    finite = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = (finite[:-1] + finite[1:]) / 2
    beside = [np.nextafter(middles.astype(np.float32), np.float32(end)).astype(np.float64) for end in (0, np.inf)]
    rest = [65519.996, 65520.0, 1e30, np.inf, np.nan, 2.0**-25, 2.0**-26, 1e-45]
    values = np.concatenate([finite, middles, *beside, rest])
    single = np.concatenate([values, -values]).astype(np.float32)
    double = single.astype(np.float64)  # others are rounded twice: LLVM goes through float32 here
    arguments = {"single": single, "double": double, "half": halves}
    tensors = {name: torch.from_numpy(value) for name, value in arguments.items()}
    made = bundle(Halves(), tuple(tensors.values()), tmp_path / "out", target="armv7", executable=True)
    from_single, from_double, widened, soft = call(made, "cortex-a8", tensors, tmp_path)
    with np.errstate(over="ignore"):
        expected = single.astype(np.float16), double.astype(np.float16), halves.astype(np.float32)
    for found, wanted in zip((from_single, from_double, widened), expected, strict=True):
        known = ~np.isnan(wanted)
        assert np.isnan(found[~known]).all()
        bits = np.uint16 if found.dtype == np.float16 else np.uint32
        np.testing.assert_array_equal(found.view(bits)[known], wanted.view(bits)[known])
    np.testing.assert_allclose(soft, torch.softmax(tensors["half"][:1000].float(), 0).numpy(), rtol=2**-10)


def test_models_of_several_shapes_are_not_bundled(tmp_path: Path) -> None:
    x, sizes = torch.zeros(3, 8), ({0: torch.export.Dim("batch")},)
    model = nn.Linear(8, 4).eval()
    dynamic = graphwright.compile(model, (x,), target="raspberry-pi-4b", dynamic_shapes=sizes)
    with pytest.raises(InputError, match="a bundle has fixed shapes: leave dynamic_shapes= out"):
        dynamic.bundle(tmp_path / "out")
    lazy = graphwright.compile(model, target="raspberry-pi-4b")
    with pytest.raises(InputError, match="pass example_inputs"):
        lazy.bundle(tmp_path / "out")
    lazy.prepare((x,))
    assert (lazy.bundle(tmp_path / "out") / "run").exists()
    lazy.prepare((torch.zeros(2, 8),))
    with pytest.raises(InputError, match="2 sets of shapes"):
        lazy.bundle(tmp_path / "again")
    assert not (tmp_path / "again").exists()


class Places(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.one_hot(x, 5) * 2


def test_assertions_are_left_out(tmp_path: Path) -> None:
    x = torch.tensor([[4, 0], [2, 2]])
    made = bundle(Places(), (x,), tmp_path / "places", executable=True)
    (found,) = call(made, "cortex-a53", {"x": x}, tmp_path)
    np.testing.assert_array_equal(found, Places()(x).numpy())
    graph = capture(export(Places(), (x,))).graph
    assert without_assertions(graph, detect()) == 0  # PyTorch raises here
    assert without_assertions(graph, lookup("raspberry-pi-4b")) == 2
    assert without_assertions(graph, lookup("raspberry-pi-4b")) == 0
    assert not [
        node for node in graph.graph.nodes if node.target in (torch.ops.aten.ge.Scalar, torch.ops.aten.lt.Scalar)
    ]


class Unsupported(nn.Module):
    """Operators that have no lowering, on lines of their own; one inside a module of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(10, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = torch.linalg.eigvalsh(x @ x.T)
        waves = torch.fft.rfft(x).abs()
        words = self.bag(x.abs().long())
        return values, waves, words, torch.relu(x)


def test_all_that_has_no_lowering_is_named_before_code_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(*_: Any) -> None:
        raise AssertionError("code was generated")

    monkeypatch.setattr(library, "build", generate)
    with pytest.raises(UnsupportedOp, match="cannot be compiled for raspberry-pi-4b") as raised:
        graphwright.compile(Unsupported().eval(), (torch.randn(4, 4),), target="raspberry-pi-4b")
    source, first = inspect.getsourcelines(Unsupported)
    for operator, line in (("_linalg_eigh", "eigvalsh"), ("_fft_r2c", "rfft"), ("_embedding_bag", "self.bag(")):
        number, text = next((first + i, text.strip()) for i, text in enumerate(source) if line in text)
        expected = rf"{operator}.*\n\s+File \"{__file__}\", line {number}, in forward: {re.escape(text)}"
        assert re.search(expected, str(raised.value))


def test_an_operator_of_pytorchs_own_modules_alone_is_found_by_its_module() -> None:
    model = nn.Sequential(nn.Sequential(nn.Identity(), nn.EmbeddingBag(10, 4))).eval()
    with pytest.raises(UnsupportedOp, match=r"^1 operator cannot be compiled") as raised:
        graphwright.compile(model, (torch.zeros(2, 3, dtype=torch.int64),), target="raspberry-pi-4b")
    assert "in the module '0.1', torch.nn.modules.sparse.EmbeddingBag" in str(raised.value)


def test_the_command_makes_bundles_for_boards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(4, 3).eval(), (torch.zeros(2, 4),)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["compile", "small:make", "--target", "raspberry-pi-4b", "-o"]
    assert CliRunner().invoke(app, [*arguments, str(tmp_path / "out")]).exit_code == 0
    assert run(tmp_path / "out", "cortex-a72").returncode == 0
    alone = CliRunner().invoke(app, [*arguments, str(tmp_path / "alone"), "--executable", "--single-file"])
    assert alone.exit_code == 0
    assert {p.name for p in (tmp_path / "alone").iterdir()} == {"run", "README.txt", "LICENSES.txt", "manifest.json"}
    assert CliRunner().invoke(app, [*arguments, str(tmp_path / "file.gw")]).exit_code == 0
    assert graphwright.compiler.artifact.inspect(tmp_path / "file.gw")["target"]["id"] == "raspberry-pi-4b"
    assert CliRunner().invoke(app, [*arguments, str(tmp_path / "dir"), "--artifact"]).exit_code == 0
    assert not (tmp_path / "dir" / "run").exists()
    both = CliRunner().invoke(app, [*arguments, str(tmp_path / "both"), "--artifact", "--executable"])
    assert "leave --artifact out" in both.output
