"""Which nodes become one kernel: the rounds, the decisions by predicted seconds, and every reason for not doing it."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import time
from collections.abc import Mapping, Sequence

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphwright.backends.region_kernel import Facts, Kernels, Problem, Region
from graphwright.backends.regions import form_regions, post_dominators
from graphwright.hwdb import Hardware, detect
from graphwright.hwdb.records import Cache

ROWS, COLUMNS = 512, 1024
FULL = (ROWS, COLUMNS)


@functools.cache
def machine(cores: int = 4) -> Hardware:
    caches = (Cache(1, 1 << 15), Cache(2, 1 << 20), Cache(3, 1 << 24, shared_by_cores=cores))
    return dataclasses.replace(
        detect(), cores=cores, clock_mhz=3000.0, caches=caches, dram_gbs=30.0, launch_us=3.0, vector_bits=256
    )


def formula(*operands: str, shape: tuple[int, ...] = FULL, work: float = 1.0, step: int | None = None) -> Facts:
    """An element-wise operator; `step` leading dims are read in step (all, if not given)."""
    depth = len(shape) if step is None else step
    size = float(math.prod(shape))
    return Facts(shape, 4, len(shape), work, True, dict.fromkeys(operands, depth), dict.fromkeys(operands, size))


def rows(operand: str, full: tuple[int, ...] = FULL, kept: int = 1, work: float | None = None) -> Facts:
    """A reduction over the dims behind the first `kept`."""
    inner = math.prod(full[kept:])
    each = float(inner) if work is None else work
    return Facts(full[:kept], 4, kept, each, False, {operand: kept}, {operand: float(math.prod(full))})


def form(
    graph: Mapping[str, Facts | Sequence[str]], results: Sequence[str], cores: int = 4
) -> tuple[list[Region], dict[str, list[str]]]:
    """The regions, and what was refused. A node without facts is given by its operands."""
    facts = {n: f for n, f in graph.items() if isinstance(f, Facts)}
    operands = {n: tuple(f.loads) if isinstance(f, Facts) else tuple(f) for n, f in graph.items()}
    refused: dict[str, list[str]] = {}

    def refuse(node: object, reason: str) -> None:
        refused.setdefault(str(node), []).append(reason)

    problem = Problem(operands, facts, frozenset(results), machine(cores), {"x": 4 * ROWS * COLUMNS})
    return form_regions(problem, refuse), refused


def sets(found: Sequence[Region]) -> list[set[str]]:
    return [{str(n) for n in region.nodes} for region in found]


# ---- post-dominators ----


def test_a_diamond_meets_at_its_end() -> None:
    readers = {"p": ["q", "r"], "q": ["m"], "r": ["m"], "m": []}
    assert post_dominators(list(readers), readers) == {"p": "m", "q": "m", "r": "m", "m": None}


def test_what_also_leads_to_the_end_meets_there() -> None:
    readers = {"p": ["q", "r"], "q": ["m"], "r": [], "m": []}
    assert post_dominators(list(readers), readers)["p"] is None


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 14), st.randoms(use_true_random=False))
def test_post_dominators_are_networkx_dominators(count: int, draw: random.Random) -> None:
    nodes = list(range(count))
    readers = {n: sorted(draw.sample(nodes[n + 1 :], min(len(nodes) - n - 1, draw.randint(0, 3)))) for n in nodes}
    reverse = networkx.DiGraph()
    for n in nodes:
        reverse.add_node(n)
        for reader in readers[n] or ["end"]:
            reverse.add_edge(reader, n)
    expected = dict(networkx.immediate_dominators(reverse, "end"))
    found = post_dominators(nodes, readers)
    assert {n: "end" if m is None else m for n, m in found.items()} == {n: expected[n] for n in nodes}


# ---- what comes together ----


def test_a_diamond_is_one_region_and_its_top_in_no_memory() -> None:
    graph = {"p": formula("x"), "q": formula("p"), "r": formula("p"), "m": formula("q", "r")}
    found, _ = form(graph, ["m"])
    assert sets(found) == [{"p", "q", "r", "m"}]
    assert found[0].results == ("m",)
    assert found[0].kept == ()


def test_a_value_read_elsewhere_is_a_second_result() -> None:
    found, _ = form({"p": formula("x"), "k": ("p",), "q": formula("p")}, ["q", "k"])
    assert sets(found) == [{"p", "q"}]
    assert found[0].results == ("p", "q")


def test_reductions_of_one_tensor_are_one_region() -> None:
    found, _ = form({"a": rows("x"), "b": rows("x")}, ["a", "b"])
    assert sets(found) == [{"a", "b"}]
    assert found[0].rows == ROWS


def test_a_reduction_and_what_its_rows_become() -> None:
    graph = {"s": rows("x"), "y": formula("x", "s")}
    graph["y"] = dataclasses.replace(graph["y"], aligned={"x": 2, "s": 1})
    found, _ = form(graph, ["y"])
    assert sets(found) == [{"s", "y"}]
    assert (found[0].rows, found[0].kept) == (ROWS, ("s",))


def test_an_expensive_value_read_twice_is_kept_for_a_row() -> None:
    graph = {"e": formula("x", work=30.0), "a": rows("e"), "b": formula("e", "a")}
    graph["b"] = dataclasses.replace(graph["b"], aligned={"e": 2, "a": 1})
    found, _ = form(graph, ["b"])
    assert sets(found) == [{"e", "a", "b"}]
    assert found[0].kept == ("e", "a")


def test_statistics_of_a_whole_tensor_go_by_blocks() -> None:
    graph = {"a": rows("x", kept=0), "b": rows("x", kept=0), "c": formula("b", shape=())}
    found, _ = form(graph, ["a", "c"])
    assert sets(found) == [{"a", "b", "c"}]


def test_a_small_value_computed_in_front_may_have_other_rows() -> None:
    table = formula("t", shape=(COLUMNS,), work=30.0)
    graph = {"table": table, "y": formula("x", "table"), "z": formula("y", "table")}
    for name in ("y", "z"):
        graph[name] = dataclasses.replace(graph[name], aligned={**graph[name].aligned, "table": 0})
    found, _ = form(graph, ["y", "z"])
    assert sets(found) == [{"table", "y", "z"}]


def test_small_formulas_of_one_shape_come_together() -> None:
    graph = {name: formula(f"x{name}", shape=(64, 64)) for name in "abcd"}
    found, _ = form(graph, list(graph))
    assert sets(found) == [set("abcd")]


def test_a_cheap_value_is_computed_in_every_kernel_that_reads_it() -> None:
    # Columns of a are rows of b: nothing lines up, so the mask would go through memory.
    mask = formula(shape=FULL, work=1.0)
    graph = {"mask": mask, "a": rows("mask"), "k": ("a",), "b": rows("mask")}
    graph["b"] = dataclasses.replace(graph["b"], aligned={"mask": 0, "k": 0}, loads={**graph["b"].loads, "k": 512.0})
    found, refused = form(graph, ["b"])
    assert sets(found) == [{"mask", "a"}, {"mask", "b"}], refused
    assert all(region.copies == {"mask"} for region in found)


# ---- reasons for staying apart ----


def test_an_expensive_value_is_stored() -> None:
    mask = formula("x", shape=FULL, work=400.0)
    graph = {"mask": mask, "a": rows("mask"), "k": ("a",), "b": rows("mask")}
    graph["b"] = dataclasses.replace(graph["b"], aligned={"mask": 0, "k": 0}, loads={**graph["b"].loads, "k": 512.0})
    found, _ = form(graph, ["b"])
    assert sum("mask" in nodes for nodes in sets(found)) == 1


def test_something_outside_between() -> None:
    graph = {"p": formula("x"), "k": ("p",), "q": formula("p", "k")}
    found, refused = form(graph, ["q"])
    assert sets(found) == [{"p"}, {"q"}]
    assert "something outside has to run in between" in refused["q"]


def test_something_outside_between_two_regions() -> None:
    graph = {"a": formula("x"), "b": formula("x"), "k": ("a",), "l": ("b",)}
    graph |= {"c": formula("x", "k"), "d": formula("x", "l"), "e": formula("c", "b"), "f": formula("d", "a")}
    found, _ = form(graph, ["e", "f"])
    quotient = networkx.DiGraph()
    home = {n: i for i, nodes in enumerate(sets(found)) for n in nodes} | {"k": "k", "l": "l"}
    operands = {n: tuple(f.loads) if isinstance(f, Facts) else f for n, f in graph.items()}
    quotient.add_edges_from((home[o], home[n]) for n in graph for o in operands[n] if o in home and home[o] != home[n])
    assert networkx.is_directed_acyclic_graph(quotient)


def test_rows_that_do_not_line_up() -> None:
    turned = dataclasses.replace(rows("e", (COLUMNS, ROWS)), aligned={"e": 0})
    graph = {"e": formula("x", work=30.0), "a": turned}
    found, refused = form(graph, ["a", "e"])
    assert sets(found) == [{"e"}, {"a"}]
    assert "rows do not line up" in refused["a"]


def test_a_reduction_of_everything_in_front_of_its_readers() -> None:
    graph = {"s": rows("x", kept=0), "y": formula("x", "s")}
    graph["y"] = dataclasses.replace(graph["y"], aligned={"x": 2, "s": 0})
    found, refused = form(graph, ["y"])
    assert sets(found) == [{"s"}, {"y"}]
    assert "rows do not line up" in refused["y"]


def test_fewer_rows_than_cores() -> None:
    full = (2, ROWS * COLUMNS // 2)
    graph = {"e": formula("x", shape=full, work=30.0), "a": rows("e", full)}
    found, refused = form(graph, ["a", "e"], cores=8)
    assert sets(found) == [{"e"}, {"a"}]
    assert "only 2 rows for 8 cores" in refused["a"]


def test_rows_too_long_for_the_second_cache() -> None:
    full = (4, 1 << 18)
    graph = {"e": formula("x", shape=full, work=30.0), "a": rows("e", full), "b": formula("e", "a", shape=full)}
    graph["b"] = dataclasses.replace(graph["b"], aligned={"e": 2, "a": 1})
    _, refused = form(graph, ["b"])
    assert any("the values of a row take" in reason for reasons in refused.values() for reason in reasons)


def test_more_operators_than_one_kernel_should_have() -> None:
    graph = {f"n{i}": formula(f"n{i - 1}" if i else "x") for i in range(200)}
    found, refused = form(graph, ["n199"])
    assert max(len(region.nodes) for region in found) <= 64
    assert any("more than 64 operators" in reason for reasons in refused.values() for reason in reasons)


def test_kernels_far_apart() -> None:
    graph: dict[str, Facts | Sequence[str]] = {"a": rows("x")}
    graph |= {f"k{i}": (f"k{i - 1}",) if i else () for i in range(500)}
    graph["b"] = rows("x")
    found, refused = form(graph, ["a", "b", "k499"])
    assert sets(found) == [{"a"}, {"b"}]
    assert "501 kernels apart" in refused["b"]


def test_what_is_predicted_slower_together(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Kernels._work

    def slower(self: Kernels, ordered: Sequence[str], *rest: object) -> tuple[float, float]:
        instructions, moved = real(self, ordered, *rest)
        return instructions * len(ordered) ** 9, moved

    monkeypatch.setattr(Kernels, "_work", slower)
    found, refused = form({"p": formula("x"), "q": formula("p")}, ["q"])
    assert sets(found) == [{"p"}, {"q"}]
    assert "together" in refused["q"][0]


def test_a_reader_that_cannot_compute_it() -> None:
    # b reads the mask four times, in another order, and is stored as well: rows of b are no rows of the mask.
    mask = formula(shape=FULL, work=3.0)
    graph = {"mask": mask, "a": rows("mask"), "k": ("a",), "b": formula("mask", "k", work=9.0), "c": rows("b")}
    loads = {"mask": 4.0 * ROWS * COLUMNS, "k": 1.0}
    graph["b"] = dataclasses.replace(graph["b"], aligned={"mask": 0, "k": 0}, loads=loads)
    found, refused = form(graph, ["c", "b"])
    assert sets(found) == [{"mask", "a"}, {"b", "c"}]
    assert "stored, not computed again: rows do not line up" in refused["mask"]


def test_what_a_copy_reads_is_a_result_of_the_region_that_has_it_too() -> None:
    # p in the kernel of r needs m there, which nobody else reads from outside of {m, p, q}.
    graph = {"m": formula("x", work=30.0), "p": formula("m"), "q": rows("p"), "k": ("q",), "r": formula("p", "k")}
    graph["r"] = dataclasses.replace(graph["r"], loads={"p": float(ROWS * COLUMNS), "k": 1.0})
    found, _ = form(graph, ["r"])
    with_m, with_r = (next(region for region in found if n in region.nodes) for n in ("m", "r"))
    assert with_m is not with_r
    assert ("m" if "p" in with_r.nodes else "p") in with_m.results


# ---- properties ----


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 24), st.randoms(use_true_random=False))
def test_regions_cover_the_graph_and_can_run_in_some_order(count: int, draw: random.Random) -> None:
    graph: dict[str, Facts | Sequence[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {"x": FULL}
    for i in range(count):
        name = f"n{i}"
        chosen = draw.sample(sorted(shapes), min(len(shapes), draw.randint(1, 2)))
        kind = draw.choice(["formula", "formula", "rows", "outside"])
        whole = [n for n in chosen if shapes[n] == FULL]
        if kind == "rows" and whole:
            graph[name], shapes[name] = rows(whole[0]), (ROWS,)
        elif kind == "formula" and whole:
            facts = formula(*chosen, work=draw.choice([1.0, 3.0, 30.0]))
            steps = {n: draw.choice([0, len(shapes[n])]) for n in chosen}
            graph[name], shapes[name] = dataclasses.replace(facts, aligned=steps), FULL
        else:
            graph[name], shapes[name] = tuple(chosen), FULL
    results = [n for n in graph if draw.random() < 0.3] or [f"n{count - 1}"]
    found, _ = form(graph, results)
    operands = {n: tuple(f.loads) if isinstance(f, Facts) else tuple(f) for n, f in graph.items()}
    home: dict[str, object] = {n: n for n, f in graph.items() if not isinstance(f, Facts)}
    for number, region in enumerate(found):
        for node in region.nodes:
            if node not in region.copies:
                assert node not in home, "a node is in two regions"
                home[str(node)] = number
    copied = {n for region in found for n in region.copies}
    assert set(graph) == set(home) | copied
    quotient = networkx.DiGraph()
    for number, region in enumerate(found):
        for node in region.nodes:
            for operand in operands[str(node)]:
                if operand not in region.nodes and operand in graph:
                    assert operand in home, "a copied value is read where it is not computed"
                    quotient.add_edge(home[operand], number)
                    if isinstance(home[operand], int):
                        assert operand in found[home[operand]].results
    for name, facts in graph.items():
        if not isinstance(facts, Facts):
            quotient.add_edges_from((home[o], name) for o in operands[name] if o in home)
    assert networkx.is_directed_acyclic_graph(quotient)
    assert set(results) <= {n for region in found for n in region.results} | {n for n in home if home[n] == n}


def test_ten_thousand_nodes_take_seconds() -> None:
    graph: dict[str, Facts | Sequence[str]] = {}
    last = "x"
    for i in range(2500):
        graph[f"s{i}"] = rows(last)
        graph[f"y{i}"] = dataclasses.replace(formula(last, f"s{i}"), aligned={last: 2, f"s{i}": 1})
        graph[f"k{i}"] = (f"y{i}", "y0")
        graph[f"z{i}"] = formula(f"k{i}", last)
        last = f"z{i}"
    started = time.process_time()
    found, _ = form(graph, [last])
    assert len(found) <= 5000
    assert time.process_time() - started < 10
