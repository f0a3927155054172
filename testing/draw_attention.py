"""Attention: as one operator and written out; masked, causal, grouped queries, rotary positions."""

from __future__ import annotations

import torch

from .builder import Builder, Refused, Value


def attention(b: Builder, x: Value) -> None:
    """Attention of a sequence [batch, length, width] with itself, split into heads or not."""
    if x.rank != 3 or not x.is_float or 0 in x.shape:
        raise Refused
    n, length, width = x.shape
    heads = b.choose([h for h in (2, 1, 4) if width % h == 0])
    depth = width // heads
    shared = b.choose([1, 1, 2]) if heads % 2 == 0 else 1  # queries that share a head of k and v
    how = b.choose(["same", "projected", "one projection"])
    q, k, v = _operands(b, x, how, width, width // shared)
    q = _heads(b, q, f"{n}, {length}, {heads}, {depth}")
    k, v = (_heads(b, y, f"{n}, {length}, {heads // shared}, {depth}") for y in (k, v))
    if b.choose([False, False, True]):
        q, k = _rotated(b, q, length, depth), _rotated(b, k, length, depth)
    grouped = shared > 1
    if grouped and b.flag():
        k, v = (_repeated(b, y, shared, (n, heads // shared, length, depth)) for y in (k, v))
        grouped = False
    mask = b.choose(["none", "causal", "bool", "additive", "padding"])
    if grouped or b.flag():
        y = _operator(b, q, k, v, mask, length, grouped)
    else:
        y = _written_out(b, q, k, v, mask, length, depth)
    y = b.emit(f"{y.name}.transpose(1, 2).{b.choose(['reshape', 'contiguous().view'])}({n}, {length}, {width})")
    if b.flag():
        y = b.emit(f"F.linear({y.name}, {b.scaled_weight((width, width), x.tensor.dtype, width)})")
        b.emit(f"{x.name} + {y.name}")


def plain(b: Builder, x: Value) -> None:
    """The operator on operands as they come."""
    if x.rank not in (2, 3, 4) or not x.is_float:
        raise Refused
    options = ["", ", is_causal=True", ", scale=0.5", ", enable_gqa=True", ", dropout_p=0.0"]
    b.emit(f"F.scaled_dot_product_attention({x.name}, {x.name}, {x.name}{b.choose(options)})")


def _operands(b: Builder, x: Value, how: str, width: int, key_width: int) -> tuple[Value, Value, Value]:
    dtype = x.tensor.dtype
    if how == "one projection":
        w = b.scaled_weight((width + 2 * key_width, width), dtype, width)
        y = b.emit(f"F.linear({x.name}, {w}, {b.weight((width + 2 * key_width,), dtype)})")
        q, k, v = b.emit_several(f"{y.name}.split([{width}, {key_width}, {key_width}], -1)", 3)
        return q, k, v
    if how == "same" and key_width == width:
        return x, x, x
    q, k, v = (
        b.emit(f"F.linear({x.name}, {b.scaled_weight((out, width), dtype, width)})")
        for out in (width, key_width, key_width)
    )
    return q, k, v


def _heads(b: Builder, x: Value, shape: str) -> Value:
    return b.emit(
        f"{x.name}.{b.choose(['view', 'reshape'])}({shape}).{b.choose(['transpose(1, 2)', 'permute(0, 2, 1, 3)'])}"
    )


def _rotated(b: Builder, x: Value, length: int, depth: int) -> Value:
    """Rotary positions: pairs of channels turned by an angle a position."""
    if depth % 2:
        return x
    cos, sin = (b.weight((length, depth), x.tensor.dtype) for _ in range(2))
    half = depth // 2
    turned = b.emit(f"torch.cat([-{x.name}[..., {half}:], {x.name}[..., :{half}]], -1)")
    return b.emit(f"{x.name} * {cos} + {turned.name} * {sin}")


def _repeated(b: Builder, x: Value, times: int, shape: tuple[int, ...]) -> Value:
    n, heads, length, depth = shape
    if b.flag():
        return b.emit(f"{x.name}.repeat_interleave({times}, dim=1)")
    spread = f"{x.name}[:, :, None].expand({n}, {heads}, {times}, {length}, {depth})"
    return b.emit(f"{spread}.reshape({n}, {heads * times}, {length}, {depth})")


def _operator(b: Builder, q: Value, k: Value, v: Value, mask: str, length: int, grouped: bool) -> Value:
    extra = ", enable_gqa=True" if grouped else ""
    if mask == "causal":
        extra += b.choose([", is_causal=True", f", attn_mask=torch.ones({length}, {length}, dtype=torch.bool).tril()"])
    elif mask == "bool":
        extra += f", attn_mask={b.weight((length, length), torch.bool)}"
    elif mask in ("additive", "padding"):
        extra += f", attn_mask={b.weight((length, length), q.tensor.dtype)}"
    if b.choose([False, False, True]):
        extra += ", scale=0.3"
    return b.emit(f"F.scaled_dot_product_attention({q.name}, {k.name}, {v.name}{extra})")


def _written_out(b: Builder, q: Value, k: Value, v: Value, mask: str, length: int, depth: int) -> Value:
    """softmax(q @ k^T / sqrt(depth) + mask) @ v, as BERT and GPT-2 have it."""
    root = depth**0.5
    form = b.choose(["({q} @ {k}) / {r}", "({q} @ {k}) * {s}", "({q} / {r}) @ {k}", "({q} * {s}) @ {k}", "{q} @ {k}"])
    turned = b.choose(["{k}.transpose(-1, -2)", "{k}.mT", "{k}.permute(0, 1, 3, 2)"]).format(k=k.name)
    scores = b.emit(form.format(q=q.name, k=turned, r=round(root, 6), s=round(1 / root, 6)))
    if mask == "causal":
        allowed = f"torch.ones({length}, {length}, dtype=torch.bool).tril()"
        low = b.choose(["-1e4", "float('-inf')"])
        forms = ["torch.where({a}, {s}, {low})", "{s}.masked_fill(~{a}, {low})"]
        # The scores beyond the mask may be as low as float16 goes: Builder refuses what is not finite or large.
        scores_text = b.choose(forms).format(a=allowed, s=scores.name, low=low)
    elif mask in ("additive", "padding"):
        shape = (length, length) if mask == "additive" else (1, 1, 1, length)
        scores_text = f"({scores.name} + {b.weight(shape, q.tensor.dtype)})"
    else:
        scores_text = scores.name
    weights = b.emit(b.choose(["F.softmax({s}, dim=-1)", "({s}).softmax(-1)"]).format(s=scores_text))
    if b.flag():
        weights = b.emit(f"F.dropout({weights.name}, 0.1, training=False)")
    return b.emit(b.choose(["torch.matmul({w}, {v})", "{w} @ {v}"]).format(w=weights.name, v=v.name))
