"""Run the passes over a copy of the captured graph: checked, timed, and written out on request."""

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

from ..errors import PassError
from ..hwdb import Hardware
from ..passes.printer import format_graph

log = logging.getLogger(__name__)

Pass = Callable[[fx.GraphModule, Hardware], int]


@dataclass(frozen=True)
class PassRun:
    """What one pass did."""

    name: str
    rewrites: int
    seconds: float


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes can be rewritten freely; tensors are shared with the original."""
    root = torch.nn.Module()
    for name, tensor in graph.named_buffers():
        root.register_buffer(name, tensor)
    nodes = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = nodes.graph_copy(graph.graph, values)
    nodes.output(output)
    for old, new in values.items():
        new.meta = copy.copy(old.meta)
    return fx.GraphModule(root, nodes)


def run(
    graph: fx.GraphModule,
    hw: Hardware,
    passes: Sequence[Pass],
    after: Callable[[str, fx.GraphModule], None] | None = None,
) -> tuple[fx.GraphModule, tuple[PassRun, ...]]:
    """Rewrite a copy of `graph` with `passes` in order; `after(name, graph)` is called behind every pass that rewrote.

    GRAPHWRIGHT_DUMP=directory writes the graph before the first pass and after each one that rewrote.
    Raises PassError naming the pass that failed or left a malformed graph.
    """
    graph = copy_graph(graph)
    dump = _Dump(os.environ.get("GRAPHWRIGHT_DUMP"))
    dump.write("input", graph)
    runs: list[PassRun] = []
    for rewrite in passes:
        name = rewrite.__name__
        started = time.perf_counter()
        try:
            count = rewrite(graph, hw)
            if count:
                graph.graph.lint()
        except Exception as error:
            before = ", ".join(r.name for r in runs) or "no other pass"
            raise PassError(f"pass {name} failed after {before}: {error}") from error
        runs.append(PassRun(name, count, time.perf_counter() - started))
        if count:
            log.debug("%s: %d rewrites in %.1f ms", name, count, runs[-1].seconds * 1e3)
            dump.write(name, graph)
            if after is not None:
                after(name, graph)
    graph.recompile()
    return graph, tuple(runs)


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
