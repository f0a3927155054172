"""Models for every kind of board, run on a software model of its processor, against float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from boards import assert_like_float64, call, emulator
from torch import nn

import graphwright
from graphwright.backends.aot import elf
from graphwright.compiler.benchmarking import zoo
from graphwright.hwdb import lookup

# Boards, with the processor that QEMU has nearest to theirs: never one with more instructions.
BOARDS = {
    "raspberry-pi-zero-2w": "cortex-a53",
    "raspberry-pi-4b": "cortex-a72",
    "raspberry-pi-5": "cortex-a76",
    "neoverse-n1": "neoverse-n1",
    "raspberry-pi-2b": "cortex-a7",
    "armv7": "cortex-a8",
}


class Recurrent(nn.Module):
    """A GRU of two layers over 12 steps, and a decision."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(20, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.gru(x)[0][:, -1])
        return y


def recurrent() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    return Recurrent().eval(), (torch.randn(2, 12, 20),)


def small(name: str) -> Callable[[], Any]:
    return lambda: zoo.build(name, small=True)


# The error allowed, relative L2. Float32 sums of up to 1536 terms; Winograd's transforms double it.
MODELS: dict[str, tuple[Callable[[], Any], float]] = {
    "resnet18": (small("resnet18"), 1e-5),
    "mobilenetv2": (small("mobilenetv2"), 1e-5),
    "minilm": (small("minilm"), 5e-6),
    "gru": (recurrent, 5e-6),
}


class FirstResult(nn.Module):
    """A model of transformers as a function from tensors to the first tensor of its result."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        result = self.model(*tensors)
        first: torch.Tensor = result if isinstance(result, torch.Tensor) else result[0]
        return first


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("board", BOARDS)
def test_a_model_on_a_board(name: str, board: str, tmp_path: Path) -> None:
    emulator(lookup(board).isa)
    make, rtol = MODELS[name]
    model, inputs = make()
    compiled = graphwright.compile(model, inputs, target=board)
    made = compiled.bundle(tmp_path / "out", executable=True)
    named = {spec.name: tensor for spec, tensor in zip(compiled.inputs, inputs, strict=True)}
    found = call(made, BOARDS[board], named, tmp_path, "--threads", "2")
    assert_like_float64(found[0], FirstResult(model), named, rtol)


@pytest.mark.parametrize(
    ("board", "cpu", "instructions"),
    [
        ("raspberry-pi-4b", "cortex-a72", ["smull and sadalp"] * 4),
        ("raspberry-pi-5", "cortex-a76", ["sdot"] * 4),
        ("neoverse-v1", "max", ["usmmla"] * 3 + ["usdot"]),
    ],
)
def test_products_of_bytes(board: str, cpu: str, instructions: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(6, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2), nn.ReLU(),
        nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 49, 30),
    ).eval()  # fmt: skip
    images = [torch.randn(1, 6, 16, 16) for _ in range(4)]
    machine = dataclasses.replace(lookup(board), cores=4)  # of a server's many, so small products keep few busy
    quantised = graphwright.quantize(model, images, target=machine)
    compiled = graphwright.compile(quantised, images[0], target=machine)
    choices = [kernel.choice for kernel in compiled.report().kernels if kernel.algorithm.startswith("int8")]
    assert [choice.split(",")[0] for choice in choices] == instructions  # one row is not worth pairs of rows
    (name,) = (spec.name for spec in compiled.inputs)
    (found,) = call(compiled.bundle(tmp_path / "out", executable=True), cpu, {name: images[0]}, tmp_path)
    with torch.no_grad():
        expected = quantised(images[0]).numpy()
    assert abs(found - expected).max() <= 1e-6 * abs(expected).max()  # integers are exact; one scale is rounded


@pytest.mark.slow
def test_a_whole_resnet_is_small_but_for_its_weights(tmp_path: Path) -> None:
    model, _ = zoo.build("resnet18")
    image = torch.randn(1, 3, 64, 64)
    made = graphwright.compile(model, (image,), target="raspberry-pi-4b").bundle(tmp_path / "out")
    assert (made / "run").stat().st_size <= 300_000
    assert (made / "model.so").stat().st_size <= 150_000
    emulator("aarch64")
    (found,) = call(made, "cortex-a72", {"pixel_values": image}, tmp_path)
    assert_like_float64(found, FirstResult(model), {"pixel_values": image}, 1e-5)  # as above


class Gamma(nn.Module):
    """A function that comes from the C library, which takes floats in floating-point registers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.lgamma(x.abs() + 1) // 0.01


@pytest.mark.parametrize("target", ["raspberry-pi-2b", "armv7"])
def test_functions_of_the_c_library_on_32_bits(target: str, tmp_path: Path) -> None:
    x = torch.linspace(-20, 20, 77)
    made = graphwright.compile(Gamma(), (x,), target=target).bundle(tmp_path / "out")
    assert "lgammaf" in elf.read(made / "model.so").undefined
    (found,) = call(made, BOARDS[target], {"x": x}, tmp_path)
    expected = Gamma()(x).numpy()
    assert abs(found - expected).max() <= 1  # the last digit before rounding down


def test_the_program_of_a_32_bit_board(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4), nn.Softmax(-1)).eval()
    x = torch.randn(3, 16)
    made = graphwright.compile(model, (x,), target="raspberry-pi-2b").bundle(tmp_path / "out")
    program, library = elf.read(made / "run"), elf.read(made / "model.so")
    assert program.machine == library.machine == "arm"
    assert program.bits == library.bits == 32
    assert program.flags & library.flags & 0x400, "floats go in floating-point registers (EF_ARM_ABI_FLOAT_HARD)"
    assert program.needed == ()
    assert set(library.needed) <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-armhf.so.3"}
    versions = {tuple(map(int, v.removeprefix("GLIBC_").split("."))) for _, v in library.versions if v[0] == "G"}
    assert max(versions) <= (2, 28)
    (found,) = call(made, "cortex-a7", {"input": x}, tmp_path)
    assert_like_float64(found, model, {"input": x}, 1e-6)
