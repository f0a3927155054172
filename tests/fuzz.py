"""Random programs by the thousand, with seeds and counts kept in docs/measurements/fuzz.json: `make fuzz`.

    python tests/fuzz.py                         until 20,000 programs ran, going on behind the seeds in the file
    python tests/fuzz.py --seconds 600           for so long
    python tests/fuzz.py --seed 7 --programs 50  one batch again, nothing stored

A batch is one seed of Hypothesis and draws the same programs everywhere. Every program goes through the passes; every
`CAPTURED`-th is captured as `compile` does, the others are traced; every `MACHINE_CODE`-th is compiled as well. What
fails is printed as a program that can be run, after shrinking.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hypothesis import HealthCheck, Phase, given, seed, settings
from random_programs import LEVELS, Subject, settle_torch

from graphwright.errors import CaptureError
from graphwright.testing import Program, programs, shrink

Level = Callable[[Subject], None]

FILE = Path(__file__).resolve().parent.parent / "docs" / "measurements" / "fuzz.json"
GOAL, BATCH = 20_000, 100
CAPTURED = 25  # every so many programs are captured by torch.export, which takes ten times as long as the checks
MACHINE_CODE = 100  # every so many are compiled


@dataclass
class Batch:
    """What became of the programs of one seed."""

    seed: int
    programs: int = 0  # all different
    runs: Counter[str] = field(default_factory=Counter)
    refused: int = 0  # torch.export cannot capture them
    failures: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The batch as JSON data."""
        return {
            "seed": self.seed,
            "programs": self.programs,
            "runs": dict(sorted(self.runs.items())),
            "refused": self.refused,
            "mismatches": len(self.failures),
            "failures": self.failures,
            "seconds": round(self.seconds, 1),
        }


def run_batch(number: int, count: int) -> Batch:
    """Draw the programs of one seed and check each."""
    batch, started = Batch(number), time.perf_counter()
    drawn: dict[str, Program] = {}

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(programs())
    def draw(program: Program) -> None:
        drawn.setdefault(program.digest, program)

    draw()
    for program in drawn.values():
        _check(program, batch)
    batch.programs = len(drawn)
    batch.seconds = time.perf_counter() - started
    return batch


def _begin(number: int, count: int) -> tuple[int, IO[str]]:
    """Run a batch in a process of its own: what PyTorch and TVM keep of each program goes with it.

    Returns the process, and the file that will hold the batch as JSON data.
    """
    file = tempfile.NamedTemporaryFile("r")  # noqa: SIM115 - closed by _end
    child = os.fork()
    if child:
        return child, file
    status = 1
    try:
        Path(file.name).write_text(json.dumps(run_batch(number, count).to_dict() | {"commit": _commit()}))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _end(running: dict[int, tuple[int, IO[str]]]) -> dict[str, Any]:
    """The batch of the process that ends first, which is taken out."""
    child, status = os.wait()
    number, file = running.pop(child)
    with file:
        if status:
            reason = f"the process ended with status {os.waitstatus_to_exitcode(status)}"
            print(f"\nseed {number}: {reason}", flush=True)
            failed = Batch(number, failures=[{"level": "process", "reason": reason}])
            return failed.to_dict()
        result: dict[str, Any] = json.load(file)
        return result


def _check(program: Program, batch: Batch) -> None:
    number = int(program.digest, 16)
    how = "captured" if not number % CAPTURED else ("whole", "core")[number // CAPTURED % 2]
    subject = _subject(program, how)
    if isinstance(subject, str):
        if subject == "refused":
            batch.refused += 1
        else:
            _note(batch, program, how, "tracing", subject)
        return
    for name, level in LEVELS.items():
        if name == "machine code" and number // 100 % MACHINE_CODE:
            continue
        batch.runs[name] += 1
        if reason := _reason(level, subject):
            _note(batch, program, how, name, reason)


def _note(batch: Batch, program: Program, how: str, name: str, reason: str) -> None:
    """Shrink what failed, print it and keep it."""

    def why(simpler: Program) -> str:
        subject = _subject(simpler, how)
        return subject if isinstance(subject, str) else _reason(LEVELS[name], subject) if name in LEVELS else ""

    kind = _kind(reason)
    simplest = shrink(program, lambda simpler: _kind(why(simpler)) == kind)
    print(f"\nseed {batch.seed}, {name}, {how}:\n{simplest.source}\n\n{why(simplest)}", flush=True)
    batch.failures.append({"level": name, "form": how, "reason": kind, "program": simplest.source})


def _subject(program: Program, how: str) -> Subject | str:
    """The program's graph, "refused" where it cannot be captured, or what went wrong."""
    try:
        return Subject(program, how)
    except CaptureError:
        return "refused"
    except Exception as error:
        # torch takes a reshape that copied for a view, once the copy is written to.
        reason = f"{type(error).__name__}: {error}"
        return "refused" if reason.startswith("ValueError: Cannot view a tensor") else reason


def _reason(level: Level, subject: Subject) -> str:
    """Why the program fails, or nothing."""
    try:
        level(subject)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _kind(reason: str) -> str:
    """What of a reason stays the same while a program gets simpler."""
    line = reason.partition("\n")[0]
    return line.partition(" after ")[0].partition("relative L2")[0].partition("second run finds")[0][:70]


def _stored() -> dict[str, Any]:
    if FILE.exists():
        data: dict[str, Any] = json.loads(FILE.read_text())
        return data
    return {"batches": []}


def _store(data: dict[str, Any]) -> None:
    batches = sorted(data["batches"], key=lambda b: b["seed"])
    totals: Counter[str] = Counter()
    for batch in batches:
        totals.update(batch["runs"])
    summary = {
        "programs": sum(b["programs"] for b in batches),
        "mismatches": sum(b["mismatches"] for b in batches),
        "refused": sum(b["refused"] for b in batches),
        "runs": dict(sorted(totals.items())),
        "seconds": round(sum(b["seconds"] for b in batches), 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("graphwright", "torch", "apache-tvm", "hypothesis")},
        },
        "batches": batches,
    }
    temporary = FILE.with_suffix(".new")
    temporary.write_text(json.dumps(summary, indent=1) + "\n")
    temporary.replace(FILE)


def _commit() -> str:
    with contextlib.suppress(OSError):
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, cwd=FILE.parent).stdout.strip()
    return ""


def _seeds(done: set[int]) -> Iterator[int]:
    number = 0
    while True:
        if number not in done:
            yield number
        number += 1


def main() -> int:
    """Run batches until there are enough programs; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goal", type=int, default=GOAL, help="programs in the file at the end")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after the batch that passes this")
    parser.add_argument("--seed", type=int, help="run this batch alone, and store nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="batches at a time")
    parser.add_argument("--programs", type=int, default=BATCH, help="of a batch")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    settle_torch()
    if options.seed is not None:
        batch = run_batch(options.seed, options.programs)
        print(batch.to_dict() | {"failures": len(batch.failures)})
        return bool(batch.failures)
    data, started, failed = _stored(), time.perf_counter(), False
    # A batch that failed runs again: what it found may be mended.
    data["batches"] = [b for b in data["batches"] if not b["mismatches"]]
    count = sum(b["programs"] for b in data["batches"])
    seeds, running = _seeds({b["seed"] for b in data["batches"]}), {}
    while True:
        late = time.perf_counter() - started > options.seconds
        while not late and len(running) < options.jobs and count + len(running) * options.programs < options.goal:
            number = next(seeds)
            child, file = _begin(number, options.programs)
            running[child] = number, file
        if not running:
            break
        batch = _end(running)
        count += batch["programs"]
        failed = failed or bool(batch["mismatches"])
        data["batches"].append(batch)
        _store(data)
        print(f"{count} programs, {batch['mismatches']} mismatches in batch {batch['seed']}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
