"""`graphwright hw calibrate --remote user@pi --target raspberry-pi-4b`: the figures of a board reached by ssh.

The programs that measure this machine (measure_host.py) are built for the board, one static program each, copied and
run as a bundle's is; the times are those the programs print. What comes of it is a record that extends the target's:

    graphwright hw calibrate --remote pi@board --target raspberry-pi-4b --name my-pi -o boards/my-pi.toml
    GRAPHWRIGHT_HWDB=boards graphwright compile MODEL --target my-pi -o out
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...backends.aot import library
from ...backends.aot.program import Program
from ...backends.bundle import features, link
from ...backends.bundle.table import Table, Tensor, c_source
from ...errors import GraphwrightError, InputError
from ...hwdb import Hardware
from ...hwdb.measured import Measured
from .measure_host import figures, programs
from .run_remote import archive, check_machine, ssh

_EXPECTED_S = 1e-3  # of a run, except that of memory: measure_host sizes its programs so
_MEMORY_S = 2e-2
_PAUSE_MS = 2
_LATENCY = re.compile(r"then min ([\d.]+), median ([\d.]+)")


def measure_board(host: str, hw: Hardware, seconds: float, say: Callable[[str], None]) -> Measured:
    """Measure the board at `host`, which `hw` describes, in about `seconds` a figure; `say` is told what comes next.

    Raises InputError where no bundles are made for `hw` or the board is of another kind, GraphwrightError where ssh or
    a program fails.
    """
    if hw.isa not in library.BUNDLED:
        raise InputError(f"boards are {' and '.join(library.BUNDLED)}, and {hw.id} is {hw.isa}")
    check_machine(host, hw.id, hw.isa, hw.triple)
    say("building the kernels")
    made = programs(hw)
    with tempfile.TemporaryDirectory(prefix="graphwright-calibrate-") as scratch:
        files = {program.name: _linked(program, hw, Path(scratch, str(i))) for i, program in enumerate(made)}
    digest = hashlib.sha256(b"".join(files.values())).hexdigest()[:16]
    directory = f".cache/graphwright/calibrate-{digest}"
    content = archive(files)
    say("copying")
    ssh(host, f"mkdir -p {directory} && cd {directory} && tar xf - && chmod +x {shlex.join(files)}", content)
    try:
        return figures(hw, _Board(host, directory, [program.name for program in made], seconds, hw.cores), say)
    finally:
        ssh(host, f"rm -r {directory}")


def record(hw: Hardware, found: Measured, name: str) -> str:
    """The record `name` with what was measured, in the words of hwdb's files (TOML); it extends that of `hw`."""
    rate = 2.0 * hw.lanes("float32") * hw.fma_per_cycle * hw.cores
    levels = ", ".join(f"L{level} {gbs:.3g} GB/s" for level, gbs in sorted(found.level_gbs.items()) if level)
    return f"""[source.{name}]
kind = "measured"
title = "graphwright hw calibrate --remote, {found.date}"

[device.{name}]
extends = "{hw.id}"
name = "{hw.name}, measured"
clock_mhz = {found.flops / rate / 1e6:.6g}
dram_gbs = {found.level_gbs[0]:.6g}
launch_us = {found.launch_us:.6g}
wake_us = {found.wake_us:.6g}
note = "{found.flops / 1e9:.4g} GFLOP/s of float32; {levels}"
source = "high: {name}"
"""


@dataclass(frozen=True)
class _Board:
    """Times programs on a board."""

    host: str
    directory: str
    names: Sequence[str]
    seconds: float
    cores: int

    def best(self, program: int, paused: bool = False) -> float:
        return self._call(program, self.cores, _PAUSE_MS if paused else 0)[0]

    def typical(self, program: int, threads: int) -> float:
        return self._call(program, threads, 0)[1]

    def _call(self, program: int, threads: int, pause_ms: int) -> tuple[float, float]:
        """Seconds of the shortest and of the median run."""
        name = self.names[program]
        expected = (_MEMORY_S if name == "level_0" else _EXPECTED_S) + 1e-3 * pause_ms
        options = ["--repeat", str(max(5, math.ceil(self.seconds / expected))), "--threads", str(threads)]
        options += ["--pause", str(pause_ms)] if pause_ms else []
        printed = ssh(self.host, f"cd {self.directory} && ./{name} {shlex.join(options)}").decode(errors="replace")
        latency = _LATENCY.search(printed)
        if latency is None:
            raise GraphwrightError(f"{name} on {self.host} printed no latency: {printed.strip()[-500:]}")
        return float(latency[1]) * 1e-3, float(latency[2]) * 1e-3


def _linked(program: Program, hw: Hardware, directory: Path) -> bytes:
    """A static program that runs `program` on noise."""
    directory.mkdir()
    info = library.build([program], hw, directory)
    assert not info.weights.nbytes

    def tensors(names: Sequence[str]) -> tuple[Tensor, ...]:
        shapes = [(name, program.buffers[name].shape) for name in names]
        return tuple(Tensor(name, "float32", shape, 4 * math.prod(shape)) for name, shape in shapes)

    read, written = tuple(range(len(program.inputs))), tuple(range(len(program.outputs)))
    needed = features.needed(hw.isa, hw.triple, hw.features)
    table = Table(hw.id, tensors(program.inputs), tensors(program.outputs), needed, read, written)
    link.program(directory / library.OBJECT_NAME, c_source(table), hw.triple, directory / "run", directory)
    return (directory / "run").read_bytes()
