"""Between files and a `Compiled`: what an artifact says of a model, written and read as JSON."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import fx
from torch.utils import _pytree as pytree

from ..backends.aot import library as aot
from ..backends.gpu.device_library import DeviceLibrary
from ..backends.gpu.launches import DEVICE_NAME
from ..errors import ArtifactError
from . import artifact
from .build import CONSTANTS_NAME
from .capture import Constant, Signature, TensorSpec
from .compiled import Compiled
from .executor import Run, executor
from .plan import Plan, from_json, to_json
from .report import Report
from .variants import Rule, Variants

log = logging.getLogger(__name__)


TWIN = "float32."  # before the names of the files of the twin


@dataclass(frozen=True)
class Twin:
    """The float32 build beside a reduced one, and when it runs: variants.py."""

    plan: Plan
    fallback: bool
    rule: Rule | None


@dataclass(frozen=True)
class Description:
    """All of a compiled model but its code and weights."""

    plan: Plan
    signature: Signature
    report: Report
    twin: Twin | None = None


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Compiled:
    """The compiled model saved at `path`, a directory or a .gw file.

    Raises ArtifactError, before any code is loaded, for a damaged artifact and for one made for another machine.
    """
    found = artifact.load(Path(path))
    try:
        described = from_data(found.description)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} describes its model wrongly ({error!r}); compile the model again") from error
    return assembled(found.directory, described, threads or described.report.threads)


def describe(directory: Path) -> Description:
    """What the artifact in `directory` says of its model; its files are not checked again."""
    return from_data(artifact.inspect(directory)["description"])


def runner(directory: Path, plan: Plan, threads: int) -> Run:
    """The machine code in `directory` as a function from tensor inputs to tensor results."""
    if (directory / DEVICE_NAME).exists():
        return executor(plan, DeviceLibrary(directory), _constants(directory))
    return opened(directory, plan, threads)[1]


def opened(directory: Path, plan: Plan, threads: int, prefix: str = "") -> tuple[aot.Library | None, Run]:
    """The machine code in `directory`, None where there is none, and the function that runs the plan with it.

    `prefix` is in front of the files' names.
    """
    code = _library(directory, threads, prefix)
    return code, executor(plan, code, _constants(directory, prefix))


def assembled(
    directory: Path, described: Description, threads: int, graph: Callable[[], fx.GraphModule] | None = None
) -> Compiled:
    """The compiled model whose files lie in `directory`.

    One made for another machine can be saved and reported on; calling it raises ArtifactError.
    """
    try:
        artifact.check_machine(artifact.inspect(directory), Path("this model"))
    except ArtifactError as foreign:
        return Compiled(_refusing(str(foreign)), described.signature, None, directory, described.report, graph)
    if (directory / DEVICE_NAME).exists():
        try:
            device = DeviceLibrary(directory)
        except ArtifactError as absent:
            return Compiled(_refusing(str(absent)), described.signature, None, directory, described.report, graph)
        run = executor(described.plan, device, _constants(directory))
        return Compiled(run, described.signature, device, directory, described.report, graph)
    code, run = opened(directory, described.plan, threads)
    if (twin := described.twin) is not None:

        def open_twin() -> tuple[aot.Library | None, Run]:
            return opened(directory, twin.plan, threads if code is None else code.threads, TWIN)

        run = Variants(run, open_twin, twin.fallback, twin.rule)
    return Compiled(run, described.signature, code, directory, described.report, graph)


def to_data(described: Description) -> dict[str, Any]:
    """The description as JSON data."""
    return {
        "plan": to_json(described.plan),
        "signature": _signature_to_data(described.signature),
        "report": described.report.to_dict(),
        "twin": None if described.twin is None else _twin_to_data(described.twin),
    }


def from_data(data: dict[str, Any]) -> Description:
    """The description that `to_data` wrote."""
    return Description(
        from_json(data["plan"]),
        _signature_from_data(data["signature"]),
        Report.from_dict(data["report"]),
        None if data.get("twin") is None else _twin_from_data(data["twin"]),
    )


def _twin_to_data(twin: Twin) -> dict[str, Any]:
    rule = None if twin.rule is None else twin.rule.to_data()
    return {"plan": to_json(twin.plan), "fallback": twin.fallback, "rule": rule}


def _twin_from_data(data: dict[str, Any]) -> Twin:
    rule = None if data["rule"] is None else Rule.from_data(data["rule"])
    return Twin(from_json(data["plan"]), bool(data["fallback"]), rule)


def _refusing(reason: str) -> Run:
    def refuse(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        raise ArtifactError(reason)

    return refuse


def _library(directory: Path, threads: int, prefix: str = "") -> aot.Library | None:
    code = directory / f"{prefix}{aot.LIBRARY_NAME}"
    return aot.Library(code, directory / f"{prefix}{aot.WEIGHTS_NAME}", threads) if code.exists() else None


def _constants(directory: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    path = directory / f"{prefix}{CONSTANTS_NAME}"
    return load_file(path) if path.exists() else {}


def _signature_to_data(signature: Signature) -> dict[str, Any]:
    return {
        "inputs": [_leaf_to_data(leaf) for leaf in signature.inputs],
        "outputs": [_leaf_to_data(leaf) for leaf in signature.outputs],
        "in_spec": _spec_to_data(signature.in_spec),
        "out_spec": _spec_to_data(signature.out_spec),
        "parameters": list(signature.parameters),
    }


def _signature_from_data(data: dict[str, Any]) -> Signature:
    inputs = tuple(_leaf_from_data(leaf) for leaf in data["inputs"])
    outputs = tuple(_leaf_from_data(leaf) for leaf in data["outputs"])
    return Signature(
        inputs,
        outputs,
        _spec_from_data(data["in_spec"], ((*range(len(inputs)),), {})),
        _spec_from_data(data["out_spec"], tuple(range(len(outputs)))),
        tuple(data["parameters"]),
    )


def _leaf_to_data(leaf: TensorSpec | Constant) -> dict[str, Any]:
    if isinstance(leaf, TensorSpec):
        strides = {} if leaf.strides is None else {"strides": list(leaf.strides)}
        dtype = str(leaf.dtype).removeprefix("torch.")
        return {"name": leaf.name, "shape": list(leaf.shape), "dtype": dtype, **strides}
    value = leaf.value
    return {"constant": value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)}


def tensors_from_data(data: dict[str, Any]) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The tensors that go in and come out, by a description as JSON data; the model's own types are not asked for."""
    sides = [[_leaf_from_data(leaf) for leaf in data["signature"][side]] for side in ("inputs", "outputs")]
    given, made = ([leaf for leaf in side if isinstance(leaf, TensorSpec)] for side in sides)
    return given, made


def _leaf_from_data(data: dict[str, Any]) -> TensorSpec | Constant:
    if "constant" in data:
        return Constant(data["constant"])
    strides = tuple(data["strides"]) if "strides" in data else None
    return TensorSpec(data["name"], tuple(data["shape"]), getattr(torch, data["dtype"]), strides)


def _spec_to_data(spec: pytree.TreeSpec) -> Any:
    """The structure as JSON, or None where it holds a type that pytree cannot name."""
    try:
        return json.loads(pytree.treespec_dumps(spec))
    except (NotImplementedError, TypeError, ValueError) as error:
        log.info("a structure cannot be saved, so a loaded model returns a plain tuple: %s", error)
        return None


def _spec_from_data(data: Any, plain: Any) -> pytree.TreeSpec:
    """The saved structure; that of `plain` where it holds a type this process does not know."""
    if data is not None:
        try:
            return pytree.treespec_loads(json.dumps(data))
        except (NotImplementedError, KeyError, ValueError) as error:
            log.warning("the model returns a type that is not imported here, and a tuple takes its place: %s", error)
    return pytree.tree_structure(plain)
