"""What prune, prepare_qat and convert are given: modules, and names of modules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from ...errors import InputError, suggest
from .learned_steps import ValueStep
from .quantize import Quantized


def check_module(model: Any, function: str, verb: str) -> None:
    """Raise InputError unless `model` is a module whose layers `function` can change (`verb`)."""
    if isinstance(model, Quantized):
        raise InputError(
            f"{function}: the model is quantised already, and its layers are integer operators: {verb} the model in "
            "float32, and quantise what that gives"
        )
    if isinstance(model, nn.Module):
        return
    what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    advice = "the nn.Module it was exported from" if isinstance(model, ExportedProgram) else "an nn.Module"
    raise InputError(f"{function} works on the layers of an nn.Module, and got {what}: pass {advice}")


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare_qat` made the model."""
    return any(isinstance(module, ValueStep) for module in model.modules())


def check_keep(keep: Any, what: str, names: Collection[str]) -> None:
    """Raise InputError unless `keep` is a list of patterns each of which fits one of the layers' names."""
    if isinstance(keep, str) or not isinstance(keep, Sequence) or not all(isinstance(name, str) for name in keep):
        raise InputError(f"keep is a list of names or patterns of modules that {what}, got {keep!r}")
    for one in keep:
        if not any(fnmatchcase(name, one) for name in names):
            raise InputError(f"keep: no layer is called {one!r}{suggest(one, names)}; there are {few(names)}")


def few(names: Collection[str]) -> str:
    """The first ten."""
    known = list(names)
    return ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
