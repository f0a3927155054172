"""Reads and writes at computed places, sorting and searching, as torch does them, and never outside the tensor."""

from __future__ import annotations

import functools
import math
from typing import Any

import lowering_harness
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering_harness import build_node, check_refused, compile_node

aten = torch.ops.aten
check = functools.partial(lowering_harness.check, shipped=True)

torch.manual_seed(0)
X = torch.randn(5, 3, 4)
ROWS = torch.tensor([[0, 2, 4], [1, -1, -5]])
NAN = torch.tensor([3.0, math.nan, -1.0, math.inf, 3.0, -0.0, 0.0, -math.inf])


def index(*shape: int, below: int) -> torch.Tensor:
    return torch.randint(0, below, shape)


READS = [
    (aten.embedding.default, torch.randn(6, 3), index(2, 4, below=6)),
    (aten.embedding.default, torch.randn(6, 3).half(), index(4, below=6).int(), 2),
    (aten.gather.default, X, 1, index(2, 7, 4, below=3)),
    (aten.gather.default, X, -1, index(5, 0, 4, below=3)),
    (aten.gather.default, torch.tensor(2.0), 0, torch.tensor(0)),
    (aten.gather.default, X[:, 0, 0], 0, torch.tensor(3)),
    (aten.index_select.default, X, 1, torch.tensor([2, 0, 2])),
    (aten.index_select.default, X, 0, torch.tensor(3)),
    (aten.index.Tensor, X, [ROWS]),
    (aten.index.Tensor, X, [None, ROWS % 3, None]),
    (aten.index.Tensor, X, [ROWS, None, ROWS[:, :1] % 4]),
    (aten.index.Tensor, X, [None, ROWS % 3, torch.tensor([1, -1, 0])]),
    (aten.index.Tensor, X > 0, [ROWS, ROWS[0] % 3, torch.tensor(1)]),
    (aten._unsafe_index.Tensor, X, [ROWS[0], None, ROWS[1] % 4]),
    (aten.take.default, X, torch.tensor([[0, 59], [-1, -60]])),
    (aten.one_hot.default, index(2, 3, below=5), 6),
]
WRITES = [
    (aten.index_put.default, X, [ROWS[0]], torch.randn(3, 4)),
    (aten.index_put.default, X, [None, torch.tensor([0, 0, 1])], torch.randn(5, 3, 4), True),
    (aten.index_put.default, X, [ROWS[0], None, torch.tensor([0, 1, 2])], torch.randn(1, 3)),
    (aten.index_put.default, X, [torch.tensor([2, 2, 2])], torch.randn(()), True),
    (aten.index_put.default, X > 0, [torch.tensor([2, 3])], torch.tensor(True)),
    (aten.index_put.default, X, [torch.tensor([], dtype=torch.int64)], torch.randn(0, 3, 4)),
    (aten._unsafe_index_put.default, X, [ROWS[1]], torch.randn(3, 3, 4)),
    (aten.put.default, X, torch.tensor([0, -1, 7]), torch.randn(3)),
    (aten.put.default, X, torch.tensor([5, 5]), torch.randn(2), True),
    (aten.scatter.src, X, 1, torch.tensor([[[0, 1, 2, 0]], [[2, 1, 0, 1]]]), torch.randn(3, 2, 4)),
    (aten.scatter.value, X, -1, index(5, 3, 2, below=4), 2.5),
    (aten.scatter.value, torch.tensor(1.0), 0, torch.tensor([0]), 2.5),
    (aten.scatter.value, X.long(), 0, index(1, 3, 4, below=5), -7),
    (aten.scatter_add.default, X, 0, index(7, 3, 4, below=5), torch.randn(7, 3, 4)),
    (aten.index_add.default, X, 1, torch.tensor([0, 2, 0]), torch.randn(5, 3, 4)),
    (aten.index_copy.default, X, 0, torch.tensor([4, 1]), torch.randn(2, 3, 4)),
    (aten.index_fill.int_Scalar, X, 2, torch.tensor([0, -1]), 9.0),
    (aten.index_fill.int_Tensor, X, 0, torch.tensor(3), torch.tensor(9.0)),
    (aten.masked_scatter.default, X, X > 0, torch.randn(60)),
    (aten.masked_scatter.default, X, X[0, :, :1] > 0, torch.randn(70)),
]


@pytest.mark.parametrize("case", [*READS, *WRITES], ids=lambda case: str(case[0]).removeprefix("aten."))
def test_a_read_or_write_is_torchs(case: tuple[Any, ...]) -> None:
    check(*case)


def test_index_add_scales_what_it_adds() -> None:
    check(aten.index_add.default, X, 1, torch.tensor([0, 2]), torch.randn(5, 2, 4), alpha=0.5)


@pytest.mark.parametrize("reduce", ["sum", "prod", "mean", "amin", "amax"])
@pytest.mark.parametrize("include_self", [True, False])
def test_scatter_reduce(reduce: str, include_self: bool) -> None:
    where, src = index(6, 3, 4, below=5), torch.randn(6, 3, 4)
    src[0, 0, 0] = math.nan
    check(aten.scatter_reduce.two, X, 0, where, src, reduce, include_self=include_self)


def test_scatter_reduce_of_integers_rounds_the_mean_down() -> None:
    check(aten.scatter_reduce.two, torch.tensor([-3, 4]), 0, torch.tensor([0, 0]), torch.tensor([-4, 0]), "mean")


@pytest.mark.parametrize("reduce", ["sum", "prod", "amin", "amax"])
def test_scatter_reduce_of_booleans(reduce: str) -> None:
    check(aten.scatter_reduce.two, X[:, 0] > 0, 0, index(3, 4, below=5), X[:3, 1] > 0, reduce, include_self=False)


@pytest.mark.parametrize("reduce", ["add", "multiply"])
def test_scatter_with_a_reduction(reduce: str) -> None:
    check(aten.scatter.reduce, X, 1, index(5, 3, 4, below=3), torch.randn(5, 3, 4), reduce=reduce)
    check(aten.scatter.value_reduce, X, 1, index(5, 3, 4, below=3), 2.5, reduce=reduce)


def test_of_several_writes_to_one_place_the_last_stays() -> None:
    check(aten.index_put.default, torch.zeros(3), [torch.tensor([1, 1, 1])], torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.embedding.default, (X[:, 0], torch.tensor([0]))),
        (aten.gather.default, (X, 0, torch.zeros(1, 3, 4, dtype=torch.int64))),
        (aten.index.Tensor, (X, [torch.tensor([0])])),
        (aten.index_put.default, (X, [torch.tensor([0])], torch.zeros(3, 4))),
        (aten.scatter_add.default, (X, 0, torch.zeros(1, 3, 4, dtype=torch.int64), X)),
        (aten.index_add.default, (X, 0, torch.tensor([0]), X[:1])),
    ],
)
def test_out_of_range_indices_stay_within_the_tensor(op: Any, args: tuple[Any, ...]) -> None:
    node, tensors, _ = build_node(op, *args)
    run = compile_node(node)
    for wild in (10**6, -(10**6), 2**62):
        given = [torch.full_like(t, wild) if t.dtype == torch.int64 else t for t in tensors]
        (result,) = run(*given)
        assert torch.isfinite(result).all()
        if op is aten.index.Tensor:  # the nearest row
            torch.testing.assert_close(result[0], X[0 if wild < 0 else 4])


@pytest.mark.parametrize(
    ("op", "args", "because"),
    [
        (aten.index.Tensor, (X, [X[:, 0, 0] > 0]), "mask"),
        (aten.index_put.default, (X, [X[:, 0, 0] > 0], torch.tensor(1.0)), "mask"),
        (aten.nonzero.default, (X,), "depends on data"),
        (aten.masked_select.default, (X, X > 0), "depends on data"),
        (aten.one_hot.default, (torch.tensor([0, 2]),), "num_classes"),
    ],
)
def test_shapes_that_depend_on_data_are_refused(op: Any, args: tuple[Any, ...], because: str) -> None:
    check_refused(op, *args, because=because)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dim=st.integers(-3, 2),
    length=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_any_gather_is_torchs(shape: list[int], dim: int, length: int, seed: int) -> None:
    dim = dim % len(shape)
    torch.manual_seed(seed)
    wanted = [*shape[:dim], length, *shape[dim + 1 :]]
    check(aten.gather.default, torch.randn(shape), dim, torch.randint(0, shape[dim], wanted), rtol=0, atol=0)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    accumulate=st.booleans(),
    seed=st.integers(0, 99),
    first=st.booleans(),
    joint=st.sampled_from([[3], [2, 3], []]),
)
def test_any_index_put_is_torchs(accumulate: bool, seed: int, first: bool, joint: list[int]) -> None:
    torch.manual_seed(seed)
    rows, columns = torch.randint(-5, 5, joint), torch.randint(-3, 3, joint)
    where = [rows if first else None, None if first else columns, torch.randint(-4, 4, joint)]
    read = X[tuple(slice(None) if w is None else w for w in where)]
    check(aten.index_put.default, X, where, torch.randn(read.shape), accumulate)


SORTS = [
    (aten.sort.default, X, 1),
    (aten.sort.default, X, 0, True),
    (aten.sort.default, torch.tensor(3.0)),
    (aten.sort.default, torch.randn(2, 0)),
    (aten.sort.default, X > 0),
    (aten.sort.default, NAN),
    (aten.sort.default, NAN, -1, True),
    (aten.argsort.default, X, -1),
    (aten.msort.default, X),
    (aten.topk.default, torch.randn(3, 50), 7),
    (aten.topk.default, torch.randn(3, 50), 40),
    (aten.topk.default, X, 2, 0, False),
    (aten.topk.default, NAN[:4], 3),
    (aten.topk.default, NAN[:4], 3, -1, False),
    (aten.topk.default, torch.tensor(1.0), 1),
    (aten.kthvalue.default, X, 2, 0, True),
    (aten.median.dim, X, 1),
    (aten.median.dim, NAN[:4], 0, True),
]


@pytest.mark.parametrize("case", SORTS, ids=lambda case: str(case[0]).removeprefix("aten."))
def test_order_is_torchs(case: tuple[Any, ...]) -> None:
    check(*case, rtol=0, atol=0)


@pytest.mark.parametrize("length", [1, 2, 3, 33, 100])
@pytest.mark.parametrize("descending", [False, True])
def test_equal_elements_keep_their_order(length: int, descending: bool) -> None:
    x = torch.randint(0, 4, (2, length))
    check(aten.sort.stable, x, stable=True, dim=-1, descending=descending)


BOUNDS = torch.tensor([-1.0, 0.0, 0.0, 2.0])


@pytest.mark.parametrize("right", [False, True])
def test_binary_search(right: bool) -> None:
    check(aten.bucketize.Tensor, NAN, BOUNDS, right=right)
    check(aten.bucketize.Tensor, torch.arange(-2, 4), BOUNDS, right=right, out_int32=True)
    check(aten.searchsorted.Tensor, X.sort().values, torch.randn(5, 3, 7), right=right)
    check(aten.searchsorted.Scalar, BOUNDS, 0, right=right)


def test_binary_search_through_a_sorter() -> None:
    order = X.argsort()
    check(aten.searchsorted.Tensor, X, torch.randn(5, 3, 2), side="right", sorter=order)
    check(aten.bucketize.Tensor, NAN, torch.empty(0))
