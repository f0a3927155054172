"""Random programs by the thousand, with seeds and counts kept in docs/measurements/fuzz.json: `make fuzz`.

    python tests/fuzz.py                         until 20,000 programs ran, going on behind the seeds in the file
    python tests/fuzz.py --seconds 600           for so long
    python tests/fuzz.py --seed 7 --programs 50  one batch again, nothing stored

A batch is one seed of Hypothesis and draws the same programs everywhere. Every program goes through the passes; every
`MACHINE_CODE`-th is compiled as well. What fails is printed as a program that can be run, after shrinking.
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
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hypothesis import HealthCheck, Phase, given, seed, settings
from random_programs import LEVELS, single_threaded

from graphwright.errors import CaptureError
from graphwright.testing import Program, programs, shrink

Level = Callable[[Program, str], None]

FILE = Path(__file__).resolve().parent.parent / "docs" / "measurements" / "fuzz.json"
GOAL, BATCH = 20_000, 100
MACHINE_CODE = 50


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


def _apart(number: int, count: int) -> dict[str, Any]:
    """The batch as JSON data, run in a process of its own: what PyTorch and TVM keep of each program goes with it."""
    with tempfile.NamedTemporaryFile("r") as file:
        child = os.fork()
        if not child:
            status = 1
            try:
                Path(file.name).write_text(json.dumps(run_batch(number, count).to_dict()))
                status = 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status:
            raise RuntimeError(f"batch {number} ended with status {os.waitstatus_to_exitcode(status)}")
        result: dict[str, Any] = json.load(file)
        return result


def _check(program: Program, batch: Batch) -> None:
    number = int(program.digest, 16)
    how = ("whole", "core", "whole", "core", "captured")[number % 5]
    for name, level in LEVELS.items():
        if name == "machine code" and number // 5 % MACHINE_CODE:
            continue
        reason = _reason(level, program, how)
        if reason == "refused":
            batch.refused += 1
            return
        batch.runs[name] += 1
        if not reason:
            continue
        simplest = _simplest(level, program, how, _kind(reason))
        reason = _reason(level, simplest, how)
        print(f"\nseed {batch.seed}, {name}, {how}:\n{simplest.source}\n\n{reason}", flush=True)
        batch.failures.append({"level": name, "form": how, "reason": _kind(reason), "program": simplest.source})


def _simplest(level: Level, program: Program, how: str, kind: str) -> Program:
    return shrink(program, lambda simpler: _kind(_reason(level, simpler, how)) == kind)


def _reason(level: Level, program: Program, how: str) -> str:
    """Why the program fails, or nothing."""
    try:
        level(program, how)
    except CaptureError:
        return "refused"
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
            "commit": _commit(),
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
    parser.add_argument("--programs", type=int, default=BATCH, help="of a batch")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    single_threaded()
    if options.seed is not None:
        batch = run_batch(options.seed, options.programs)
        print(batch.to_dict() | {"failures": len(batch.failures)})
        return bool(batch.failures)
    data, started, failed = _stored(), time.perf_counter(), False
    # A batch that failed runs again: what it found may be mended.
    data["batches"] = [b for b in data["batches"] if not b["mismatches"]]
    count = sum(b["programs"] for b in data["batches"])
    for number in _seeds({b["seed"] for b in data["batches"]}):
        if count >= options.goal or time.perf_counter() - started > options.seconds:
            break
        batch = _apart(number, options.programs)
        count += batch["programs"]
        failed = failed or bool(batch["mismatches"])
        data["batches"].append(batch)
        _store(data)
        print(f"{count} programs, {batch['mismatches']} mismatches in batch {number}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
