"""Softmax and its logarithm over the last dim: maximum, exponentials and their sum, scaling; each row stays in L1.

A row with a NaN, with +inf, or of nothing but -inf becomes NaN, as in torch.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from . import vector_math
from .loops import flat, kernel_function, span, spread
from .rows import Rows, accumulators, choose_rows, each_row, each_task, each_vector, fill, fold, greater, masked, vector

CYCLES = 16.0  # of one vector over the three passes, measured
ROW_CYCLES = 120.0  # of a row beside its vectors: two folds and a division, measured at 128 columns


def softmax_rows(shape: tuple[int, ...], hw: Hardware) -> Rows:
    """How a tensor of that shape is cut."""
    return choose_rows(math.prod(shape[:-1]), shape[-1], CYCLES, hw)


def softmax(shape: tuple[int, ...], hw: Hardware, log: bool = False, rows: Rows | None = None) -> Any:
    """PrimFunc (in [shape], out [shape]): softmax over the last dim, or its logarithm.

    e^(x - max) is computed by `exp_nonpositive` (1 ulp); the sum has one partial result per lane and accumulator.
    """
    rows = rows or softmax_rows(shape, hw)
    lanes = rows.lanes

    def body(source: Any, target: Any) -> None:
        x, y = flat(source), flat(target)
        with each_task(rows) as bounds:
            acc = accumulators(rows)
            with each_row(rows, bounds) as (_, base):
                _row(rows, x, y, acc, base, log)

    def _row(rows: Rows, x: Any, y: Any, acc: Any, base: Any, log: bool) -> None:
        fill(rows, acc, -math.inf)

        def largest(column: Any, u: int, _: Any) -> None:
            at = span(u * lanes, lanes)
            T.buffer_store(acc, greater(x[span(base + column, lanes)], acc[at]), [at])

        each_vector(rows, largest)
        maximum = T.bind(spread(fold(rows, acc, greater), lanes))
        fill(rows, acc, 0.0)

        def exponential(column: Any, u: int, mask: Any) -> None:
            at = span(u * lanes, lanes)
            e = T.bind(vector_math.exp_nonpositive(x[span(base + column, lanes)] - maximum))
            if not log:
                T.buffer_store(y, e, [span(base + column, lanes)])
            T.buffer_store(acc, acc[at] + masked(mask, e, vector(0.0, lanes)), [at])

        each_vector(rows, exponential)
        total = fold(rows, acc, lambda a, b: a + b)
        if log:
            shift = T.bind(spread(vector_math.log(total), lanes))
        else:
            scale = T.bind(spread(tirx.const(1.0, "float32") / total, lanes))

        def finish(column: Any, u: int, mask: Any) -> None:
            here = span(base + column, lanes)
            if log:
                T.buffer_store(y, (x[here] - maximum) - shift, [here])
            else:
                T.buffer_store(y, masked(mask, y[here] * scale, y[here]), [here])

        each_vector(rows, finish)

    return kernel_function("log_softmax" if log else "softmax", [shape], [shape], body)
