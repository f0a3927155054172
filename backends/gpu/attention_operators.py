"""Attention as one kernel on GPUs: in float32 where its tiles fit shared memory, or in 16 bits on matrix units.

Refused: other dtypes, dropout, batches or heads that broadcast, depths beyond what shared memory holds, tensors whose
elements 32 bits do not count. The TE definition serves those.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.cost import Work
from ...passes import dialect, mixed
from ...passes.rewrite import shape_of
from ..kernels.attention_plan import Problem, problem
from ..lowering.kernels_attention import mask_shape, torch_attention
from ..lowering.kernels_matmul import bind, refuse_dtypes, refuse_large
from ..lowering.registry import Kernel, KernelCall, Refusal
from .amd_fragments import AmdLanes, form_of
from .attention import attention, plan_attention
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
    made = _kernel(hw, p, dtype, scale, (*shapes, shape_of(node)), causal, masked, fill, dtypes)
    if isinstance(made, Refusal):
        return made
    func, reason, blocks = made
    pairs = p.batch * p.heads
    work = Work(
        flops={dtype: 2.0 * pairs * p.queries * p.keys * (p.depth + p.value_depth) * (0.5 if causal else 1)},
        bytes_read=sum(operand.meta["val"].element_size() * prod(shape_of(operand)) for operand in read),
        bytes_written=item_bytes(dtypes[3]) * prod(shape_of(node)),
        launches=1,
        tasks=blocks,
    )
    algorithm = "online attention" if dtype == "float32" else f"{dtype} online attention"
    return KernelCall(func, read, algorithm, reason, work)


def _kernel(hw: Hardware, p: Problem, dtype: str, *rest: Any) -> tuple[Any, str, int] | Refusal:
    """The kernel of scale, shapes, causal, mask, fill and dtypes `rest`; its plan in words, and its blocks."""
    if dtype == "float32":
        plan = plan_attention(hw, p)
        if plan is None:
            return Refusal(f"tiles of depth {p.depth} and {p.value_depth} do not fit shared memory")
        return attention(p, plan, *rest[:-1]), plan.reason, plan.blocks
    matrix = plan_matrix_attention(hw, p, dtype)
    scale, shapes, causal, mask, fill, dtypes = rest
    units: Callable[[str, Any], Lanes] = partial(AmdLanes, form_of(hw)) if hw.isa == "amdgcn" else MmaLanes
    past = copies_past_registers(hw)
    func = matrix_attention(p, matrix, scale, shapes, units, causal, mask, fill, dtypes, past)
    return func, matrix.reason, matrix.blocks


ATTENTIONS: dict[torch._ops.OpOverload, Kernel] = {
    dialect.attention: _dialect_attention,
    aten.scaled_dot_product_attention.default: _aten_attention,
    mixed.attention_f16: partial(_rounding_attention, dtype="float16"),
    mixed.attention_bf16: partial(_rounding_attention, dtype="bfloat16"),
}
