"""`graphwright.gate`: leave out of a model, at run time, what is too small to matter."""

from __future__ import annotations

import math

import torch

from ...errors import InputError, suggest
from ...passes import dialect_gating
from ..numbers_given import is_number

BY = ("row", "element")


def gate(x: torch.Tensor, threshold: float, *, by: str = "row", share: float = 0.5) -> torch.Tensor:
    """x with what is smaller than a fixed threshold set to 0; written in a model, it lets compiled code skip work.

    x: [..., width]; a row (a token) is the last dim.
    threshold: rows whose largest magnitude is below it, rounded to x's dtype, become 0 as a whole, or with by="element"
        each such element.
    by: "row" or "element".
    share: how much of the rows is expected to become 0. Where skipping them is predicted to pay with so many, linear
        layers behind the gate multiply the others only (docs/compression.md); the numbers are the same.

    Infinities and NaN are below nothing: they stay, and their rows with them. Gradients pass where values stay.
    Raises InputError for a threshold, a share or a `by` that there is not, and for x that is no float tensor.
    """
    if by not in BY:
        raise InputError(f"by={by!r}{suggest(str(by), BY)}: there are 'row' and 'element'")
    if not is_number(threshold) or not 0.0 <= threshold < math.inf:
        raise InputError(f"threshold={threshold!r}: a gate needs a magnitude that is fixed, a finite number from 0")
    if not is_number(share) or not 0.0 <= share <= 1.0:
        raise InputError(f"share={share!r}: what is expected to become 0 is a share of the rows, from 0 to 1")
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or not x.dim():
        what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise InputError(f"gate takes a tensor of floats with a last dim for its rows, got {what}")
    # Rounded here, since the comparison is done in more bits than x has where the model is lowered or checked.
    limit = _nearest(float(threshold), x.dtype)
    result: torch.Tensor = dialect_gating.gate(x, limit, by == "row", float(share))
    return result


def _nearest(number: float, dtype: torch.dtype) -> float:
    """The nearest number of `dtype` to one that is not negative, half to even; in Python, which tracing folds."""
    known = torch.finfo(dtype)
    spacing = known.eps * max(2.0 ** (math.frexp(number)[1] - 1), known.smallest_normal)
    nearest = round(number / spacing) * spacing
    return nearest if nearest <= known.max else math.inf
