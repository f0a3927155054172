"""Run the passes over a copy of the captured graph until none of them rewrites: checked, timed, written out on request.

A round is the tuple of passes in its order. A pass is left out of a round where the graph is as it was when it last
found nothing: the round that proves the fixpoint costs one look at the nodes for each pass that others rewrote behind.
"""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from ..errors import PassError
from ..hwdb import Hardware
from ..passes.printer import format_graph
from .pass_checks import Pass, Watch, is_ours, name_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budget:
    """Where the rounds end although passes still rewrite: some undo what others do, or one rewrites for ever."""

    rounds: int = 8
    rewrites: int = 10_000
    rewrites_per_node: int = 20

    def allowed(self, nodes: int) -> int:
        """Rewrites of a graph that began with so many nodes."""
        return self.rewrites + self.rewrites_per_node * nodes


@dataclass(frozen=True)
class PassRun:
    """What one entry of the tuple did, over all rounds."""

    name: str
    rewrites: int
    seconds: float
    runs: int = 1  # rounds it was not left out of
    unfinished: bool = False  # it still rewrote when the budget was spent


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes can be rewritten freely; tensors are shared with the original.

    Python code for it is made when it is first called, not after every rewrite: passes never call it.
    """
    root = torch.nn.Module()
    for name, tensor in graph.named_buffers(remove_duplicate=False):
        root.register_buffer(name, tensor)
    nodes = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = nodes.graph_copy(graph.graph, values)
    nodes.output(output)
    for old, new in values.items():
        new.meta = copy.copy(old.meta)
    copied = _LazyGraphModule(root, nodes)
    copied.meta.update(graph.meta)
    return copied


def run(
    graph: fx.GraphModule,
    hw: Hardware,
    passes: Sequence[Pass],
    after: Callable[[str, fx.GraphModule], None] | None = None,
    budget: Budget = Budget(),
    before: Callable[[fx.GraphModule], None] | None = None,
) -> tuple[fx.GraphModule, tuple[PassRun, ...]]:
    """Rewrite a copy of `graph` with `passes` in order, and again until none rewrites or the budget is spent.

    `before(graph)` is called with the copy, `after(name, graph)` behind every pass that rewrote.
    GRAPHWRIGHT_DUMP=directory writes the graph before the first pass and after each one that rewrote. A spent budget is
    logged, and marked in the runs of the passes that still rewrote; the graph is right nevertheless, as it is behind
    every pass.
    Raises PassError naming the pass that failed, or broke the contract of `pass_checks`.
    """
    work = _Work(copy_graph(graph), hw, after)
    if before is not None:
        before(work.graph)
    entries = [_Entry(rewrite) for rewrite in passes]
    allowed = budget.allowed(len(work.graph.graph.nodes))
    for _ in range(budget.rounds):
        began = work.rewrites
        for entry in entries:
            entry.last = 0
        for entry in entries:
            work.apply(entry)
            if work.rewrites > allowed:
                return work.graph, _stopped(entries, f"{work.rewrites} rewrites")
        if work.rewrites == began:
            return work.graph, tuple(entry.run() for entry in entries)
    return work.graph, _stopped(entries, f"{budget.rounds} rounds")


@dataclass
class _Entry:
    """One place of the tuple, and what was done there."""

    rewrite: Pass
    rewrites: int = 0
    seconds: float = 0.0
    runs: int = 0
    last: int = 0  # rewrites of this round

    def run(self, unfinished: bool = False) -> PassRun:
        return PassRun(name_of(self.rewrite), self.rewrites, self.seconds, self.runs, unfinished)


def _failure(rewrite: Pass, message: str) -> PassError:
    error = PassError(message)
    error.rewrite = name_of(rewrite) if is_ours(rewrite) else None
    return error


def _stopped(entries: Sequence[_Entry], spent: str) -> tuple[PassRun, ...]:
    """The runs where the budget ended them."""
    names = ", ".join(dict.fromkeys(name_of(entry.rewrite) for entry in entries if entry.last))
    log.warning("the passes were stopped after %s, while %s still rewrote; what they made is used", spent, names)
    return tuple(entry.run(entry.last > 0) for entry in entries)


class _Work:
    """The graph on its way through the passes."""

    def __init__(
        self, graph: fx.GraphModule, hw: Hardware, after: Callable[[str, fx.GraphModule], None] | None
    ) -> None:
        self.graph, self.hw, self.after = graph, hw, after
        self.rewrites = 0
        self.found_nothing: dict[int, int] = {}  # pass -> rewrites of all passes when it last found nothing
        self.ran: dict[str, None] = {}
        self.dump = _Dump(os.environ.get("GRAPHWRIGHT_DUMP"))
        self.dump.write("input", graph)

    def apply(self, entry: _Entry) -> None:
        """Run one pass, unless it found nothing in this very graph before."""
        if self.found_nothing.get(id(entry.rewrite)) == self.rewrites:
            return
        name, started = name_of(entry.rewrite), time.perf_counter()
        watch = Watch(self.graph, strict=not is_ours(entry.rewrite))
        try:
            count = entry.rewrite(self.graph, self.hw)
        except Exception as error:
            raise _failure(entry.rewrite, f"pass {name} failed after {self._before()}: {error}") from error
        if (broken := watch.broken(count)) is not None:
            raise _failure(entry.rewrite, f"pass {name}, after {self._before()}, {broken}")
        self.ran.pop(name, None)  # to the end: it is the last that ran
        self.ran[name] = None
        entry.last = count
        entry.rewrites += count
        entry.runs += 1
        entry.seconds += (seconds := time.perf_counter() - started)
        if not count:
            self.found_nothing[id(entry.rewrite)] = self.rewrites
            return
        self.rewrites += count
        log.debug("%s: %d rewrites in %.1f ms", name, count, seconds * 1e3)
        self.dump.write(name, self.graph)
        if self.after is not None:
            self.after(name, self.graph)

    def _before(self) -> str:
        last = ", ".join(list(self.ran)[-3:])
        if len(self.ran) <= 3:
            return last or "no other pass"
        return f"{len(self.ran)} passes, the last of them {last}"


class _Dump:
    """Numbered text files of the graph, one a stage."""

    def __init__(self, directory: str | None) -> None:
        self.directory = Path(directory) if directory else None
        self.count = 0

    def write(self, name: str, graph: fx.GraphModule) -> None:
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / f"{self.count:02d}-{name}.txt").write_text(format_graph(graph) + "\n")
        self.count += 1
