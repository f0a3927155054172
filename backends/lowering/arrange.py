"""A region's steps between lowering and code: their order, values computed again, results over operands.

    order_steps -> (with a limit, where it is needed) rematerialise -> reuse_operands

Each leaves every bit as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from ...errors import MemoryLimit, size
from ...hwdb import Hardware
from ...hwdb.cost import Work, predict_seconds
from ..aot.memory import lifetimes, plan
from ..aot.order import order_steps
from ..aot.program import Program
from ..aot.rematerialise import rematerialise
from ..aot.reuse_operands import Proofs, reuse_operands
from .extract import Lowered
from .registry import KernelInfo

log = logging.getLogger(__name__)

# Values are computed again for a limit that much above the one asked for: results over operands bring the rest.
_SLACK = (1.6, 1.4, 1.25, 1.1, 1.0, 0.8)


def arrange(lowered: Lowered, hw: Hardware, limit: int | None = None) -> Lowered:
    """The region with its activations in as few bytes as its order allows, and in at most `limit` where one is given.

    Raises MemoryLimit, naming what is alive at the fullest step, where that cannot be.
    """
    infos = {info.step: info for info in lowered.kernels}
    ordered, order = order_steps(lowered.program)
    proofs: Proofs = {}
    program, reused = reuse_operands(ordered, proofs)
    origin: Sequence[int] = order
    if limit is not None and _peak(program) > limit:
        seconds = [_seconds(lowered.program, infos, number, hw) for number in order]
        smallest = program
        for slack in _SLACK:
            again = rematerialise(ordered, int(limit * slack), seconds)
            program, reused = reuse_operands(again.program, proofs)
            origin = [order[number] for number in again.origin]
            smallest = min(smallest, program, key=_peak)
            if _peak(program) <= limit:
                break
        else:
            raise MemoryLimit(_explained(smallest, limit))
        log.debug("%s: %d values computed again", program.name, len(origin) - len(order))
    log.debug("%s: %d results over operands", program.name, reused)
    kernels = [replace(infos[old], step=new) for new, old in enumerate(origin) if old in infos]
    return replace(lowered, program=program, kernels=kernels)


def _peak(program: Program) -> int:
    return plan(program, dict.fromkeys(program.weights.values(), 0)).peak_bytes


def _seconds(program: Program, infos: dict[int, KernelInfo], number: int, hw: Hardware) -> float:
    """What a step takes: its kernel's own prediction, else that of moving its bytes."""
    info = infos.get(number)
    if info is not None and info.predicted_us is not None:
        return info.predicted_us * 1e-6
    moved = sum(program.buffers[name].nbytes for name in program.steps[number].args)
    return predict_seconds(hw, Work(bytes_read=moved)) or moved * 1e-10


def _explained(program: Program, limit: int) -> str:
    outside = {*program.inputs, *program.weights, *(program.root(name) for name in program.outputs)}
    alive = lifetimes(program, outside)
    fullest = max(range(len(program.steps)), key=lambda s: sum(x.nbytes for x in alive if x.first <= s <= x.last))
    held = sorted((x for x in alive if x.first <= fullest <= x.last), key=lambda x: -x.nbytes)
    kernel = program.steps[fullest].kernel or "copy"
    lines = [
        f"the activations need {size(_peak(program))} and memory_limit is {size(limit)}, "
        f"although values are computed again where that frees memory. Alive at step {fullest}, {kernel}:"
    ]
    for life in held[:8]:
        buffer, writer = program.buffers[life.name], program.steps[life.first].kernel or "copy"
        lines.append(f"  {size(life.nbytes)}: {buffer.dtype}{list(buffer.shape)}, written by {writer}")
    lines.append(
        "A smaller batch or resolution needs less; a reduced precision does not, since activations stay float32."
    )
    return "\n".join(lines)
