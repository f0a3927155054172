"""Which families of fusions a graph may be given: what `compile(kernel_fusion=[...])` chose.

The choice lies in graph.meta, so that it goes where the graph goes: to passes, to lowering, and to every rerun of the
passes. The names, and the passes that belong to one of them alone, are in `default.FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

_KEY = "kernel_fusion"


def restrict(graph: fx.GraphModule, families: Iterable[str] | None) -> None:
    """Let passes make the fusions of `families` only; None lets them make all."""
    graph.meta[_KEY] = None if families is None else frozenset(families)


def fuses(graph: fx.GraphModule, family: str) -> bool:
    """Whether passes may make the fusions of this family."""
    chosen: frozenset[str] | None = graph.meta.get(_KEY)
    return chosen is None or family in chosen
