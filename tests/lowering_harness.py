"""Runs one TE definition and compares it with PyTorch: `check(torch.ops.aten.add.Tensor, a, b, alpha=2)`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import tvm
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from tvm import te

from graphwright.backends.cpu.expand_math import expand_math
from graphwright.backends.cpu.schedule import schedule
from graphwright.backends.lowering import families
from graphwright.backends.lowering.registry import LOWERINGS, Out
from graphwright.hwdb import detect

families.load()


@functools.cache
def host_target() -> tvm.target.Target:
    """LLVM for the features this machine has enabled: the name of its chip may promise more (SIGILL)."""
    flags = set(Path("/proc/cpuinfo").read_text().split())
    levels = (("avx512vl", "x86-64-v4"), ("avx2", "x86-64-v3"), ("sse4_2", "x86-64-v2"))
    mcpu = next((level for flag, level in levels if flag in flags), "generic")
    return tvm.target.Target({"kind": "llvm", "mcpu": mcpu})


def dtype_name(dtype: torch.dtype) -> str:
    """TVM's name of a torch dtype: the two agree but for the `torch.`."""
    return str(dtype).removeprefix("torch.")


def build_node(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> tuple[fx.Node, list[torch.Tensor], Any]:
    """Make the fx node that calls `op`; returns it, the tensors among its arguments, and eager's result."""
    expected = op(*args, **kwargs)
    graph, mode, tensors = fx.Graph(), FakeTensorMode(allow_non_fake_inputs=True), list[torch.Tensor]()

    def fake(value: Any) -> Any:
        return mode.from_tensor(value.detach().contiguous()) if isinstance(value, torch.Tensor) else value

    def place(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(f"arg{len(tensors)}")
        node.meta["val"] = fake(value)
        tensors.append(value.detach().contiguous())
        return node

    args, kwargs = pytree.tree_map(place, (args, kwargs))
    node = graph.call_function(op, args, kwargs)
    node.meta["val"] = pytree.tree_map(fake, tuple(expected) if isinstance(expected, list) else expected)
    return node, tensors, expected


def reason(node: fx.Node) -> str | None:
    """Why the table does not take the node, or None."""
    entry = LOWERINGS.get(node.target)
    return f"no lowering of {node.target}" if entry is None else entry.can(node)


def prim_func(node: fx.Node) -> tuple[Any, list[fx.Node], list[Out]]:
    """The node's PrimFunc, the nodes it reads in the order of its parameters, and its results."""
    inputs = list(node.all_input_nodes)
    places = {
        n: te.placeholder(tuple(n.meta["val"].shape), dtype_name(n.meta["val"].dtype), name=n.name) for n in inputs
    }
    value = node.meta["val"]
    single = isinstance(value, torch.Tensor)
    outs = [Out(tuple(v.shape), dtype_name(v.dtype)) for v in ((value,) if single else value)]
    args, kwargs = fx.map_arg((node.args, node.kwargs), places.__getitem__)
    result = LOWERINGS[node.target].compute(outs[0] if single else tuple(outs), *args, **kwargs)
    results = [result] if single else list(result)
    assert len(results) == len(outs)
    for tensor, out in zip(results, outs, strict=True):
        shape = tuple(int(extent) for extent in tensor.shape)
        assert (shape, str(tensor.dtype)) == (out.shape, out.dtype), f"{(shape, tensor.dtype)} is not {out}"
    return te.create_prim_func([*places.values(), *results]), inputs, outs


def compile_nodes(nodes: Sequence[fx.Node], shipped: bool = False) -> list[Callable[..., list[torch.Tensor]]]:
    """Compile the nodes in one module; call the results with the tensors each node reads, in order.

    With TVM's default schedule, or as they are shipped: with our generic schedule and our elementary functions.
    """
    functions, described = {}, []
    for i, node in enumerate(nodes):
        func, inputs, outs = prim_func(node)
        if shipped:
            func = expand_math(schedule(func, detect()))
        functions[f"f{i}"] = func.with_attrs({"global_symbol": f"f{i}", "tirx.noalias": True})
        described.append((len(inputs), outs))
    module = tvm.compile(tvm.IRModule(functions), target=host_target())
    return [functools.partial(_call, module[f"f{i}"], *description) for i, description in enumerate(described)]


def compile_node(node: fx.Node, shipped: bool = False) -> Callable[..., list[torch.Tensor]]:
    """`compile_nodes` of one."""
    return compile_nodes([node], shipped)[0]


def _call(function: Any, count: int, outs: Sequence[Out], *tensors: torch.Tensor) -> list[torch.Tensor]:
    assert len(tensors) == count
    results = [torch.zeros(out.shape, dtype=getattr(torch, out.dtype)) for out in outs]
    function(*(_to_tvm(t) for t in (*tensors, *results)))
    return results


def _to_tvm(tensor: torch.Tensor) -> Any:
    # TVM wants C-order strides even of a tensor without elements; torch's are at least 1.
    if tensor.numel() == 0:
        return tvm.runtime.empty(tuple(tensor.shape), dtype_name(tensor.dtype))
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.data_ptr() % 64:  # TVM assumes this alignment; results made by torch.zeros have it
        tensor = tensor.clone()
    return tvm.runtime.from_dlpack(tensor)


def run(op: torch._ops.OpOverload, *args: Any, shipped: bool = False, **kwargs: Any) -> tuple[list[torch.Tensor], Any]:
    """Compile and run the call; returns our results and eager's."""
    node, tensors, expected = build_node(op, *args, **kwargs)
    refusal = reason(node)
    assert refusal is None, refusal
    return compile_node(node, shipped)(*_read_by(node, tensors)), expected


def _read_by(node: fx.Node, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    placeholders = [n for n in node.graph.nodes if n.op == "placeholder"]
    given = dict(zip(placeholders, tensors, strict=True))
    return [given[n] for n in node.all_input_nodes]


def check(
    op: torch._ops.OpOverload,
    *args: Any,
    rtol: float | None = None,
    atol: float | None = None,
    shipped: bool = False,
    **kwargs: Any,
) -> None:
    """Assert that our results are eager's: dtype and shape, values within assert_close's defaults."""
    got, expected = run(op, *args, shipped=shipped, **kwargs)
    _compare(got, expected, rtol, atol)


def _compare(got: Sequence[torch.Tensor], expected: Any, rtol: float | None, atol: float | None) -> None:
    wanted = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True, check_stride=False)


class Checks:
    """Many checks compiled in one module, which takes a fraction of the time: add the calls, then `run`."""

    def __init__(self) -> None:
        self.calls: list[tuple[fx.Node, list[torch.Tensor], Any, float | None, float | None]] = []

    def add(
        self,
        op: torch._ops.OpOverload,
        *args: Any,
        rtol: float | None = None,
        atol: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember a call to be checked as `check` would."""
        node, tensors, expected = build_node(op, *args, **kwargs)
        refusal = reason(node)
        assert refusal is None, refusal
        self.calls.append((node, tensors, expected, rtol, atol))

    def run(self, shipped: bool = True) -> None:
        """Compile and compare them all; the failure lists every call that differs."""
        compiled = compile_nodes([node for node, *_ in self.calls], shipped)
        failures = []
        for function, (node, tensors, expected, rtol, atol) in zip(compiled, self.calls, strict=True):
            try:
                _compare(function(*_read_by(node, tensors)), expected, rtol, atol)
            except AssertionError as error:
                kinds = [f"{t.dtype} {tuple(t.shape)}" for t in tensors]
                failures.append(f"{node.format_node()} of {kinds}:\n{error}")
        assert not failures, "\n\n".join(failures)


def check_refused(op: torch._ops.OpOverload, *args: Any, because: str, **kwargs: Any) -> None:
    """Assert that the table refuses the call, naming `because`."""
    node, _, _ = build_node(op, *args, **kwargs)
    refusal = reason(node)
    if refusal is None or because not in refusal:
        pytest.fail(f"refusal {refusal!r} does not mention {because!r}")
