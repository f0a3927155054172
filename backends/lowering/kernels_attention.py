"""Kernels of attention, in all forms it is written in.

Refused: other dtypes than float32, dropout, batches that broadcast, masks that do not. The TE definition serves those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes import dialect
from ...passes.dialect_attention import MOST_KEYS, attention_int8, strided_attention_int8
from ...passes.dialect_int8 import MOST_TERMS
from ...passes.rewrite import shape_of
from ..kernels import attention_plan
from ..kernels.attention import attention
from ..kernels.attention_block import Block
from ..kernels.attention_plan import Placement, Plan, Problem, plan_attention, problem
from ..kernels.int8_attention import Int8Block, attention_dot
from .kernels_matmul import bind, refuse_dtypes, refuse_large
from .registry import KernelCall, Refusal, kernel_for

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """One attention as kernels take it: extents, operands, and where those lie."""

    problem: Problem
    operands: tuple[fx.Node, fx.Node, fx.Node]
    mask: fx.Node | None
    mask_operand: tuple[tuple[int, ...], str] | None
    causal: bool
    scale: float
    fill: float | None = None
    placements: tuple[Placement, Placement, Placement, Placement] | None = None
    tables: Sequence[fx.Node | None] = (None, None)

    def plan(self, hw: Hardware, in_bytes: bool = False) -> Plan:
        """How it is cut on `hw`."""
        stride = self.placements[2].position if self.placements else None
        return plan_attention(hw, self.problem, self.causal, self.mask is not None, stride, in_bytes)


@kernel_for(dialect.attention, dialect.strided_attention)
def dialect_attention(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """softmax(q . k^T * scale + mask) . v; fewer key heads than query heads are shared in groups."""
    found = described(node)
    return found if isinstance(found, Refusal) else _call(node, hw, found)


@kernel_for(attention_int8, strided_attention_int8)
def attention_in_bytes(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """The same with both products of bytes."""
    found = described_in_bytes(node)
    return found if isinstance(found, Refusal) else _call(node, hw, found, in_bytes=True)


@kernel_for(aten.scaled_dot_product_attention.default)
def scaled_dot_product_attention(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """torch's attention without dropout."""
    operands = torch_attention(node)
    found = operands if isinstance(operands, Refusal) else _dense(node, *operands)
    return found if isinstance(found, Refusal) else _call(node, hw, found)


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


def described(node: fx.Node) -> Attention | Refusal:
    """What one of the dialect's attentions computes, or why no kernel does."""
    if node.target in (dialect.attention, attention_int8):
        return _dense(node, *bind(node))
    return _strided(node)


def described_in_bytes(node: fx.Node) -> Attention | Refusal:
    """The same for products of bytes."""
    found = described(node)
    if isinstance(found, Refusal):
        return found
    p = found.problem
    if p.keys > MOST_KEYS:
        return Refusal(f"{p.keys} keys: sums of bytes fit 32 bits for {MOST_KEYS}")
    if p.depth > MOST_TERMS:
        return Refusal(f"sums of {p.depth} terms do not fit 32 bits")
    return found


def _dense(
    node: fx.Node,
    q: fx.Node,
    k: fx.Node,
    v: fx.Node,
    mask: fx.Node | None,
    causal: bool,
    scale: float,
    fill: float | None = None,
) -> Attention | Refusal:
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
    found = _mask(mask, p, shapes[0])
    if isinstance(found, Refusal):
        return found
    return _checked(node, Attention(p, (q, k, v), mask, found, causal, scale, fill))


def _strided(node: fx.Node) -> Attention | Refusal:
    """Attention of operands that lie anywhere in their buffers, and of a result that does."""
    q, k, v, mask, causal, scale, extents, places, _, fill, *tables = bind(node)
    refusal = refuse_dtypes(node, q, k, v)
    if refusal is not None:
        return refusal
    p = Problem(*extents)
    found = _mask(mask, p, (p.batch, p.heads, p.queries, p.depth))
    if isinstance(found, Refusal):
        return found
    q_place, k_place, v_place, out_place = (Placement(*places[i : i + 4]) for i in range(0, 16, 4))
    placements = (q_place, k_place, v_place, out_place)
    return _checked(node, Attention(p, (q, k, v), mask, found, causal, scale, fill, placements, tables))


def _mask(mask: fx.Node | None, p: Problem, q: tuple[int, ...]) -> tuple[tuple[int, ...], str] | Refusal | None:
    """A mask's shape and dtype, as kernels take it."""
    if mask is None:
        return None
    found = mask_shape(mask, p, q)
    return found if isinstance(found, Refusal) else (found, str(mask.meta["val"].dtype).removeprefix("torch."))


def _checked(node: fx.Node, a: Attention) -> Attention | Refusal:
    refusal = refuse_large(node, *a.operands, *([a.mask] if a.mask is not None else []))
    return a if refusal is None else refusal


def _call(node: fx.Node, hw: Hardware, a: Attention, in_bytes: bool = False) -> KernelCall:
    p, plan = a.problem, a.plan(hw, in_bytes)
    q, k, v = (shape_of(operand) for operand in a.operands)
    func = attention(
        p,
        hw,
        a.scale,
        causal=a.causal,
        mask=a.mask_operand,
        mask_buffer=shape_of(a.mask) if a.mask is not None else None,
        placements=a.placements,
        buffer_shapes=(q, k, v, shape_of(node)),
        fill=a.fill,
        tables=(a.tables[0] is not None, a.tables[1] is not None),
        plan=plan,
        block_of=Int8Block if in_bytes else Block,
    )
    pairs = p.batch * p.heads
    read = pairs * p.queries * p.depth + p.batch * p.key_heads * p.keys * (p.depth + p.value_depth)
    flops = 2.0 * pairs * p.queries * p.keys * (p.depth + p.value_depth) * (0.5 if a.causal else 1)
    work = Work(
        flops={"int8" if in_bytes else "float32": flops},
        bytes_read=4.0 * (read + (prod(a.mask_operand[0]) if a.mask_operand else 0)),
        bytes_written=4.0 * prod(shape_of(node)),
        launches=int(plan.tasks > 1),
        tasks=pairs * plan.parts,
        efficiency=0.8 * max(0.01, plan.scores.efficiency),  # softmax takes a fifth
    )
    seconds = attention_plan.predicted_seconds(hw, plan)
    read_too = tuple(extra for extra in (a.mask, *a.tables) if extra is not None)
    name, how = "attention", plan.reason
    if in_bytes:
        name, how = "int8 attention, rows rounded at run time", f"{attention_dot(hw).name}, {plan.reason}"
    return KernelCall(func, (*a.operands, *read_too), name, how, work, seconds)


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
