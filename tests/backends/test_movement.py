"""Moves are exact: every element of the result is bit for bit the one torch puts there."""

from __future__ import annotations

import functools
import math
from typing import Any

import lowering_harness
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering_harness import check_refused

import graphwright.passes.dialect as dialect

aten = torch.ops.aten
check = functools.partial(lowering_harness.check, shipped=True)

EXAMPLES = settings(max_examples=8, deadline=None, derandomize=True)


def sample(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of which no two elements are equal (as far as the dtype goes)."""
    values = torch.arange(math.prod(shape)).reshape(shape)
    return values % 3 == 0 if dtype == torch.bool else (values - 7).to(dtype)


def exactly(op: Any, *args: Any, **kwargs: Any) -> None:
    check(op, *args, rtol=0, atol=0, **kwargs)


X = sample(2, 3, 4)

CASES = [
    (aten.view.default, X, [4, 6]),
    (aten.view.default, sample(6, 4), [2, 3, 1, 4]),
    (aten.view.default, sample(1), []),
    (aten.view.default, sample(0, 3), [3, 0, 2]),
    (aten.reshape.default, X, [-1]),
    (aten._unsafe_view.default, X, [3, 8]),
    (aten.squeeze.dim, sample(2, 1, 3), 1),
    (aten.unsqueeze.default, X, -1),
    (aten.permute.default, X, [2, 0, -2]),
    (aten.permute.default, sample(), []),
    (aten.transpose.int, X, -1, 0),
    (aten.transpose.int, sample(), 0, -1),
    (aten.t.default, sample(3, 5)),
    (aten.t.default, sample(5)),
    (aten.numpy_T.default, sample(2, 3)),
    (aten.mT.default, X),
    (aten.movedim.int, X, 0, -1),
    (aten.movedim.intlist, X, [0, 2], [1, 0]),
    (aten.moveaxis.int, X, 2, 0),
    (dialect.permute, X, [2, 3, 2, 2], [0, 2, 1, 3], [4, 6]),
    (dialect.permute, sample(6, 4), [-1, 4], [1, 0], [2, 2, 6]),
    (aten.expand.default, sample(3, 1), [2, -1, 4]),
    (aten.expand.default, sample(), [2, 0]),
    (aten.broadcast_to.default, sample(3, 1), [2, 3, 4]),
    (aten.slice.Tensor, X, -1, 1, 9223372036854775807, 2),
    (aten.slice.Tensor, X, 1, -2, 100),
    (aten.slice.Tensor, X, 1, 2, 1),
    (aten.slice.Tensor, X, 0, -100, -1),
    (aten.select.int, X, -2, -1),
    (aten.select.int, sample(5), 0, 3),
    (aten.narrow.default, X, 1, -2, 1),
    (aten.split.Tensor, sample(7, 2), 3),
    (aten.split.Tensor, X, 3, -1),
    (aten.split_with_sizes.default, sample(6), [1, 0, 5]),
    (aten.chunk.default, sample(7), 3),
    (aten.tensor_split.sections, sample(7), 3),
    (aten.unbind.int, X, 1),
    (aten.cat.default, [X, X[:, :1], sample(0), X[:, :0]], 1),
    (aten.cat.default, [X.half(), X.long(), X > 3], -1),
    (aten.cat.default, [sample(0), sample(0)]),
    (aten.stack.default, [X, X + 1, X + 2], -1),
    (aten.flip.default, X, [0, -1]),
    (aten.flip.default, X, []),
    (aten.roll.default, X, [1, -5], [0, -1]),
    (aten.roll.default, X, [1, 2], [1, 1]),
    (aten.roll.default, X, [-7]),
    (aten.repeat.default, sample(2, 3), [2, 1, 3]),
    (aten.repeat.default, sample(), [3]),
    (aten.tile.default, sample(2, 3), [2]),
    (aten.repeat_interleave.self_int, X, 3, 1),
    (aten.repeat_interleave.self_int, X, 2),
    (aten.unfold.default, sample(2, 7), 1, 3, 2),
    (aten.unfold.default, sample(), 0, 1, 1),
    (aten.as_strided.default, sample(12), [3, 2], [2, 3], 1),
    (aten.as_strided.default, sample(3, 4), [4, 4], [1, 0]),
    (aten.diagonal.default, X, -1, 2, 0),
    (aten.diagonal.default, sample(2, 2), 5),
    (aten.diag_embed.default, sample(2, 3), -1, 0, 2),
    (aten.tril.default, X, -1),
    (aten.triu.default, X, 1),
    (aten.constant_pad_nd.default, X, [1, 2, 0, 1], 2.5),
    (aten.constant_pad_nd.default, X, [-1, 2, 1, -2]),
    (aten.constant_pad_nd.default, sample(2, 0), [1, 1], 3.0),
    (aten.constant_pad_nd.default, X.long(), [1, 0], -3),
    (aten.reflection_pad1d.default, X, [3, 1]),
    (aten.reflection_pad2d.default, X, [1, 2, 2, 0]),
    (aten.reflection_pad3d.default, X[None], [1, 2, 2, 0, 1, 1]),
    (aten.replication_pad1d.default, X, [3, 1]),
    (aten.replication_pad2d.default, X, [1, -1, 2, 0]),
    (aten.replication_pad3d.default, X[None], [1, 2, 2, 0, 1, 1]),
    (aten.pixel_shuffle.default, sample(1, 8, 2, 3), 2),
    (aten.pixel_unshuffle.default, sample(2, 4, 6), 2),
    (aten.channel_shuffle.default, sample(1, 6, 2, 2), 3),
    (aten.slice_scatter.default, X, sample(2, 3, 2) + 50, 2, 1, 4, 2),
    (aten.slice_scatter.default, X, sample(2, 0, 4), 1, 2, 2),
    (aten.select_scatter.default, X, sample(2, 4) + 50, 1, -1),
    (aten.diagonal_scatter.default, sample(3, 4), sample(3) + 50, 1),
    (aten.im2col.default, sample(2, 3, 5, 6), [2, 3], [1, 2], [1, 0], [2, 1]),
    (aten.col2im.default, sample(2, 8, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]),
    (aten.clone.default, X),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]).removeprefix("aten."))
def test_a_move_is_exact(case: tuple[Any, ...]) -> None:
    exactly(*case)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.uint8, torch.bfloat16])
def test_moves_keep_any_dtype(dtype: torch.dtype) -> None:
    x = sample(3, 4, dtype=dtype)
    exactly(aten.permute.default, x, [1, 0])
    exactly(aten.cat.default, [x, x], 1)
    exactly(aten.constant_pad_nd.default, x, [1, 1], 1)


def test_nan_and_negative_zero_are_moved_unchanged() -> None:
    x = torch.tensor([math.nan, -0.0, math.inf, 1.0])
    exactly(aten.flip.default, x, [0])
    exactly(aten.diag_embed.default, x)


def test_as_strided_beyond_its_operand_is_refused() -> None:
    # The operand is the start of a larger storage, which torch may read and compiled code does not have.
    check_refused(aten.as_strided.default, sample(4, 4)[:3], [4], [4], because="beyond")


shapes = st.lists(st.integers(0, 4), min_size=0, max_size=4)


@EXAMPLES
@given(shape=shapes, data=st.data())
def test_any_view_is_exact(shape: list[int], data: st.DataObject) -> None:
    factors = [p for extent in shape for p in ((2, 2) if extent == 4 else (extent,))]
    mixed = data.draw(st.permutations(factors))
    target: list[int] = []
    while mixed:
        count = data.draw(st.integers(1, len(mixed)))
        target.append(math.prod(mixed[:count]))
        mixed = mixed[count:]
    exactly(aten.view.default, sample(*shape), target)


@EXAMPLES
@given(
    extent=st.integers(0, 9),
    start=st.none() | st.integers(-12, 12),
    end=st.none() | st.integers(-12, 12),
    step=st.integers(1, 4),
)
def test_any_slice_is_exact(extent: int, start: int | None, end: int | None, step: int) -> None:
    exactly(aten.slice.Tensor, sample(2, extent, 3), 1, start, end, step)


@EXAMPLES
@given(
    pad=st.lists(st.integers(-2, 3), min_size=2, max_size=6).filter(lambda p: len(p) % 2 == 0),
    value=st.sampled_from([0.0, -1.5, math.inf]),
)
def test_any_pad_is_exact(pad: list[int], value: float) -> None:
    exactly(aten.constant_pad_nd.default, sample(4, 5, 6), pad, value)


@EXAMPLES
@given(order=st.permutations(range(4)), split=st.sampled_from([[2, 3, 2, 2], [1, 6, 4, 1], [3, 2, 2, 2]]))
def test_any_reshaped_permutation_is_exact(order: list[int], split: list[int]) -> None:
    turned = [split[d] for d in order]
    exactly(dialect.permute, X, split, list(order), [turned[0] * turned[1], turned[2], turned[3]])
