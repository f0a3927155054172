"""A compiled model: called like the module it came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..backends.gpu.device_library import DeviceLibrary
from ..errors import ArtifactError, InputError
from .calls import tensor_leaves
from .capture import Constant, Signature, TensorSpec
from .variants import Variants

if TYPE_CHECKING:
    from ..backends.aot.library import Library
    from .executor import Run
    from .profile import Profile
    from .report import Report


class Compiled:
    """A model as machine code for one set of input shapes.

    Called with the model's positional and keyword arguments; tensors may have any strides and results are fresh
    tensors, on the GPU where the inputs are there and the model was compiled for it. Safe to call from several threads
    at once; the GIL is released while machine code runs.
    """

    def __init__(
        self,
        run: Run,
        signature: Signature,
        library: Library | DeviceLibrary | None,
        directory: Path,
        report: Report,
        graph: Callable[[], fx.GraphModule] | None = None,
    ) -> None:
        self._run = run
        self._signature = signature
        self._library = library
        self._on_cpu = not isinstance(library, DeviceLibrary)
        self._directory = directory
        self._report = report
        self._make_graph = graph
        self._graph: fx.GraphModule | None = None
        self._specs = signature.tensors
        self._checks = tuple((torch.Size(s.shape), s.dtype) for s in self._specs)
        self._lying = tuple((i, s) for i, s in enumerate(self._specs) if s.strides is not None)
        spec = signature.in_spec
        self._positional = len(self._specs) if spec == _positional_spec(len(self._specs)) else None
        leaf = pytree.tree_structure(0)
        self._single = signature.out_spec == leaf and isinstance(signature.outputs[0], TensorSpec)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. Raises InputError for arguments that differ from what it was compiled for."""
        plain = not kwargs and len(args) == self._positional
        tensors: Sequence[Any] = args if plain else tensor_leaves(self._signature, args, kwargs, "compiled")
        for tensor, (shape, dtype) in zip(tensors, self._checks, strict=True):
            if (
                not isinstance(tensor, torch.Tensor)
                or tensor.shape != shape
                or tensor.dtype != dtype
                or tensor.requires_grad
                or (not tensor.is_cpu and self._on_cpu)
                or tensor.layout is not torch.strided
                or (type(tensor) is not torch.Tensor and type(tensor) is not torch.nn.Parameter)
            ):
                tensors = self._refuse(tensors)
                break
        for i, spec in self._lying:
            _check_strides(tensors[i], spec)
        results = self._run(tensors)
        if self._single:
            return results[0]
        return self._unflatten(results)

    @property
    def graph(self) -> fx.GraphModule:
        """The rewritten fx graph: runs in plain PyTorch, and prints what the passes made of the model."""
        if self._graph is None:
            if self._make_graph is None:
                raise ArtifactError(
                    "a loaded artifact holds machine code only; its graph is in the process that compiled it"
                )
            self._graph = self._make_graph()
        return self._graph

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Name, shape and dtype of every tensor that goes in, in order."""
        return self._specs

    def arguments(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments of a call with `tensors` in the places of `inputs`."""
        given = iter(tensors)
        leaves = [leaf.value if isinstance(leaf, Constant) else next(given) for leaf in self._signature.inputs]
        args, kwargs = pytree.tree_unflatten(leaves, self._signature.in_spec)
        return args, kwargs

    @property
    def threads(self) -> int:
        """Threads that one call uses; may be set."""
        return self._library.threads if self._library is not None else 1

    @threads.setter
    def threads(self, count: int) -> None:
        if not isinstance(count, int) or count < 1:
            raise InputError(f"threads must be a whole number of at least 1, got {count!r}")
        if self._library is not None:
            self._library.threads = count
        if isinstance(self._run, Variants):
            self._run.set_threads(count)

    def report(self) -> Report:
        """What the passes did, which kernels were chosen, the error measured, sizes and compile time.

        Where there are two builds (fallback, precision="adaptive"), how often each has run since loading.
        """
        if isinstance(self._run, Variants):
            return replace(self._report, calls=asdict(self._run.counts()))
        return self._report

    def profile(self, *args: Any, rounds: int = 20, **kwargs: Any) -> Profile:
        """Run a call `rounds` times and time each kernel: median microseconds beside what the cost model predicted.

        No other call may run meanwhile. Raises InputError as a call does, and where there is no machine code to time.
        """
        from .profile import profile

        return profile(self._library, self._report.kernels, lambda: self(*args, **kwargs), rounds)

    def save(self, path: str | Path) -> Path:
        """Write the artifact to `path`: a directory, or one file where the name ends in .gw. Returns the path."""
        from . import artifact

        return artifact.save(self._directory, Path(path))

    def bundle(self, path: str | Path, *, executable: bool = False, single_file: bool = False) -> Path:
        """Write to the directory `path` what an ARM machine without Python needs: docs/arm.md. Returns the path.

        executable: the static program alone, without the library. single_file: the weights inside both.
        Raises InputError where the model is not for such a machine or needs PyTorch.
        """
        from .bundle import bundle

        return bundle(self._directory, Path(path), executable, single_file)

    def __reduce__(self) -> Any:
        raise TypeError("a compiled model is neither pickled nor copied: use save() and graphwright.load()")

    def __repr__(self) -> str:
        inputs = ", ".join(f"{s.name}: {_describe(s)}" for s in self._specs)
        return f"Compiled({inputs})"

    def _refuse(self, tensors: Sequence[Any]) -> Sequence[Any]:
        """Say what is wrong with the inputs; returns them (as plain tensors) where nothing is."""
        fixed = []
        for tensor, spec in zip(tensors, self._specs, strict=True):
            if not isinstance(tensor, torch.Tensor):
                raise InputError(f"{spec.name}: expected a tensor, got {type(tensor).__name__}")
            if tensor.layout is not torch.strided or tensor.is_nested:
                raise InputError(f"{spec.name}: expected a dense tensor, got layout {tensor.layout}: x.to_dense()")
            if type(tensor) is not torch.nn.Parameter and is_traceable_wrapper_subclass(tensor):
                raise InputError(f"{spec.name}: is a {type(tensor).__name__}, which wraps other tensors; unwrap it")
            if isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                raise InputError(f"{spec.name}: holds no data: a compiled model cannot be traced, vmapped or faked")
            if not tensor.is_cpu and self._on_cpu:
                raise InputError(
                    f"{spec.name}: is on device {tensor.device}; the model is compiled for the CPU: x.cpu()"
                )
            if tensor.dtype != spec.dtype:
                raise InputError(
                    f"{spec.name}: expected {_describe(spec)}, got dtype {tensor.dtype}; convert it: x.to({spec.dtype})"
                )
            if tuple(tensor.shape) != spec.shape:
                raise InputError(
                    f"{spec.name}: expected {_describe(spec)}, got shape {tuple(tensor.shape)}; "
                    "a compiled model has fixed shapes: compile it again with example inputs of the new shape, "
                    "or pass dynamic_shapes="
                )
            if tensor.requires_grad:
                if torch.is_grad_enabled():
                    raise InputError(
                        f"{spec.name}: requires a gradient, and a compiled model only infers; "
                        "call it under torch.no_grad(), or with x.detach()"
                    )
                tensor = tensor.detach()
            fixed.append(tensor)
        return fixed

    def _unflatten(self, results: Sequence[torch.Tensor]) -> Any:
        leaves: list[Any] = []
        tensors = iter(results)
        for leaf in self._signature.outputs:
            leaves.append(leaf.value if isinstance(leaf, Constant) else next(tensors))
        return pytree.tree_unflatten(leaves, self._signature.out_spec)


def _positional_spec(count: int) -> pytree.TreeSpec:
    return pytree.tree_structure((tuple(range(count)), {}))


def _describe(spec: TensorSpec) -> str:
    dtype = str(spec.dtype).removeprefix("torch.")
    return f"{dtype}[{', '.join(map(str, spec.shape))}]"


def _check_strides(tensor: torch.Tensor, spec: TensorSpec) -> None:
    """Raises InputError where the tensor lies otherwise in memory, which the model reads, than the example did."""
    strides = tuple(tensor.stride())
    assert spec.strides is not None
    if any(d > 1 and a != b for d, a, b in zip(spec.shape, strides, spec.strides, strict=True)):
        raise InputError(
            f"{spec.name}: has strides {strides}, and the model reads its memory (as_strided), which lay in strides "
            f"{spec.strides} when it was compiled: compile it with such an example, or bring the input into that order"
        )
