"""Weights that torchao's `quantize_` left in a model: tensors that wrap others, which torch.export does not take.

    linear(x, Int8Tensor)     linear(x, dequantize_rows(codes, scales)): its own codes, a scale a row, which stay 8 bits
    others of torchao         torchao's own unwrapping: the arithmetic is what torchao says, the weights become float32

A tensor is known by its attributes (qdata, scale, ...), so that nothing is imported for a model that has none.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..passes import dialect_int8


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


def with_plain_weights(module: nn.Module) -> nn.Module:
    """`module` itself where it holds no tensor of torchao's, else a copy that computes the same by plain ones."""
    if not any(map(_is_wrapped, module.parameters())):
        return module
    plain = copy.deepcopy(module)
    if type(plain) is nn.Linear and _in_rows(plain.weight):
        return StoredLinear(plain.weight, plain.bias).train(plain.training)
    for name, layer in list(plain.named_modules(remove_duplicate=False)):
        if type(layer) is nn.Linear and _in_rows(layer.weight):
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, StoredLinear(layer.weight, layer.bias).train(layer.training))
    if any(map(_is_wrapped, plain.parameters())):
        from torchao.utils import unwrap_tensor_subclass

        unwrap_tensor_subclass(plain)
    return plain


def _is_wrapped(tensor: Tensor) -> bool:
    return type(tensor).__module__.partition(".")[0] == "torchao"


def _in_rows(weight: Any) -> bool:
    """Whether codes are int8 with one float32 scale a row, zero in the middle, for inputs that are not rounded."""
    if not _is_wrapped(weight) or getattr(getattr(weight, "qdata", None), "dtype", None) is not torch.int8:
        return False
    zero = getattr(weight, "zero_point", None)
    rounded = [getattr(weight, name, None) for name in ("act_quant_kwargs", "act_quant_scale", "act_pre_scale")]
    return (
        weight.qdata.dim() == 2
        and weight.dtype == torch.float32
        and tuple(weight.scale.shape) == (len(weight.qdata), 1)
        and (zero is None or not bool(zero.any()))
        and all(value is None for value in rounded)
    )
