"""A captured graph -> the files of an artifact: passes, partition, lowering, machine code."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx

from ..backends.aot.weights import write_tensors
from ..backends.choices import Choices, choosing
from ..backends.lowering.registry import KernelInfo
from ..errors import GraphwrightError, UnsupportedOp
from ..hwdb import Hardware
from . import pipeline
from .obstacle import obstacle
from .partition import Partition, partition
from .pass_checks import Pass
from .plan import Plan, called, make_plan
from .precision import FP32, Precision
from .report import EagerRow
from .rewriting import rewrite
from .users_line import users_line

if TYPE_CHECKING:
    import torch

    from ..backends.gpu.lower import Lowered as OnGpu
    from ..backends.lowering.extract import Fused, Lowered
    from ..passes.assign_precision import Choice

log = logging.getLogger(__name__)

# Tensors that operators left to PyTorch read.
CONSTANTS_NAME = "constants.safetensors"
_NO_PLAN = Plan((), 0, (), 0, {})  # until there is one
MOST_FAILURES = 16  # operators whose lowering may fail: each costs lowering the graph once more


@dataclass
class Built:
    """What a build made: the files lie in the directory it was given."""

    plan: Plan
    graph: fx.GraphModule
    passes: tuple[pipeline.PassRun, ...]
    precisions: tuple[Choice, ...] = ()
    notes: tuple[str, ...] = ()  # on the precisions
    kernels: tuple[KernelInfo, ...] = ()
    eager: tuple[EagerRow, ...] = ()
    sizes: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)


def default_passes(hw: Hardware) -> tuple[Pass, ...]:
    """The passes for a machine, in their order."""
    from ..passes.default import passes_for

    return passes_for(hw)


def build(
    graph: fx.GraphModule,
    hw: Hardware,
    directory: Path,
    passes: Sequence[Pass] | None = None,
    choices: Choices | None = None,
    precision: Precision = FP32,
    memory_limit: int | None = None,
    left_out: Mapping[str, str] | None = None,
) -> Built:
    """Compile `graph` for `hw` and write the code, weights and constants to `directory`.

    `choices` decide between ranked candidates of the cost model; by default the first wins.
    `memory_limit` is in bytes of the largest region's activations. `left_out`: nodes of the rewritten graph, by name,
    that PyTorch is to run, and why.
    Raises UnsupportedOp, with every operator and the user's source lines, where PyTorch cannot take over on the target.
    """
    from ..backends.aot import library, weights

    clock = _Clock()
    made = rewrite(graph, hw, default_passes(hw) if passes is None else passes, precision)
    rewritten = made.graph
    clock.stage("passes")
    if hw.kind == "gpu":
        return _build_gpu(Built(_NO_PLAN, rewritten, made.runs, made.precisions, made.notes), hw, directory, clock)
    try:
        with choosing(choices or Choices()):
            parts, lowered = _lower(rewritten, hw, memory_limit, left_out)
        clock.stage("lowering")
        info = library.build([r.program for r in lowered], hw, directory) if lowered else None
        clock.stage("code")
    except GraphwrightError:
        raise
    except Exception as error:
        parts, lowered, info = _all_to_pytorch(rewritten, hw, error), [], None
    plan, constants = make_plan(rewritten, parts.parts)
    built = Built(plan, rewritten, made.runs, made.precisions, made.notes, eager=_eager_rows(parts))
    built.kernels = _kernels(lowered)
    _save_constants(constants, directory)
    if info is not None:
        tensors = {name: tensor for r in lowered for name, tensor in r.weights.items()}
        weights.write(directory / library.WEIGHTS_NAME, info.weights, tensors)
        clock.stage("weights")
        largest = max(info.plans, key=lambda p: p.peak_bytes)
        built.sizes["weights_bytes"] = info.weights.nbytes
        built.sizes["code_bytes"] = info.code_bytes
        built.sizes["arena_bytes"] = largest.peak_bytes
        built.sizes["arena_lower_bound_bytes"] = largest.lower_bound_bytes
        built.sizes["activations_bytes"] = largest.sum_bytes
    built.stages = clock.seconds
    return built


def _build_gpu(built: Built, hw: Hardware, directory: Path, clock: _Clock) -> Built:
    """The same for a GPU, where all operators become one region."""
    from ..backends.gpu import build as gpu

    gpu.check_compiler(hw)
    with _named(f"code generation for {hw.id}"):
        parts, region = _lower_for_gpu(built.graph, hw)
    clock.stage("lowering")
    built.plan, constants = make_plan(built.graph, parts.parts)
    _save_constants(constants, directory)
    if region is not None:
        with _named(f"code generation for {hw.id}"):
            info = gpu.build(*region, hw, directory)
        clock.stage("code")
        built.kernels = tuple(info.kernels)
        built.sizes |= {
            "weights_bytes": info.weights_bytes,
            "code_bytes": info.code_bytes,
            "arena_bytes": info.storage_bytes,
            "fallbacks": tuple(region[1].fallbacks),
        }
    built.stages = clock.seconds
    return built


def _save_constants(constants: Mapping[str, torch.Tensor], directory: Path) -> None:
    if constants:
        write_tensors(directory / CONSTANTS_NAME, {name: tensor.contiguous() for name, tensor in constants.items()})


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Raise GraphwrightError that says `what` failed for errors of TVM and LLVM inside, which are bugs of ours."""
    try:
        yield
    except (GraphwrightError, OSError):  # a sentence already, or of the user's disk
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise GraphwrightError(f"{what} failed: {reason}; report this as a bug") from error


def _lower_for_gpu(graph: fx.GraphModule, hw: Hardware) -> tuple[Partition, tuple[Fused, OnGpu] | None]:
    """The graph as one region, and that lowered; None where it computes nothing.

    A kernel of ours that cannot be lowered gives way to TVM's rules. Raises UnsupportedOp with all that has no
    lowering.
    """
    from ..backends.gpu import build as gpu
    from ..backends.gpu.lower import KernelFailed, lower
    from ..backends.lowering.graph import LoweringError, Region, relax_region
    from ..backends.lowering.supported import why_not

    failed: set[fx.Node] = set()
    fallbacks: list[str] = []
    while True:
        parts = partition(graph, lambda node: why_not(node, hw))
        if parts.reasons:
            raise UnsupportedOp(_refusal(parts, hw))
        if not parts.parts:
            return parts, None
        (part,) = parts.parts
        for node in failed:
            node.meta.pop("kernel_call", None)
        try:
            fused = relax_region(Region("region_0", part.nodes, part.inputs, part.outputs), graph, hw)
            lowered = lower(fused, hw, gpu.host_target())
            lowered.fallbacks[:0] = fallbacks
            return parts, (fused, lowered)
        except LoweringError as error:
            raise GraphwrightError(f"{error}\nreport this as a bug") from error
        except KernelFailed as error:
            calls = {node: node.meta.get("kernel_call") for node in part.nodes}
            failing = {node for node, call in calls.items() if call is not None and call.has(error.call.func)}
            if not failing:
                raise
            log.warning("%s: TVM's rules take its place; report this as a bug", error)
            fallbacks.append(next(iter(str(error).splitlines())))
            failed |= failing


def kernels_of(graph: fx.GraphModule, hw: Hardware, choices: Choices | None = None) -> tuple[KernelInfo, ...]:
    """The kernels of a rewritten graph, with their predictions; no code is generated. None where lowering fails."""
    graph = pipeline.copy_graph(graph)
    if hw.kind == "gpu":
        with _named(f"lowering for {hw.id}"):
            region = _lower_for_gpu(graph, hw)[1]
        return () if region is None else tuple(region[1].kernels)
    try:
        with choosing(choices or Choices()):
            return _kernels(_lower(graph, hw)[1])
    except GraphwrightError:
        raise
    except Exception as error:
        _all_to_pytorch(graph, hw, error)
        return ()


def _kernels(lowered: Sequence[Lowered]) -> tuple[KernelInfo, ...]:
    """The kernels of all regions; a region has one mark more than steps."""
    kernels: list[KernelInfo] = []
    first = 0
    for region in lowered:
        kernels += [replace(kernel, step=first + kernel.step) for kernel in region.kernels]
        first += len(region.program.steps) + 1
    return tuple(kernels)


def _lower(
    graph: fx.GraphModule,
    hw: Hardware,
    memory_limit: int | None = None,
    left_out: Mapping[str, str] | None = None,
) -> tuple[Partition, list[Any]]:
    """Partition and lower; an operator whose lowering fails is left to PyTorch, and the rest is tried again.

    Raises RuntimeError where that does not help, or helps too slowly: then nothing is compiled.
    """
    from ..backends.lowering.arrange import arrange
    from ..backends.lowering.graph import LoweringError, Region, lower
    from ..backends.lowering.supported import why_not

    left_out = left_out or {}
    failed = {node: left_out[node.name] for node in graph.graph.nodes if node.name in left_out}
    while True:
        parts = partition(graph, lambda node: failed.get(node) or why_not(node, hw))
        if parts.reasons and obstacle(hw) is not None:
            raise UnsupportedOp(_refusal(parts, hw))
        lowered = []
        try:
            for i, part in enumerate(p for p in parts.parts if p.compiled):
                lowered.append(lower(Region(f"region_{i}", part.nodes, part.inputs, part.outputs), graph, hw))
        except LoweringError as error:
            if error.node in failed or len(failed) - len(left_out) == MOST_FAILURES:
                raise RuntimeError(
                    f"lowering fails again and again, last at {error.node}: {error.__cause__}"
                ) from error
            log.warning("%s", error)
            failed[error.node] = f"its lowering failed: {error.__cause__}"
            continue
        return parts, [arrange(region, hw, memory_limit) for region in lowered]


def _all_to_pytorch(graph: fx.GraphModule, hw: Hardware, error: Exception) -> Partition:
    """Where TVM or LLVM fails on what we gave it, which is a bug of ours, the whole model runs in PyTorch."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    if obstacle(hw) is not None:
        raise GraphwrightError(f"code generation for {hw.id} failed: {reason}; report this as a bug") from error
    log.warning("code generation failed, so the model runs in PyTorch: %s", reason)
    return partition(graph, lambda node: f"code generation failed: {reason}")


def _eager_rows(parts: Partition) -> tuple[EagerRow, ...]:
    counts = Counter((called(node), reason) for node, reason in parts.reasons.items())
    return tuple(EagerRow(operator, count, reason) for (operator, reason), count in counts.items())


def _refusal(parts: Partition, hw: Hardware) -> str:
    count = len(parts.reasons)
    operators = "1 operator" if count == 1 else f"{count} operators"
    lines = [f"{operators} cannot be compiled for {hw.id}, where PyTorch cannot take over:"]
    for node, reason in parts.reasons.items():
        lines.append(f"  {called(node)}: {reason}")
        if line := users_line(node):
            lines.append(f"    {line}")
    return "\n".join(lines)


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now
