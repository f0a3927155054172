"""Products with weights or with each other, and what stands behind them in models: bias, norm, activation, residual."""

from __future__ import annotations

import math

from .builder import Builder, Refused, Value
from .draw_elementwise import partner

_ACTIVATIONS = (
    "torch.relu({x})",
    "F.gelu({x})",
    "F.silu({x})",
    "torch.sigmoid({x})",
    "torch.tanh({x})",
    "F.relu6({x})",
    "{x}.clamp(-1, 2)",
    "F.leaky_relu({x}, 0.1)",
    "F.hardswish({x})",
)


def linear(b: Builder, x: Value) -> None:
    """A linear layer in one of its spellings."""
    if not x.rank or not x.is_float:
        raise Refused
    depth, out, dtype = x.shape[-1], b.integer(1, 8), x.tensor.dtype
    kind = b.choose(["linear", "no bias", "matmul", "addmm", "stored transposed"])
    if kind in ("linear", "no bias"):
        w = b.scaled_weight((out, depth), dtype, depth)
        bias = f", {b.weight((out,), dtype)}" if kind == "linear" else ""
        y = b.emit(f"F.linear({x.name}, {w}{bias})")
    elif kind == "stored transposed":
        y = b.emit(f"{x.name} @ {b.scaled_weight((out, depth), dtype, depth)}.t()")
    else:
        w = b.scaled_weight((depth, out), dtype, depth)
        if kind == "addmm" and x.rank == 2:
            extra = b.choose(["", ", beta=2", ", alpha=0.5"])
            added = b.weight(b.choose([(out,), (1, out), (x.shape[0], out), (x.shape[0], 1)]), dtype)
            y = b.emit(f"torch.addmm({added}, {x.name}, {w}{extra})")
        else:
            y = b.emit(f"{x.name} @ {w}")
    tail(b, x, y)


def product(b: Builder, x: Value) -> None:
    """A product of two values."""
    if not x.rank or not x.is_float:
        raise Refused
    kind = b.choose(["gram", "outer", "matmul", "bmm", "baddbmm", "vector", "einsum"])
    scale = max(1, x.shape[-1])
    if kind == "gram":
        y = b.emit(f"({x.name} / {scale}) @ {x.name}.mT") if x.rank >= 2 else b.emit(f"torch.dot({x.name}, {x.name})")
    elif kind == "outer":
        y = b.emit(f"{x.name}.unsqueeze(-1) @ {x.name}.unsqueeze(-2)")
    elif kind == "einsum" and x.rank >= 2:
        y = b.emit(f"torch.einsum('...ij,...kj->...ik', {x.name}, {x.name} / {scale})")
    elif kind == "vector":
        y = b.emit(f"{x.name} @ {b.scaled_weight((x.shape[-1],), x.tensor.dtype, scale)}")
    elif kind in ("bmm", "baddbmm") and x.rank == 3:
        n, _, depth = x.shape
        w = b.scaled_weight((n, depth, b.integer(1, 6)), x.tensor.dtype, depth)
        y = b.emit(f"torch.bmm({x.name}, {w})")
        if kind == "baddbmm":
            y = b.emit(f"torch.baddbmm({y.name}, {x.name}, {w}{b.choose(['', ', beta=0.5'])})")
    else:
        fits = [v for v in b.values if v.is_float and v.rank and v.tensor.dtype == x.tensor.dtype]
        y = b.emit(f"({x.name} / {scale}) @ {b.choose(fits[::-1]).name}")
    tail(b, x, y)


def convolution(b: Builder, x: Value) -> None:
    """A convolution over 1, 2 or 3 dims, transposed or not, with what stands around it."""
    dims = x.rank - 2
    if dims not in (1, 2, 3) or not x.is_float:
        raise Refused
    channels, dtype = x.shape[1], x.tensor.dtype
    if not channels:
        raise Refused
    kind = b.choose(["plain", "pointwise", "depthwise", "grouped", "transposed", "same"])
    divisors = [g for g in (2, 3, 4) if channels % g == 0]
    groups = {"depthwise": channels, "grouped": divisors[0] if divisors else 1}.get(kind, 1)
    out = groups * b.integer(1, 2) if groups > 1 else b.choose([channels, 4, 1, 7, 8])
    kernel = 1 if kind == "pointwise" else b.choose([3, 1, 2, 5])
    stride, padding, dilation = b.choose([1, 2]), b.choose([kernel // 2, 0, 1]), b.choose([1, 1, 2])
    source = x
    if b.choose([False, False, True]):
        amounts = [b.choose([1, 0, 2]) for _ in range(2 * dims)]
        source = b.emit(f"F.pad({x.name}, {tuple(amounts)})")
    window = (kernel,) * dims
    if kind == "transposed":
        w = b.scaled_weight((channels, out, *window), dtype, channels)
        bias = b.weight((out,), dtype) if b.flag() else "None"
        extra = f"stride={stride}, padding={padding}, output_padding={stride - 1}"
        y = b.emit(f"F.conv_transpose{dims}d({source.name}, {w}, {bias}, {extra})")
    else:
        w = b.scaled_weight((out, channels // groups, *window), dtype, channels // groups * kernel**dims)
        bias = b.weight((out,), dtype) if b.flag() else "None"
        if kind == "same":
            extra = f"padding='same', dilation={dilation}"
        else:
            extra = f"stride={stride}, padding={padding}, dilation={dilation}, groups={groups}"
        y = b.emit(f"F.conv{dims}d({source.name}, {w}, {bias}, {extra})")
    if b.choose([False, True]):
        y = batch_norm(b, y)
    if b.choose([False, False, True]):
        shape = (out, *[1] * dims)
        y = b.emit(b.choose(["{y} * {w}", "{w} + {y}"]).format(y=y.name, w=b.weight(shape, dtype)))
    tail(b, x, y)


def batch_norm(b: Builder, x: Value) -> Value:
    """A batch norm in inference."""
    if x.rank < 2 or not x.is_float:
        raise Refused
    c, dtype = x.shape[1], x.tensor.dtype
    mean, var = b.weight((c,), dtype), b.weight((c,), dtype, ".abs() + 0.5")
    affine = f", {b.weight((c,), dtype)}, {b.weight((c,), dtype)}" if b.flag() else ", None, None"
    return b.emit(f"F.batch_norm({x.name}, {mean}, {var}{affine}, False, 0.1, 1e-3)")


def _groups_of_some(x: Value, groups: int) -> bool:
    """Whether each group holds several values: one alone is its own mean, and the rest is rounding."""
    return x.shape[1] % groups == 0 and math.prod(x.shape[1:]) > groups


def norm(b: Builder, x: Value) -> None:
    """A normalisation, as an operator or written out."""
    if not x.rank or not x.is_float:
        raise Refused
    kind = b.choose(["layer", "rms", "batch", "group", "written layer", "written rms", "instance", "l2"])
    n, dtype = x.shape[-1], x.tensor.dtype
    if kind == "batch":
        batch_norm(b, x)
    elif kind == "layer":
        affine = b.choose(["", f", {b.weight((n,), dtype)}", f", {b.weight((n,), dtype)}, {b.weight((n,), dtype)}"])
        b.emit(f"F.layer_norm({x.name}, ({n},){affine}{', eps=0.1' if not affine else ''})")
    elif kind == "rms":
        b.emit(f"F.rms_norm({x.name}, ({n},), {b.weight((n,), dtype)}, 1e-3)")
    elif kind == "group":
        groups = b.choose([g for g in (1, 2, 3, 4) if x.rank >= 2 and x.shape[1] and _groups_of_some(x, g)])
        b.emit(f"F.group_norm({x.name}, {groups}, {b.weight((x.shape[1],), dtype)}, None, 0.1)")
    elif kind == "instance":
        b.emit(f"F.instance_norm({x.name}, eps=0.1)")
    elif kind == "l2":
        b.emit(f"{x.name} / ({x.name}.norm(dim=-1, keepdim=True) + 0.5)")
    elif kind == "written rms":
        y = b.emit(f"{x.name} * torch.rsqrt({x.name}.pow(2).mean(-1, keepdim=True) + 1e-3)")
        b.emit(f"{b.weight((n,), dtype)} * {y.name}")
    else:
        centred = b.emit(f"{x.name} - {x.name}.mean(-1, keepdim=True)")
        form = b.choose(["{c} / torch.sqrt({v} + 0.1)", "{c} * torch.rsqrt({v} + 0.1)", "{c} / ({v} + 0.1).sqrt()"])
        variance = b.emit(
            b.choose(["{c}.pow(2).mean(-1, keepdim=True)", "({c} * {c}).mean(-1, True)"]).format(c=centred.name)
        )
        y = b.emit(form.format(c=centred.name, v=variance.name))
        b.emit(f"{y.name} * {b.weight((n,), dtype)} + {b.weight((n,), dtype)}")


def pool(b: Builder, x: Value) -> None:
    """Pooling and resizing of images, sequences and volumes."""
    dims = x.rank - 2
    if dims not in (1, 2, 3) or not x.is_float:
        raise Refused
    kind = b.choose(["max", "avg", "adaptive", "global", "nearest", "linear", "adaptive max"])
    kernel, stride = b.choose([2, 3]), b.choose([1, 2])
    if kind in ("max", "avg"):
        extra = b.choose(["", ", ceil_mode=True", ", count_include_pad=False" if kind == "avg" else ", dilation=2"])
        b.emit(f"F.{kind}_pool{dims}d({x.name}, {kernel}, {stride}, {b.choose([0, 1])}{extra})")
    elif kind == "adaptive":
        b.emit(f"F.adaptive_avg_pool{dims}d({x.name}, {b.choose([1, 2, 3])})")
    elif kind == "adaptive max":
        b.emit(f"F.adaptive_max_pool{dims}d({x.name}, 2)")
    elif kind == "global":
        b.emit(f"{x.name}.mean({tuple(range(2, x.rank))}, keepdim={b.flag()})")
    elif kind == "nearest":
        b.emit(f"F.interpolate({x.name}, scale_factor=2)")
    elif dims == 2:
        b.emit(f"F.interpolate({x.name}, scale_factor=2, mode='bilinear', align_corners={b.flag()})")
    else:
        raise Refused


def tail(b: Builder, x: Value, y: Value) -> None:
    """What models put behind a product y of x: a bias, a residual, an activation, or nothing."""
    for _ in range(b.integer(0, 3)):
        kind = b.choose(["activation", "residual", "bias", "reshape", "scale", "other"])
        if kind == "activation":
            y = b.emit(b.choose(_ACTIVATIONS).format(x=y.name))
        elif kind == "residual" and x.shape == y.shape:
            y = b.emit(b.choose(["{y} + {x}", "{x} + {y}", "torch.add({y}, {x}, alpha=2)"]).format(x=x.name, y=y.name))
        elif kind == "bias" and y.rank:
            y = b.emit(f"{y.name} + {b.weight(y.shape[-1:], y.tensor.dtype)}")
        elif kind == "reshape":
            y = b.emit(f"{y.name}.flatten(0, {max(0, y.rank - 2)})")
        elif kind == "scale" and y.rank:
            y = b.emit(f"{y.name} * {b.weight(y.shape[-1:], y.tensor.dtype)}")
        else:
            y = b.emit(f"{y.name} + {partner(b, y).name}")
