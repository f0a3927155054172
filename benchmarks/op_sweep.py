"""Compile torch's own operator samples (OpInfo, float32) and say which operators are compiled, and whether rightly.

    python benchmarks/op_sweep.py [--ops add,conv2d] [--limit 50] [--samples 2] [--jobs 2]
                                  [--json out.json] [--update-docs docs/operators.md]

Each operator runs in a worker process that is restarted when it dies, so that a crash is a result like any other.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# From the best to the worst; an operator is as good as its worst sample.
STATUSES = ("compiled", "partly", "eager", "refused", "failed", "wrong", "crash")
MEANING = {
    "compiled": "all of its graph is machine code of ours",
    "partly": "some of its graph is left to PyTorch",
    "eager": "all of it is left to PyTorch",
    "refused": "torch.export cannot capture it, it changes its inputs, or they are sparse",
    "failed": "compiling raised an error that it should not",
    "wrong": "the result differs from PyTorch's",
    "crash": "the process died or did not answer",
}


class Worker:
    """A process that classifies one operator at a time."""

    def __init__(self, samples: int, timeout: float) -> None:
        self.samples, self.timeout = samples, timeout
        self.process: subprocess.Popen[bytes] | None = None

    def names(self) -> list[str]:
        """The operators there are."""
        answer = self._ask({"list": True})
        assert answer is not None, "the worker did not start"
        return [str(name) for name in answer["names"]]

    def classify(self, name: str) -> dict[str, Any]:
        """The record of one operator."""
        started = time.perf_counter()
        answer = self._ask({"operator": name, "samples": self.samples})
        if answer is None:
            answer = {"operator": name, "status": "crash", "detail": self._died(), "missing": []}
        return {**answer, "seconds": round(time.perf_counter() - started, 2)}

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _ask(self, question: dict[str, Any]) -> dict[str, Any] | None:
        if self.process is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"}
            command = [sys.executable, str(Path(__file__).with_name("op_sweep_worker.py"))]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        ready, _, _ = select.select([process.stdout], [], [], self.timeout)
        line = process.stdout.readline() if ready else b""
        answer: dict[str, Any] | None = json.loads(line) if line.endswith(b"\n") else None
        return answer

    def _died(self) -> str:
        assert self.process is not None
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self.close()
            return f"no answer in {self.timeout:.0f} s"
        self.process = None
        return f"the process ended with {code}"


def sweep(names: list[str], samples: int, jobs: int, timeout: float) -> list[dict[str, Any]]:
    """Classify the operators, in `jobs` processes."""
    workers = [Worker(samples, timeout) for _ in range(jobs)]
    free = collections.deque(workers)

    def classify(name: str) -> dict[str, Any]:
        worker = free.popleft()
        try:
            record = worker.classify(name)
        finally:
            free.append(worker)
        print(f"{record['status']:9} {name:50} {record['seconds']:6.1f} s  {record['detail'][:120]}", flush=True)
        return record

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        records = list(pool.map(classify, names))
    for worker in workers:
        worker.close()
    return records


def totals(records: list[dict[str, Any]]) -> dict[str, int]:
    """How many operators there are of each status."""
    found = collections.Counter(record["status"] for record in records)
    return {status: found[status] for status in STATUSES}


def missing(records: list[dict[str, Any]]) -> list[tuple[str, int, str]]:
    """The overloads left to PyTorch: how many operators that costs, and the reason, most expensive first."""
    users: dict[str, set[str]] = collections.defaultdict(set)
    reasons: dict[str, str] = {}
    for record in records:
        for overload, reason in record["missing"]:
            users[overload].add(record["operator"])
            reasons.setdefault(overload, reason)
    return sorted(((o, len(u), reasons[o]) for o, u in users.items()), key=lambda row: (-row[1], row[0]))


def summary(records: list[dict[str, Any]]) -> str:
    """One line: the totals and the share compiled."""
    counts = totals(records)
    share = 100 * counts["compiled"] / max(1, len(records))
    rest = ", ".join(f"{counts[s]} {s}" for s in STATUSES[1:])
    return f"{counts['compiled']} of {len(records)} operators compiled ({share:.1f} %), {rest}"


def document(records: list[dict[str, Any]], samples: int) -> str:
    """docs/operators.md."""
    lines = [
        "# Operators",
        "",
        f"What becomes of each operator of torch's own test samples (OpInfo, float32, {samples} samples each).",
        "Written by `python benchmarks/op_sweep.py --update-docs docs/operators.md`.",
        "",
        f"**{summary(records)}.**",
        "",
        *(f"- {status}: {MEANING[status]}" for status in STATUSES if totals(records)[status]),
        "",
        "| operator | status | left to PyTorch, or why |",
        "|---|---|---|",
    ]
    for record in sorted(records, key=lambda r: r["operator"].lower()):
        overloads = ", ".join(f"`{overload}`" for overload in sorted({o for o, _ in record["missing"]}))
        note = overloads or ("" if record["status"] == "compiled" else record["detail"].split("\n")[0][:100])
        lines.append(f"| {record['operator']} | {record['status']} | {note.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the sweep; the exit status is 1 if an operator is wrong, failed or crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", help="comma-separated names; every OpInfo of that name (default: all)")
    parser.add_argument("--limit", type=int, help="only the first N operators")
    parser.add_argument("--samples", type=int, default=2, help="samples per operator")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--timeout", type=float, default=300, help="seconds until an operator counts as a crash")
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--update-docs", type=Path, help="write the table of operators here")
    options = parser.parse_args()
    first = Worker(options.samples, options.timeout)
    names = first.names()
    first.close()
    if options.ops:
        wanted = set(options.ops.split(","))
        names = [name for name in names if name in wanted]
        unknown = wanted - set(names)
        if unknown:
            parser.error(f"no operator named {', '.join(sorted(unknown))}")
    records = sweep(names[: options.limit], options.samples, options.jobs, options.timeout)
    print("\nleft to PyTorch, by the number of operators:")
    for overload, count, reason in missing(records):
        print(f"{count:4} {overload}: {reason}")
    print(f"\n{summary(records)}")
    if options.json:
        data = {"summary": totals(records), "samples": options.samples, "operators": records}
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    if options.update_docs:
        options.update_docs.write_text(document(records, options.samples))
    counts = totals(records)
    return 1 if counts["failed"] + counts["wrong"] + counts["crash"] else 0


if __name__ == "__main__":
    sys.exit(main())
