"""for i in parallel(n): ...  ->  gw_extent(n); for i in parallel(n): ...

TVM launches a parallel loop without telling the runtime how many iterations it has. The runtime needs the number to cut
the loop into more tasks than threads, and not into more than there are iterations (pool.c).

A loop that is parallel inside a parallel loop runs serially; announcing it does no harm.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.tirx import ForKind, Stmt


def announce_loops(body: Stmt) -> Stmt:
    """`body` with the number of its iterations in front of every parallel loop."""
    return tvm_ffi.structural_map(body, (tirx.For, _announced))


def _announced(loop: Any) -> Stmt:
    if loop.kind != ForKind.PARALLEL:
        return loop
    call = tirx.call_extern("int32", "gw_extent", tirx.Cast("int32", loop.extent))
    return tirx.SeqStmt([tirx.Evaluate(call), loop])
