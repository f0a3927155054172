"""The weights file: aligned, mapped, exact, and a proper safetensors file."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from graphwright.backends.aot.weights import ALIGNMENT, Layout, Weights, read_layout, write
from graphwright.errors import ArtifactError

DTYPES = ["float32", "float64", "float16", "bfloat16", "float8_e4m3fn"]
DTYPES += ["int8", "int16", "int32", "int64", "uint8", "bool"]


def described(tensors: dict[str, torch.Tensor]) -> Layout:
    return Layout.of({n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items()})


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def some_tensors() -> dict[str, torch.Tensor]:
    made = {f"{i}.{d}": (torch.randn(i, 3) * 10).to(getattr(torch, d)) for i, d in enumerate(DTYPES)}
    return {**made, "scalar": torch.tensor(3.5), "strided": torch.randn(6, 4).t()[1:, ::2]}


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path / "w", described(tensors), tensors)
    found = load_file(tmp_path / "w")
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor)
    assert all(name.startswith("__pad_") for name in set(found) - set(tensors))


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=12))
def test_every_tensor_is_aligned_and_none_overlap(made: list[tuple[str, list[int]]]) -> None:
    layout = Layout.of({str(i): (dtype, tuple(shape)) for i, (dtype, shape) in enumerate(made)})
    end = 0
    for entry in layout.entries.values():
        assert entry.offset % ALIGNMENT == 0
        assert entry.offset >= end
        end = entry.offset + entry.nbytes
    assert end <= layout.nbytes < end + ALIGNMENT


def test_the_mapped_bytes(tmp_path: Path) -> None:
    import ctypes

    tensors = some_tensors()
    layout = described(tensors)
    write(tmp_path / "w", layout, tensors)
    assert read_layout(tmp_path / "w") == layout
    with Weights(tmp_path / "w") as weights:
        assert weights.address % ALIGNMENT == 0
        assert weights.nbytes == layout.nbytes
        for name, entry in layout.entries.items():
            assert ctypes.string_at(weights.address + entry.offset, entry.nbytes) == bits(tensors[name])


def test_no_weights_at_all(tmp_path: Path) -> None:
    write(tmp_path / "w", Layout.of({}), {})
    assert load_file(tmp_path / "w") == {}
    with Weights(tmp_path / "w") as weights:
        assert weights.nbytes == 0


def test_equal_tensors_give_equal_files(tmp_path: Path) -> None:
    tensors = some_tensors()
    for name in "ab":
        write(tmp_path / name, described(tensors), {k: v.clone() for k, v in tensors.items()})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_tensors_must_be_those_the_code_was_compiled_for(tmp_path: Path) -> None:
    layout = Layout.of({"w": ("float32", (2, 3))})
    for wrong in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match="weight w is"):
            write(tmp_path / "w", layout, {"w": wrong})
    with pytest.raises(KeyError):
        write(tmp_path / "w", layout, {})
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 1 << 62), struct.pack("<Q", 56) + b"x" * 56])
def test_what_is_not_a_weights_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ArtifactError, match="not a whole weights file"):
        Weights(tmp_path / "w")


@pytest.mark.parametrize("cut", [1, 64, 200])
def test_a_truncated_file(tmp_path: Path, cut: int) -> None:
    tensors = some_tensors()
    write(tmp_path / "w", described(tensors), tensors)
    content = (tmp_path / "w").read_bytes()
    (tmp_path / "w").write_bytes(content[:-cut])
    with pytest.raises(ArtifactError, match="not a whole weights file"):
        Weights(tmp_path / "w")
