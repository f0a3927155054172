"""Rows that are left out at run time: the operator that users write, and those it becomes where skipping pays.

    gate(x, threshold, by_row, share)    by_row: rows (last dim) of which every |x| < threshold are 0; else each such
                                         element. NaN is not below anything: it stays, and its row with it.
                                         `share`: of the rows, as users expect; decides whether skipping pays

    places = row_places(strength, threshold)     int32 [M + 1]: where row i goes; strength[M] = max |x[i]|
                                                 rows below the threshold: all to places[M], the count of the others
    rows   = pack_rows(x, places)                [M + 1, K]: rows that are there, then a row of zeros, which stands for
                                                 all that are not
    y      = packed_linear(rows, W, b, ..., places, share)     act(rows W^T + b), of the rows up to that one
    unpack_rows(y, places)                       [M, N]: row i is y[places[i]]

Rows of `rows` and y behind the row of zeros are zeros and what follows from them in PyTorch, and nobody's in kernels,
which do not write them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import dialect


def there(input: Tensor, threshold: float, by_row: bool) -> Tensor:
    """What the gate lets through, as bool that broadcasts to `input`."""
    size = input.abs()
    if by_row:
        size = size.amax(-1, keepdim=True) if input.shape[-1] else size
    return ~(size < threshold)


def _gate(input: Tensor, threshold: float, by_row: bool, share: float) -> Tensor:
    return torch.where(there(input, threshold, by_row), input, 0.0).contiguous()


def _row_places(strength: Tensor, threshold: float) -> Tensor:
    kept = ~(strength < threshold)
    count = kept.sum()
    places = torch.where(kept, kept.cumsum(0) - 1, count)
    return torch.cat([places, count[None]]).to(torch.int32)


def _pack_rows(input: Tensor, places: Tensor) -> Tensor:
    rows = input.reshape(-1, input.shape[-1])
    packed = rows.new_zeros((len(rows) + 1, rows.shape[1]))
    where = places.long()
    kept = where[:-1] < where[-1]
    packed[where[:-1][kept]] = rows[kept]
    return packed


def _packed_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
    places: Tensor,
    share: float,
) -> Tensor:
    result: Tensor = dialect.linear(input, weight, bias, None, activation, activation_args)
    return result


gate = dialect.define(
    "gate",
    "(Tensor input, float threshold, bool by_row, float share) -> Tensor",
    _gate,
    lambda input, *_: input.new_empty(input.shape),
)
row_places = dialect.define(
    "row_places",
    "(Tensor strength, float threshold) -> Tensor",
    _row_places,
    lambda strength, _: strength.new_empty(strength.shape[0] + 1, dtype=torch.int32),
)
pack_rows = dialect.define(
    "pack_rows",
    "(Tensor input, Tensor places) -> Tensor",
    _pack_rows,
    lambda input, places: input.new_empty(places.shape[0], input.shape[-1]),
)
packed_linear = dialect.define(
    "packed_linear",
    "(Tensor input, Tensor weight, Tensor? bias, str activation, float[] activation_args, Tensor places, float share) "
    "-> Tensor",
    _packed_linear,
    lambda input, weight, *_: input.new_empty(input.shape[0], weight.shape[0]),
)
unpack_rows = dialect.define(
    "unpack_rows",
    "(Tensor input, Tensor places) -> Tensor",
    lambda input, places: input[places[:-1].long()],
    lambda input, places: input.new_empty(places.shape[0] - 1, input.shape[1]),
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(there(*inputs[:3]))


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return torch.where(ctx.saved_tensors[0], gradient, 0.0), None, None, None


torch.library.register_autograd("graphwright::gate", _backward, setup_context=_remember)
