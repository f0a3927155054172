"""The MODEL and --input of the command line: a .pt2 file, module:factory or a name of the zoo; SHAPE[:dtype]."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import CaptureError, GraphwrightError, InputError, suggest
from ...hwdb.dtypes import dtype_name

_DTYPES = (
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
)


@dataclass(frozen=True)
class InputSpec:
    """The shape and dtype of one input tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def example(self, generator: torch.Generator) -> torch.Tensor:
        """Normal noise for floating point, zeros and ones otherwise: those index any table of at least two rows."""
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(self.shape, generator=generator).to(self.dtype)
        return torch.randint(0, 2, self.shape, generator=generator).to(self.dtype)


def parse_input(text: str) -> InputSpec:
    """Read `1x3x224x224`, `1x128:int64` or `scalar:float32`. Raises InputError for anything else."""
    shape, _, dtype = text.partition(":")
    name = dtype_name(dtype or "float32")
    if name not in _DTYPES:
        raise InputError(f"--input {text}: unknown dtype {dtype!r}{suggest(name, _DTYPES)}; use {', '.join(_DTYPES)}")
    if shape != "scalar" and not re.fullmatch(r"\d+(x\d+)*", shape):
        raise InputError(f"--input {text}: write the shape as 1x3x224x224, then :dtype if it is not float32")
    sizes = () if shape == "scalar" else tuple(int(size) for size in shape.split("x"))
    return InputSpec(sizes, getattr(torch, name))


def load_model(text: str, inputs: Sequence[str] = ()) -> tuple[Any, Any]:
    """Return (model, example inputs) for a MODEL argument and its --input options.

    Example inputs are None for a .pt2 file that carries its own. Raises GraphwrightError where MODEL does not exist or
    its factory fails, and InputError where nothing says what the inputs are.
    """
    specs = [parse_input(item) for item in inputs]
    given: Any = tuple(spec.example(torch.Generator().manual_seed(i)) for i, spec in enumerate(specs)) or None
    if ":" in text and not Path(text).exists():
        model, own = _from_factory(text)
    elif text.endswith((".pt2", ".ep")) or os.sep in text or Path(text).exists():
        model, own = _from_file(Path(text))
    else:
        model, own = _from_zoo(text)
    if given is None and own is None:
        raise InputError(
            f"{text} brings no example inputs: add --input SHAPE[:dtype] for every input tensor, such as "
            "--input 1x3x224x224, or let the factory return (model, example_inputs)"
        )
    return model, given if given is not None else own


def _from_file(path: Path) -> tuple[Any, Any]:
    from ..capture import export

    program = export(path)
    if program.example_inputs is None:
        return program, None
    args, kwargs = program.example_inputs
    return program, dict(kwargs) if kwargs and not args else tuple(args)


def _from_zoo(name: str) -> tuple[Any, Any]:
    from ..benchmarking import zoo

    if name not in zoo.names():
        raise GraphwrightError(
            f"{name!r} is not a model: give a .pt2 file, module:factory, or one of the example models "
            f"{', '.join(zoo.names())}{suggest(name, zoo.names())}"
        )
    return zoo.build(name)


def _from_factory(text: str) -> tuple[Any, Any]:
    module_name, _, attribute = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: a model file lies where one works
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise CaptureError(f"{text}: importing {module_name} failed: {error}") from error
        raise GraphwrightError(
            f"{text}: there is no module {error.name!r} here or installed; MODEL is a .pt2 file or module:factory"
        ) from error
    except Exception as error:
        raise CaptureError(f"{text}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
            raise GraphwrightError(f"{text}: {module_name} has no {attribute!r}{suggest(part, public)}")
        found = getattr(found, part)
    if isinstance(found, torch.nn.Module):
        return found.eval(), None
    if not callable(found):
        raise GraphwrightError(f"{text} is a {type(found).__name__}; name a function that returns the model")
    try:
        made = found()
    except Exception as error:
        raise CaptureError(f"{text}() raised {type(error).__name__}: {error}") from error
    return _checked(text, made)


def _checked(text: str, made: Any) -> tuple[Any, Any]:
    """Split what a factory returned into (model, example inputs or None)."""
    model, own = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if isinstance(model, torch.nn.Module):
        model = model.eval()
    elif not callable(model) and not isinstance(model, torch.export.ExportedProgram):
        raise GraphwrightError(f"{text}() returned a {type(made).__name__}; return a model, or (model, example_inputs)")
    if own is not None and not isinstance(own, (torch.Tensor, Sequence, Mapping)):
        raise GraphwrightError(
            f"{text}() returned example inputs of type {type(own).__name__}; "
            "return a tensor, a tuple of arguments or a mapping of keywords"
        )
    return model, own
