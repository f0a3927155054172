"""A region as a Relax module -> bytecode for TVM's virtual machine, host functions and GPU kernels, all as TVM's IR.

Operators are joined by TVM's FuseOps (elementwise work into the product or reduction in front of it), every function is
scheduled by the first rule (schedule.py) whose result can be lowered within the limits of the device, and memory is
planned by StaticPlanBlockMemory.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import tvm
import tvm.tirx.build  # not an attribute of tvm.tirx, where a function has its name
import tvm_ffi
from tvm import ir, relax, tirx
from tvm.relax import transform
from tvm.target import Target

from ...errors import GraphwrightError
from ...hwdb import Hardware
from ..lowering.extract import Fused
from ..lowering.registry import KernelCall, KernelInfo
from .launches import Launch
from .own_order import is_imperative
from .schedule import NOTHING, reason_of, schedules
from .without_views import without_views

log = logging.getLogger(__name__)

_JOIN = (
    transform.LegalizeOps,  # reshapes become functions, and views again where they are no result
    transform.AnnotateTIROpPattern,
    transform.FuseOps,
    transform.FuseTIR,
    transform.DeadCodeElimination,
)
_PLAN = (
    transform.RewriteDataflowReshape,
    transform.ToNonDataflow,
    transform.RemovePurityChecking,
    transform.CallTIRRewrite,
    transform.StaticPlanBlockMemory,
)
_BYTECODE = (
    transform.LowerAllocTensor,
    transform.KillAfterLastUse,
    transform.LowerRuntimeBuiltin,
    transform.ComputePrimValue,
    transform.VMShapeLower,
    transform.AttachGlobalSymbol,
)

_OPAQUE = 8  # OpPatternKind.kOpaque: FuseOps leaves it alone
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError)  # what TVM's passes raise


@dataclass(frozen=True)
class Lowered:
    """What is left is code generation. `host` and `device` are TVM's IR; `builder` holds the bytecode."""

    builder: Any
    host: Any
    device: Any
    target: Target
    launches: dict[str, tuple[Launch, ...]]  # by function
    kernels: list[KernelInfo]
    storage_bytes: int  # of the activations, as planned
    fallbacks: list[str]  # schedules that failed, each with the reason: another took the place


def lower(fused: Fused, hw: Hardware, host: dict[str, Any]) -> Lowered:
    """Schedule and lower a region for `hw`; `host` is the target dictionary of the machine that drives it.

    Raises GraphwrightError for a function that no rule can bring within the limits of the device.
    """
    target = Target(hw.tvm_target(), host=host)
    with target:
        joined = _apply(_not_joined(fused.module), _JOIN)
        planned = _apply(joined, _PLAN)
        storage = _storage_bytes(planned)
        builder = relax.ExecBuilder()
        recorded = _recorded(planned, len(fused.inputs)) if target.kind.name == "cuda" else planned
        rest = tvm.get_global_func("relax.VMCodeGen")(builder, _apply(recorded, _BYTECODE))
    functions = {gv: function for gv, function in rest.functions_items() if isinstance(function, tirx.PrimFunc)}
    host_functions: dict[Any, Any] = {}
    kernels: dict[Any, Any] = {}
    infos: dict[str, tuple[str, str, tuple[Launch, ...]]] = {}
    fallbacks: list[str] = []
    for variable, function in functions.items():
        call, _ = fused.calls.get(variable.name_hint, (None, ""))
        if call is not None:
            rule, on_host, on_device = _lower_kernel(variable, function, call, target)
        else:
            try:
                rule, on_host, on_device = _lower_function(variable, function, target, hw.cores, fallbacks)
            except _FAILURES as error:
                if isinstance(error, GraphwrightError):
                    raise
                raise GraphwrightError(
                    f"{variable.name_hint} cannot be scheduled for {hw.id}: {reason_of(error)}; report this as a bug"
                ) from error
        host_functions.update(on_host.functions_items())
        kernels.update(on_device.functions_items())
        found = tuple(_launch(kernel) for _, kernel in on_device.functions_items())
        choice = _described(found) if call is None else f"{call.choice}, {_described(found)}"
        infos[variable.name_hint] = (rule, choice, found)
    launches = {name: found for name, (_, _, found) in infos.items()}
    rows = [
        KernelInfo(name, fused.calls[name][1] if name in fused.calls else name, *infos[name][:2], None, step=number)
        for number, name in enumerate(_calls(planned, infos))
    ]
    on_host, on_device = ir.IRModule(host_functions), ir.IRModule(kernels)
    return Lowered(builder, on_host, on_device, target, launches, rows, storage, fallbacks)


def _not_joined(module: Any) -> Any:
    """The module with functions that must stay as they are.

    Those of several results: joined, one that nobody reads is memory of a kernel. Those in an order of their own: where
    they have no loop, TVM takes them for elementwise, and does not see what they read.
    """
    marked = ir.IRModule(dict(module.functions_items()))
    functions = [(name, f) for name, f in module.functions_items() if isinstance(f, tirx.PrimFunc)]
    apart = {name for name, function in functions if is_imperative(function)}

    def look(call: Any) -> None:
        called = isinstance(call, relax.Call) and call.op.same_as(ir.Op.get("relax.call_tir"))
        if called and isinstance(call.ty, ir.TupleType):
            apart.add(call.args[0])

    relax.analysis.post_order_visit(module["main"], look)
    for variable in apart:
        marked.update_func(variable, module[variable].with_attr("op_pattern", _OPAQUE))
    return marked


def _recorded(module: Any, inputs: int) -> Any:
    """The module with kernels that neither read an input nor write a result in CUDA graphs.

    Those have the same memory in every call; weights, behind the first `inputs` parameters, have too. Recorded in the
    first call, they are one launch from then on.
    """
    module = ir.IRModule(dict(module.functions_items()))
    module.update_func(module.get_global_var("main"), module["main"].with_attr("num_input", inputs))
    with ir.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        return transform.RewriteCUDAGraph()(module)


def _apply(module: Any, passes: tuple[Any, ...]) -> Any:
    for make in passes:
        module = make()(module)
    return module


class KernelFailed(GraphwrightError):
    """A kernel of ours that cannot be lowered, or not within the limits of the device."""

    def __init__(self, call: KernelCall, reason: str) -> None:
        super().__init__(f"{call.algorithm} ({call.choice}) cannot be lowered: {reason}")
        self.call = call


def _lower_kernel(variable: Any, function: Any, call: KernelCall, target: Target) -> tuple[str, Any, Any]:
    """The same for a kernel of ours, which has its threads already."""
    try:
        on_host, on_device = _split(variable, function, target)
        if not on_device.functions:
            raise ValueError("it has no threads of a GPU")
        for _, kernel in on_device.functions_items():
            _check_limits(_launch(kernel), target)
    except _FAILURES as error:
        raise KernelFailed(call, reason_of(error)) from error
    return call.algorithm, on_host, on_device


def _lower_function(
    variable: Any, function: Any, target: Target, units: int, fallbacks: list[str]
) -> tuple[str, Any, Any]:
    """The first rule that works, the functions of the host, the kernels; those that failed are added to `fallbacks`."""
    failure: Exception | None = None
    for rule, scheduled in schedules(function, target, units):
        try:
            on_host, on_device = _split(variable, scheduled, target)
            if not on_device.functions and rule != NOTHING:
                raise ValueError("the schedule leaves everything to the host")
            for _, kernel in on_device.functions_items():
                _check_limits(_launch(kernel), target)
        except _FAILURES as error:
            log.warning("%s: %s does not work, the next rule takes its place", variable.name_hint, rule)
            log.info("because %s", error)
            fallbacks.append(f"{rule} for {variable.name_hint}: {reason_of(error)}")
            failure = error
            continue
        return rule, on_host, on_device
    assert failure is not None  # `schedules` raises where it has none
    raise GraphwrightError(
        f"no schedule makes kernels of {variable.name_hint} for {target.kind.name}, the last one because "
        f"{reason_of(failure)}; choose a device with other limits, or report this as a bug"
    ) from failure


def _split(variable: Any, function: Any, target: Target) -> tuple[Any, Any]:
    """The function through TVM's passes: what runs on the host, and the kernels."""
    build = sys.modules["tvm.tirx.build"]
    module = tirx.transform.BindTarget(target)(ir.IRModule({variable: _with_bits(function)}))
    pipeline, finish_host, finish_device = tirx.get_tir_pipeline("s_tir")
    on_host, by_target = build.split_host_device_mods(pipeline(module))
    (on_device,) = by_target.values() or (ir.IRModule({}),)  # a result without elements takes no kernel
    finished = finish_device()(on_device)
    return finish_host()(on_host), without_views(finished) if target.kind.name == "rocm" else finished


def _with_bits(function: Any) -> Any:
    """The function with constants of bfloat16 as their bits: TVM keeps that type in memory as integers of 16 bits, and
    forgets constants that are stored as they are."""

    def as_bits(constant: Any) -> Any:
        if str(constant.ty.dtype) != "bfloat16":
            return constant
        bits = torch.tensor(float(constant.value), dtype=torch.bfloat16).view(torch.uint16)
        return tirx.reinterpret("bfloat16", tirx.const(int(bits), "uint16"))

    return function.with_body(tvm_ffi.structural_map(function.body, (tirx.FloatImm, as_bits)))


def _launch(kernel: Any) -> Launch:
    extents: dict[str, int] = {}
    shared: list[int] = []

    def thread(node: Any) -> None:
        if node.attr_key == "thread_extent":
            extents[str(node.node.thread_tag)] = int(node.value)

    def allocation(node: Any) -> None:
        if str(node.buffer.scope()) == "global":
            raise ValueError(
                f"{kernel.attrs['global_symbol']} allocates {node.buffer.shape} in memory, which no kernel can"
            )
        if str(node.buffer.scope()).startswith("shared"):
            dtype = tvm_ffi.dtype(str(node.buffer.dtype))
            shared.append(prod(int(extent) for extent in node.buffer.shape) * dtype.bits * dtype.lanes // 8)

    tvm_ffi.structural_walk(kernel.body, [(tirx.AttrStmt, thread), (tirx.AllocBuffer, allocation)])
    threads = prod(extent for tag, extent in extents.items() if tag.startswith("threadIdx"))
    blocks = prod(extent for tag, extent in extents.items() if tag.startswith("blockIdx"))
    arguments = tuple("handle" if _is_pointer(p) else str(p.ty.dtype) for p in kernel.params)
    tags = tuple(str(tag) for tag in kernel.attrs["tirx.kernel_launch_params"])
    return Launch(str(kernel.attrs["global_symbol"]), arguments, tags, threads, sum(shared), blocks)


def _is_pointer(parameter: Any) -> bool:
    return isinstance(parameter.ty, ir.PointerType)


def _check_limits(launch: Launch, target: Target) -> None:
    threads, shared = (int(target.attrs[name]) for name in ("max_threads_per_block", "max_shared_memory_per_block"))
    # What a kernel declares without asking the driver for more is at most 48 KB, on every device.
    shared = min(shared, 48 << 10)
    if launch.threads > threads:
        raise ValueError(f"{launch.name} has {launch.threads} threads a block, the device allows {threads}")
    if launch.shared_bytes > shared:
        raise ValueError(f"{launch.name} has {launch.shared_bytes} bytes of shared memory, {shared} are allowed")


def _described(launches: tuple[Launch, ...]) -> str:
    if not launches:
        return "no kernel"
    shared = max(launch.shared_bytes for launch in launches)
    text = " + ".join(f"{launch.threads} threads a block" for launch in launches)
    return f"{text}, {shared} bytes shared" if shared else text


def _calls(module: Any, known: dict[str, Any]) -> list[str]:
    """The functions that main calls, in order."""
    names: list[str] = []

    def look(call: Any) -> None:
        if isinstance(call.op, ir.GlobalVar) and call.op.name_hint in known:
            names.append(call.op.name_hint)

    relax.analysis.post_order_visit(module["main"], lambda e: look(e) if isinstance(e, relax.Call) else None)
    return names


def _storage_bytes(module: Any) -> int:
    """Bytes of the storages that the plan allocates."""
    total = 0

    def look(expression: Any) -> None:
        nonlocal total
        if isinstance(expression, relax.Call) and expression.op.same_as(ir.Op.get("relax.memory.alloc_storage")):
            total += prod(int(extent) for extent in expression.args[0].values)

    relax.analysis.post_order_visit(module["main"], look)
    return total
