"""How much a weight matters, and what the weights that are kept become when others are taken away.

    magnitude   w^2
    wanda       w^2 * mean(x^2)          x: the weight's input (Sun et al., A simple and effective pruning approach for
                                         large language models, 2023), squared, so that blocks add up
    hessian     w^2 / [H^-1]_kk          H = mean(x x^T) over the inputs of a layer: what taking w away costs at the
                                         layer's outputs, by the optimal brain surgeon (Hassibi and Stork, 1993)

After `hessian` the weights that stay are corrected for those that went, one input after the other, by the rows of the
Cholesky factor of H^-1 (Frantar and Alistarh, SparseGPT, 2023), for a mask that is already chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..calibration import finite_inputs, run_in_evaluation

IMPORTANCE = ("magnitude", "wanda", "hessian")
DAMPING = 0.01  # of H's mean diagonal, added to it: SparseGPT's
COLUMNS = 128  # inputs corrected at once
MOST_BYTES = 1 << 30  # of matrices H held at once: the layers of a large model are calibrated in several runs


def inputs_of(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the rows of the layer's weight matrix are multiplied by, as [groups, rows, taps * channels]."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, nn.Conv1d):
        x, kernel, stride, dilation = x.unsqueeze(-2), (1, *kernel), (1, *stride), (1, *dilation)
    columns = F.unfold(x, kernel, dilation, 0, stride)  # [batch, channels * taps, places]
    taps = kernel[0] * kernel[1]
    split = columns.view(len(x), layer.groups, -1, taps, columns.shape[-1])  # batch, group, channel, tap, place
    return split.permute(1, 0, 4, 3, 2).reshape(layer.groups, -1, split.shape[2] * taps)


def observe(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    calibration: Sequence[Any],
    statistic: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The mean over rows of statistic(inputs[groups, rows, K]), a sum over rows, for every layer that runs.

    Raises InputError where a layer reads infinities or NaN.
    """
    sums: dict[str, torch.Tensor] = {}
    rows: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        look = finite_inputs(name)

        def hook(layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            look(layer, args, keywords)
            x = inputs_of(layer, (args[0] if args else keywords["input"]).detach().float())
            found = statistic(x)
            sums[name] = sums[name] + found if name in sums else found
            rows[name] = rows.get(name, 0) + x.shape[1]

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        run_in_evaluation(model, calibration)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / max(1, rows[name]) for name, total in sums.items()}


def squares(x: torch.Tensor) -> torch.Tensor:
    """Sum of x^2 over the rows of [groups, rows, K]."""
    return (x * x).sum(1)


def products(x: torch.Tensor) -> torch.Tensor:
    """Sum of x x^T over the rows of [groups, rows, K]."""
    return x.mT @ x


def by_row(statistic: torch.Tensor, outputs: int) -> torch.Tensor:
    """What is known of each group, [groups, ...], for each of the outputs."""
    return statistic.repeat_interleave(outputs // len(statistic), 0)


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor U of H^-1 = U^T U, in float64, H damped; [..., K, K]."""
    h = hessian.double().clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    damping = DAMPING * diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(damping > 0.0, damping, 1.0)  # an input that is always zero has a price of its own
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def prices(matrix: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """w^2 / [H^-1]_kk for the rows [O, K] of one group."""
    return (matrix.double() ** 2 / (factor**2).sum(0)).float()


def corrected(matrix: torch.Tensor, mask: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The rows [O, K] of one group with zeros where the mask says, the others moved to make up for them."""
    w, keep = matrix.double().clone(), mask
    count = w.shape[1]
    for begin in range(0, count, COLUMNS):
        end = min(begin + COLUMNS, count)
        errors = torch.zeros_like(w[:, begin:end])
        for k in range(begin, end):
            gone = torch.where(keep[:, k], 0.0, w[:, k])
            error = gone / factor[k, k]
            w[:, k] -= gone
            w[:, k + 1 : end] -= error[:, None] * factor[k, k + 1 : end]
            errors[:, k - begin] = error
        w[:, end:] -= errors @ factor[begin:end, end:]
    return torch.where(keep, w, 0.0).to(matrix.dtype)
