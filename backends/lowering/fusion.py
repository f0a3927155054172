"""Expressions of one region of the graph -> kernels of several nodes each.

Facts about a node (`region_kernel.Facts`) are read from the loops that its definition makes, not kept in a table:
whether an element is one formula, which leading dims stay in step with each operand, what it costs. A fused kernel is
the definitions applied to each other's results. Definitions with several results that are formulas each (split, unbind)
fall into one node a result; those with loops of their own (sort, scatter) stay alone.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import tvm_ffi
from torch import fx
from tvm import te
from tvm.ir import Call, TensorLoad

from ...hwdb import Hardware
from ...passes.refusals import keep
from ..cpu.access import element_bits, size_of
from ..cpu.stages import Stage, collect, cost, inline_producers, intrinsic, read_stages
from ..region_kernel import Facts, Problem, Region
from ..regions import form_regions
from .operators import LOWERINGS
from .registry import Out

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fusion:
    """One kernel to be: nodes in order, the tensors it reads, the nodes whose values it writes, and why it is one."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    reason: str

    def compute(self, *tensors: te.Tensor) -> list[te.Tensor]:
        """The results as expressions of the inputs."""
        values: dict[fx.Node, Any] = dict(zip(self.inputs, tensors, strict=True))
        several: dict[fx.Node, Any] = {}
        for node in self.nodes:
            values[node] = _defined(node, values, several)
        results: list[te.Tensor] = []
        for node in self.results:
            value = values[node]
            # TVM names a value by its producer, and refuses to return a placeholder or one value twice.
            if any(value.same_as(known) for known in (*tensors, *results)):
                value = te.compute(value.shape, lambda *i, value=value: value(*i), name="copy")
            results.append(value)
        return results


def fuse(
    nodes: Sequence[fx.Node], outputs: Sequence[fx.Node], reshapes: frozenset[fx.Node], hw: Hardware
) -> list[Fusion]:
    """The kernels of the expressions among `nodes`; kernels of our own and `reshapes` that stay aliases are not."""
    facts, operands = _facts(nodes, reshapes)
    problem = Problem(operands, facts, frozenset(outputs), hw, {n: _nbytes(n) for n in _externals(operands)})
    regions = form_regions(problem, lambda node, reason: keep(log, node, "%s", reason))
    return [fusion for region in regions if (fusion := _fusion(region, operands, reshapes)) is not None]


def apart(fusion: Fusion) -> list[Fusion]:
    """A kernel for every node of `fusion`."""
    kernels = []
    for node in fusion.nodes:
        inputs = tuple(dict.fromkeys(source_of(node).all_input_nodes))
        kernels.append(Fusion((node,), inputs, (node,), "one operator"))
    return kernels


def source_of(node: fx.Node) -> fx.Node:
    """The node whose operator computes the value of `node`: for one of several results, the producer of them all."""
    if node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source
    return node


def _defined(node: fx.Node, values: Mapping[fx.Node, Any], several: dict[fx.Node, Any]) -> Any:
    """The definition of `node` applied to `values`; `several` remembers definitions with several results."""
    source = source_of(node)
    if source is not node and source in several:
        return several[source][node.args[1]]
    args, kwargs = fx.node.map_arg((source.args, source.kwargs), values.__getitem__)
    result = LOWERINGS[source.target].compute(outs_of(source), *args, **kwargs)  # type: ignore[index]
    if source is node:
        return result
    several[source] = result
    return result[node.args[1]]


def outs_of(node: fx.Node) -> Out | tuple[Out, ...]:
    """The shapes and dtypes a node promises."""
    value = node.meta["val"]
    return tuple(_out(v) for v in value) if isinstance(value, (tuple, list)) else _out(value)


def _out(value: torch.Tensor) -> Out:
    return Out(tuple(int(d) for d in value.shape), str(value.dtype).removeprefix("torch."))


def _nbytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _externals(operands: Mapping[fx.Node, tuple[fx.Node, ...]]) -> set[fx.Node]:
    return {operand for sources in operands.values() for operand in sources} | set(operands)


def _fusion(
    region: Region, operands: Mapping[fx.Node, tuple[fx.Node, ...]], reshapes: frozenset[fx.Node]
) -> Fusion | None:
    """The region without reshapes at its edges, which only rename; None where nothing is left."""
    nodes: list[Any] = list(region.nodes)
    results: list[Any] = list(region.results)
    for node in list(nodes):
        if node in reshapes and operands[node][0] not in nodes and node not in results:
            nodes.remove(node)
        elif node in reshapes and operands[node][0] not in nodes:
            nodes.remove(node)
            results.remove(node)
    for node in reversed(list(nodes)):
        if node in reshapes and node in results and not any(node in operands[other] for other in nodes):
            nodes.remove(node)
            results.remove(node)
            if operands[node][0] not in results:
                results.append(operands[node][0])
    if not nodes:
        return None
    inputs = dict.fromkeys(o for node in nodes for o in operands[node] if o not in nodes)
    return Fusion(tuple(nodes), tuple(inputs), tuple(n for n in nodes if n in results), region.reason)


# ---- facts ----


@dataclass(frozen=True)
class _Read:
    """Facts of a definition, operands by number."""

    shape: tuple[int, ...]
    item_bytes: int
    rows: int
    work: float
    formula: bool
    aligned: tuple[int, ...]
    loads: tuple[float, ...]


def _facts(
    nodes: Sequence[fx.Node], reshapes: frozenset[fx.Node]
) -> tuple[dict[fx.Node, Facts], dict[fx.Node, tuple[fx.Node, ...]]]:
    """The facts of every expression with one result, and the operands of every node that computes something."""
    facts: dict[fx.Node, Facts] = {}
    operands: dict[fx.Node, tuple[fx.Node, ...]] = {}
    memo: dict[Any, _Read | None] = {}
    split: set[fx.Node] = set()
    for node in nodes:
        source = source_of(node)
        if "kernel_call" in source.meta or (source.target not in LOWERINGS):
            operands[node] = tuple(node.all_input_nodes)
            continue
        if isinstance(node.meta["val"], (tuple, list)):
            pieces = [user for user in node.users if user.target is operator.getitem]
            read = [_read(piece, memo) for piece in pieces]
            if len(pieces) == len(node.users) and all(r is not None and r.formula for r in read):
                split.add(node)
            else:
                operands[node] = tuple(node.all_input_nodes)
            continue
        if source is not node and source not in split:
            operands[node] = (source,)
            continue
        operands[node] = tuple(dict.fromkeys(source.all_input_nodes))
        found = _read(node, memo)
        if found is not None:
            facts[node] = Facts(
                found.shape,
                found.item_bytes,
                found.rows,
                0.0 if node in reshapes else found.work,
                found.formula,
                dict(zip(operands[node], found.aligned, strict=True)),
                dict(zip(operands[node], found.loads, strict=True)),
            )
    return facts, operands


def _read(node: fx.Node, memo: dict[Any, _Read | None]) -> _Read | None:
    """Facts about the definition of `node`, from the loops it makes; None where those cannot be read."""
    source = source_of(node)
    tensors = list(dict.fromkeys(source.all_input_nodes))
    outs = {t: outs_of(t) for t in tensors}
    names = {t: f"%{i}" for i, t in enumerate(tensors)}
    # fx prints nodes by name: equal definitions get equal text.
    text = repr(fx.node.map_arg((source.args, source.kwargs), lambda n: _Name(names[n])))
    index = None if source is node else node.args[1]
    key = (source.target, text, tuple(outs.values()), outs_of(node), index)
    if key not in memo:
        try:
            memo[key] = _analysed(node, tensors, outs)
        except Exception as error:  # whoever lowers the node meets it again, and knows what to do
            log.debug("nothing is known of %s: %s", node, error)
            memo[key] = None
    return memo[key]


class _Name(str):
    """An operand in the text of a call."""

    __slots__ = ()
    __repr__ = str.__str__


def _analysed(node: fx.Node, tensors: Sequence[fx.Node], outs: Mapping[fx.Node, Any]) -> _Read | None:
    if not all(isinstance(out, Out) for out in outs.values()):
        return None
    given = {t: te.placeholder(outs[t].shape, outs[t].dtype, name=f"x{i}") for i, t in enumerate(tensors)}
    result = Fusion((node,), tuple(tensors), (node,), "").compute(*given.values())
    func = te.create_prim_func([*given.values(), *result], "int64")
    stages, allocated = read_stages(func)
    stages = inline_producers(stages, allocated)
    if any(not stage.simple for stage in stages):
        return None
    *sources, target = func.params
    return _of_stages(stages, sources, target)


def _of_stages(stages: Sequence[Stage], sources: Sequence[Any], target: Any) -> _Read:
    shape = tuple(int(extent) for extent in target.shape if int(extent) != 1)
    written = {stage.body.buffer for stage in stages}
    rows = len(shape)
    aligned = dict.fromkeys(sources, len(shape))
    loads = dict.fromkeys(sources, 0.0)
    work = 0.0
    for stage in stages:
        rows = min(rows, _leading(stage.body.indices, stage.body.buffer, stage), _common(stage, shape))
        work += stage.points * cost(stage.body)
        guarded = _guarded(stage)
        for load in _distinct(collect(stage.body, TensorLoad)):
            depth = _leading(load.indices, load.source, stage)
            if load.source in written:
                rows = min(rows, depth)
                continue
            aligned[load.source] = min(aligned[load.source], depth)
            count = float(stage.points)
            loads[load.source] += min(count, size_of(load.source)) if any(load.same_as(g) for g in guarded) else count
    size = max(size_of(target), 1)
    formula = len(stages) == 1 and stages[0].injective
    return _Read(
        shape,
        element_bits(str(target.dtype)) // 8,
        rows,
        work / size,
        formula,
        tuple(min(aligned[s], rows) for s in sources),
        tuple(loads[s] for s in sources),
    )


def _common(stage: Stage, shape: tuple[int, ...]) -> int:
    """How many leading axes of the stage have the extents of the result."""
    depth = 0
    for axis, extent in zip(stage.spatial, shape, strict=False):
        if axis.extent != extent:
            break
        depth += 1
    return depth


def _leading(indices: Sequence[Any], buffer: Any, stage: Stage) -> int:
    """How many leading dims of `buffer` are indexed by the leading axes of the stage, one by one over their extent."""
    varying = [(i, int(extent)) for i, extent in zip(indices, buffer.shape, strict=True) if int(extent) != 1]
    depth = 0
    for (index, extent), axis in zip(varying, stage.spatial, strict=False):
        if not index.same_as(axis.var) or extent != axis.extent:
            break
        depth += 1
    return depth


def _distinct(loads: Sequence[Any]) -> list[Any]:
    """Loads of different elements: code generation reads an element once."""
    found: list[Any] = []
    for load in loads:
        if not any(tvm_ffi.structural_equal(load, known) for known in found):
            found.append(load)
    return found


def _guarded(stage: Stage) -> list[Any]:
    """Loads in a branch of an if_then_else: of a concatenation, each reads its own part only."""
    branches = [c.args[1:] for c in collect(stage.body, Call) if intrinsic(c) == "if_then_else"]
    return [load for branch in branches for load in collect(list(branch), TensorLoad)]
