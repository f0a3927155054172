"""Element by element, on one value or on two that broadcast: arithmetic, comparison, casts, changes in place."""

from __future__ import annotations

import torch

from .builder import Builder, Refused, Value

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.int32, torch.int64, torch.bool)

_FLOAT_UNARY = (
    "torch.relu({x})",
    "torch.sigmoid({x})",
    "torch.tanh({x})",
    "F.gelu({x})",
    "F.gelu({x}, approximate='tanh')",
    "F.silu({x})",
    "F.hardswish({x})",
    "F.hardsigmoid({x})",
    "F.relu6({x})",
    "F.leaky_relu({x}, 0.2)",
    "F.elu({x})",
    "F.softplus({x})",
    "F.mish({x})",
    "{x}.clamp(-0.5, 0.75)",
    "{x}.clamp(min=0)",
    "{x}.clamp_max(0.5)",
    "F.hardtanh({x}, 0.0, 6.0)",
    "{x}.clamp(-5, 5).exp()",
    "({x}.abs() + 0.5).log()",
    "({x}.abs() + 0.5).sqrt()",
    "({x}.abs() + 0.5).rsqrt()",
    "({x}.abs() + 0.5).reciprocal()",
    "torch.sin({x})",
    "torch.erf({x})",
    "{x}.clamp(-9, 9) ** 2",
    "{x}.clamp(-4, 4).pow(3)",
    "{x} * {x}",
    "{x} / 2",
    "{x} * 0.5 + 1",
    "1 - {x}",
    "F.dropout({x}, 0.5, training=False)",
)
_ANY_UNARY = (
    "torch.neg({x})",
    "torch.abs({x})",
    "{x} * 1",
    "{x} + 0",
    "{x} - 0",
    "{x} * 2",
    "{x} + 1",
    "{x}.clamp(-1, 1)",
    "{x}.clone()",
    "{x}.contiguous()",
    "{x}.detach()",
    "{x}.to({x}.dtype)",
    "{x}.square()",
    "torch.zeros_like({x})",
    "torch.full_like({x}, 2)",
)
_BOOL_UNARY = ("torch.logical_not({x})", "~{x}", "{x}.clone()", "{x} * 2")
_WRITTEN_OUT = (
    "0.5 * {x} * (1 + torch.erf({x} / math.sqrt(2)))",
    "{x} * 0.5 * (1.0 + torch.erf({x} * 0.7071067811865476))",
    "0.5 * {x} * (1 + torch.tanh(math.sqrt(2 / math.pi) * ({x} + 0.044715 * torch.pow({x}, 3))))",
    "0.5 * {x} * (1 + torch.tanh({x} * 0.7978845608 * (1 + 0.044715 * {x} * {x})))",
    "{x} * torch.sigmoid({x})",
    "torch.sigmoid({x}) * {x}",
    "{x} * F.relu6({x} + 3) / 6",
    "F.relu6({x} + 3) / 6",
    "{x} * F.hardsigmoid({x})",
    "({x} + 3).clamp(0, 6) * (1 / 6)",
    "{x} / (1 + torch.exp(-{x}))",
    "torch.clamp({x}, min=0.0).clamp(max=6.0)",
    "torch.maximum({x}, torch.zeros_like({x}))",
    "{x} * torch.sigmoid(1.702 * {x})",
)
_BINARY = (
    "torch.add({x}, {y})",
    "torch.sub({x}, {y}, alpha=2)",
    "torch.mul({x}, {y})",
    "torch.maximum({x}, {y})",
    "torch.minimum({x}, {y})",
    "{x} / ({y}.abs() + 1)",
    "torch.add({x}, {y}, alpha=3)",
    "torch.sub({x}, {y})",
    "torch.atan2({x}, {y}.abs() + 1)",
    "torch.lerp({x}, {y}, 0.25)",
    "torch.addcmul({x}, {y}, {y}, value=0.5)",
)
_BOOL_BINARY = ("torch.logical_and({x}, {y})", "torch.logical_or({x}, {y})", "{x} ^ {y}", "{x} & {y}")
_COMPARISONS = (">", "<", ">=", "<=", "==", "!=")
_CHANGES = (
    "{x}.add_(1)",
    "{x}.mul_(0.5)",
    "{x}.relu_()",
    "{x}.neg_()",
    "{x}.clamp_(-1, 1)",
    "{x}.zero_()",
    "{x}.add_({y})",
    "{x}.mul_({y})",
    "{x}.copy_({y})",
    "F.relu({x}, inplace=True)",
    "{x}.select(0, 0).fill_(0.5)",
    "{x}[..., 0] = 1",
    "{x}.narrow(0, 0, 1).mul_(2)",
    "{x}.transpose(0, -1).add_(1)",
    "{x}.masked_fill_({x} == {x}, 2)",
    "{x}.flatten()[0] = 3",
)


def unary(b: Builder, x: Value) -> None:
    """One value, element by element."""
    if x.is_bool:
        b.emit(b.choose(_BOOL_UNARY).format(x=x.name))
    elif x.is_float:
        b.emit(b.choose((*_FLOAT_UNARY, *_ANY_UNARY)).format(x=x.name))
    else:
        b.emit(b.choose(_ANY_UNARY).format(x=x.name))


def written_out(b: Builder, x: Value) -> None:
    """An activation as formulas of papers have it."""
    if not x.is_float:
        raise Refused
    b.emit(b.choose(_WRITTEN_OUT).format(x=x.name))


def binary(b: Builder, x: Value) -> None:
    """Two values that broadcast; their dtypes may differ."""
    y = partner(b, x)
    kinds = _BOOL_BINARY if x.is_bool and y.is_bool else _BINARY
    b.emit(b.choose(kinds).format(x=x.name, y=y.name))


def with_constant(b: Builder, x: Value) -> None:
    """A value and a weight that broadcasts over it: a bias, a scale, a table."""
    if not x.is_float:
        raise Refused
    kind = b.choose(["row", "whole", "channel", "one"])
    shape: tuple[int, ...] = x.shape
    if kind == "row":
        shape = x.shape[-1:]
    elif kind == "channel" and x.rank >= 3:
        shape = (x.shape[1], *[1] * (x.rank - 2))
    elif kind == "one":
        shape = b.choose([(), (1,)])
    weight = b.weight(shape, x.tensor.dtype)
    b.emit(b.choose(["{x} + {w}", "{x} * {w}", "{w} + {x}", "{x} - {w}", "{w} * {x}"]).format(x=x.name, w=weight))


def compare(b: Builder, x: Value) -> None:
    """A boolean from a comparison, far from where it turns over."""
    other = b.choose(["number", "value"])
    sign = b.choose(_COMPARISONS)
    if other == "number" or x.is_bool:
        step = b.choose([0, 0.25, 1])
        b.emit(f"{b.far(x, step).name} {sign} {step}")
        return
    y = partner(b, x)
    difference = Value("", torch.sub(x.tensor.double(), y.tensor.double()).to(x.tensor.dtype))
    if x.is_float:
        b.far(difference)
    b.emit(f"{x.name} {sign} {y.name}")


def select(b: Builder, x: Value) -> None:
    """One of two values by a boolean, or a constant where it holds."""
    if x.is_bool:
        raise Refused
    y = partner(b, x)
    conditions = [v for v in b.values if v.is_bool and broadcasts(v, x)]
    condition = b.choose(conditions).name if conditions else f"({b.far(x).name} > 0)"
    b.emit(
        b.choose(
            [
                "torch.where({c}, {x}, {y})",
                "torch.where({c}, {x}, 0.5)",
                "{x}.masked_fill({c}, 2)",
                "{x} * {c}",
                "torch.where({c}, {x} * 2, {x})",
            ]
        ).format(c=condition, x=x.name, y=y.name)
    )


def cast(b: Builder, x: Value) -> None:
    """Another dtype."""
    dtype = b.choose(DTYPES)
    if x.is_float and not dtype.is_floating_point:
        b.far(x, 0.0) if dtype == torch.bool else b.far(x, 0.0, period=1.0)
    b.emit(b.choose([f"{x.name}.to({dtype})", f"{x.name}.type({dtype})"]))


def change(b: Builder, x: Value) -> None:
    """A statement that changes a value in place."""
    if x.is_bool or not x.tensor.numel():
        raise Refused
    y = b.choose([v for v in b.values if v.tensor.dtype == x.tensor.dtype and broadcasts_to(v, x)])
    b.change(x, b.choose(_CHANGES).format(x=x.name, y=y.name))


def partner(b: Builder, x: Value) -> Value:
    """Another value that broadcasts with x: the last first, x itself where there is none."""
    fits = [v for v in reversed(b.values) if broadcasts(v, x)]
    return b.choose(fits)


def broadcasts(a: Value, x: Value) -> bool:
    """Whether two values go together, and the result is no larger than the larger."""
    pairs = list(zip(reversed(a.shape), reversed(x.shape), strict=False))
    return max(a.rank, x.rank) <= 5 and all(m == n or 1 in (m, n) for m, n in pairs)


def broadcasts_to(a: Value, x: Value) -> bool:
    """Whether a takes x's shape."""
    pairs = list(zip(reversed(a.shape), reversed(x.shape), strict=False))
    return a.rank <= x.rank and all(m in (n, 1) for m, n in pairs)
