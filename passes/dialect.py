"""The fused operators that passes introduce, namespace `graphwright`.

Each has an eager body in plain torch, which is its meaning (`activation(convolution + bias + residual)`,
every operation rounded as torch rounds it), and a fake kernel that gives shape and dtype. A rewritten graph
therefore still runs in PyTorch, and any pass can be checked alone.

Layouts: "NCHW", or "NHWC" for tensors whose logical shape is [N, H, W, C]. Convolution weights are always
OIHW. Padding is always (top, bottom, left, right). Results are contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .dialect_images import image_shape, owned, spatial_shape
from .dialect_pools import avg_pool2d_body, avg_pool2d_fake, max_pool2d_body, max_pool2d_fake

ACTIVATIONS: dict[str, Callable[[Tensor, Sequence[float]], Tensor]] = {
    "none": lambda x, args: x,
    "relu": lambda x, args: F.relu(x),
    "relu6": lambda x, args: F.relu6(x),
    "silu": lambda x, args: F.silu(x),
    "gelu": lambda x, args: F.gelu(x),
    "gelu_tanh": lambda x, args: F.gelu(x, approximate="tanh"),
    "hardswish": lambda x, args: F.hardswish(x),
    "hardsigmoid": lambda x, args: F.hardsigmoid(x),
    "sigmoid": lambda x, args: torch.sigmoid(x),
    "tanh": lambda x, args: torch.tanh(x),
    "clamp": lambda x, args: torch.clamp(x, args[0], args[1]),  # either end may be infinite; NaN stays NaN
    "leaky_relu": lambda x, args: F.leaky_relu(x, args[0]),
    "swish": lambda x, args: _swish(x, args[0]),
}


def _swish(input: Tensor, beta: float) -> Tensor:
    return input * torch.sigmoid(beta * input)


def _epilogue(x: Tensor, residual: Tensor | None, activation: str, args: Sequence[float]) -> Tensor:
    if residual is not None:
        x = x + residual
    return ACTIVATIONS[activation](x, args)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    activation_args: Sequence[float],
    layout: str,
) -> Tensor:
    x = input.permute(0, 3, 1, 2) if layout == "NHWC" else input
    top, bottom, left, right = padding
    if (top, left) == (bottom, right):
        y = torch.conv2d(x, weight, bias, list(stride), [top, left], list(dilation), groups)
    else:
        x = F.pad(x, (left, right, top, bottom))
        y = torch.conv2d(x, weight, bias, list(stride), [0, 0], list(dilation), groups)
    y = y.permute(0, 2, 3, 1) if layout == "NHWC" else y
    return _epilogue(y, residual, activation, activation_args).contiguous()


def _conv2d_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    activation_args: Sequence[float],
    layout: str,
) -> Tensor:
    batch, *spatial = spatial_shape(input, layout)
    ends = (padding[0] + padding[1], padding[2] + padding[3])
    reach = [dilation[i] * (weight.shape[2 + i] - 1) + 1 for i in (0, 1)]
    height, width = ((spatial[i] + ends[i] - reach[i]) // stride[i] + 1 for i in (0, 1))
    return input.new_empty(image_shape(batch, weight.shape[0], height, width, layout))


def _conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    activation_args: Sequence[float],
    layout: str,
) -> Tensor:
    x = input.permute(0, 3, 1, 2) if layout == "NHWC" else input
    y = F.conv_transpose2d(x, weight, bias, list(stride), list(padding), list(output_padding), groups, list(dilation))
    y = y.permute(0, 2, 3, 1) if layout == "NHWC" else y
    return _epilogue(y, residual, activation, activation_args).contiguous()


def _conv_transpose2d_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    activation_args: Sequence[float],
    layout: str,
) -> Tensor:
    batch, *spatial = spatial_shape(input, layout)
    reach = [dilation[i] * (weight.shape[2 + i] - 1) + 1 for i in (0, 1)]
    height, width = ((spatial[i] - 1) * stride[i] - 2 * padding[i] + reach[i] + output_padding[i] for i in (0, 1))
    return input.new_empty(image_shape(batch, weight.shape[1] * groups, height, width, layout))


def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    return _epilogue(F.linear(input, weight, bias), residual, activation, activation_args).contiguous()


def _linear_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    transpose_a: bool,
    transpose_b: bool,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    y = torch.matmul(a.mT if transpose_a else a, b.mT if transpose_b else b)
    if bias is not None:
        y = y + bias
    return _epilogue(y, residual, activation, activation_args).contiguous()


def _matmul_fake(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    transpose_a: bool,
    transpose_b: bool,
    activation: str,
    activation_args: Sequence[float],
) -> Tensor:
    rows = a.shape[-1] if transpose_a else a.shape[-2]
    columns = b.shape[-2] if transpose_b else b.shape[-1]
    leading: torch.Size = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    return a.new_empty((*leading, rows, columns))


def _permute(input: Tensor, in_shape: Sequence[int], dims: Sequence[int], out_shape: Sequence[int]) -> Tensor:
    return owned(input.reshape(in_shape).permute(list(dims)).reshape(out_shape), input)


def _permute_fake(input: Tensor, in_shape: Sequence[int], dims: Sequence[int], out_shape: Sequence[int]) -> Tensor:
    return input.new_empty(out_shape)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, fill: float | None = None
) -> Tensor:
    """`fill` None: as scaled_dot_product_attention, which hides keys with -inf and turns a row of nothing else to 0.

    Otherwise as products and a softmax: keys that a bool mask hides score `fill`, and a row of -inf gives NaN.
    """
    grouped = q.shape[-3] != k.shape[-3]
    if fill is not None:
        k, v = (x.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for x in (k, v))
        return torch.matmul(masked(q @ k.mT * scale, mask, is_causal, fill).softmax(-1), v).contiguous()
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=grouped).contiguous()


def masked(scores: Tensor, mask: Tensor | None, is_causal: bool, fill: float) -> Tensor:
    """Scores with what a mask of bool stops at `fill`, another mask added, and keys behind their query at -inf."""
    if mask is not None:
        scores = torch.where(mask, scores, fill) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, fill: float | None = None
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _placed(extents: Sequence[int], place: Sequence[int], rows: Tensor | None) -> Tensor:
    """Where the elements [b, h, s, d] lie in a dense buffer: place[0] + b, h and s times the other three + d.

    With `rows` [b, s] its numbers take the place of s, and b has no stride.
    """
    batch, heads, positions, depth = (torch.arange(n) for n in extents)
    start, batch_stride, head_stride, position_stride = place
    row = batch[:, None] * batch_stride + positions * position_stride if rows is None else rows.long() * position_stride
    return start + row[:, None, :, None] + (heads * head_stride)[:, None, None] + depth


def heads_of(
    operands: tuple[Tensor, Tensor, Tensor], extents: Sequence[int], places: Sequence[int], rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of `strided_attention` as [batch, heads, positions, depth]."""
    batch, heads, key_heads, queries, keys, depth, value_depth = extents
    q, k, v = (x.reshape(-1) for x in operands)
    return (
        q[_placed((batch, heads, queries, depth), places[:4], rows)],
        k[_placed((batch, key_heads, keys, depth), places[4:8], rows)],
        v[_placed((batch, key_heads, keys, value_depth), places[8:12], rows)],
    )


def put_heads(y: Tensor, places: Sequence[int], out_shape: Sequence[int], out_rows: Tensor | None) -> Tensor:
    """The result [batch, heads, positions, depth] where `strided_attention` wants it."""
    result = y.new_empty(math.prod(out_shape))
    result[_placed(y.shape, places[12:], out_rows)] = y
    return result.reshape(out_shape)


def _strided_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    extents: Sequence[int],
    places: Sequence[int],
    out_shape: Sequence[int],
    fill: float | None = None,
    rows: Tensor | None = None,
    out_rows: Tensor | None = None,
) -> Tensor:
    heads = heads_of((q, k, v), extents, places, rows)
    return put_heads(_attention(*heads, mask, is_causal, scale, fill), places, out_shape, out_rows)


def _strided_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    extents: Sequence[int],
    places: Sequence[int],
    out_shape: Sequence[int],
    fill: float | None = None,
    rows: Tensor | None = None,
    out_rows: Tensor | None = None,
) -> Tensor:
    return q.new_empty(list(out_shape))


ATTENTION = "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale, float? fill=None) -> Tensor"
# extents: batch, heads of q, heads of k, queries, keys, depth, depth of v; places: see _placed; q, k, v, the
# result; int32 rows [batch, position] of q, k and v, and of the result
STRIDED_ATTENTION = (
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float scale, int[] extents, int[] places, "
    "int[] out_shape, float? fill=None, Tensor? rows=None, Tensor? out_rows=None) -> Tensor"
)
_EPILOGUE = "str activation, float[] activation_args"
_OPERATORS: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Tensor]]] = {
    "conv2d": (
        "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
        f"int[] dilation, int groups, {_EPILOGUE}, str layout) -> Tensor",
        _conv2d,
        _conv2d_fake,
    ),
    "conv_transpose2d": (
        "(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
        f"int[] output_padding, int[] dilation, int groups, {_EPILOGUE}, str layout) -> Tensor",
        _conv_transpose2d,
        _conv_transpose2d_fake,
    ),
    "linear": (
        f"(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, {_EPILOGUE}) -> Tensor",
        _linear,
        _linear_fake,
    ),
    "matmul": (
        "(Tensor a, Tensor b, Tensor? bias, Tensor? residual, bool transpose_a, bool transpose_b, "
        f"{_EPILOGUE}) -> Tensor",
        _matmul,
        _matmul_fake,
    ),
    "swish": (
        "(Tensor input, float beta) -> Tensor",
        lambda input, beta: _swish(input, beta).contiguous(),
        lambda input, beta: input.new_empty(input.shape),
    ),
    "permute": (
        "(Tensor input, int[] in_shape, int[] dims, int[] out_shape) -> Tensor",
        _permute,
        _permute_fake,
    ),
    "attention": (
        ATTENTION,
        _attention,
        _attention_fake,
    ),
    "strided_attention": (
        STRIDED_ATTENTION,
        _strided_attention,
        _strided_attention_fake,
    ),
    "max_pool2d": (
        "(Tensor input, int[] kernel, int[] stride, int[] padding, int[] dilation, bool ceil_mode, "
        "str layout) -> Tensor",
        max_pool2d_body,
        max_pool2d_fake,
    ),
    "avg_pool2d": (
        "(Tensor input, int[] kernel, int[] stride, int[] padding, bool ceil_mode, bool count_include_pad, "
        "int? divisor, str layout) -> Tensor",
        avg_pool2d_body,
        avg_pool2d_fake,
    ),
}


BODIES: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {}  # of operators of torch, so with derivatives


def define(name: str, schema: str, body: Callable[..., Tensor], fake: Callable[..., Tensor]) -> torch._ops.OpOverload:
    """Return the operator graphwright::`name`, entered unless a second copy of its module (a reload) finds it there."""
    if not hasattr(torch.ops.graphwright, name):
        torch.library.define(f"graphwright::{name}", schema)
        torch.library.impl(f"graphwright::{name}", "default", body)
        torch.library.register_fake(f"graphwright::{name}", fake)
    operator: torch._ops.OpOverload = getattr(torch.ops.graphwright, name).default
    BODIES[operator] = body
    return operator


for _name, _parts in _OPERATORS.items():
    define(_name, *_parts)

conv2d = torch.ops.graphwright.conv2d.default
conv_transpose2d = torch.ops.graphwright.conv_transpose2d.default
linear = torch.ops.graphwright.linear.default
matmul = torch.ops.graphwright.matmul.default
swish = torch.ops.graphwright.swish.default
permute = torch.ops.graphwright.permute.default
attention = torch.ops.graphwright.attention.default
strided_attention = torch.ops.graphwright.strided_attention.default
max_pool2d = torch.ops.graphwright.max_pool2d.default
avg_pool2d = torch.ops.graphwright.avg_pool2d.default

OPERATORS = frozenset(
    {conv2d, conv_transpose2d, linear, matmul, permute, attention, strided_attention, swish, max_pool2d, avg_pool2d}
)
