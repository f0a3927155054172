"""Weights that torchao's `quantize_` left in a model: tensors that wrap others, which torch.export does not take.

    linear(x, Int8Tensor)     linear(x, dequantize_rows(codes, scales)): its own codes, a scale a row, which stay 8 bits
    linear(rounded x, Int8Tensor)   linear_tokens(x, codes, scales): inputs are rounded at run time, row by row
    others of torchao         torchao's own unwrapping: the arithmetic is what torchao says, the weights become float32

A tensor is known by its attributes (qdata, scale, ...), so that nothing is imported for a model that has none.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..passes import dialect_int8, dialect_rows


class StoredLinear(nn.Module):
    """A linear layer of int8 codes [outputs, inputs] with a scale for each output."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight: Any, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", weight.qdata.detach())
        self.register_buffer("scales", weight.scale.detach().reshape(-1).float())
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result."""
        return F.linear(x, dialect_int8.dequantize_rows(self.codes, self.scales, None, 0), self.bias)


class RoundingLinear(StoredLinear):
    """The same of inputs that are rounded to 8 bits at run time, each row by its largest value."""

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result."""
        result: Tensor = dialect_rows.linear_tokens(x, self.codes, self.scales, self.bias, None, "none", [])
        return result


def with_plain_weights(module: nn.Module) -> nn.Module:
    """`module` itself where it holds no tensor of torchao's, else a copy that computes the same by plain ones."""
    if not any(map(_is_wrapped, module.parameters())):
        return module
    plain = copy.deepcopy(module)
    if type(plain) is nn.Linear and (form := form_of(plain.weight)) is not None and _is_wrapped(plain.weight):
        return form(plain.weight, plain.bias).train(plain.training)
    for name, layer in list(plain.named_modules(remove_duplicate=False)):
        if type(layer) is nn.Linear and _is_wrapped(layer.weight) and (form := form_of(layer.weight)) is not None:
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, form(layer.weight, layer.bias).train(layer.training))
    if any(map(_is_wrapped, plain.parameters())):
        from torchao.utils import unwrap_tensor_subclass

        unwrap_tensor_subclass(plain)
    return plain


def _is_wrapped(tensor: Tensor) -> bool:
    return type(tensor).__module__.partition(".")[0] == "torchao"


def form_of(weight: Any) -> type[StoredLinear] | None:
    """The layer for int8 codes with one float32 scale a row, zero in the middle; None for other weights.

    Inputs are not rounded, or each row by its own largest magnitude to all of int8.
    """
    if getattr(getattr(weight, "qdata", None), "dtype", None) is not torch.int8 or weight.qdata.dim() != 2:
        return None
    zero = getattr(weight, "zero_point", None)
    given = [getattr(weight, name, None) for name in ("act_quant_scale", "act_quant_zero_point", "act_pre_scale")]
    if (
        weight.dtype != torch.float32
        or tuple(weight.scale.shape) != (len(weight.qdata), 1)
        or (zero is not None and bool(zero.any()))
        or any(value is not None for value in given)
    ):
        return None
    how = getattr(weight, "act_quant_kwargs", None)
    if how is None:
        return StoredLinear
    by_row = type(getattr(how, "granularity", None)).__name__ == "PerRow"
    symmetric = getattr(getattr(how, "mapping_type", None), "name", "") == "SYMMETRIC"
    return RoundingLinear if by_row and symmetric and getattr(how, "reduce_range", None) is False else None
