"""Which operators are broken up, and which stay whole because a pass, a kernel or lowering knows them.

    x.index_reduce(dim, index, source, how)  -> scatter_reduce with the index expanded
    cdist(a, b, p)                           -> ||a[:, None] - b[None, :]||_p
    median(x)                                -> the middle of sort(x), or its NaN

Operators that draw random numbers are never broken up: PyTorch's generator has to make them, in PyTorch's order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import global_decomposition_table

aten = torch.ops.aten

# Composites a pass or a kernel wants to see as one node.
KEPT: tuple[torch._ops.OpOverload, ...] = (
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten.avg_pool1d.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.gelu.default,
    aten.group_norm.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.instance_norm.default,
    aten.layer_norm.default,
    aten.linear.default,
    aten.log_softmax.int,
    aten.max_pool2d.default,
    aten.mish.default,
    aten.scaled_dot_product_attention.default,
    aten.silu.default,
    aten.softmax.int,
    aten.softplus.default,
    aten.std.correction,
    aten.upsample_bicubic2d.default,
    aten.upsample_bicubic2d.vec,
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_linear1d.default,
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.default,
    aten.upsample_trilinear3d.default,
)

# torch has a decomposition of these that export does not use; with it they reach operators we compile.
ADDED: tuple[torch._ops.OpOverload, ...] = (
    aten._batch_norm_no_update.default,
    aten._batch_norm_with_update_functional.default,
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_functional.default,
    aten.as_strided_copy.default,
    aten.dist.default,
    aten.ldexp.Tensor,
    aten.narrow_copy.default,
    aten.permute_copy.default,
    aten.unbind_copy.int,
    aten.view_copy.default,
)


def _index_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    name = {"mean": "mean", "prod": "prod", "amax": "amax", "amin": "amin"}[reduce]
    shape = [1] * x.dim()
    if shape:
        shape[dim] = -1
    positions = index.reshape(shape).expand_as(source)
    return x.scatter_reduce(dim, positions, source, name, include_self=include_self)


def _norm(x: Tensor, p: float) -> Tensor:
    lengths: Tensor = aten.linalg_vector_norm.default(x, p, [-1])
    return lengths


def _cdist_forward(a: Tensor, b: Tensor, p: float, compute_mode: int | None) -> Tensor:
    return _norm(a.unsqueeze(-2) - b.unsqueeze(-3), p)


def _pdist_forward(x: Tensor, p: float = 2.0) -> Tensor:
    i, j = torch.triu_indices(x.shape[0], x.shape[0], 1)
    return _norm(x[i] - x[j], p)


def _trilinear(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Tensor:
    expanded = []
    for x, dims in ((a, expand1), (b, expand2), (c, expand3)):
        for dim in sorted(dims):
            x = x.unsqueeze(dim)
        expanded.append(x)
    a, b, c = expanded
    return (a * b * c).sum(list(sumdim)) if sumdim else a * b * c


def _median(x: Tensor) -> Any:
    if x.numel() == 0:
        return NotImplemented
    ordered = x.reshape(-1).sort().values  # NaN comes last
    middle = ordered[(x.numel() - 1) // 2]
    return torch.where(ordered[-1].isnan(), ordered[-1], middle) if x.is_floating_point() else middle


def _nanmedian(x: Tensor) -> Any:
    if x.numel() == 0 or not x.is_floating_point():
        return NotImplemented
    ordered = x.reshape(-1).sort().values
    numbers = ordered.isnan().logical_not().sum()
    middle = ((numbers - 1).clamp(min=0) / 2).floor().to(torch.int64)
    return ordered.gather(0, middle.reshape(1)).reshape(())


def _rrelu(
    x: Tensor, noise: Tensor, lower: float = 0.125, upper: float = 1 / 3, training: bool = False, generator: Any = None
) -> Any:
    if training:
        return NotImplemented
    return aten.leaky_relu.default(x, (lower + upper) / 2), noise.clone()


OURS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    aten._cdist_forward.default: _cdist_forward,
    aten._pdist_forward.default: _pdist_forward,
    aten._trilinear.default: _trilinear,
    aten.index_reduce.default: _index_reduce,
    aten.median.default: _median,
    aten.nanmedian.default: _nanmedian,
    aten.rrelu_with_noise_functional.default: _rrelu,
}


def table() -> dict[torch._ops.OperatorBase, Callable[..., Any]]:
    """The decomposition table capture runs: torch.export's own, less `KEPT`, plus `ADDED` and `OURS`."""
    everything = global_decomposition_table["post_autograd"]
    result = dict(torch.export.default_decompositions().items())  # type: ignore[no-untyped-call]
    for operator in KEPT:
        result.pop(operator, None)
    for operator in ADDED:
        result[operator] = everything[operator]
    return {**result, **OURS}
