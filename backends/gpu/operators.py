"""The operators that have kernels of ours on GPUs; a kernel may refuse a node, and then the TE definition serves."""

from __future__ import annotations

import torch

from ..lowering.registry import Kernel
from .attention_operators import ATTENTIONS
from .extreme import EXTREMES
from .product_operators import PRODUCTS
from .sorting import SORTS

GPU_KERNELS: dict[torch._ops.OpOverload, Kernel] = {**PRODUCTS, **ATTENTIONS, **EXTREMES, **SORTS}
