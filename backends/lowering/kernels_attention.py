"""Kernels of attention, in all forms it is written in.

Refused: other dtypes than float32, dropout, batches that broadcast, masks that do not. The TE definition serves those.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes import dialect
from ...passes.rewrite import shape_of
from ..kernels import attention_plan
from ..kernels.attention import attention
from ..kernels.attention_plan import Placement, Problem, plan_attention, problem
from .kernels_matmul import bind, refuse_dtypes, refuse_large
from .registry import KernelCall, Refusal, kernel_for

aten = torch.ops.aten


@kernel_for(dialect.attention)
def dialect_attention(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """softmax(q . k^T * scale + mask) . v; fewer key heads than query heads are shared in groups."""
    q, k, v, mask, causal, scale, fill = bind(node)
    return _attention(node, hw, q, k, v, mask, causal, scale, fill)


@kernel_for(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """torch's attention without dropout."""
    operands = torch_attention(node)
    return operands if isinstance(operands, Refusal) else _attention(node, hw, *operands)


def torch_attention(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None, bool, float] | Refusal:
    """q, k, v, mask, causal and scale of torch's attention, as kernels take them."""
    q, k, v, mask, dropout, causal, scale, grouped = bind(node)
    if dropout:
        return Refusal(f"dropout of {dropout}")
    heads = [shape_of(operand)[-3:-2] for operand in (q, k, v)]
    if not grouped and (heads[0] != heads[1] or heads[1] != heads[2]):
        return Refusal(f"head counts {heads} broadcast")
    depth = shape_of(q)[-1]
    return q, k, v, mask, causal, depth**-0.5 if scale is None and depth else scale


def _attention(
    node: fx.Node,
    hw: Hardware,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    mask: fx.Node | None,
    causal: bool,
    scale: float,
    fill: float | None = None,
) -> KernelCall | Refusal:
    refusal = refuse_dtypes(node, q, k, v)
    if refusal is not None:
        return refusal
    shapes = [shape_of(operand) for operand in (q, k, v)]
    if not all(prod(shape) for shape in shapes) or not prod(shape_of(node)):
        return Refusal(f"empty operands: {shapes}")
    if len({shape[:-3] for shape in shapes}) != 1 or len({len(shape) for shape in shapes}) != 1:
        return Refusal(f"the batches of {shapes} differ")
    p = problem(*shapes)
    if shapes[1][:-1] != shapes[2][:-1] or p.heads % p.key_heads:
        return Refusal(f"the heads of {shapes} do not group")
    mask_operand: tuple[tuple[int, ...], str] | None = None
    if mask is not None:
        found = mask_shape(mask, p, shapes[0])
        if isinstance(found, Refusal):
            return found
        mask_operand = (found, str(mask.meta["val"].dtype).removeprefix("torch."))
    return _attention_call(node, hw, p, (q, k, v), mask, mask_operand, causal, scale, None, fill)


@kernel_for(dialect.strided_attention)
def strided_attention(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """Attention of operands that lie anywhere in their buffers, and of a result that does."""
    q, k, v, mask, causal, scale, extents, places, _, fill, *tables = bind(node)
    refusal = refuse_dtypes(node, q, k, v)
    if refusal is not None:
        return refusal
    batch, heads, key_heads, queries, keys, depth, value_depth = extents
    p = Problem(batch, heads, key_heads, queries, keys, depth, value_depth)
    mask_operand: tuple[tuple[int, ...], str] | None = None
    if mask is not None:
        found = mask_shape(mask, p, (batch, heads, queries, depth))
        if isinstance(found, Refusal):
            return found
        mask_operand = (found, str(mask.meta["val"].dtype).removeprefix("torch."))
    q_place, k_place, v_place, out_place = (Placement(*places[i : i + 4]) for i in range(0, 16, 4))
    placements = (q_place, k_place, v_place, out_place)
    return _attention_call(node, hw, p, (q, k, v), mask, mask_operand, causal, scale, placements, fill, tables)


def _attention_call(
    node: fx.Node,
    hw: Hardware,
    p: Problem,
    operands: tuple[fx.Node, fx.Node, fx.Node],
    mask: fx.Node | None,
    mask_operand: tuple[tuple[int, ...], str] | None,
    causal: bool,
    scale: float,
    placements: tuple[Placement, Placement, Placement, Placement] | None,
    fill: float | None,
    tables: Sequence[fx.Node | None] = (None, None),
) -> KernelCall | Refusal:
    refusal = refuse_large(node, *operands, *([mask] if mask is not None else []))
    if refusal is not None:
        return refusal
    plan = plan_attention(hw, p, causal, mask is not None, placements[2].position if placements else None)
    q, k, v = (shape_of(operand) for operand in operands)
    func = attention(
        p,
        hw,
        scale,
        causal=causal,
        mask=mask_operand,
        mask_buffer=shape_of(mask) if mask is not None else None,
        placements=placements,
        buffer_shapes=(q, k, v, shape_of(node)),
        fill=fill,
        tables=(tables[0] is not None, tables[1] is not None),
        plan=plan,
    )
    pairs = p.batch * p.heads
    read = pairs * p.queries * p.depth + p.batch * p.key_heads * p.keys * (p.depth + p.value_depth)
    work = Work(
        flops={"float32": 2.0 * pairs * p.queries * p.keys * (p.depth + p.value_depth) * (0.5 if causal else 1)},
        bytes_read=4.0 * (read + (prod(mask_operand[0]) if mask_operand else 0)),
        bytes_written=4.0 * prod(shape_of(node)),
        launches=int(plan.tasks > 1),
        tasks=pairs * plan.parts,
        efficiency=0.8 * max(0.01, plan.scores.efficiency),  # softmax takes a fifth
    )
    seconds = attention_plan.predicted_seconds(hw, plan)
    read_too = tuple(extra for extra in (mask, *tables) if extra is not None)
    return KernelCall(func, (*operands, *read_too), "attention", plan.reason, work, seconds)


def mask_shape(mask: fx.Node, p: Problem, q: tuple[int, ...]) -> tuple[int, ...] | Refusal:
    """The mask's shape as [batch, heads, S_q, S_k], each extent full or 1."""
    if mask.meta["val"].dtype not in (torch.float32, torch.bool):
        return Refusal(f"the mask is {mask.meta['val'].dtype}, neither float32 nor bool")
    shape = shape_of(mask)
    if len(shape) > max(len(q), 3):
        return Refusal(f"the mask has shape {shape}, more dimensions than q")
    shape = (1,) * (max(len(q), 3) - len(shape)) + shape
    batch = shape[:-3]
    if batch not in (q[:-3], (1,) * len(batch)):
        return Refusal(f"the mask has shape {shape}, which broadcasts within the batch {q[:-3]}")
    full = (p.heads, p.queries, p.keys)
    if any(extent not in (1, whole) for extent, whole in zip(shape[-3:], full, strict=True)):
        return Refusal(f"the mask has shape {shape}, not {full}")
    return (prod(batch), *shape[-3:])
