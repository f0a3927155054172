"""`tune="30s"`: let the machine decide between the cost model's best candidates, and remember what it said.

The whole model is built once with the first candidate of every decision, once with the second, once with the third, as
far as the time allows; the builds take turns, every kernel is timed in its place, and a candidate that is faster there
by more than noise is preferred from then on. So a candidate meets the caches as the model leaves them. The winners are
then built together and timed beside the first build: where that is no faster, all stays as it was.

What was found lies in the cache directory, in a file of the target and this version of the compiler. A preference can
only choose between candidates that the cost model offers, so a wrong or foreign file makes nothing but speed worse.

Who times the builds is a `Measure`: this machine, or a board (commands/tune_board.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import fx

from ..backends.aot.library import Library
from ..backends.aot.toolchain import cache_directory
from ..backends.choices import SHORTLIST, Choices
from ..backends.lowering.registry import KernelInfo
from ..errors import InputError
from ..hwdb import Hardware
from . import fingerprint, loading, pipeline
from .build import Built, build, default_passes
from .executor import Run
from .pass_checks import Pass
from .precision import FP32, Precision
from .profile import profile

log = logging.getLogger(__name__)

GAIN = 0.97  # of the first candidate's time: less is noise
TURNS = 5
LARGEST_FILE = 16 << 20

Candidate = tuple[Path, Built]  # a build, and the directory of its files
# The microseconds of every kernel of every build; it takes turns until the time (of perf_counter) is up, one at least.
Measure = Callable[[Sequence[Candidate], float], list[list[float]]]


@dataclass(frozen=True)
class Row:
    """A decision: the candidates that were measured, with the mean microseconds of the kernels they decide."""

    problem: str
    candidates: tuple[tuple[str, float], ...]  # (candidate, microseconds); the first is the cost model's
    kept: str


@dataclass(frozen=True)
class Tuned:
    """What measuring candidates found, and where it is kept."""

    rows: tuple[Row, ...]
    before_us: float  # in kernels of one call, as the cost model chooses
    after_us: float  # with what was kept: never more
    builds: int  # of SHORTLIST candidates, those that there was time for
    preferred: Mapping[str, str]  # problem -> candidate: all that is kept for this machine, of other models too
    path: Path

    def text(self) -> str:
        """The decisions that were open, each with its candidates, the one kept with a star; the time of a call."""
        lines = []
        for row in self.rows:
            if len(row.candidates) > 1:
                lines.append(row.problem)
                lines += [f" {'*' if name == row.kept else ' '} {us:10.1f} us  {name}" for name, us in row.candidates]
        if self.builds < SHORTLIST:
            lines.append(f"there was time for {self.builds} of {SHORTLIST} candidates: give more for the others")
        refuted = sum(min(us for _, us in row.candidates) < GAIN * dict(row.candidates)[row.kept] for row in self.rows)
        if refuted:
            lines.append(f"{refuted} that won did not win again beside the others, or by more than noise: not kept")
        changed = sum(row.kept != row.candidates[0][0] for row in self.rows)
        kept = f"{changed} of {len(self.rows)} decisions differ from the cost model's"
        lines.append(f"kernels of a call: {self.before_us:.1f} us before, {self.after_us:.1f} us now; {kept}")
        return "\n".join(lines)


def budget(given: str | float | None) -> float | None:
    """Seconds of "30s", "2m" or a number; None stays None. Raises InputError for anything else."""
    if given is None:
        return None
    text = str(given)
    if isinstance(given, bool) or not (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|)", text)) or not float(match[1]):
        raise InputError(f'tune={given!r}: give a time such as "30s" or "2m", or a number of seconds')
    return float(match[1]) * (60 if match[2] == "m" else 1)


def stored(hw: Hardware) -> dict[str, str]:
    """What earlier measurements on this machine prefer: problem -> candidate. Empty where there is nothing to trust."""
    try:
        path = _path(hw)
        if path.stat().st_size > LARGEST_FILE:
            return {}
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("measurements of tune= are ignored: %s", error)
        return {}
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, str) for k, v in found.items()):
        log.warning("measurements of tune= are ignored: %s has another form", path)
        return {}
    return found


def tune(
    graph: fx.GraphModule,
    hw: Hardware,
    seconds: float,
    measure: Measure,
    precision: Precision = FP32,
    passes: Sequence[Pass] | None = None,
) -> Tuned:
    """Measure candidates for about `seconds` and store what won."""
    started = time.perf_counter()
    rewritten, _ = pipeline.run(graph, hw, default_passes(hw) if passes is None else passes)
    with tempfile.TemporaryDirectory(prefix="graphwright-tune-") as directory:

        def made(name: str, choices: Choices) -> Candidate:
            place = Path(directory, name)
            place.mkdir()
            return place, build(rewritten, hw, place, passes=(), choices=choices, precision=precision)

        builds: list[Candidate] = []
        last = 0.0
        for rank in range(SHORTLIST):
            begun = time.perf_counter()
            # One more build, and the measurement after it, takes about as long as the one before.
            if builds and begun - started + 1.5 * last > seconds:
                log.info("tune: time for %d of %d candidates", rank, SHORTLIST)
                break
            builds.append(made(str(rank), Choices(rank=rank)))
            last = time.perf_counter() - begun
        times = measure(builds, started + seconds)
        rows = weighed([built.kernels for _, built in builds], times)
        before = after = sum(times[0])
        if any(row.kept != row.candidates[0][0] for row in rows):
            both = [builds[0], made("winners", Choices({row.problem: row.kept for row in rows}))]
            again = measure(both, max(started + seconds, time.perf_counter() + 0.2 * seconds))
            rows, before, after = confirmed(rows, [built.kernels for _, built in both], again)
    # A winner of an earlier, longer measurement stays where there was no time for others.
    preferred = {**stored(hw), **{row.problem: row.kept for row in rows if len(row.candidates) > 1}}
    _store(hw, preferred)
    return Tuned(rows, before, after, len(builds), preferred, _path(hw))


def weighed(builds: Sequence[Sequence[KernelInfo]], times: Sequence[Sequence[float]]) -> tuple[Row, ...]:
    """The candidate to prefer for every problem, from the times of the kernels of builds that differ in rank only."""
    first = builds[0]
    spent: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for kernels, measured in zip(builds, times, strict=True):
        if [k.operators for k in kernels] != [k.operators for k in first]:
            continue  # another fusion: its kernels are not comparable one by one
        for kernel, microseconds in zip(kernels, measured, strict=True):
            for decision in kernel.decisions:
                spent[decision.problem][decision.reason].append(microseconds)
    rows = []
    for problem, default in {d.problem: d.reason for kernel in first for d in kernel.decisions}.items():
        candidates = spent[problem]
        calls = len(candidates[default])
        # Where there are fewer candidates than builds, the last of them was built, and measured, more than once.
        means = {r: sum(samples) / len(samples) for r, samples in candidates.items() if len(samples) % calls == 0}
        best = min(means, key=lambda reason: means[reason])
        # The default is noted too: it may have been measured as worse before.
        kept = best if means[best] < GAIN * means[default] else default
        rows.append(Row(problem, tuple(sorted(means.items(), key=lambda item: item[0] != default)), kept))
    return tuple(rows)


def confirmed(
    rows: Sequence[Row], builds: Sequence[Sequence[KernelInfo]], times: Sequence[Sequence[float]]
) -> tuple[tuple[Row, ...], float, float]:
    """The rows whose winner was faster a second time, in a build of all winners, others with the cost model's choice
    kept; and the microseconds of a call before and after. Of many candidates some win by chance, but seldom twice.
    """
    before, together = map(sum, times)
    again = {row.problem: row.kept for row in weighed(builds, times)} if together < before else {}
    kept = tuple(row if again.get(row.problem) == row.kept else replace(row, kept=row.candidates[0][0]) for row in rows)
    changed = {row.problem for row in kept if row.kept != row.candidates[0][0]}
    if not changed:
        log.info("tune: the winners together take %.1f us, and %.1f without them", together, before)
        return kept, before, before
    after = sum(
        new if changed & {decision.problem for decision in kernel.decisions} else old
        for kernel, old, new in zip(builds[0], *times, strict=True)
    )
    return kept, before, after


def order(count: int, turn: int) -> list[int]:
    """The order in which builds are timed in a turn. Whoever is first may meet a clock that has not risen yet: each is
    at times, and of two the cost model's build the less often.
    """
    return [(turn + 1 + i) % count for i in range(count)]


def on_this_machine(
    inputs: Sequence[torch.Tensor], threads: int, builds: Sequence[Candidate], end: float
) -> list[list[float]]:
    """A `Measure` (of two arguments more): medians over turns."""
    with contextlib.ExitStack() as libraries:
        opened = []
        for place, built in builds:
            opened.append(loading.opened(place, built.plan, threads))
            if (library := opened[-1][0]) is not None:
                libraries.callback(library.close)
        samples = _turns(opened, builds, inputs, end)
    return [[statistics.median(column) for column in zip(*found, strict=True)] for found in samples]


def _turns(
    opened: Sequence[tuple[Library | None, Run]],
    builds: Sequence[Candidate],
    inputs: Sequence[torch.Tensor],
    end: float,
) -> list[list[list[float]]]:
    """For every build, the kernels' microseconds in each turn."""
    samples: list[list[list[float]]] = [[] for _ in builds]
    for turn in range(TURNS):
        if turn and time.perf_counter() > end:
            break
        for i in order(len(builds), turn):
            library, run = opened[i]
            if library is None:
                samples[i].append([])
                continue
            began = time.perf_counter()
            run(inputs)
            rounds = 3 if time.perf_counter() - began > 0.1 else 10
            rows = profile(library, builds[i][1].kernels, lambda run=run: run(inputs), rounds).rows  # type: ignore[misc]
            samples[i].append([row.measured_us for row in rows])
    return samples


def _path(hw: Hardware) -> Path:
    return cache_directory() / "tuned" / f"{fingerprint.setting(hw)}.json"


def _store(hw: Hardware, preferred: Mapping[str, str]) -> None:
    path = _path(hw)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            json.dump(dict(sorted(preferred.items())), file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("measurements of tune= are not kept for the next run: %s", error)
