"""What counts as a copy, and what it writes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import trace, trace_core

from graphwright.passes.moves.copies import Copies, count_copies

X = torch.randn(2, 3, 4)
BYTES = 4 * 24


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        (lambda x: x.permute(0, 2, 1), Copies(1, BYTES)),
        (lambda x: x.transpose(0, 1).contiguous().view(-1), Copies(1, BYTES)),  # clone and reshape stay in place
        (lambda x: x.unsqueeze(1).permute(0, 2, 1, 3), Copies(0, 0)),  # only a dim of 1 moves
        (lambda x: x.reshape(6, 4) * 2, Copies(0, 0)),
        (lambda x: x[:, 1:], Copies(1, 4 * 16)),
        (lambda x: x[:, 0:] + 1, Copies(0, 0)),
        (lambda x: torch.cat([x, x]), Copies(1, 2 * BYTES)),
        (lambda x: torch.roll(x, 1, 0), Copies(1, BYTES)),
        (lambda x: x.unsqueeze(0).expand(5, -1, -1, -1) + 1, Copies(1, 5 * BYTES)),
        (lambda x: sum(torch.split(x, 1, 1)), Copies(1, BYTES)),
        (lambda x: x + torch.ones(4, 3).t().reshape(3, 4), Copies(0, 0)),  # a constant's moves are made before
    ],
)
def test_counts(model, wanted):
    assert count_copies(trace_core(model, [X])) == wanted


def test_one_measure_before_and_behind_the_passes():
    from rewriting import HW

    from graphwright.compiler.pipeline import run
    from graphwright.passes.default import PASSES

    graph = trace(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2).relu(), [X])
    assert count_copies(graph) == Copies(2, 2 * BYTES)
    assert count_copies(run(graph, HW, PASSES)[0]) == Copies(0, 0)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)), st.lists(st.integers(1, 3), min_size=4, max_size=4))
def test_a_permute_is_a_copy_where_elements_move(dims, shape):
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    moved = not torch.equal(x.permute(dims).reshape(-1), x.reshape(-1))
    assert count_copies(trace_core(lambda x: x.permute(dims), [x])).count == moved
