"""Attention as one kernel on GPUs: in float32 where its tiles fit shared memory, or in 16 bits on matrix units.

Up to 8 queries have a kernel that reads keys and values once, of any one dtype, in parts where units have no block.

Refused: other dtypes, dropout, batches or heads that broadcast, depths beyond what shared memory holds, tensors whose
elements 32 bits do not count. The TE definition serves those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes import dialect, dialect_mixed
from ...passes.rewrite import shape_of
from ..kernels.attention_plan import Problem, problem
from ..lowering.kernels_attention import mask_shape, torch_attention
from ..lowering.kernels_matmul import bind, refuse_dtypes, refuse_large
from ..lowering.registry import Kernel, KernelCall, Refusal, Second
from .amd_fragments import AmdLanes, form_of
from .attention import attention, plan_attention
from .few_queries import add_key_parts, few_queries
from .few_queries_plan import MOST_QUERIES, parts_shape, plan_few_queries
from .matrix_attention import Lanes, matrix_attention, plan_matrix_attention
from .mma import MmaLanes
from .product_call import copies_past_registers, dtype_of, item_bytes

aten = torch.ops.aten


def _dialect_attention(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    """softmax(q . k^T * scale + mask) . v; fewer key heads than query heads are shared in groups."""
    q, k, v, mask, causal, scale, fill = bind(node)
    return _attention(node, hw, (q, k, v), mask, causal, scale, fill)


def _rounding_attention(node: fx.Node, hw: Hardware, dtype: str) -> KernelCall | Refusal:
    q, k, v, mask, causal, scale, fill, _ = bind(node)
    return _attention(node, hw, (q, k, v), mask, causal, scale, fill, dtype)


def _aten_attention(node: fx.Node, hw: Hardware) -> KernelCall | Refusal:
    operands = torch_attention(node)
    if isinstance(operands, Refusal):
        return operands
    q, k, v, mask, causal, scale = operands
    return _attention(node, hw, (q, k, v), mask, causal, scale, None)


def _attention(
    node: fx.Node,
    hw: Hardware,
    operands: tuple[fx.Node, fx.Node, fx.Node],
    mask: fx.Node | None,
    causal: bool,
    scale: float,
    fill: float | None,
    dtype: str = "float32",
) -> KernelCall | Refusal:
    read = (*operands, *([mask] if mask is not None else []))
    dtypes = [dtype_of(tensor) for tensor in (*operands, node)]
    wide = [tensor for tensor in (*operands, node) if dtype == "float32" or dtype_of(tensor) != dtype]
    few = dtype == "float32" and shape_of(operands[0])[-2] <= MOST_QUERIES
    if few and len(set(dtypes)) == 1 and dtypes[0] in ("float16", "bfloat16"):
        wide = []
    refusal = refuse_dtypes(*wide) or refuse_large(node, *read)
    if refusal is not None:
        return refusal
    shapes = (shape_of(operands[0]), shape_of(operands[1]), shape_of(operands[2]))
    if not all(prod(shape) for shape in (*shapes, shape_of(node))):
        return Refusal(f"empty operands: {shapes}")
    if len({shape[:-3] for shape in shapes}) != 1 or len({len(shape) for shape in shapes}) != 1:
        return Refusal(f"the batches of {shapes} differ")
    p = problem(*shapes)
    if shapes[1][:-1] != shapes[2][:-1] or p.heads % p.key_heads:
        return Refusal(f"the heads of {shapes} do not group")
    masked = None
    if mask is not None:
        extents = mask_shape(mask, p, shapes[0])
        if isinstance(extents, Refusal):
            return extents
        masked = (extents, str(mask.meta["val"].dtype).removeprefix("torch."), shape_of(mask))
    given = (scale, (*shapes, shape_of(node)), causal, masked, fill)
    made = _few_queries(hw, p, given, dtypes[0]) if few else None
    made = made or _kernel(hw, p, dtype, given, dtypes)
    if isinstance(made, Refusal):
        return made
    pairs = p.batch * p.heads
    work = Work(
        flops={dtype: 2.0 * pairs * p.queries * p.keys * (p.depth + p.value_depth) * (0.5 if causal else 1)},
        bytes_read=sum(operand.meta["val"].element_size() * prod(shape_of(operand)) for operand in read),
        bytes_written=item_bytes(dtypes[3]) * prod(shape_of(node)),
        launches=1 if made.second is None else 2,
        tasks=made.blocks,
    )
    return KernelCall(made.func, read, made.algorithm, made.reason, work, second=made.second)


@dataclass(frozen=True)
class _Made:
    """A kernel, its plan in words, and its blocks."""

    func: Any
    algorithm: str
    reason: str
    blocks: int
    second: Second | None = None


# Scale, shapes, causal, mask and fill of a kernel.
_Given = tuple[float, Any, bool, Any, "float | None"]


def _few_queries(hw: Hardware, p: Problem, given: _Given, dtype: str) -> _Made | Refusal | None:
    """The kernel for few queries of tensors of `dtype`; None where registers do not hold a head."""
    _, shapes, causal, mask, fill = given
    plan = plan_few_queries(hw, p, dtype, causal)
    if plan is None:
        return None if dtype == "float32" else Refusal(f"{dtype} heads of {p.depth} and {p.value_depth} are too long")
    second = None
    if plan.parts > 1:
        adding = add_key_parts(p, plan, shapes[3], fill, dtype)
        operands = 3 if mask is None else 4
        second = Second(adding, parts_shape(p, plan), operands, "sums of parts", f"{plan.parts} parts of the keys")
    func = few_queries(p, plan, *given, dtype)
    return _Made(func, "attention of few queries", plan.reason, plan.blocks, second)


def _kernel(hw: Hardware, p: Problem, dtype: str, given: _Given, dtypes: list[str]) -> _Made | Refusal:
    """The kernel for tiles of queries; `dtypes` are those of q, k, v and the result."""
    if dtype == "float32":
        plan = plan_attention(hw, p)
        if plan is None:
            return Refusal(f"tiles of depth {p.depth} and {p.value_depth} do not fit shared memory")
        return _Made(attention(p, plan, *given), "online attention", plan.reason, plan.blocks)
    matrix = plan_matrix_attention(hw, p, dtype)
    scale, shapes, causal, mask, fill = given
    units: Callable[[str, Any], Lanes] = partial(AmdLanes, form_of(hw)) if hw.isa == "amdgcn" else MmaLanes
    past = copies_past_registers(hw)
    func = matrix_attention(p, matrix, scale, shapes, units, causal, mask, fill, dtypes, past)
    return _Made(func, f"{dtype} online attention", matrix.reason, matrix.blocks)


ATTENTIONS: dict[torch._ops.OpOverload, Kernel] = {
    dialect.attention: _dialect_attention,
    aten.scaled_dot_product_attention.default: _aten_attention,
    dialect_mixed.attention_f16: partial(_rounding_attention, dtype="float16"),
    dialect_mixed.attention_bf16: partial(_rounding_attention, dtype="bfloat16"),
}
