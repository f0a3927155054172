"""Plain functions as models: torch.export takes modules only."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import proxy

from ..errors import CaptureError


class Function(torch.nn.Module):
    """A module that calls a function. Nodes are traced to lines of the function, and to none of this file."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        # Of the frames that are not called `forward`, torch keeps those of functions that are registered.
        register = getattr(proxy, "_register_stack_trace_anchor", None)
        if register is not None:
            register(inspect.unwrap(function))

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    forward = _call


def as_module(model: Any) -> torch.nn.Module:
    """`model` itself, or a module around it where it is a function; raises CaptureError for anything else."""
    if isinstance(model, torch.nn.Module):
        return model
    if callable(model):
        return Function(model)
    raise CaptureError(
        f"cannot compile a {type(model).__name__}: pass an nn.Module, a function, an ExportedProgram or a .pt2 path"
    )


def parameters_of(model: Any) -> tuple[str, ...]:
    """The names of the positional parameters, for calls with keywords; empty where they are unknown."""
    if isinstance(model, (ExportedProgram, str, os.PathLike)):
        return ()
    try:
        signature = inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model)
    except (TypeError, ValueError):
        return ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in signature.parameters.items() if p.kind in positional)


def dynamic_shapes(module: torch.nn.Module, args: Sequence[Any], shapes: Any) -> Any:
    """What torch.export wants of the module around a function, for shapes given by the function's own parameters."""
    if not isinstance(module, Function) or shapes is None:
        return shapes
    names = parameters_of(module.function)
    given = dict(shapes) if isinstance(shapes, Mapping) else dict(zip(names, shapes, strict=False))
    positional = tuple(given.pop(name, None) for name in names[: len(args)])
    return {"args": positional, **given} if args else given
