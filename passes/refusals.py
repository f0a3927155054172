"""What passes refuse, and why: logged, and kept for whoever asks.

keep(log, node, "read by %d nodes", len(node.users))

with recording() as refusals:
    fuse_matmul_bias(graph, hw)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Refusal:
    """A node that a pass left as it is."""

    rule: str  # the pass, or the part of one that several passes share
    node: str
    operator: str
    reason: str


_recorded: ContextVar[dict[Refusal, None] | None] = ContextVar("refusals", default=None)


@contextmanager
def recording() -> Iterator[dict[Refusal, None]]:
    """The refusals of every pass that runs inside, in order; equal ones once."""
    refusals: dict[Refusal, None] = {}
    token = _recorded.set(refusals)
    try:
        yield refusals
    finally:
        _recorded.reset(token)


def keep(log: logging.Logger, node: fx.Node, reason: str, *args: object) -> None:
    """Say why `node` is not rewritten; `args` fill in `reason` as in logging."""
    refusals = _recorded.get()
    if refusals is None and not log.isEnabledFor(logging.DEBUG):
        return
    text = reason % args if args else reason
    log.debug("keep %s: %s", node, text)
    if refusals is not None:
        refusals[Refusal(log.name.rpartition(".")[2], node.name, str(node.target), text)] = None
