"""Scaled dot-product attention, softmax(q . k^T * scale + mask) . v, block by block with the scores in L1.

    head       k is packed transposed [ceil(S_k/NR)][D][NR], v [ceil(D_v/NV)][S_k][NV]; once per task and key head
    block      some rows of q, scaled, side by side; scores[rows][S_k] by row tiles MR x NR, masked as they are stored,
               with the largest of each lane; e^(score - maximum) and its sum, row by row; then row tiles MR x NV of
               scores . v, divided by the sums as they are stored
    causal     panels of k wholly above the diagonal are skipped, and so are their rows of v

               k columns ->             lanes
             +-----+-----+-----+      +-------+
      q rows | MR x NR   |     |  ->  |maximum|  one row each; a square of `lanes` rows is folded at once
             +-----+-----+-----+      +-------+

    in place   few rows: NR dot products of one row with NR keys at once (NR accumulators + one vector of q); results
               by rows of v, D_v / lanes accumulators + one broadcast, a chunk of v for all rows while it is in L1
    tasks      units (batch, group of heads, part of the blocks), dealt out in equal runs

A row of -inf only gives zeros, as torch does (`_safe_softmax`), or NaN where `fill` is given, as softmax does; NaN
gives NaN.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from .attention_block import Block
from .attention_operands import Rows, located, masking
from .attention_plan import Layout, Placement, Plan, Problem, dense, plan_attention
from .dot_product import importing
from .loops import Shape, between, share, typed_kernel, view


def attention(
    p: Problem,
    hw: Hardware,
    scale: float,
    *,
    causal: bool = False,
    mask: tuple[Shape, str] | None = None,
    mask_buffer: Shape | None = None,
    layout: Layout = "BHSD",
    placements: tuple[Placement, Placement, Placement, Placement] | None = None,
    buffer_shapes: tuple[Shape, Shape, Shape, Shape] | None = None,
    plan: Plan | None = None,
    fill: float | None = None,
    tables: tuple[bool, bool] = (False, False),
    block_of: type[Block] = Block,
) -> Any:
    """Return the kernel (q, k, v[, mask][, rows][, rows of out], out).

    `mask` is (shape, "float32" added or "bool" true = attend), broadcastable to [batch, heads, S_q, S_k]. q, k, v
    and out lie as `layout` says, or wherever `placements` puts them in buffers of `buffer_shapes` (so that one buffer
    can hold q, k and v side by side; out must be dense). `mask_buffer` is the mask's declared shape where another.
    `tables`: whether int32 numbers [batch, positions] stand for the positions of q, k and v, and of out. `fill` is what
    keys score that a bool mask hides, None as in torch. `block_of`: how a block of rows is computed.
    """
    extents = (
        (p.heads, p.queries, p.depth),
        (p.key_heads, p.keys, p.depth),
        (p.key_heads, p.keys, p.value_depth),
        (p.heads, p.queries, p.value_depth),
    )
    places = placements or tuple(dense(layout, *extent) for extent in extents)
    plan = plan or plan_attention(hw, p, causal, mask is not None, places[2].position)
    declared = buffer_shapes or tuple(
        (p.batch, h, s, d) if layout == "BHSD" else (p.batch, s, h, d) for h, s, d in extents
    )
    heads = p.heads // plan.group

    def body(*buffers: Any) -> None:
        q, k, v, out = located(buffers, declared, places, tables)
        bias = masking(view(buffers[3], (1,) * (4 - len(mask[0])) + mask[0]), mask[1], fill) if mask else None
        with (
            importing(*block_of.helpers(hw)),
            T.parallel(0, plan.tasks) if plan.tasks > 1 else T.serial(0, 1) as task,
        ):
            block = block_of(hw, p, plan, causal, scale, bias, 0.0 if fill is None else float("nan"))
            packed_head = T.alloc_buffer((1,), "int32", scope="local")
            T.buffer_store(packed_head, tirx.const(-1, "int32"), [0])
            # A known number of tiles would be unrolled, and then some of the copies spill accumulators. No task has a
            # number so large that this bit is set.
            hidden = tirx.bitwise_and(task, tirx.const(1 << 20, "int32"))
            with between(*share(p.batch * heads * plan.parts, plan.tasks, task)) as unit:
                pair = tirx.floordiv(unit, plan.parts)
                part = tirx.floormod(unit, plan.parts)
                b, h = tirx.floordiv(pair, heads), tirx.floormod(pair, heads)
                kh = tirx.floordiv(h, heads // p.key_heads)
                if not plan.in_place:
                    with T.If(packed_head[0] != b * p.key_heads + kh), T.Then():
                        block.pack(k, v, b, kh)
                        T.buffer_store(packed_head, b * p.key_heads + kh, [0])
                with between(*share(plan.blocks, plan.parts, part)) as index:
                    block.run(Rows(q, k, v, out, b, h, kh), index + hidden)

    operands = [(shape, "float32") for shape in declared[:3]]
    operands += [(mask_buffer or mask[0], mask[1])] if mask else []
    operands += [((p.batch, p.queries), "int32")] * sum(tables)
    return typed_kernel("attention", operands, [(declared[3], "float32")], body)
