"""`torch.compile(model, backend="graphwright")`: found through the torch_dynamo_backends entry point.

Dynamo hands over graphs whose parameters are inputs. They are bound as constants (so that weights are packed once) and
watched: when one changes, the graph is compiled anew. One that changes sooner than compiling takes, again and again, is
passed in from then on. What graphwright cannot compile runs as the graph dynamo made.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils import _pytree as pytree

from ..errors import GraphwrightError, InputError
from ..hwdb import compile_target
from .obstacle import obstacle
from .watch import Watch
from .without_data import without_data

log = logging.getLogger(__name__)

# Compilations of one graph before calls of further shapes run in PyTorch.
SHAPES = 8
# Compilations that a constant may make useless at once, before it is passed in.
CHANGES = 3
OPTIONS = {
    *("precision", "tolerance", "fallback", "calibration", "int8", "threads", "verify", "cache", "target"),
    *("passes", "kernel_fusion"),
}


def graphwright(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Callable[..., Any]:
    """The backend torch.compile calls. `options`: those of graphwright.compile that OPTIONS names.

    Raises InputError for an option it does not know and for a target whose code cannot run here, and what `compile`
    raises for a wrong value.
    """
    chosen = {**(options or {}), **{k: v for k, v in settings.items() if k != "mode"}}
    if unknown := sorted(set(chosen) - OPTIONS):
        raise InputError(f"graphwright has no option {', '.join(unknown)}; it takes {', '.join(sorted(OPTIONS))}")
    from .api import check

    check(chosen)  # refused now: a graph that cannot be compiled runs in PyTorch
    hw = compile_target(chosen.get("target", "native"))
    if reason := obstacle(hw):
        raise InputError(
            f"torch.compile runs what it compiles, and code for {hw.id} cannot run here: {reason}; leave target= out, "
            f'or make an artifact for it: graphwright.compile(model, inputs, target="{hw.id}").save("model.gw")'
        )
    return _Specialised(graph, chosen)


@dataclass(frozen=True)
class _Entry:
    """One compilation: the function over the free inputs, and the constants it has inside."""

    run: Callable[..., Any] | None  # None: runs in PyTorch, whatever the constants hold
    free: tuple[int, ...] = ()
    bound: Watch = field(default_factory=lambda: Watch({}))
    pays: float = 0.0  # the time on the clock when it has been there as long as compiling took
    changes: Counter[int] = field(default_factory=Counter)  # by position: compilations before this that did not pay


class _Bound(torch.nn.Module):
    """Dynamo's graph with some inputs fixed."""

    def __init__(self, graph: fx.GraphModule, fixed: dict[int, Any], count: int) -> None:
        super().__init__()
        self.graph = graph
        self.count = count
        self.values = {i: v for i, v in fixed.items() if not isinstance(v, torch.Tensor)}
        for i, value in fixed.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(f"input_{i}", value.detach())

    def forward(self, *free: Any) -> Any:
        given = iter(free)
        inputs = []
        for i in range(self.count):
            if i in self.values:
                inputs.append(self.values[i])
            elif (fixed := getattr(self, f"input_{i}", None)) is not None:
                inputs.append(fixed)
            else:
                inputs.append(next(given))
        return self.graph(*inputs)


class _Specialised:
    """Compiles dynamo's graph once for every set of shapes it is called with."""

    def __init__(self, graph: fx.GraphModule, options: dict[str, Any]) -> None:
        self.graph = graph
        self.options = options
        self.entries: dict[Any, _Entry] = {}
        self.lock = threading.Lock()
        self.told: set[str] = set()
        self.varying: tuple[int, ...] | None = None  # inputs that are not constants

    def __call__(self, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            self._tell("gradients are needed, so this graph runs in PyTorch: graphwright only infers so far")
            return self.graph(*inputs)
        entry = self.entries.get(self._key(inputs))
        if entry is None or not entry.bound.holds(inputs):
            entry = self._enter(inputs)
        if entry.run is None:
            return self.graph(*inputs)
        return entry.run(*[inputs[i] for i in entry.free])

    def _key(self, inputs: Sequence[Any]) -> Any:
        """Constants are not described: another shape means other bytes, which are watched."""
        if self.varying is None:
            self.varying = tuple(
                i for i, x in enumerate(inputs) if not isinstance(x, torch.Tensor) or not _is_static(x)
            )
        return tuple(
            (x.shape, x.stride(), x.dtype) if isinstance(x := inputs[i], torch.Tensor) else x for i in self.varying
        )

    def _enter(self, inputs: Sequence[Any]) -> _Entry:
        with self.lock:
            key = self._key(inputs)
            entry = self.entries.get(key)
            if entry is not None and entry.bound.holds(inputs):
                return entry
            changes: Counter[int] = Counter()
            if entry is not None:
                changes = entry.changes.copy()
                if time.monotonic() < entry.pays:
                    changes.update(entry.bound.changed(inputs))
                if restless := {i for i, count in changes.items() if count >= CHANGES}:
                    self._pass_in(restless)
                    key, changes = self._key(inputs), Counter()
            elif len(self.entries) >= SHAPES:
                self._tell(f"called with more than {SHAPES} sets of shapes; further ones run in PyTorch")
                return _Entry(None)
            self.entries[key] = entry = self._compile(inputs, changes)
            return entry

    def _pass_in(self, positions: set[int]) -> None:
        """Take these for constants no more, in none of the compilations."""
        assert self.varying is not None
        nodes = [n for n in self.graph.graph.nodes if n.op == "placeholder"]
        names = [nodes[i].name for i in sorted(positions)]
        rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
        log.warning(
            "%s%s changed soon after each of %d compilations, and will be passed in where constants would be faster; "
            "torch._dynamo.reset() starts afresh once they stay as they are",
            ", ".join(names[:3]), rest, CHANGES,
        )  # fmt: skip
        self.varying = tuple(sorted({*self.varying, *positions}))
        self.entries.clear()

    def _compile(self, inputs: Sequence[Any], changes: Counter[int]) -> _Entry:
        from .api import compile

        assert self.varying is not None
        started = time.monotonic()
        free = tuple(i for i in self.varying if isinstance(inputs[i], torch.Tensor))
        fixed = {i: x for i, x in enumerate(inputs) if i not in free}
        if any(isinstance(x, torch.Tensor) and not x.is_cpu for x in inputs):
            self._tell("an input is not on the CPU, so this graph runs in PyTorch")
            return _Entry(None)
        if reason := next((r for x in inputs if isinstance(x, torch.Tensor) and (r := without_data(x))), None):
            self._tell(f"this graph runs in PyTorch: an input {reason}")
            return _Entry(None)
        bound = Watch({i: x for i, x in fixed.items() if isinstance(x, torch.Tensor)})
        strides = _strides(self.graph, inputs)
        if strides is None:
            self._tell("a result shares memory with an input or another result, so this graph runs in PyTorch")
            return _Entry(None)
        try:
            module = _Bound(self.graph, fixed, len(inputs))
            with torch.no_grad():
                compiled = compile(module, tuple(inputs[i] for i in free), **self.options)
        except GraphwrightError as error:
            self._tell(f"this graph runs in PyTorch: {error.what}")
            return _Entry(None)
        ended = time.monotonic()
        run = _with_strides(compiled, strides)
        if any(inputs[i].requires_grad for i in free):
            run = _detached(run)
        return _Entry(run, free, bound, ended + (ended - started), changes)

    def _tell(self, message: str) -> None:
        """Say it once a graph."""
        if message not in self.told:
            self.told.add(message)
            log.warning("%s", message)


def _strides(graph: fx.GraphModule, inputs: Sequence[Any]) -> list[tuple[int, ...] | None] | None:
    """The strides dynamo expects of each result (None: no tensor, or known at run time only).

    None in all where results share memory with inputs or each other: a compiled model returns fresh tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in inputs]
    try:
        with mode, torch.no_grad():
            results = pytree.tree_leaves(graph(*fakes))
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException):
        return []
    seen = {x.untyped_storage()._cdata for x in fakes if isinstance(x, torch.Tensor)}
    strides: list[tuple[int, ...] | None] = []
    for result in results:
        if not isinstance(result, torch.Tensor):
            strides.append(None)
            continue
        if (storage := result.untyped_storage()._cdata) in seen:
            return None
        seen.add(storage)
        strides.append(tuple(result.stride()))
    return strides


def _with_strides(run: Callable[..., Any], strides: list[tuple[int, ...] | None]) -> Callable[..., Any]:
    """Lay results out in memory as dynamo was told they would be; code behind the graph may read strides."""

    def call(*inputs: Any) -> Any:
        results = run(*inputs)
        leaves, spec = pytree.tree_flatten(results)
        if all(s is None or leaf.stride() == s for leaf, s in zip(leaves, strides, strict=True)):
            return results
        moved = [
            leaf if s is None or leaf.stride() == s else leaf.new_empty_strided(leaf.shape, s).copy_(leaf)
            for leaf, s in zip(leaves, strides, strict=True)
        ]
        return pytree.tree_unflatten(moved, spec)

    return call if strides else run


def _detached(run: Callable[..., Any]) -> Callable[..., Any]:
    """For parameters among the inputs, where no gradients are needed."""
    return lambda *inputs: run(*[x.detach() for x in inputs])


def _is_static(tensor: torch.Tensor) -> bool:
    """Whether dynamo knows the input to be a parameter or buffer of the module."""
    return isinstance(tensor, torch.nn.Parameter) or getattr(tensor, "_dynamo_static_input_type", None) is not None
