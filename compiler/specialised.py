"""A model compiled on demand: once for every set of input shapes it is called with."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from ..errors import CaptureError, InputError

if TYPE_CHECKING:
    from .capture import Model
    from .compiled import Compiled
    from .report import Report

# A model that is called with ever new shapes would compile for ever.
LIMIT = 32


class Specialised:
    """Called like the model. The first call with new shapes compiles; later ones go straight to the machine code.

    With `dynamic_shapes`, shapes outside the declared ranges are refused (InputError) when they are first met.
    """

    def __init__(
        self,
        model: Model,
        compile_for: Callable[[tuple[Any, ...], dict[str, Any]], Compiled],
        dynamic_shapes: Any = None,
    ) -> None:
        self._model = model
        self._compile_for = compile_for
        self._dynamic_shapes = dynamic_shapes
        self._compiled: dict[Any, Compiled] = {}
        self._lock = threading.Lock()
        self._last: Compiled | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, compiling it first where these shapes are new."""
        return self.prepare(args, kwargs)(*args, **kwargs)

    def prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Compiled:
        """Compile for these arguments, unless that was done before, and return the compiled model."""
        kwargs = kwargs or {}
        key = _key(args, kwargs)
        compiled = self._compiled.get(key)
        if compiled is None:
            with self._lock:
                compiled = self._compiled.get(key) or self._specialise(key, args, kwargs)
        self._last = compiled
        return compiled

    @property
    def specialisations(self) -> tuple[Compiled, ...]:
        """What has been compiled so far."""
        return tuple(self._compiled.values())

    def report(self) -> Report:
        """The report of the specialisation used last."""
        return self._require().report()

    @property
    def graph(self) -> torch.fx.GraphModule:
        """The rewritten graph of the specialisation used last."""
        return self._require().graph

    def save(self, path: str | Path) -> Path:
        """Save the one specialisation there is; raises InputError where there are several, or none yet."""
        last = self._require()
        if (count := len(self._compiled)) > 1:
            raise InputError(
                f"the model is compiled for {count} sets of shapes, and an artifact holds one: save each by itself, "
                'as in model.specialisations[0].save("model.gw")'
            )
        return last.save(path)

    def bundle(self, path: str | Path, *, executable: bool = False, single_file: bool = False) -> Path:
        """Bundle the one specialisation there is; raises InputError for `dynamic_shapes`, for several, or none yet."""
        if self._dynamic_shapes is not None:
            raise InputError(
                "a bundle has fixed shapes: leave dynamic_shapes= out, and make one for every size that is needed"
            )
        last = self._require()
        if (count := len(self._compiled)) > 1:
            raise InputError(
                f"the model is compiled for {count} sets of shapes, and a bundle has one: bundle each by itself, "
                'as in model.specialisations[0].bundle("out")'
            )
        return last.bundle(path, executable=executable, single_file=single_file)

    def _require(self) -> Compiled:
        if self._last is None:
            raise InputError(
                "the model has not been called yet, and is compiled at its first call: pass example_inputs"
            )
        return self._last

    def _specialise(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Compiled:
        if len(self._compiled) >= LIMIT:
            raise InputError(
                f"called with more than {LIMIT} sets of shapes; pad the inputs to a few sizes, "
                "or compile once for every size you need"
            )
        if self._dynamic_shapes is not None:
            self._check_ranges(args, kwargs)
        self._compiled[key] = compiled = self._compile_for(args, kwargs)
        return compiled

    def _check_ranges(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let torch.export say whether the declared dynamic shapes admit these arguments."""
        from .capture import export

        try:
            export(self._model, args, kwargs, self._dynamic_shapes)
        except CaptureError as error:
            reason = str(error.__cause__).strip().splitlines()[0]
            if "not in range" not in reason:
                raise
            raise InputError(f"called with a size outside of dynamic_shapes: {reason}") from error


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    described = tuple(
        (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else (type(leaf).__name__, repr(leaf))
        for leaf in leaves
    )
    return described, spec
