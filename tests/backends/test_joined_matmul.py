"""Products of rows that lie in several tensors: numbers against float64, chains of sums, what is refused."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from kernel_harness import Constant, refusal, run_kernel
from lowering_harness import check

from graphwright.backends.kernels.joined_matmul import Part, runs
from graphwright.backends.lowering import kernels_joined  # noqa: F401  (fills KERNELS)
from graphwright.hwdb import detect
from graphwright.passes.dialect_joined import joined_linear


def reference(parts, starts, widths, weight, bias, residual):
    x = torch.cat([p[..., s : s + w] for p, s, w in zip(parts, starts, widths, strict=True)], -1).double()
    y = x @ weight.double().T
    y = y if bias is None else y + bias.double()
    return y if residual is None else y + residual.double()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_parts(data: st.DataObject) -> None:
    draw = data.draw
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    count = draw(st.integers(1, 4))
    margins = [(draw(st.integers(0, 3)), draw(st.integers(0, 3))) for _ in range(count)]
    widths = [draw(st.sampled_from([1, 5, 29, 200])) for _ in range(count)]
    torch.manual_seed(rows)
    parts = [torch.randn(2, rows, b + w + e) for (b, e), w in zip(margins, widths, strict=True)]
    starts = [b for b, _ in margins]
    weight = torch.randn(columns, sum(widths))
    bias = torch.randn(columns) if draw(st.booleans()) else None
    residual = torch.randn(2, rows, columns) if draw(st.booleans()) else None
    got = run_kernel(detect(), joined_linear, parts, starts, widths, Constant(weight), bias, residual, "none", [])
    want = reference(parts, starts, widths, weight, bias, residual)
    # 384 additions in a chain, each rounded once: far below 1e-5 of the size of what is added up.
    scale = reference([p.abs() for p in parts], starts, widths, weight.abs(), None, None).max()
    assert (got.double() - want).abs().max() <= 1e-5 * scale


def test_chains_are_cut_at_the_longest_sum() -> None:
    parts = [Part((1, 9), 2, 5), Part((1, 9), 0, 8)]
    assert runs(parts, 6) == [[(0, 2, 0, 5), (1, 0, 5, 1)], [(1, 1, 6, 6)], [(1, 7, 12, 1)]]


def test_refused() -> None:
    x, w = torch.randn(2, 4), torch.randn(3, 4)
    hw = detect()
    assert "computed" in refusal(hw, joined_linear, [x], [0], [4], w, None, None, "none", [])
    assert "float64" in refusal(hw, joined_linear, [x.double()], [0], [4], Constant(w.double()), None, None, "none", [])
    assert "one value" in refusal(hw, joined_linear, [x], [0], [4], Constant(w), torch.randn(2, 3), None, "none", [])


def test_the_definition_in_plain_expressions() -> None:
    x, y, w = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(6, 5)
    check(joined_linear, [x, y, x], [1, 2, 0], [2, 2, 1], w, torch.randn(6), None, "relu", [])
