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
from collections.abc import Callable, Mapping, Sequence

from .region_kernel import SMALL_POINTS, Kernels, Node, Problem, Region, predicted

_MOST_NODES = 64
_MOST_BETWEEN = 400  # kernels, in the order they would run
_MOST_READERS = 16

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
        self.kernels = Kernels(problem)
        self.index, self.readers, self.homes = self.kernels.index, self.kernels.readers, self.kernels.homes
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
        """A formula goes into the regions of all its readers, where storing it for them costs more; readers first."""
        for node, facts in reversed(list(self.problem.facts.items())):
            readers = self.readers.get(node, [])
            if not facts.formula or node in self.problem.results or not readers:
                continue
            home = self.region[node]
            targets = {t for reader in readers for t in self.homes.get(reader, {self.region[reader]})}
            if len(targets) < 2 or any(reader not in self.problem.facts for reader in readers):
                continue
            before = [self._region(t) for t in {home, *targets}]
            self.homes[node] = targets  # from here on what it reads is a result, even where it is computed
            with_copy = {t: self._with_copy(t, node) for t in targets}
            made = [*with_copy.values(), *([] if home in targets else self._rest(home, node))]
            obstacle = next((value for value in made if isinstance(value, str)), None)
            copied = [value for value in with_copy.values() if isinstance(value, Region)]
            together, apart = self._compare(copied, before) if obstacle is None else (0.0, 0.0)
            if obstacle is not None:
                self.refuse(node, f"stored, not computed again: {obstacle}")
            elif together > apart:
                self.refuse(node, f"stored: predicted {apart * 1e6:.1f} us, {together * 1e6:.1f} us if computed again")
            else:
                self._copy(node, with_copy)
                continue
            del self.homes[node]

    def _with_copy(self, target: int, node: Node) -> Region | str:
        nodes = [n for n in self.members[target] if n != node]
        if len(nodes) >= _MOST_NODES:
            return f"more than {_MOST_NODES} operators"
        return self.kernels.of(nodes, {*self.copies.get(target, ()), node})

    def _rest(self, home: int, node: Node) -> list[Region | str]:
        """The region of `node` without it, where something is left."""
        nodes = [n for n in self.members[home] if n != node]
        return [self.kernels.of(nodes, self.copies.get(home, set()))] if nodes else []

    def _copy(self, node: Node, with_copy: Mapping[int, Region | str]) -> None:
        """Let `node` be computed in each of the regions and have none of its own."""
        home = self.region[node]
        self.members[home].remove(node)
        self.known.pop(home, None)
        for target, value in with_copy.items():
            assert isinstance(value, Region)
            self.copies.setdefault(target, set()).add(node)
            self.known[target] = value
        if not self.members[home]:
            del self.members[home]
            self.at[self.slots.pop(home)] = None

    def regions(self) -> list[Region]:
        """What came out, in the order of their last nodes."""
        found = [self._region(r) for r, nodes in self.members.items() if nodes[0] in self.problem.facts]
        return sorted(found, key=lambda region: self.index[region.nodes[-1]])

    # ---- growing ----

    def _is_large_operand(self, operand: Node, reader: Node) -> bool:
        loads = self.problem.facts[reader].loads
        return 4 * self.kernels.nbytes(operand, loads[operand]) >= max(
            self.kernels.nbytes(o, n) for o, n in loads.items()
        )

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
        together = self.kernels.of(nodes, set())
        if isinstance(together, str):
            self.refuse(node, together)
            return
        seconds, apart = self._compare([together], [self._region(r) for r in regions])
        if seconds > apart:
            self.refuse(node, f"predicted {seconds * 1e6:.1f} us together, {apart * 1e6:.1f} us apart")
            return
        obstacle = self._merge(regions, together)
        if obstacle is not None:
            self.refuse(node, obstacle)

    def _compare(self, new: Sequence[Region], old: Sequence[Region]) -> tuple[float, float]:
        """Predicted seconds of the one set of kernels and of the other, all data where the largest of them finds it."""
        footprint = max(region.moved for region in (*new, *old))
        one, other = (sum(predicted(region, footprint, self.problem.hw) for region in side) for side in (new, old))
        return one, other

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
            value = self.kernels.of(self.members[number], self.copies.get(number, set()))
            # A single node can always be a kernel.
            assert isinstance(value, Region), value
            self.known[number] = value
        return self.known[number]
