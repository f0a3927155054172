"""`graphwright tune MODEL --target raspberry-pi-4b --remote user@pi`: candidates timed on a board reached by ssh.

Every candidate is linked to the static program of a bundle, copied once, and asked by `--profile` for the time of each
of its kernels, on the example inputs. The builds take turns, one call of ssh a turn; what was copied is removed at the
end. What wins is kept on this machine for the target (tune.py), where `compile --target` reads it.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shlex
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from ...backends.aot import library
from ...backends.bundle import link
from ...backends.bundle.table import c_source
from ...errors import GraphwrightError, InputError
from ...hwdb import Hardware
from ..bundle import table_of
from ..capture import Signature
from ..plan import Plan
from ..tune import TURNS, Candidate, Measure, order
from .run_remote import ANSWER_S, archive, check_machine, ssh

log = logging.getLogger(__name__)

_FEWEST, _MOST = 3, 200  # calls of a turn
_TURN_MS = 300.0  # that they take, about: clocks rise with the work, some within tens of milliseconds only
_STALLED_S = 600.0  # beyond the time that was given, a turn is taken for dead
_SLOWEST = 100e3  # bytes a second of a network
_STEP = re.compile(r"^step \d+: ([\d.]+) us$", re.MULTILINE)
_FIRST = re.compile(r"^latency: first call ([\d.]+) ms", re.MULTILINE)


@contextmanager
def measuring(
    host: str, hw: Hardware, signature: Signature, inputs: Sequence[torch.Tensor], threads: int, seconds: float
) -> Iterator[Measure]:
    """What measures builds of a model for `hw` on `host`, as ssh names it.

    Raises InputError where no bundles are made for `hw` or the board is of another kind, and GraphwrightError where ssh
    or a program fails, with what they said.
    """
    if hw.isa not in library.BUNDLED:
        raise InputError(
            f"boards are {' and '.join(library.BUNDLED)}, and {hw.id} is {hw.isa}: say what the board is by "
            "target=, or --target, with a name of `graphwright hw list`"
        )
    check_machine(host, hw.id, hw.isa, hw.triple)
    made = ssh(host, "mkdir -p .cache/graphwright && mktemp -d .cache/graphwright/tune-XXXXXX", limit=ANSWER_S)
    directory = shlex.quote(made.decode().strip())
    try:
        yield _Board(host, directory, hw, signature, inputs, threads, seconds).measure
    finally:
        try:
            ssh(host, f"rm -r {directory}", limit=ANSWER_S)
        except GraphwrightError as error:  # the same has been said of what came before
            log.warning("%s was left on %s: %s", directory, host, error)


class _Board:
    """Copies builds to a board and times them there."""

    def __init__(
        self,
        host: str,
        directory: str,
        hw: Hardware,
        signature: Signature,
        inputs: Sequence[torch.Tensor],
        threads: int,
        seconds: float,
    ) -> None:
        self.host, self.directory, self.hw, self.signature = host, directory, hw, signature
        self.threads, self.limit = threads, seconds + _STALLED_S
        self.there: set[str] = set()  # names of files on the board
        self.commands: dict[Path, str] = {}
        self.inputs = {f"input{i}": _content(tensor) for i, tensor in enumerate(inputs)}

    def measure(self, builds: Sequence[Candidate], end: float) -> list[list[float]]:
        """Microseconds of every kernel of every build: medians over turns."""
        commands = [self._command(place, built.plan) for place, built in builds]
        samples: list[list[list[float]]] = [[] for _ in builds]
        repeat = _FEWEST
        for turn in range(TURNS):
            if turn and time.perf_counter() > end:
                break
            which = order(len(builds), turn)
            printed = self._turn([f"{commands[i]} --repeat {repeat}" for i in which])
            for i, text in zip(which, printed, strict=True):
                steps = [float(us) for us in _STEP.findall(text)]
                samples[i].append([steps[kernel.step] for kernel in builds[i][1].kernels])
            first = max(float(ms) for text in printed for ms in _FIRST.findall(text))
            repeat = round(min(max(_FEWEST, _TURN_MS / max(first, 1e-3)), _MOST))
        return [[statistics.median(column) for column in zip(*found, strict=True)] for found in samples]

    def _turn(self, commands: Sequence[str]) -> list[str]:
        """What each command prints."""
        lines = ["set -e", f"cd {self.directory}", *(f"echo next && {command}" for command in commands)]
        answer = ssh(self.host, "\n".join(lines), limit=self.limit).decode(errors="replace")
        _, *printed = answer.split("next\n")
        if len(printed) != len(commands) or not all(_FIRST.search(text) for text in printed):
            raise GraphwrightError(f"a program on {self.host} printed no latency: {answer.strip()[-500:]}")
        return printed

    def _command(self, place: Path, plan: Plan) -> str:
        """What runs a build, whose files are on the board by then."""
        if place in self.commands:
            return self.commands[place]
        facts = {"id": self.hw.id, "isa": self.hw.isa, "triple": self.hw.triple, "features": sorted(self.hw.features)}
        table = table_of(place, facts, plan, self.signature)
        code, program = place / library.OBJECT_NAME, place / "run"
        link.program(code if table.runs else None, c_source(table), self.hw.triple, program, place)
        weights = place / library.WEIGHTS_NAME
        files = {"run": program.read_bytes()} | ({"weights": weights.read_bytes()} if table.weights_bytes else {})
        named = {f"{kind}-{hashlib.sha256(content).hexdigest()[:16]}": content for kind, content in files.items()}
        new = {name: content for name, content in (named | self.inputs).items() if name not in self.there}
        content = archive(new)
        limit = self.limit + len(content) / _SLOWEST
        ssh(self.host, f"cd {self.directory} && tar xf - && chmod +x run-*", content, limit)
        self.there |= new.keys()
        names = list(named)
        options = ["--profile", "--threads", str(self.threads)]
        options += ["--weights", names[1]] if table.weights_bytes else []
        for i, tensor in enumerate(table.inputs):
            options += ["--input", f"{tensor.name}=input{i}"]
        self.commands[place] = f"./{names[0]} {shlex.join(options)}"
        return self.commands[place]


def _content(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
