"""`graphwright bench` and `make bench`: models beside eager, Inductor, ONNX Runtime and OpenVINO at equal threads.

Every runner has a process of its own (bench_worker.py); rounds give each of them a turn while the others wait.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import GraphwrightError, suggest
from .worker import Failed, Ready, Subject, Task, Worker

log = logging.getLogger(__name__)

PEERS = ("eager", "inductor", "onnxruntime", "openvino")
PREPARE_SECONDS = 300.0  # for building, compiling and the first call of one runner
ERROR_TIMES = 4.0  # our error over eager's
ERROR_LIMIT = 2e-5  # relative, in float32


@dataclass(frozen=True)
class Row:
    """One model: milliseconds and errors by runner; a peer that cannot run the model says why."""

    model: str
    batch: int
    precision: str
    milliseconds: dict[str, float]
    relative_l2: dict[str, float]  # of the first result, against the model in float64
    compile_seconds: dict[str, float]
    unavailable: dict[str, str] = field(default_factory=dict)
    bar: float | None = None  # the ratio aimed at
    arena_bytes: int = 0
    arena_lower_bound_bytes: int = 0
    peak_rss_bytes: int = 0  # of our own runner's process, the original model included

    @property
    def best_peer(self) -> str | None:
        """The fastest of the others."""
        peers = {k: v for k, v in self.milliseconds.items() if k != "graphwright"}
        return min(peers, key=lambda k: peers[k], default=None)

    @property
    def ratio(self) -> float | None:
        """Our time over the best peer's; None where one of them is missing."""
        ours, best = self.milliseconds.get("graphwright"), self.best_peer
        return None if ours is None or best is None else ours / self.milliseconds[best]

    @property
    def inexact(self) -> bool:
        """Whether our error is beyond a few times eager's, or in float32 beyond what is allowed at all."""
        ours, eager = self.relative_l2.get("graphwright"), self.relative_l2.get("eager")
        if ours is None:
            return False
        return (self.precision == "fp32" and ours > ERROR_LIMIT) or (eager is not None and ours > ERROR_TIMES * eager)

    @property
    def key(self) -> tuple[str, int, str]:
        """What tells rows apart."""
        return self.model, self.batch, self.precision


def check_peers(peers: Sequence[str]) -> None:
    """Raise GraphwrightError for a peer that is not one of PEERS."""
    for peer in peers:
        if peer not in PEERS:
            raise GraphwrightError(f"no peer {peer!r}{suggest(peer, PEERS)}; there are {', '.join(PEERS)}")


def bench_models(
    subjects: Sequence[Subject],
    against: Sequence[str] = PEERS,
    rounds: int = 15,
    threads: int | None = None,
    json_path: str | Path | None = None,
    bars: Mapping[tuple[str, int, str], float] | None = None,
) -> list[Row]:
    """Measure every subject and print its row; the file at `json_path` gets each row as soon as it is measured.

    Rows of other subjects in that file are kept. Raises GraphwrightError for an unknown peer, and where no runner can
    run a subject.
    """
    import torch

    check_peers(against)
    threads = threads or torch.get_num_threads()
    rows: list[Row] = []
    for subject in subjects:
        bar = (bars or {}).get((subject.name, subject.batch, subject.precision))
        row = measure(subject, against, rounds, threads, bar)
        print_rows([row], against, header=not rows)
        if json_path is not None:
            store(Path(json_path), row, threads)
        rows.append(row)
    return rows


def measure(subject: Subject, against: Sequence[str], rounds: int, threads: int, bar: float | None = None) -> Row:
    """Let everybody prepare, then take turns."""
    ready: dict[str, Ready] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="graphwright-bench-") as directory, ExitStack() as stack:
        tasks = {name: Task(subject, name, threads, Path(directory)) for name in ("graphwright", *against)}
        workers: dict[str, Worker] = {}

        def prepare(names: Sequence[str]) -> None:
            for name in names:
                workers[name] = worker = Worker(tasks[name])
                stack.callback(worker.stop)
            for name in names:
                try:
                    ready[name] = workers[name].ready(PREPARE_SECONDS)
                except Failed as error:
                    missing[name] = str(error)
                    workers.pop(name).stop()
                    log.warning("%s cannot run %s: %s", name, subject.name, error)

        prepare(["graphwright"])  # alone, for its compile time counts; of the peers only what comes after
        prepare(against)
        if not workers:
            raise GraphwrightError(f"nobody can run {subject.name}: {missing}")
        milliseconds = _take_turns(workers, ready, rounds)
        errors = _errors(tasks)
    facts = ready["graphwright"].facts if "graphwright" in ready else {}
    seconds = {name: answer.compile_seconds for name, answer in ready.items()}
    return Row(subject.name, subject.batch, subject.precision, milliseconds, errors, seconds, missing, bar, **facts)


def _take_turns(workers: Mapping[str, Worker], ready: Mapping[str, Ready], rounds: int) -> dict[str, float]:
    """Median milliseconds of each; a round gives every one of them a turn, so that drift meets all alike."""
    slowest = max(ready[name].call_seconds for name in workers)
    calls = 1 if slowest > 0.2 else 3
    if slowest > 1:
        rounds = min(rounds, 3)
    elif slowest > 0.3:
        rounds = min(rounds, 7)
    samples: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            samples[name] += worker.turn(calls)
    return {name: statistics.median(values) for name, values in samples.items()}


def _errors(tasks: Mapping[str, Task]) -> dict[str, float]:
    import torch

    from ..reference import relative_l2

    some = next(iter(tasks.values()))
    if not some.exact.exists():
        return {}
    exact = torch.load(some.exact)
    return {
        name: relative_l2(torch.load(task.output).double(), exact)
        for name, task in tasks.items()
        if task.output.exists()
    }


def read(path: Path) -> dict[str, Any]:
    """What `store` wrote, or an empty table where there is none or it has another form."""
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        rows = [Row(**row) for row in data["rows"]]
    except (OSError, ValueError, KeyError, TypeError):
        return {"machine": {}, "rows": []}
    return {**data, "rows": rows}


def store(path: Path, row: Row, threads: int) -> None:
    """Enter the row in the file, in the place of an older one of the same subject."""
    rows: list[Row] = read(path)["rows"]
    places = {known.key: i for i, known in enumerate(rows)}
    if row.key in places:
        rows[places[row.key]] = row
    else:
        rows.append(row)
    data = {"machine": machine(threads), "rows": [asdict(r) for r in rows]}
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(unfinished, path)


def machine(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    from ...hwdb import detect

    hw = detect()
    return {
        "cpu": hw.name,
        "isa": hw.isa,
        "vector_bits": hw.vector_bits,
        "cores": os.cpu_count(),
        "threads": threads,
        "caches": [[c.level, c.size_bytes] for c in hw.caches],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def print_rows(rows: Sequence[Row], against: Sequence[str], header: bool = True) -> None:
    """Print a table; `!` marks an error beyond the limits and a ratio above its bar."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=header)
    table.add_column("model", min_width=13)
    for column in ("batch", "precision"):
        table.add_column(column, min_width=9, justify="right")
    for peer in ("graphwright", *against):
        table.add_column(f"{peer} ms", min_width=12, justify="right")
    for column in ("best peer", "ratio", "bar", "error", "eager's", "compile s", "activations MB"):
        table.add_column(column, min_width=10, justify="right")
    for row in rows:
        table.add_row(*_cells(row, against))
    Console(width=200).print(table)


def _cells(row: Row, against: Sequence[str]) -> list[str]:
    errors = {name: f"{error:.1e}" for name, error in row.relative_l2.items()}
    times = [f"{row.milliseconds[p]:.2f}" if p in row.milliseconds else "-" for p in ("graphwright", *against)]
    above = row.ratio is not None and row.bar is not None and row.ratio > row.bar
    return [
        row.model,
        str(row.batch),
        row.precision,
        *times,
        row.best_peer or "-",
        "-" if row.ratio is None else f"{row.ratio:.2f}{'!' if above else ''}",
        "-" if row.bar is None else f"{row.bar:.2f}",
        errors.get("graphwright", "-") + ("!" if row.inexact else ""),
        errors.get("eager", "-"),
        f"{row.compile_seconds['graphwright']:.1f}" if "graphwright" in row.compile_seconds else "-",
        f"{row.arena_bytes / 1e6:.1f}",
    ]
