"""The dialect's product with weights of which whole blocks are zero.

    sparse_linear(x, W, b, r, ..., blocks) = act(x W^T + b + r)

blocks: outputs and inputs of a block, how many blocks of W hold anything but zeros, and the most of those in one row of
blocks. W is stored whole: the body is that of `linear`, and the kernel packs what is not zero.
"""

from __future__ import annotations

from . import dialect

sparse_linear = dialect.define(
    "sparse_linear",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, str activation, float[] activation_args, "
    "int[] blocks) -> Tensor",
    lambda *operands: dialect.linear(*operands[:-1]),
    lambda input, weight, *_: input.new_empty((*input.shape[:-1], weight.shape[0])),
)
