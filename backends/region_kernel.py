"""One set of nodes as a kernel: what it stores, the rows it goes by, what it costs; or why the nodes cannot be one.

stored    a result, a reduction, a formula too expensive to repeat
rows      leading dims in which all stored values, and every read between them, keep step
aside     little work that no large stored value waits for, or that waits for none: a loop in front or behind
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from ..hwdb import Hardware
from ..hwdb.cost import Work, launch_seconds, memory_bandwidth_gbs, predict_seconds

# A kernel's code and the first lines of its operands have left the inner caches since the last call: about ten misses
# of 0.1 us, an estimate.
ENTRY_SECONDS = 1e-6
SMALL_POINTS = 1 << 14  # work too small for several cores, where the number of rows is no matter
MEMORY_INSTRUCTIONS = 6  # a store and a load, in vector instructions
_LITTLE = 0.1  # of a kernel's elements: work that may have a loop of its own in front or behind
_VECTORISED = 64  # elements that a row should have
_BYTES, _INSTRUCTIONS = 2e10, 1e10  # a second, for a machine whose rates are not known: only ratios matter

Node = Any  # whatever is hashable: fx nodes, or names in tests


@dataclass(frozen=True)
class Facts:
    """What computing one node takes. Shapes are without dims of extent 1."""

    shape: tuple[int, ...]  # of the result
    item_bytes: int
    rows: int  # leading dims along which every step of the definition stays in its row
    work: float  # vector instructions for one element of the result
    formula: bool  # whether an element is one formula of the operands' elements
    aligned: Mapping[Node, int]  # operand -> leading dims in which it is read in step with the result
    loads: Mapping[Node, float]  # operand -> its elements that are loaded, repetitions counted

    @property
    def size(self) -> int:
        """Elements of the result."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return self.size * self.item_bytes


@dataclass(frozen=True)
class Region:
    """Nodes of one kernel, in order; `copies` among them are computed elsewhere too."""

    nodes: tuple[Node, ...]
    results: tuple[Node, ...]
    kept: tuple[Node, ...]  # stored for the time of one row
    rows: int  # 1 where one loop nest computes everything
    instructions: float  # vector instructions, for one element each
    moved: float  # bytes that come in and go out, each once
    copies: frozenset[Node] = frozenset()

    @property
    def reason(self) -> str:
        """What the kernel is, in a few words."""
        parts = [f"{len(self.nodes)} operators"] if len(self.nodes) > 1 else ["one operator"]
        if len(self.results) > 1:
            parts.append(f"{len(self.results)} results")
        if self.rows > 1:
            parts.append(f"{self.rows} rows")
        if self.kept:
            parts.append(f"{len(self.kept)} values kept")
        if self.copies:
            parts.append(f"{len(self.copies)} values computed again")
        return ", ".join(parts)


@dataclass(frozen=True)
class Problem:
    """Every node in order with its operands, the facts of those that may be fused, and those read elsewhere."""

    operands: Mapping[Node, tuple[Node, ...]]
    facts: Mapping[Node, Facts]
    results: frozenset[Node]
    hw: Hardware
    nbytes: Mapping[Node, int] = field(default_factory=dict)  # of nodes without facts


def row_bytes(hw: Hardware) -> int:
    """What the values that a kernel keeps for one row may take: half of a core's second cache."""
    cache = hw.cache(2)
    return 1 << 17 if cache is None else cache.size_bytes // (2 * cache.shared_by_cores)


def predicted(region: Region, footprint: float, hw: Hardware) -> float:
    """Seconds of the kernel where its data comes from the cache that holds `footprint` bytes.

    Arithmetic and memory add up: short loops hide little of one behind the other.
    """
    rate = memory_bandwidth_gbs(hw, footprint)
    # Two flops are one vector instruction for every element.
    arithmetic = predict_seconds(hw, Work({"float32": 2.0 * region.instructions}, launches=0, efficiency=1.0))
    if rate is None or arithmetic is None:
        return region.moved / _BYTES + region.instructions / _INSTRUCTIONS + ENTRY_SECONDS
    known, start = arithmetic + region.moved / (rate * 1e9), launch_seconds(hw)
    return (known + start if known * hw.cores > 2 * start else known * hw.cores) + ENTRY_SECONDS


class Kernels:
    """Kernels of any nodes of a problem. `homes` are the regions of nodes that are computed in several."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.index = {node: i for i, node in enumerate(problem.operands)}
        self.readers: dict[Node, list[Node]] = {}
        for node, operands in problem.operands.items():
            for operand in dict.fromkeys(operands):
                self.readers.setdefault(operand, []).append(node)
        self.homes: dict[Node, set[int]] = {}

    def of(self, nodes: Iterable[Node], copies: Set[Node]) -> Region | str:
        """The kernel of `nodes` and `copies`, which are no results, or why they cannot be one."""
        facts = self.problem.facts
        ordered = sorted({*nodes, *copies}, key=self.index.__getitem__)
        inside = set(ordered)
        results = [n for n in ordered if n not in copies and self._is_result(n, inside)]
        stored, runs = self._stored(ordered, inside, set(results))
        instructions, moved = self._work(ordered, inside, results, runs)
        kept = [n for n in ordered if n in stored and n not in results]

        def region(rows: int) -> Region:
            return Region(tuple(ordered), tuple(results), tuple(kept), rows, instructions, moved, frozenset(copies))

        if len(stored) == 1:
            return region(1)
        aside = self._aside(ordered, inside, stored, runs)
        large = [n for n in stored if n not in aside]
        depth = self._depth(ordered, set(stored), aside)
        if self._one_nest(stored, depth) or not large or self._in_blocks(large, inside):
            return region(1)
        rows = self._rows(large, depth, runs)
        if isinstance(rows, str):
            return rows
        scratch = sum(facts[n].nbytes for n in kept if n not in aside) / rows
        if scratch > row_bytes(self.problem.hw):
            return f"the values of a row take {scratch:.0f} bytes"
        return region(rows)

    def _is_result(self, node: Node, inside: set[Node]) -> bool:
        """Whether something outside reads the node, or nothing does."""
        readers = self.readers.get(node, ())
        elsewhere = any(u not in inside or len(self.homes.get(u, ())) > 1 for u in readers)
        return not readers or node in self.problem.results or elsewhere

    def _stored(
        self, ordered: Sequence[Node], inside: set[Node], results: set[Node]
    ) -> tuple[list[Node], dict[Node, float]]:
        """The stored nodes, and how many elements of each node are computed."""
        facts = self.problem.facts
        stored: list[Node] = []
        runs: dict[Node, float] = {}
        for node in reversed(ordered):
            own = facts[node]
            repeated = 0.0
            for reader in self.readers.get(node, ()):
                if reader in inside:
                    repeated += runs[reader] * facts[reader].loads[node] / max(facts[reader].size, 1)
            repeat = repeated * own.work <= own.size * (own.work + MEMORY_INSTRUCTIONS)
            if own.work <= 1:
                repeat = own.work == 0 or repeated <= 4 * own.size
            if node in results or not own.formula or not repeat:
                stored.insert(0, node)
                runs[node] = own.size
            else:
                runs[node] = repeated
        return stored, runs

    def _aside(
        self, ordered: Sequence[Node], inside: set[Node], stored: Sequence[Node], runs: Mapping[Node, float]
    ) -> set[Node]:
        """Stored nodes of little work that need no large one, or that no large one needs: loops before or behind."""
        facts = self.problem.facts
        points = {n: max(runs[n], *facts[n].loads.values(), 0.0) for n in stored}
        large = {n for n in stored if points[n] > max(SMALL_POINTS, sum(points.values()) * _LITTLE)}
        behind: set[Node] = set()
        for node in ordered:
            if any(o in large or o in behind for o in self.problem.operands[node] if o in inside):
                behind.add(node)
        before: set[Node] = set()
        for node in reversed(ordered):
            if any(u in large or u in before for u in self.readers.get(node, ()) if u in inside):
                before.add(node)
        return {n for n in stored if n not in large and not (n in behind and n in before)}

    def _depth(self, ordered: Sequence[Node], stored: set[Node], aside: set[Node]) -> dict[Node, int]:
        """For every node the leading dims in which all stored nodes that read it keep step, those `aside` left out."""
        facts = self.problem.facts
        depth: dict[Node, int] = {}
        for node in reversed(ordered):
            reach = len(facts[node].shape)
            for reader in self.readers.get(node, ()):
                if reader in depth and reader not in aside:
                    step = facts[reader].aligned[node]
                    reach = min(reach, step if reader in stored else min(step, depth[reader]))
            depth[node] = reach
        return depth

    def _in_blocks(self, large: Sequence[Node], inside: set[Node]) -> bool:
        """Whether all are reductions of the same elements to next to nothing: blocks of what they read are rows."""
        facts, cores = self.problem.facts, self.problem.hw.cores
        if any(facts[n].formula or facts[n].size >= cores for n in large):
            return False
        elements = {max(facts[n].loads.values(), default=0.0) for n in large}
        return len(elements) == 1 and not any(self._leads_to(n, set(large), inside) for n in large)

    def _leads_to(self, start: Node, ends: set[Node], inside: set[Node]) -> bool:
        found, waiting = {start}, [start]
        while waiting:
            for reader in self.readers.get(waiting.pop(), ()):
                if reader in ends:
                    return True
                if reader in inside and reader not in found:
                    found.add(reader)
                    waiting.append(reader)
        return False

    def _one_nest(self, stored: Sequence[Node], depth: Mapping[Node, int]) -> bool:
        """Whether one pass over the elements writes all of `stored`."""
        facts = self.problem.facts
        shape = facts[stored[0]].shape
        return all(facts[n].formula and facts[n].shape == shape and depth[n] == len(shape) for n in stored)

    def _rows(self, stored: Sequence[Node], depth: Mapping[Node, int], runs: Mapping[Node, float]) -> int | str:
        """How many rows the stored values have in common."""
        facts, hw = self.problem.facts, self.problem.hw
        first = facts[stored[0]].shape
        shared = min(min(facts[n].rows, depth[n]) for n in stored)
        while shared and any(facts[n].shape[:shared] != first[:shared] for n in stored):
            shared -= 1
        if not shared:
            return "rows do not line up"
        points = max(max(facts[n].size, *facts[n].loads.values(), 1) for n in stored)
        while shared > 1 and points // math.prod(first[:shared]) < _VECTORISED:
            shared -= 1
        rows = math.prod(first[:shared])
        total = sum(max(runs[n], *facts[n].loads.values(), 1) for n in stored)
        if rows < hw.cores and total > SMALL_POINTS:
            return f"only {rows} rows for {hw.cores} cores"
        return rows

    def _work(
        self, ordered: Sequence[Node], inside: set[Node], results: Sequence[Node], runs: Mapping[Node, float]
    ) -> tuple[float, float]:
        """Vector instructions of all elements, and the bytes that come in and go out, each once."""
        facts = self.problem.facts
        read: dict[Node, float] = {}
        for n in ordered:
            share = runs[n] / max(facts[n].size, 1)
            for operand, loads in facts[n].loads.items():
                if operand not in inside:
                    read[operand] = read.get(operand, 0.0) + loads * share
        into = sum(min(loads * 4.0, self.nbytes(operand, loads)) for operand, loads in read.items())
        return sum(runs[n] * facts[n].work for n in ordered), into + sum(facts[n].nbytes for n in results)

    def nbytes(self, node: Node, loads: float) -> float:
        """Bytes of a value; where nothing is known of it, of what is loaded."""
        known = self.problem.facts.get(node)
        return known.nbytes if known is not None else self.problem.nbytes.get(node, loads * 4.0)
