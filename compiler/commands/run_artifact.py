"""`graphwright run`: call a loaded artifact on inputs from a .npz file, or on noise, and time it."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy
import torch
from torch.utils import _pytree as pytree

from ...errors import GraphwrightError, InputError, suggest
from ..capture import TensorSpec
from .model_argument import InputSpec


def run_artifact(compiled: Any, inputs: Path | None, output: Path | None, repeat: int) -> Iterator[str]:
    """Call `compiled`, write its results to `output`, and yield lines that describe them.

    Raises InputError, before any call, where `inputs` is not a .npz file of exactly the arrays that the model takes, or
    `output` cannot be written.
    """
    check_output(output)
    specs: Sequence[TensorSpec] = compiled.inputs
    tensors = _noise(specs) if inputs is None else _read(inputs, specs)
    if inputs is None:
        yield "inputs: noise (give --input FILE.npz for your own)"
    args, kwargs = compiled.arguments(tensors)
    with torch.no_grad():
        results = compiled(*args, **kwargs)
        seconds = min(_time(compiled, args, kwargs) for _ in range(repeat))
    named = _named(results)
    for name, value in named.items():
        yield f"{name}: {_describe(value)}"
    if output is not None:
        found = {name: array_of(value) for name, value in named.items()}
        write_results(output, {name: array for name, array in found.items() if array.dtype != object})  # not None
        yield f"wrote {output}"
    yield f"{seconds * 1e3:.3f} ms a call, the fastest of {repeat}"


def check_output(output: Path | None) -> None:
    """Raise InputError where results cannot be written to `output`, as far as can be told without touching it."""
    if output is None:
        return
    folder = output.absolute().parent
    if output.is_dir():
        raise InputError(f"--output {output} is a directory: name a file in it")
    if not folder.is_dir():
        raise InputError(f"--output {output}: there is no directory {folder}")
    if not os.access(output if output.exists() else folder, os.W_OK):
        raise InputError(f"--output {output}: may not be written")


def write_results(output: Path, arrays: dict[str, Any]) -> None:
    """Write a .npz file. Raises GraphwrightError where that fails."""
    try:
        # As numpy.savez does, whose own arguments no array can be named after.
        with ZipFile(output, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    numpy.lib.format.write_array(file, numpy.asanyarray(array), allow_pickle=False)
    except OSError as error:
        raise GraphwrightError(f"cannot write the results to {output}: {error}") from error


def _time(compiled: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    started = time.perf_counter()
    compiled(*args, **kwargs)
    return time.perf_counter() - started


def _noise(specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [InputSpec(spec.shape, spec.dtype).example(generator) for spec in specs]


def _read(file: Path, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
    """Tensors by input name, or in order where the file has numpy's own names arr_0, arr_1, ..."""
    given = arrays(file, "--input")
    names = [spec.name for spec in specs]
    if set(given) == {f"arr_{i}" for i in range(len(specs))}:
        given = {name: given[f"arr_{i}"] for i, name in enumerate(names)}
    for name in given:
        if name not in names:
            raise InputError(f"--input {file}: the model takes {', '.join(names)}, not {name!r}{suggest(name, names)}")
    missing = [name for name in names if name not in given]
    if missing:
        raise InputError(f"--input {file}: {', '.join(missing)} missing; the model takes {', '.join(names)}")
    return [tensor_of(given[spec.name], spec) for spec in specs]


def arrays(file: Path, option: str) -> dict[str, Any]:
    """The arrays of a .npz file. Raises InputError, naming the option, where it is something else."""
    try:
        with numpy.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise InputError(f"{option} {file}: cannot be read: {error.strerror or error}") from error
    except (ValueError, BadZipFile, AttributeError, TypeError, EOFError, zlib.error) as error:
        raise InputError(
            f"{option} {file}: is not a .npz file of arrays, or damaged: write it by numpy.savez(FILE, NAME=ARRAY)"
        ) from error


def tensor_of(array: Any, spec: TensorSpec) -> torch.Tensor:
    """The array as a tensor, float32 as what `spec` is where that is bfloat16: numpy has none, its values travel so.

    Raises InputError for arrays of a dtype that tensors do not have.
    """
    try:
        tensor = torch.from_numpy(numpy.ascontiguousarray(array).reshape(array.shape))
    except TypeError as error:
        raise InputError(f"{spec.name}: arrays of {array.dtype} are not tensors") from error
    return tensor.to(spec.dtype) if spec.dtype == torch.bfloat16 and tensor.dtype == torch.float32 else tensor


def _named(results: Any) -> dict[str, Any]:
    """Leaves of the results under names made of their keys and positions."""
    leaves, _ = pytree.tree_flatten_with_path(results)
    return {pytree.keystr(path).strip("[].'\"").replace("']['", ".") or "output": leaf for path, leaf in leaves}


def array_of(value: Any) -> Any:
    """A result as an array, bfloat16 as float32."""
    if not isinstance(value, torch.Tensor):
        return numpy.asarray(value)
    return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()


def _describe(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    text = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if value.numel() == 0 or value.dtype.is_complex:
        return text
    wide = value.double()
    return f"{text}, from {float(wide.min()):.4g} to {float(wide.max()):.4g}, mean {float(wide.mean()):.4g}"
