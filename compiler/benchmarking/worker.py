"""One runner in a process of its own: it builds the model, compiles it, and times calls when it is its turn.

In one process the runtimes are not themselves: their threads spin beside each other's, and they share a heap, its pages
and the settings of the processor. Here all but one wait, blocked on a pipe.

    Worker.start(task) ... worker.ready(limit) ... worker.turn(calls) ... worker.stop()
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ...errors import GraphwrightError, InputError


@dataclass(frozen=True)
class Subject:
    """What is measured: a model of the zoo at a batch size, or any MODEL and --input of the command line."""

    name: str
    batch: int = 1
    precision: str = "fp32"
    inputs: tuple[str, ...] = ()

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """The model, with the same weights in every process where it draws them, and the arguments of a call."""
        import torch

        from . import zoo

        torch.manual_seed(0)

        if self.name in zoo.names() and not self.inputs:
            return zoo.build(self.name, batch=self.batch)
        from ..commands.model_argument import load_model

        loaded, examples = load_model(self.name, self.inputs)
        model = loaded.module() if hasattr(loaded, "module_call_graph") else loaded
        if isinstance(examples, dict):
            raise InputError(
                f"{self.name}: bench calls models with positional arguments; its example inputs are keywords"
            )
        return model, tuple(examples) if isinstance(examples, (tuple, list)) else (examples,)


@dataclass(frozen=True)
class Task:
    """A runner of a subject: "graphwright" or a peer; `directory` is shared by the runners of one row."""

    subject: Subject
    runner: str
    threads: int
    directory: Path

    @property
    def output(self) -> Path:
        """Where the first result is left, for its error."""
        return self.directory / f"{self.runner}.pt"

    @property
    def exact(self) -> Path:
        """Where the eager runner leaves the result in float64."""
        return self.directory / "float64.pt"


@dataclass(frozen=True)
class Ready:
    """What a runner says when it can take turns."""

    compile_seconds: float
    call_seconds: float
    facts: dict[str, int] = field(default_factory=dict)


class Failed(Exception):
    """The runner refused the model, took too long, or died; the text says which."""


class Worker:
    """The process of one runner, seen from the one that deals out turns."""

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.task = task
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, task), daemon=True)
        self._process.start()
        theirs.close()

    def ready(self, limit: float) -> Ready:
        """Wait until it can take turns. Raises Failed."""
        answer = self._answer(limit)
        assert isinstance(answer, Ready)
        return answer

    def turn(self, calls: int, limit: float = 600.0) -> list[float]:
        """Milliseconds of `calls` calls, after untimed ones that fill the caches again. Raises Failed."""
        self._pipe.send(calls)
        answer: list[float] = self._answer(limit)
        return answer

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()
        self._pipe.close()

    def _answer(self, limit: float) -> Any:
        if not self._pipe.poll(limit):
            raise Failed(f"not done within {limit:.0f} s")
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise Failed(f"its process ended with {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise Failed(answer)
        return answer


def _serve(pipe: Connection, task: Task) -> None:
    """The runner's process: a `Ready`, then a list of milliseconds for every number of calls it is sent."""
    from .bench import settle

    try:
        run, ready = _prepare(task)
    except Exception as error:
        # A peer that refuses a model is a gap in a row, not the end of the run.
        text = str(error).strip()
        pipe.send(f"{type(error).__name__}: {text.splitlines()[0] if text else ''}")
        return
    settle()
    pipe.send(ready)
    while True:
        try:
            calls = pipe.recv()
        except EOFError:
            return
        for _ in range(1 if ready.call_seconds > 1 else 2):
            run()
        milliseconds = []
        for _ in range(calls):
            started = time.perf_counter()
            run()
            milliseconds.append((time.perf_counter() - started) * 1e3)
        settle()  # before the next runner's turn: threads spin for a while after their last task
        pipe.send(milliseconds)


def _prepare(task: Task) -> tuple[Callable[[], Any], Ready]:
    import torch

    torch.set_num_threads(task.threads)
    model, inputs = task.subject.build()
    started = time.perf_counter()
    run, facts = _runner(task, model, inputs)
    result = run()
    compiled = time.perf_counter() - started
    torch.save(first_tensor(result), task.output)
    if task.runner == "eager":
        torch.save(_exact(model, inputs), task.exact)
    for _ in range(2):
        started = time.perf_counter()
        run()
        call_seconds = time.perf_counter() - started
    facts["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return run, Ready(compiled, call_seconds, facts)


def _runner(task: Task, model: Any, inputs: Sequence[Any]) -> tuple[Callable[[], Any], dict[str, int]]:
    from ..api import compile
    from . import bench

    narrow = task.subject.precision == "bf16"
    threads = task.threads
    if task.runner == "graphwright":
        compiled = compile(model, tuple(inputs), precision=task.subject.precision, threads=threads, cache=False)
        report = compiled.report()
        facts = {"arena_bytes": report.arena_bytes, "arena_lower_bound_bytes": report.arena_lower_bound_bytes}
        return lambda: compiled(*inputs), facts
    onnx = task.directory / "model.onnx"
    if task.runner == "onnxruntime":
        if narrow:
            raise GraphwrightError("ONNX Runtime has no bfloat16 kernels for the CPU")
        return bench.onnxruntime(model, inputs, threads, onnx), {}
    if task.runner == "openvino":
        return bench.openvino(model, inputs, threads, onnx, task.subject.precision), {}
    if narrow:
        model, inputs = bench.narrowed(model, inputs)
    return (bench.eager if task.runner == "eager" else bench.inductor)(model, inputs), {}


def _exact(model: Any, inputs: Sequence[Any]) -> Any:
    """The first result of the model in float64."""
    import torch

    wide = model.double()
    with torch.no_grad():
        result = first_tensor(wide(*[x.double() if x.is_floating_point() else x for x in inputs]))
    wide.float()
    return result


def first_tensor(result: Any) -> Any:
    """The first tensor of whatever a runner returns."""
    import torch
    from torch.utils import _pytree as pytree

    leaf = pytree.tree_leaves(result)[0]
    return (leaf if isinstance(leaf, torch.Tensor) else torch.from_numpy(leaf)).detach().clone()
