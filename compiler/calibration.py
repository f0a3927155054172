"""Sets of inputs that reduced precision is decided and checked by.

`calibration=` of compile is a list of inputs, each as example_inputs are, or a mapping from input names (arr_0, arr_1,
... for "in order") to tensors that hold several samples along a leading axis: what a .npz file holds.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import GraphwrightError, InputError, suggest
from . import compare
from .capture import Captured, Signature, TensorSpec, arguments, example_tensors
from .compression.int8_method import DEFAULT, Method
from .precision import Sample

if TYPE_CHECKING:
    from .api import Options

Example = tuple[tuple[Any, ...], dict[str, Any]]
MEASURED = 8  # sets of inputs that the error of int8 is measured on, besides the example


@dataclass(frozen=True)
class Inputs:
    """The tensors of the example, if there is one, and of every set of inputs to calibrate with."""

    example: list[torch.Tensor] | None
    calibration: tuple[list[torch.Tensor], ...]


def check_options(precision: str, fallback: Any, calibration: Any, has_example: bool, method: Method = DEFAULT) -> None:
    """Raise InputError for options that say nothing together; `method`: of int8."""
    if fallback is not None:
        if fallback != "fp32":
            near = suggest(str(fallback), ("fp32",))
            raise InputError(f"fallback={fallback!r}{near}: there is 'fp32', or None for no twin")
        if precision == "fp32":
            raise InputError(
                "fallback='fp32' needs a reduced precision: pass precision='auto', 'int8', 'bf16' or 'fp16'"
            )
    if calibration is not None:
        if precision == "fp32":
            raise InputError(
                "calibration serves reduced precision and fp32 decides nothing by it: leave it out, or "
                "pass precision='int8', 'auto', 'adaptive', 'bf16' or 'fp16'"
            )
        if not isinstance(calibration, (Mapping, list, tuple)) or not len(calibration):
            raise _no_list(calibration)
    if precision == "int8" and calibration is None and method.calibrates:
        raise InputError(
            "precision='int8' finds the ranges of values on inputs: pass calibration=[inputs, ...], a few dozen that "
            "look like those the model will get (int8={'activation': 'dynamic'}, without migration, needs none, but "
            "for depthwise convolutions)"
        )
    if precision == "adaptive" and calibration is None:
        raise InputError(
            "precision='adaptive' learns from inputs when the reduced build is safe: pass calibration=[inputs, ...], "
            "or precision='auto' to decide once"
        )
    if precision == "adaptive" and not has_example:
        raise InputError("precision='adaptive' decides at compile time: pass example_inputs")


def listed(calibration: Any) -> Any:
    """What an iterable of inputs gives, consumed once, as a list; None, lists, tuples and mappings as they are.

    Raises InputError for what holds no sets of inputs: a tensor or an array is one.
    """
    if calibration is None or isinstance(calibration, (Mapping, list, tuple)):
        return calibration
    if not isinstance(calibration, Iterable) or isinstance(calibration, (str, bytes)) or _is_array(calibration):
        raise _no_list(calibration)
    return list(calibration)


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or hasattr(value, "__array__")


def _no_list(calibration: Any) -> InputError:
    if _is_array(calibration):
        advice = ": for one set of inputs pass [it]"
    elif isinstance(calibration, (str, bytes)):
        advice = ", no file: pass dict(numpy.load(path)) for a .npz of one array an input"
    elif isinstance(calibration, Iterable) and not hasattr(calibration, "__len__"):
        advice = ", which can be read once only: pass list(it)"
    else:
        advice = ""
    return InputError(
        "calibration is a list of inputs, each as example_inputs are, or a mapping from input names to tensors with a "
        f"leading axis of samples; got {_shown(calibration)}{advice}"
    )


def first_arguments(model: Any, calibration: Any) -> Example:
    """The first set of inputs as arguments of `model`, those of a mapping in their places where they have one.

    Raises InputError for a mapping whose names the model does not take, or without samples.
    """
    if not isinstance(calibration, Mapping):
        return _set(0, calibration[0])
    stacked = {str(name): _tensor(name, values) for name, values in calibration.items()}
    if empty := [name for name, tensor in stacked.items() if not tensor.dim() or not len(tensor)]:
        raise InputError(f"calibration: {empty[0]} holds no samples: stack them along a leading axis")
    first = {name: tensor[0] for name, tensor in stacked.items()}
    if set(first) == {f"arr_{i}" for i in range(len(first))}:
        return tuple(first[f"arr_{i}"] for i in range(len(first))), {}
    forward = model.forward if isinstance(model, nn.Module) else model
    if not callable(forward):  # exported before
        return (), first
    try:
        bound = inspect.signature(forward).bind(**first)
    except TypeError as error:
        taken = ", ".join(inspect.signature(forward).parameters)
        raise InputError(f"calibration names {', '.join(first)}, and the model takes {taken}: {error}") from error
    return bound.args, bound.kwargs


@contextmanager
def naming_float64(calibration: Any) -> Iterator[None]:
    """Errors within, of a model that is run on the first set, say where that holds float64."""
    try:
        yield
    except GraphwrightError as error:
        named = (
            calibration.items() if isinstance(calibration, Mapping) else enumerate(pytree.tree_leaves(calibration[0]))
        )
        wide = [str(name) for name, values in named if str(getattr(values, "dtype", "")).endswith("float64")]
        if not wide:
            raise
        raise InputError(
            f"calibration: {', '.join(wide)} in float64, which NumPy makes unless told otherwise; where the model "
            f"takes float32, pass array.astype('float32'). {error}"
        ) from error


def inputs_of(example: Example | None, calibration: Any, signature: Signature) -> Inputs:
    """The tensors of the example and of the calibration. Raises InputError where one does not fit the model."""
    first = None if example is None else example_tensors(example, signature)
    if calibration is None:
        return Inputs(first, ())
    specs = signature.tensors
    if isinstance(calibration, Mapping):
        samples = _unstacked(calibration, specs)
    else:
        samples = [example_tensors(_set(number, given), signature) for number, given in enumerate(calibration)]
    for number, tensors in enumerate(samples):
        for tensor, spec in zip(tensors, specs, strict=True):
            if tuple(tensor.shape) != tuple(spec.shape) or tensor.dtype != spec.dtype:
                other = tensor.dtype != spec.dtype
                advice = f": convert it, as by .to({spec.dtype})" if other else ""
                if other and tensor.dtype == torch.float64:
                    advice += " (float64 is what NumPy makes unless told otherwise: array.astype('float32'))"
                raise InputError(
                    f"calibration set {number}: {spec.name} is {tensor.dtype} of shape {tuple(tensor.shape)}, and the "
                    f"model is compiled for {spec.dtype} of shape {tuple(spec.shape)}{advice}"
                )
    return Inputs(first, tuple(samples))


def run_in_evaluation(model: nn.Module, calibration: Iterable[Any]) -> None:
    """Call the model with each element of `calibration`, without gradients; afterwards its modes are as before.

    Raises InputError where the model does not run on one, and for what holds no sets of inputs.
    """
    if isinstance(calibration, Mapping):
        raise InputError(
            "calibration is a list of inputs here, each as example_inputs of compile, not a mapping: pass "
            "[{'name': tensor, ...}, ...] for inputs by keyword"
        )
    if (sets := listed(calibration)) is None:
        raise InputError("calibration=None: pass a list of inputs, each as example_inputs of compile")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for number, given in enumerate(sets):
                args, kwargs = _set(number, given)
                try:
                    model(*args, **kwargs)
                except InputError:
                    raise
                except Exception as error:
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    raise InputError(f"calibration set {number}: the model does not run on it: {reason}") from error
    finally:
        for module, training in modes.items():
            module.training = training


def finite_inputs(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A hook with keywords in front of the layer `name`, which raises InputError where it reads infinities or NaN."""

    def look(layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not bool(torch.isfinite(args[0] if args else keywords["input"]).all()):
            raise InputError(
                f"calibration: {name or type(layer).__name__} reads infinities or NaN: leave out the inputs that bring "
                "them, or mend what computes them"
            )

    return look


def _set(number: int, given: Any) -> Example:
    try:
        return arguments(given)
    except InputError as error:
        array = ": torch.from_numpy(array) makes one" if _is_array(given) else ""
        raise InputError(
            f"calibration set {number} is a {type(given).__name__}; pass a tensor, a tuple of arguments or a mapping "
            f"of keywords{array}"
        ) from error


def _tensor(name: object, values: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = f"an array of {values.dtype}" if hasattr(values, "dtype") else f"a {type(values).__name__}"
        raise InputError(f"calibration: {name} is {kind}, of which PyTorch makes no tensor: {error}") from error


def _unstacked(stacked: Mapping[str, Any], specs: Sequence[TensorSpec]) -> list[list[torch.Tensor]]:
    names = [spec.name for spec in specs]
    if set(stacked) == {f"arr_{i}" for i in range(len(specs))}:
        stacked = {name: stacked[f"arr_{i}"] for i, name in enumerate(names)}
    for name in stacked:
        if name not in names:
            near = suggest(str(name), names)
            raise InputError(f"calibration: the model takes {', '.join(names)}, not {name!r}{near}")
    if missing := [name for name in names if name not in stacked]:
        raise InputError(f"calibration: {', '.join(missing)} missing; the model takes {', '.join(names)}")
    tensors = [_tensor(name, stacked[name]) for name in names]
    counts = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    if len(counts) != 1 or not min(counts):
        raise InputError(
            "calibration: every array holds the samples along its leading axis, as many as the others and at least "
            f"one; they have {', '.join(f'{n} {tuple(t.shape)}' for n, t in zip(names, tensors, strict=True))}"
        )
    return [[tensor[i] for tensor in tensors] for i in range(counts.pop())]


def digest(example: Example | None, calibration: Any) -> str:
    """Of the values that an adaptive build is made by."""
    made = hashlib.sha256()
    given = dict(sorted(calibration.items())) if isinstance(calibration, Mapping) else calibration
    for leaf in pytree.tree_leaves([example, given]):
        if hasattr(leaf, "__array__") and not isinstance(leaf, torch.Tensor):
            leaf = torch.as_tensor(leaf)
        if isinstance(leaf, torch.Tensor):
            dense = leaf.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
            made.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode() + dense.view(torch.uint8).numpy().tobytes())
        else:
            made.update(repr(leaf).encode())
    return made.hexdigest()


def samples_for(captured: Captured, inputs: Inputs, options: Options) -> tuple[Sample, ...]:
    """What precisions are decided by: the example, and where one assignment serves all inputs the calibration too."""
    decisive = options.precision in ("auto", "adaptive", "int8") or options.verify
    if options.precision == "fp32" or not decisive or compare.is_random(captured.graph):
        return ()
    sets = [] if inputs.example is None else [inputs.example]
    if options.precision == "int8":  # hundreds serve to find ranges; errors are measured on a few
        sets += inputs.calibration[:MEASURED]
    elif options.precision != "adaptive":
        sets += inputs.calibration
    return with_references(captured, sets)


def with_references(captured: Captured, sets: Sequence[Sequence[torch.Tensor]]) -> tuple[Sample, ...]:
    """Every set of inputs and its float64 results. Raises InputError where PyTorch does not run the model on one."""
    names = [tensor.name for tensor in captured.signature.tensors]
    return tuple((tensors, compare.reference(captured.graph, tensors, names)) for tensors in sets)


def _shown(value: Any) -> str:
    return "nothing" if value is not None and hasattr(value, "__len__") and not len(value) else type(value).__name__
