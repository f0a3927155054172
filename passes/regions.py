"""Which elementwise operators and reductions become one kernel, and which values in between are stored.

    p -> {q, r} -> m          one kernel, p in no memory: m post-dominates p, so no other kernel waits for p
    p -> {q, kernel}          one kernel with two results, p and q
    {sum(x), max(x)}          one kernel, x read once
    p -> {kernel of q, kernel of r}   p computed in both, where that costs less than storing it

A region is a set of nodes that runs as one kernel. Its values are *stored* (a result, a reduction, a formula too
expensive to repeat: kept for as long as a row takes) or *formulas*, computed where they are read. All stored values
have rows in common: their leading dims (those of extent 1 left out) are equal and every read between them stays in its
row, so that the kernel takes one row after another through cache and divides the rows among the cores.

Nodes come together in rounds: from every node to its immediate post-dominator with all between (found as in Cooper,
Harvey, Kennedy, A simple, fast dominance algorithm, 2001; one sweep suffices without cycles), then along single edges,
then readers of one tensor, then small formulas of one shape. Each time the predicted seconds decide. Last, a formula
that several kernels read is copied into them, or stored.

Refused: nodes between which something outside would have to run; rows that do not line up, or fewer than there are
cores; values of a row beyond a share of cache; nodes far apart (what is stored for long needs memory); what is
predicted slower together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..hwdb import Hardware
from ..hwdb.cost import Work, launch_seconds, predict_seconds

# A kernel's code and the first lines of its operands have left the inner caches since the last call: about ten misses
# of 0.1 us, an estimate.
ENTRY_SECONDS = 1e-6
SMALL_POINTS = 1 << 14  # work too small for several cores, where the number of rows is no matter
MEMORY_INSTRUCTIONS = 6  # a store and a load, in vector instructions
_MOST_NODES = 64
_MOST_BETWEEN = 400  # kernels, in the order they would run
_MOST_READERS = 16
_LITTLE = 0.1  # of a kernel's elements: work that may have a loop of its own in front or behind
_VECTORISED = 64  # elements that a row should have
_BYTES, _INSTRUCTIONS = 2e10, 1e10  # a second, for a machine whose rates are not known: only ratios matter

Node = Hashable


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
    seconds: float
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


Refuse = Callable[[Node, str], None]


def form_regions(problem: Problem, refuse: Refuse = lambda node, reason: None) -> list[Region]:
    """A region for every node that has facts; those of several nodes where it pays. `refuse` is told why not."""
    former = _Former(problem, refuse)
    former.to_post_dominators()
    former.along_edges()
    former.readers_of_one()
    former.small_neighbours()
    former.copy_formulas()
    return former.regions()


def row_bytes(hw: Hardware) -> int:
    """What the values that a kernel keeps for one row may take: half of a core's second cache."""
    cache = hw.cache(2)
    return 1 << 17 if cache is None else cache.size_bytes // (2 * cache.shared_by_cores)


def post_dominators(order: Sequence[Node], readers: Mapping[Node, Sequence[Node]]) -> dict[Node, Node | None]:
    """The immediate post-dominator of every node of an acyclic graph: the first that all paths from it lead through.

    None stands for the end of the graph. A node without readers, or read beyond `order`, leads to the end.
    """
    found: dict[Node, Node | None] = {}
    depth: dict[Node | None, int] = {None: 0}
    for node in reversed(order):
        ways = readers.get(node, ())
        meeting: Node | None = ways[0] if ways and ways[0] in depth else None
        for reader in ways[1:]:
            other: Node | None = reader if reader in depth else None
            while meeting != other:
                if depth[meeting] >= depth[other]:
                    meeting = found[meeting] if meeting is not None else None
                else:
                    other = found[other] if other is not None else None
        found[node] = meeting
        depth[node] = depth[meeting] + 1
    return found


class _Former:
    """Regions as they grow. `slots` is an order in which they could run."""

    def __init__(self, problem: Problem, refuse: Refuse) -> None:
        self.problem, self.refuse = problem, refuse
        self.index = {node: i for i, node in enumerate(problem.operands)}
        self.readers: dict[Node, list[Node]] = {}
        for node, operands in problem.operands.items():
            for operand in dict.fromkeys(operands):
                self.readers.setdefault(operand, []).append(node)
        self.region = dict(self.index)  # node -> the slot of its region
        self.members: dict[int, list[Node]] = {i: [node] for node, i in self.index.items()}
        self.slots: dict[int, int] = {i: i for i in self.members}  # region -> place
        self.at: list[int | None] = list(range(len(self.members)))  # place -> region
        self.copies: dict[int, set[Node]] = {}
        self.known: dict[int, Region] = {}

    # ---- the rounds ----

    def to_post_dominators(self) -> None:
        """From every node to where all its readers meet again, with what lies between."""
        order = list(self.problem.operands)
        meeting = post_dominators(order, self.readers)
        for node in reversed(order):
            end = meeting[node]
            if node not in self.problem.facts or node in self.problem.results or end not in self.problem.facts:
                continue
            between = self._between(node, end)
            if between is not None:
                self._try(node, {self.region[n] for n in between})

    def along_edges(self) -> None:
        """Every node with the producers of its operands, which stay results where others read them."""
        for node in self.problem.facts:
            for operand in self.problem.operands[node]:
                if operand in self.problem.facts:
                    self._try(node, {self.region[operand], self.region[node]})

    def readers_of_one(self) -> None:
        """The regions that read one tensor."""
        for operand, readers in list(self.readers.items()):
            near = [n for n in readers if n in self.problem.facts][:_MOST_READERS]
            for first, second in itertools.pairwise(near):
                if self._is_large_operand(operand, first) and self._is_large_operand(operand, second):
                    self._try(second, {self.region[first], self.region[second]})

    def small_neighbours(self) -> None:
        """Formulas over equally many elements, so few that entering their kernels counts."""
        last: dict[tuple[int, ...], Node] = {}
        for node, facts in self.problem.facts.items():
            if not facts.formula or facts.size > SMALL_POINTS:
                continue
            before = last.get(facts.shape)
            last[facts.shape] = node
            if before is not None:
                self._try(node, {self.region[before], self.region[node]})

    def copy_formulas(self) -> None:
        """A formula alone in its region goes into all its readers', where storing it costs more."""
        for node, facts in self.problem.facts.items():
            home = self.region[node]
            if len(self.members[home]) > 1 or not facts.formula or node in self.problem.results:
                continue
            readers = self.readers.get(node, [])
            if not readers or any(reader not in self.problem.facts for reader in readers):
                continue
            targets = {self.region[reader] for reader in readers}
            with_copy = {t: self._evaluated([*self.members[t], node], {*self.copies.get(t, ()), node}) for t in targets}
            if any(isinstance(value, str) for value in with_copy.values()):
                self.refuse(node, "stored: a kernel that reads it cannot compute it")
                continue
            together = sum(value.seconds for value in with_copy.values() if isinstance(value, Region))
            apart = sum(self._region(t).seconds for t in (home, *targets))
            if together > apart:
                self.refuse(node, f"stored: predicted {apart * 1e6:.1f} us, {together * 1e6:.1f} us if computed again")
                continue
            for target, value in with_copy.items():
                assert isinstance(value, Region)
                self.copies.setdefault(target, set()).add(node)
                self.known[target] = value
            del self.members[home]
            self.at[self.slots.pop(home)] = None

    def regions(self) -> list[Region]:
        """What came out, in the order of their last nodes."""
        found = [self._region(r) for r, nodes in self.members.items() if nodes[0] in self.problem.facts]
        return sorted(found, key=lambda region: self.index[region.nodes[-1]])

    # ---- growing ----

    def _is_large_operand(self, operand: Node, reader: Node) -> bool:
        loads = self.problem.facts[reader].loads
        return 4 * self._nbytes(operand, loads[operand]) >= max(self._nbytes(o, n) for o, n in loads.items())

    def _between(self, start: Node, end: Node) -> set[Node] | None:
        """Everything on a path from `start` to `end`, both included; None where some of it is not to be fused."""
        found, waiting = {start, end}, [start]
        while waiting:
            for reader in self.readers.get(waiting.pop(), ()):
                if reader in found:
                    continue
                if reader not in self.problem.facts or len(found) >= _MOST_NODES:
                    return None
                found.add(reader)
                waiting.append(reader)
        return found

    def _try(self, node: Node, regions: set[int]) -> None:
        """Make one region of `regions` where that is possible and predicted to pay."""
        if len(regions) < 2:
            return
        nodes = [n for r in regions for n in self.members[r]]
        if len(nodes) > _MOST_NODES:
            self.refuse(node, f"more than {_MOST_NODES} operators")
            return
        together = self._evaluated(nodes, set())
        if isinstance(together, str):
            self.refuse(node, together)
            return
        apart = sum(self._region(r).seconds for r in regions)
        if together.seconds > apart:
            self.refuse(node, f"predicted {together.seconds * 1e6:.1f} us together, {apart * 1e6:.1f} us apart")
            return
        obstacle = self._merge(regions, together)
        if obstacle is not None:
            self.refuse(node, obstacle)

    def _merge(self, regions: set[int], merged: Region) -> str | None:
        """Put `regions` in one place of the order, or say why there is none.

        In the stretch from the first to the last, what waits for one of them has to come after all of them.
        """
        places = [self.slots[r] for r in regions]
        low, high = min(places), max(places)
        if high - low > _MOST_BETWEEN:
            return f"{high - low} kernels apart"
        after: set[int] = set()
        waiting = list(regions)
        while waiting:
            for reader in self._reading(waiting.pop()):
                if self.slots[reader] > high or reader in after:
                    continue
                if reader in regions:
                    continue
                after.add(reader)
                waiting.append(reader)
        if any(not regions.isdisjoint(self._reading(r)) for r in after):
            return "something outside has to run in between"
        stretch = [r for r in self.at[low : high + 1] if r is not None and r not in regions]
        kept = min(regions)
        order = [*(r for r in stretch if r not in after), kept, *(r for r in stretch if r in after)]
        self.at[low : high + 1] = [*order, *[None] * (high + 1 - low - len(order))]
        for r in regions:
            self.slots.pop(r)
        for place, r in enumerate(order, low):
            self.slots[r] = place
        nodes = list(merged.nodes)
        for r in regions:
            del self.members[r]
            self.known.pop(r, None)
        self.members[kept], self.known[kept] = nodes, merged
        for node in nodes:
            self.region[node] = kept
        return None

    def _reading(self, region: int) -> set[int]:
        """The regions that read a value of this one."""
        readers = {self.region[u] for n in self.members[region] for u in self.readers.get(n, ())}
        readers.discard(region)
        return readers

    def _region(self, number: int) -> Region:
        if number not in self.known:
            value = self._evaluated(self.members[number], self.copies.get(number, set()))
            # A single node can always be a kernel.
            assert isinstance(value, Region), value
            self.known[number] = value
        return self.known[number]

    # ---- one set of nodes as a kernel ----

    def _evaluated(self, nodes: Iterable[Node], copies: set[Node]) -> Region | str:
        """The kernel of `nodes`, or why they cannot be one."""
        facts = self.problem.facts
        ordered = sorted({*nodes, *copies}, key=self.index.__getitem__)
        inside = set(ordered)
        results = [
            n
            for n in ordered
            if n not in copies and (n in self.problem.results or any(u not in inside for u in self.readers.get(n, ())))
        ]
        stored, runs = self._stored(ordered, inside, set(results))
        seconds = self._seconds(ordered, inside, results, runs)
        kept = [n for n in ordered if n in stored and n not in results]

        def region(rows: int) -> Region:
            return Region(tuple(ordered), tuple(results), tuple(kept), rows, seconds, frozenset(copies))

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

    def _seconds(
        self, ordered: Sequence[Node], inside: set[Node], results: Sequence[Node], runs: Mapping[Node, float]
    ) -> float:
        """Predicted seconds: of what comes in and goes out, each once, and of the arithmetic."""
        facts, hw = self.problem.facts, self.problem.hw
        instructions = sum(runs[n] * facts[n].work for n in ordered)
        read: dict[Node, float] = {}
        for n in ordered:
            share = runs[n] / max(facts[n].size, 1)
            for operand, loads in facts[n].loads.items():
                if operand not in inside:
                    read[operand] = read.get(operand, 0.0) + loads * share
        into = sum(min(loads * 4.0, self._nbytes(operand, loads)) for operand, loads in read.items())
        out = float(sum(facts[n].nbytes for n in results))
        # Two flops are one vector instruction for every element. Short loops hide little of one behind the other.
        arithmetic = predict_seconds(hw, Work({"float32": 2.0 * instructions}, launches=0, efficiency=1.0))
        memory = predict_seconds(hw, Work({}, into, out, launches=0))
        if arithmetic is None or memory is None:
            return (into + out) / _BYTES + instructions / _INSTRUCTIONS + ENTRY_SECONDS
        known = arithmetic + memory
        start = launch_seconds(hw)
        return (known + start if known * hw.cores > 2 * start else known * hw.cores) + ENTRY_SECONDS

    def _nbytes(self, node: Node, loads: float) -> float:
        known = self.problem.facts.get(node)
        return known.nbytes if known is not None else self.problem.nbytes.get(node, loads * 4.0)
