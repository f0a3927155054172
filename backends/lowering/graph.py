"""A region of the fx graph -> Relax -> fused PrimFuncs -> the program that the ahead-of-time path compiles.

Operators with a kernel of ours become opaque calls; the others become tensor expressions, joined as `backends.regions`
decides, which the generic schedule turns into parallel, vectorised loops.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx
from tvm import relax, te

from ...errors import GraphwrightError
from ...hwdb import Hardware
from .expressions import filled
from .extract import Fused, Lowered, Unscheduled, extract
from .fusion import Fusion, apart, fuse, outs_of, source_of
from .operators import LOWERINGS
from .registry import KernelCall, Out, Packed
from .repack import gather, order_of
from .supported import has_kernels, is_reshape, out_of, promised

log = logging.getLogger(__name__)
aten = torch.ops.aten

_NAME_LENGTH = 48  # of a kernel of several operators


def _where(node: fx.Node) -> str:
    trace = node.meta.get("stack_trace")
    return f"\nwhere the model says:\n{trace}" if trace else ""


class LoweringError(GraphwrightError):
    """The definition of an operator failed: a bug of ours, after which PyTorch takes over where it can."""

    def __init__(self, node: fx.Node, error: Exception) -> None:
        super().__init__(f"lowering {node.format_node()} failed: {error}{_where(node)}")
        # Whoever leaves operators to PyTorch decides by the producer of a getitem.
        self.node: fx.Node = node.all_input_nodes[0] if node.target is operator.getitem else node


@dataclass(frozen=True)
class Region:
    """A connected, convex part of the graph that is compiled as one."""

    name: str
    nodes: tuple[fx.Node, ...]  # call_function nodes in order
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def lower(region: Region, graph: fx.GraphModule, hw: Hardware) -> Lowered:
    """Compile the region's operators to scheduled PrimFuncs and the order of their calls."""
    single: set[fx.Node] = set()
    while True:
        builder = _Builder(region, graph, hw, single)
        try:
            return extract(builder.fused(), hw)
        except Unscheduled as error:
            log.warning("%s: its operators become kernels of their own", error)
            single.update(builder.fusions[error.function].nodes)


def relax_region(region: Region, graph: fx.GraphModule, hw: Hardware) -> Fused:
    """The region as a Relax module without schedules, a function an operator where `hw` has no kernels of ours."""
    return _Builder(region, graph, hw, set()).fused()


def _shape(node: fx.Node) -> tuple[int, ...]:
    out = out_of(node)
    assert isinstance(out, Out)
    return out.shape


def _order_name(operand: Packed) -> str:
    return f"order of {_shape(operand.constant)}.{operand.layout}"


def _read_by(node: fx.Node) -> Sequence[fx.Node]:
    """The nodes whose values a node of its own reads; packed weights are not among them."""
    call: KernelCall | None = node.meta.get("kernel_call")
    if call is None:
        return node.all_input_nodes
    read = [o.constant if isinstance(o, Packed) else o for o in call.operands]
    return [n for n in read if n.op != "get_attr" or n in call.operands]


def _single(node: fx.Node) -> Out:
    out = out_of(node)
    assert isinstance(out, Out), node
    return out


def _type(out: Out) -> Any:
    return relax.TensorType(out.shape, out.dtype)


class _Builder:
    """Builds the Relax function of one region; parameters are the region's inputs, then the constants it reads."""

    def __init__(self, region: Region, graph: fx.GraphModule, hw: Hardware, single: Set[fx.Node]) -> None:
        self.region, self.graph, self.hw = region, graph, hw
        reshapes = frozenset(n for n in region.nodes if is_reshape(n))
        fusions = fuse(region.nodes, region.outputs, reshapes, hw) if has_kernels(hw) else []
        self.plan = [part for f in fusions for part in ([f] if single.isdisjoint(f.nodes) else apart(f))]
        self.fusions: dict[str, Fusion] = {}  # function -> what it computes
        self.block = relax.BlockBuilder()
        self.values: dict[fx.Node, Any] = {}
        self.parameters: list[Any] = []
        self.input_names: list[str] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.weight_vars: dict[str, Any] = {}
        self.calls: dict[str, tuple[KernelCall, str]] = {}
        self.outputs: list[Any] = []

    def fused(self) -> Fused:
        """The module, without what nothing reads, and what its parts stand for."""
        module = relax.transform.DeadCodeElimination()(self._build())
        parameters = {str(var.name): name for name, var in self.weight_vars.items()}
        reasons = {name: fusion.reason for name, fusion in self.fusions.items() if len(fusion.nodes) > 1}
        return Fused(self.region.name, module, tuple(self.input_names), self.weights, parameters, self.calls, reasons)

    def _build(self) -> Any:
        for i, node in enumerate(self.region.inputs):
            out = out_of(node)
            assert isinstance(out, Out)
            var = relax.Var(f"input_{i}", _type(out))
            self.values[node] = var
            self.parameters.append(var)
            self.input_names.append(str(var.name))
        self._declare_constants()
        with self.block.function("main", list(self.parameters)):
            with self.block.dataflow():
                self._emit_all()
                results = [self._value(n) for n in self.region.outputs]
                result = self.block.emit_output(relax.Tuple(results))
            self.block.emit_func_output(result)
        return self.block.get()

    def _declare_constants(self) -> None:
        """Relax wants parameters before the body: find every constant the nodes will read."""
        for node in self.region.nodes:
            call: KernelCall | None = node.meta.get("kernel_call")
            operands: Sequence[fx.Node | Packed] = call.operands if call else node.all_input_nodes
            for operand in operands:
                if isinstance(operand, Packed) and operand.constant.op != "get_attr":
                    if (name := _order_name(operand)) not in self.weight_vars:
                        self._declare(name, order_of(operand, _shape(operand.constant)))
                elif isinstance(operand, Packed):
                    name = f"{operand.constant.target}.{operand.layout}"
                    if name not in self.weight_vars:
                        stored = getattr(self.graph, str(operand.constant.target))
                        self._declare(name, operand.pack(stored).contiguous())
                elif operand.op == "get_attr" and operand not in self.values:
                    name = str(operand.target)
                    if name not in self.weight_vars:
                        self._declare(name, getattr(self.graph, name).contiguous())
                    self.values[operand] = self.weight_vars[name]
        for node in self.region.outputs:
            if node.op == "get_attr" and node not in self.values:
                name = str(node.target)
                if name not in self.weight_vars:
                    self._declare(name, getattr(self.graph, name).contiguous())
                self.values[node] = self.weight_vars[name]

    def _declare(self, name: str, tensor: torch.Tensor) -> None:
        var = relax.Var(f"weight_{len(self.weights)}", _type(promised(tensor)))
        self.weights[name] = tensor
        self.weight_vars[name] = var
        self.parameters.append(var)

    def _value(self, node: fx.Node) -> Any:
        return self.values[node]

    def _emit_all(self) -> None:
        """Every operator in order; a kernel of several comes with its last, or where its first reader is."""
        writers = {node: fusion for fusion in self.plan for node in fusion.results}
        last = {fusion.nodes[-1]: fusion.results[0] for fusion in self.plan}
        fused = {node for fusion in self.plan for node in fusion.nodes}
        for node in self.region.nodes:
            if node in last:
                self._emit(last[node], writers)
            elif node not in fused and not is_reshape(node) and node.target is not operator.getitem:
                self._emit(node, writers)
        for node in self.region.outputs:
            self._emit(node, writers)

    def _emit(self, wanted: fx.Node, writers: Mapping[fx.Node, Fusion]) -> None:
        """The value of `wanted`, and before it what it needs."""
        waiting = [wanted]
        while waiting:
            node = waiting[-1]
            if node in self.values:
                waiting.pop()
                continue
            fusion = writers.get(node)
            needed = fusion.inputs if fusion is not None else _read_by(node)
            missing = [n for n in needed if n not in self.values]
            if missing:
                waiting += missing
                continue
            try:
                if fusion is not None:
                    self._fused(fusion)
                else:
                    self.values[node] = self._node(node)
            except Exception as error:
                raise LoweringError(node, error) from error

    def _node(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(index, int)
            tensors = out_of(source)
            assert isinstance(tensors, tuple)
            if len(tensors) == 1:  # Relax knows no tuple of one
                return self._value(source)
            return self.block.emit(relax.TupleGetItem(self._value(source), index))
        if is_reshape(node):
            out = out_of(node)
            assert isinstance(out, Out)
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if 0 in out.shape:  # Relax takes a 0 in the new shape for "as it was"
                return self.block.emit_te(lambda _: filled(out, 0), self._value(source), primfunc_name_hint="empty")
            return self.block.emit(relax.op.reshape(self._value(source), relax.ShapeExpr(out.shape)))
        if "kernel_call" in node.meta:
            return self._kernel(node, node.meta["kernel_call"])
        return self._tensor_expression(node)

    def _kernel(self, node: fx.Node, call: KernelCall) -> Any:
        name = call.algorithm.replace(" ", "_")
        function = self.block.add_func(call.func.with_attr("op_pattern", 8), name)
        self.calls[function.name_hint] = (call, str(node.target))
        operands = [self._packed(o) if isinstance(o, Packed) else self._value(o) for o in call.operands]
        out = out_of(node)
        types = [_type(o) for o in out] if isinstance(out, tuple) else _type(out)
        if call.second is not None:
            second, count = call.second, call.second.first
            between = _type(Out(second.between, "float32"))
            given = self.block.emit(relax.call_tir(function, operands[:count], between))
            rest = replace(
                call, func=second.func, algorithm=second.algorithm, choice=second.choice, second=None, decisions=()
            )
            function = self.block.add_func(second.func.with_attr("op_pattern", 8), second.algorithm.replace(" ", "_"))
            self.calls[function.name_hint] = (rest, str(node.target))
            operands = [given, *operands[count:]]
        return self.block.emit(relax.call_tir(function, operands, types))

    def _packed(self, operand: Packed) -> Any:
        if operand.constant.op == "get_attr":
            return self.weight_vars[f"{operand.constant.target}.{operand.layout}"]
        count = relax.ShapeExpr([prod(_shape(operand.constant))])
        line = self.block.emit(relax.op.reshape(self._value(operand.constant), count))
        order = self.weight_vars[_order_name(operand)]
        return self.block.emit_te(gather, line, order, primfunc_name_hint="repack")

    def _tensor_expression(self, node: fx.Node) -> Any:
        """A definition with loops of its own, which is never part of a kernel of several."""
        lowering = LOWERINGS[node.target]  # type: ignore[index]
        tensors = list(dict.fromkeys(node.all_input_nodes))

        def compute(*operands: Any) -> Any:
            given = dict(zip(tensors, operands, strict=True))
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: given[n])
            result = lowering.compute(outs_of(node), *args, **kwargs)
            return tuple(result) if isinstance(result, list) else result

        hint = str(node.target).split(".")[1]
        return self.block.emit_te(compute, *[self._value(t) for t in tensors], primfunc_name_hint=hint)

    def _fused(self, fusion: Fusion) -> None:
        """One kernel for all nodes of `fusion`; where that fails, one for each."""
        names = dict.fromkeys(str(source_of(n).target).split(".")[1] for n in fusion.nodes if not is_reshape(n))
        try:
            tensors = [te.placeholder(o.shape, o.dtype, f"x{i}") for i, o in enumerate(map(_single, fusion.inputs))]
            function = te.create_prim_func([*tensors, *fusion.compute(*tensors)], "int64")
        except Exception as error:
            if len(fusion.nodes) == 1:
                raise
            log.warning("%d operators become kernels of their own: %s", len(fusion.nodes), error)
            for part in apart(fusion):
                self._fused(part)
            return
        variable = self.block.add_func(function, "_".join(names)[:_NAME_LENGTH] or "copy")
        self.fusions[variable.name_hint] = fusion
        types = [_type(_single(n)) for n in fusion.results]
        operands = [self._value(n) for n in fusion.inputs]
        value = self.block.emit(relax.call_tir(variable, operands, types if len(types) > 1 else types[0]))
        if len(types) == 1:
            self.values[fusion.results[0]] = value
            return
        for i, node in enumerate(fusion.results):
            self.values[node] = self.block.emit(relax.TupleGetItem(value, i))
