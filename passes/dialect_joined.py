"""The dialect's product of rows that lie in several tensors: a concat that nobody writes down; and one that is.

    joined_rows([x, y, ...], starts, widths) = cat([x[..., s : s + w], ...], -1)
    joined_linear([x, y, ...], starts, widths, W, b, r) = act(cat([x[..., s : s + w], ...], -1) W^T + b + r)

Parts have the same leading dims. The body is in plain torch, rounded as torch rounds it; the result is contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dialect


def _joined_rows(parts: Sequence[Tensor], starts: Sequence[int], widths: Sequence[int]) -> Tensor:
    pieces = [x[..., start : start + width] for x, start, width in zip(parts, starts, widths, strict=True)]
    return torch.cat(pieces, -1)


def _joined_rows_fake(parts: Sequence[Tensor], starts: Sequence[int], widths: Sequence[int]) -> Tensor:
    return parts[0].new_empty((*parts[0].shape[:-1], sum(widths)))


def _joined_linear(
    parts: Sequence[Tensor],
    starts: Sequence[int],
    widths: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    x = _joined_rows(parts, starts, widths)
    result: Tensor = dialect.linear(x, weight, bias, residual, activation, activation_args)
    return result


def _joined_linear_fake(
    parts: Sequence[Tensor],
    starts: Sequence[int],
    widths: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    return parts[0].new_empty((*parts[0].shape[:-1], weight.shape[0]))


_SCHEMA = (
    "(Tensor[] parts, int[] starts, int[] widths, Tensor weight, Tensor? bias, Tensor? residual, str activation, "
    "float[] activation_args) -> Tensor"
)

joined_rows = dialect.define(
    "joined_rows", "(Tensor[] parts, int[] starts, int[] widths) -> Tensor", _joined_rows, _joined_rows_fake
)
joined_linear = dialect.define("joined_linear", _SCHEMA, _joined_linear, _joined_linear_fake)
