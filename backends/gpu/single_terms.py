"""A reduction over one element -> an assignment.

    out = 0; out = out + x[i]   for one i      ->      out = 0 + x[i]

Scheduling leaves loops of extent 1 out. The block is then taken for one that is executed once, but still starts at its
result and adds to that: with an epilogue put into it, a bias was in the start and in the sum.
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import TensorLoad


def assign_single_terms(function: Any) -> Any:
    """The function without reductions over one element; those of several results at once stay."""
    return function.with_body(tvm_ffi.structural_map(function.body, (s_tir.SBlock, _assigned)))


def _assigned(block: Any) -> Any:
    reduced = [axis for axis in block.iter_vars if axis.iter_type == tirx.IterVar.CommReduce]
    if not isinstance(block.init, tirx.BufferStore) or not isinstance(block.body, tirx.BufferStore):
        return block
    if any(not isinstance(axis.dom.extent, tirx.IntImm) or int(axis.dom.extent) != 1 for axis in reduced):
        return block
    start, body = block.init, block.body

    def load(node: Any) -> Any:
        return start.value if node.source.same_as(start.buffer) else node

    axes = [tirx.IterVar(axis.dom, axis.var, tirx.IterVar.DataPar) for axis in block.iter_vars]
    value = tvm_ffi.structural_map(body.value, (TensorLoad, load))
    store = tirx.BufferStore(body.buffer, value, body.indices)
    return s_tir.SBlock(axes, block.reads, block.writes, block.name_hint, store, annotations=block.annotations)
