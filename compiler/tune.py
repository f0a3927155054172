"""`tune="30s"`: let the machine decide between the cost model's best candidates, and remember what it said.

The whole model is built once with the first candidate of every decision, once with the second, once with the third, as
far as the time allows; the builds take turns, every kernel is timed in its place, and a candidate that is faster there
by more than noise is preferred from then on. So a candidate meets the caches as the model leaves them.

What was found lies in the cache directory, in a file of this machine and this version of the compiler. A preference can
only choose between candidates that the cost model offers, so a wrong or foreign file makes nothing but speed worse.
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
from collections.abc import Mapping, Sequence
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
    inputs: Sequence[torch.Tensor],
    seconds: float,
    threads: int,
    precision: Precision = FP32,
    passes: Sequence[Pass] | None = None,
) -> dict[str, str]:
    """Measure candidates for about `seconds`, store what won, and return all that is stored."""
    started = time.perf_counter()
    rewritten, _ = pipeline.run(graph, hw, default_passes(hw) if passes is None else passes)
    with tempfile.TemporaryDirectory(prefix="graphwright-tune-") as directory:
        builds: list[tuple[Path, Built]] = []
        last = 0.0
        for rank in range(SHORTLIST):
            begun = time.perf_counter()
            # One more build, and the measurement after it, takes about as long as the one before.
            if builds and begun - started + 1.5 * last > seconds:
                log.info("tune: time for %d of %d candidates", rank, SHORTLIST)
                break
            place = Path(directory, str(rank))
            place.mkdir()
            built = build(rewritten, hw, place, passes=(), choices=Choices(rank=rank), precision=precision)
            builds.append((place, built))
            last = time.perf_counter() - begun
        times = _measure(builds, inputs, threads, started + seconds)
    preferred = {**stored(hw), **winners([built.kernels for _, built in builds], times)}
    _store(hw, preferred)
    return preferred


def winners(builds: Sequence[Sequence[KernelInfo]], times: Sequence[Sequence[float]]) -> dict[str, str]:
    """The candidate to prefer for every problem, from the times of the kernels of builds that differ in rank only."""
    first = builds[0]
    spent: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for kernels, measured in zip(builds, times, strict=True):
        if [k.operators for k in kernels] != [k.operators for k in first]:
            continue  # another fusion: its kernels are not comparable one by one
        for kernel, microseconds in zip(kernels, measured, strict=True):
            for decision in kernel.decisions:
                spent[decision.problem][decision.reason].append(microseconds)
    found = {}
    for problem, default in {d.problem: d.reason for kernel in first for d in kernel.decisions}.items():
        candidates = spent[problem]
        calls = len(candidates[default])
        # Where there are fewer candidates than builds, the last of them was built, and measured, more than once.
        means = {r: sum(samples) / len(samples) for r, samples in candidates.items() if len(samples) % calls == 0}
        best = min(means, key=lambda reason: means[reason])
        # The default is noted too: it may have been measured as worse before.
        found[problem] = best if means[best] < GAIN * means[default] else default
    return found


def _measure(
    builds: Sequence[tuple[Path, Built]], inputs: Sequence[torch.Tensor], threads: int, end: float
) -> list[list[float]]:
    """Microseconds of every kernel of every build: medians over turns."""
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
    builds: Sequence[tuple[Path, Built]],
    inputs: Sequence[torch.Tensor],
    end: float,
) -> list[list[list[float]]]:
    """For every build, the kernels' microseconds in each turn."""
    samples: list[list[list[float]]] = [[] for _ in builds]
    for turn in range(TURNS):
        if turn and time.perf_counter() > end:
            break
        for (library, run), (_, built), found in zip(opened, builds, samples, strict=True):
            if library is None:
                found.append([])
                continue
            began = time.perf_counter()
            run(inputs)
            rounds = 3 if time.perf_counter() - began > 0.1 else 10
            rows = profile(library, built.kernels, lambda run=run: run(inputs), rounds).rows  # type: ignore[misc]
            found.append([row.measured_us for row in rows])
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
