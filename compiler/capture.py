"""nn.Module -> one flat, functional torch.fx graph, through torch.export.

Composite operators (linear, conv2d, layer_norm, attention, ...) stay whole so that passes see what was meant.
"""

from __future__ import annotations

import functools
import logging
import operator
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    OutputKind,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from ..errors import CaptureError, InputError
from . import functions
from .compression.learned_steps import ValueStep
from .foreign_weights import with_plain_weights
from .result_names import result_names
from .storage_order import settle_storage_order, strides_read
from .without_data import require_data

log = logging.getLogger(__name__)

# Checks of dtype and device that export has already decided.
_WITH_EFFECTS = torch.ops.higher_order.with_effects
_STATIC_CHECKS = {torch.ops.aten._assert_tensor_metadata.default}

Model: TypeAlias = "torch.nn.Module | Callable[..., Any] | ExportedProgram | str | os.PathLike[str]"


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor that goes in or comes out; strides where the memory of an input is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Constant:
    """A leaf of the arguments or results that is not a tensor: its value is part of the compiled model."""

    value: Any


@dataclass(frozen=True)
class Signature:
    """How a call's arguments flatten into tensors, and how result tensors unflatten into what the model returns.

    `inputs` has one entry per flat leaf of (args, kwargs); `outputs` one per flat leaf of the result.
    """

    inputs: tuple[TensorSpec | Constant, ...]
    outputs: tuple[TensorSpec | Constant, ...]
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    parameters: tuple[str, ...]  # names of the model's forward parameters, for keyword calls

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The tensor inputs in order."""
        return tuple(leaf for leaf in self.inputs if isinstance(leaf, TensorSpec))


@dataclass(frozen=True)
class Captured:
    """A model as a flat graph, with the calling convention it had."""

    graph: fx.GraphModule
    signature: Signature


def arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as users give them (a tensor, a tuple, a mapping, None) as positional and keyword arguments."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    raise InputError(
        f"example_inputs is a {type(example_inputs).__name__}; "
        "pass a tensor, a tuple of arguments or a mapping of keywords"
    )


def example_of(exported: ExportedProgram, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments to run an exported program with: those given, else those it was exported with, else None."""
    if example_inputs is not None:
        return arguments(example_inputs)
    if exported.example_inputs is None:
        return None
    args, kwargs = exported.example_inputs
    return tuple(args), dict(kwargs)


def example_tensors(example: tuple[tuple[Any, ...], dict[str, Any]], signature: Signature) -> list[torch.Tensor]:
    """The tensor leaves of example arguments, in the order of the captured call."""
    leaves, spec = pytree.tree_flatten(example)
    if len(leaves) != len(signature.inputs):
        raise InputError(f"the example inputs {spec} differ from what the program was exported with")
    pairs = zip(leaves, signature.inputs, strict=True)
    return [leaf.detach() for leaf, expected in pairs if isinstance(expected, TensorSpec)]


def export(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Export `model` for these arguments.

    Raises CaptureError with torch's reason and the user's source line where the model cannot be one graph, and
    InputError for a model or an argument that is not on the CPU, or a model prepared for training in 8 bits.
    """
    exported = _export(model, args, kwargs, dynamic_shapes)
    require_data(exported)
    return exported


def _export(
    model: Model, args: Sequence[Any], kwargs: Mapping[str, Any] | None, dynamic_shapes: Any
) -> ExportedProgram:
    if isinstance(model, ExportedProgram):
        return model
    if isinstance(model, (str, os.PathLike)):
        return _load_exported(Path(model))
    module = with_plain_weights(functions.as_module(model))
    _require_cpu(module)
    _require_converted(module)
    arguments, keywords = _separate((tuple(args), dict(kwargs or {})))
    with torch.no_grad():
        try:
            shapes = functions.dynamic_shapes(module, arguments, dynamic_shapes)
            return torch.export.export(module, arguments, keywords, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise _unexportable(module, error) from error


def _require_converted(module: torch.nn.Module) -> None:
    if any(isinstance(m, ValueStep) for m in module.modules()):
        raise InputError(
            "the model is prepared for training in 8 bits (graphwright.prepare_qat): convert it first, by "
            "graphwright.convert(model, example_inputs), and take what that returns"
        )


def capture(exported: ExportedProgram, parameters: tuple[str, ...] = ()) -> Captured:
    """Turn an exported program into the flat graph that the passes rewrite.

    Raises CaptureError where the model changes its buffers or inputs, takes symbolic shapes, or has control flow that
    PyTorch does not decompose.
    """
    _refuse_mutation(exported)
    with torch.no_grad(), warnings.catch_warnings():
        # torch copies its own tree specifications in a way that it warns of.
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
        try:
            core = exported.run_decompositions({**_decompositions(), **_quantisation(exported)})
        except RuntimeError as error:  # of control-flow operators, whose branches are looked into here
            raise CaptureError(
                f"torch.export cannot decompose the model: {str(error).strip()}",
                split='\ntorch.compile(model, backend="graphwright") splits the model at control flow.',
            ) from error
    _refuse_mutation(core)
    graph, signature = _flatten(core, parameters)
    return Captured(graph, signature)


@functools.lru_cache(maxsize=1)
def _decompositions() -> dict[Any, Any]:
    """The decomposition table, built once: torch enumerates all its operators to make it."""
    from ..backends.lowering import decompositions

    return decompositions.table()


def _quantisation(exported: ExportedProgram) -> Mapping[Any, Callable[..., Any]]:
    """Decompositions of the operators by which PyTorch's own tools quantise, where the program has such."""
    from ..backends.lowering import foreign_quantisation

    return foreign_quantisation.spelt(n.target for n in exported.graph.nodes if n.op == "call_function")


def _load_exported(path: Path) -> ExportedProgram:
    if not path.exists():
        raise CaptureError(f"no such file: {path}")
    try:
        return torch.export.load(path)
    except Exception as error:
        raise CaptureError(f"{path} is not a program saved by torch.export.save: {error}") from error


def _require_cpu(module: torch.nn.Module) -> None:
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.device.type != "cpu":
            raise InputError(f"{name} is on device {tensor.device}; move the model to the CPU first: model.cpu()")


def _separate(tree: Any) -> Any:
    """Give repeated or overlapping tensors storage of their own: export would merge them into one input."""
    leaves, spec = pytree.tree_flatten(tree)
    seen: set[int] = set()
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            continue
        if leaf.device.type != "cpu":
            raise InputError(f"an example input is on device {leaf.device}; move it to the CPU first: x.cpu()")
        if leaf.layout == torch.strided and leaf.numel():
            if (address := leaf.untyped_storage().data_ptr()) in seen:
                leaves[i] = leaf.detach().clone()
            seen.add(address)
        if leaf.requires_grad:
            leaves[i] = leaves[i].detach()
    return pytree.tree_unflatten(leaves, spec)


def _unexportable(module: torch.nn.Module, error: Exception) -> CaptureError:
    model = module.function if isinstance(module, functions.Function) else module
    name = getattr(model, "__name__", type(model).__name__)
    reason = str(error).strip() or type(error).__name__
    text = f"torch.export cannot capture {name} as one graph: {reason}"
    if not any(word in text for word in ("ata-dependent", "data dependent", "control flow", "higher order")):
        return CaptureError(text)
    return CaptureError(
        text,
        split='\nWhere control flow depends on data, torch.compile(model, backend="graphwright") splits the model at '
        "such places.",
    )


def _refuse_mutation(exported: ExportedProgram) -> None:
    signature = exported.graph_signature
    if changed := sorted(set(signature.buffers_to_mutate.values())):
        raise CaptureError(
            f"the forward changes the buffers {', '.join(changed)}, and a compiled model has no state; "
            "call model.eval() (BatchNorm and dropout stop changing state), or return the new value instead"
        )
    if changed := sorted(set(signature.user_inputs_to_mutate.values())):
        raise CaptureError(
            f"the forward changes its inputs {', '.join(changed)} in place; work on a copy (x = x.clone()) instead"
        )


def _flatten(exported: ExportedProgram, parameters: tuple[str, ...]) -> tuple[fx.GraphModule, Signature]:
    """Copy the exported graph with parameters, buffers and constants as attributes and user tensors as placeholders."""
    root = torch.nn.Module()
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    inputs: list[TensorSpec | Constant] = []
    constants: dict[int, str] = {}
    for old, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.TOKEN:
            continue
        if spec.kind is not InputKind.USER_INPUT:
            nodes[old] = _attribute(graph, root, old, _stored(exported, spec), constants)
        elif isinstance(spec.arg, TensorArgument):
            inputs.append(_tensor_spec(old, old.name))
            nodes[old] = graph.node_copy(old)
        elif isinstance(spec.arg, ConstantArgument):
            inputs.append(Constant(spec.arg.value))
        else:
            raise CaptureError(f"input {old.name} is a {type(spec.arg).__name__}, which cannot be compiled")
    for old in exported.graph.nodes:
        if old.op in ("placeholder", "output") or old.target in _STATIC_CHECKS:
            continue
        if old.op == "get_attr":
            value = getattr(exported.graph_module, str(old.target))
            if isinstance(value, torch.Tensor):
                nodes[old] = _attribute(graph, root, old, value, constants)
                continue
            raise CaptureError(
                f"{old.target} is a nested graph (torch.cond or another control-flow operator), "
                "which graphwright does not compile",
                split='; use torch.compile(model, backend="graphwright")',
            )
        if old.target is _WITH_EFFECTS:
            nodes[old] = _effect(graph, old, nodes)
        elif old.target is operator.getitem and old.args[0].target is _WITH_EFFECTS:
            _effect_result(graph, old, nodes)
        else:
            nodes[old] = graph.node_copy(old, lambda n: nodes[n])
            nodes[old].meta = dict(old.meta)
    outputs: list[TensorSpec | Constant] = []
    results: list[fx.Node] = []
    output = next(n for n in exported.graph.nodes if n.op == "output")
    for spec, leaf in zip(exported.graph_signature.output_specs, output.args[0], strict=True):
        if spec.kind is OutputKind.TOKEN:
            continue
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"the model has an output of kind {spec.kind.name}, which graphwright does not compile")
        if isinstance(spec.arg, TensorArgument):
            outputs.append(_output_spec(leaf))
            results.append(nodes[leaf])
        elif isinstance(spec.arg, ConstantArgument):
            outputs.append(Constant(spec.arg.value))
        else:
            raise CaptureError(f"output {leaf} is a {type(spec.arg).__name__}, which cannot be compiled")
    graph.output(tuple(results))
    settle_storage_order(graph)
    read = strides_read(graph)
    call = exported.module_call_graph[0].signature
    assert call is not None
    names = result_names(call.out_spec, [leaf.name if isinstance(leaf, TensorSpec) else "" for leaf in outputs])
    made = tuple(
        replace(leaf, name=name) if isinstance(leaf, TensorSpec) else leaf
        for leaf, name in zip(outputs, names, strict=True)
    )
    given = tuple(replace(i, strides=read.get(i.name)) if isinstance(i, TensorSpec) else i for i in inputs)
    return fx.GraphModule(root, graph), Signature(given, made, call.in_spec, call.out_spec, parameters)


def _stored(exported: ExportedProgram, spec: Any) -> torch.Tensor:
    """The tensor behind a parameter, buffer or lifted constant."""
    name = str(spec.target)
    value = exported.state_dict.get(name, exported.constants.get(name))
    if not isinstance(value, torch.Tensor):
        raise CaptureError(f"{name} is a {type(value).__name__}; only tensors can be constants of a compiled model")
    return value


def _attribute(
    graph: fx.Graph, root: torch.nn.Module, old: fx.Node, value: torch.Tensor, constants: dict[int, str]
) -> fx.Node:
    """A get_attr node for a constant; one tensor used under two names is stored once."""
    name = constants.get(id(value))
    if name is None:
        name = old.name
        constants[id(value)] = name
        root.register_buffer(name, value.detach())
    node = graph.get_attr(name)
    node.meta = dict(old.meta)
    return node


def _effect(graph: fx.Graph, old: fx.Node, nodes: dict[fx.Node, fx.Node]) -> fx.Node:
    """with_effects(token, operator, *args) -> operator(*args): partition keeps the order that tokens are for."""
    _, effect, *rest = old.args
    args, kwargs = fx.node.map_arg((tuple(rest), old.kwargs), lambda n: nodes[n])
    node = graph.call_function(effect, args, kwargs)  # type: ignore[arg-type]
    _, *values = old.meta["val"]
    node.meta = {**old.meta, "val": values[0] if len(values) == 1 else tuple(values), "effect": True}
    return node


def _effect_result(graph: fx.Graph, old: fx.Node, nodes: dict[fx.Node, fx.Node]) -> None:
    """A result of with_effects: number 0 is the token, which is not needed."""
    source, index = old.args
    assert isinstance(source, fx.Node)
    assert isinstance(index, int)
    if index == 0:
        return
    if isinstance(nodes[source].meta["val"], tuple):
        nodes[old] = graph.call_function(operator.getitem, (nodes[source], index - 1))
        nodes[old].meta = dict(old.meta)
    else:
        nodes[old] = nodes[source]


def _output_spec(node: fx.Node) -> TensorSpec:
    """Like `_tensor_spec`, with -1 for an extent that is only known at run time."""
    value = node.meta["val"]
    return TensorSpec(node.name, tuple(d if isinstance(d, int) else -1 for d in value.shape), value.dtype)


def _tensor_spec(node: fx.Node, name: str) -> TensorSpec:
    value = node.meta["val"]
    if any(not isinstance(d, int) for d in value.shape):
        raise CaptureError(f"{name} has the symbolic shape {tuple(value.shape)}; compile it with fixed shapes")
    return TensorSpec(name, tuple(value.shape), value.dtype)
