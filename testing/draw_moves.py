"""Operators that move elements, or look at them in another shape."""

from __future__ import annotations

import math

from .builder import Builder, Refused, Value, dims_text


def _factors(n: int) -> list[int]:
    return [f for f in range(1, n + 1) if n % f == 0] or [1]


def view(b: Builder, x: Value) -> None:
    """Another shape of the same elements in order."""
    kind = b.choose(["reshape", "flatten", "split dim", "squeeze", "unsqueeze", "view", "as is"])
    name, shape = x.name, list(x.shape)
    if kind == "as is":
        b.emit(f"{name}.reshape({dims_text(shape)})")
    elif kind == "flatten":
        start = b.integer(0, max(0, x.rank - 1))
        end = b.integer(start, max(0, x.rank - 1))
        b.emit(f"{name}.flatten({start}, {end})")
    elif kind == "split dim":
        dim = _dim(b, x)
        factor = b.choose(_factors(shape[dim]))
        if b.flag():
            b.emit(f"{name}.unflatten({dim}, ({factor}, {shape[dim] // factor}))")
        else:
            b.emit(f"{name}.reshape({dims_text([*shape[:dim], factor, shape[dim] // factor, *shape[dim + 1 :]])})")
    elif kind == "squeeze":
        ones = [d for d, n in enumerate(shape) if n == 1]
        b.emit(f"{name}.squeeze({b.choose(ones)})" if ones else f"{name}.squeeze()")
    elif kind == "unsqueeze":
        b.emit(f"{name}.unsqueeze({b.integer(0, x.rank)})")
    else:
        count = math.prod(shape)
        first = b.choose(_factors(count))
        second = b.choose(_factors(count // first)) if count else 1
        rest = count // first // second if count else 0
        b.emit(f"{name}.{kind}({dims_text([first, second, rest])})")


def permute(b: Builder, x: Value) -> None:
    """The dims in another order."""
    if x.rank < 2:
        raise Refused
    kind = b.choose(["permute", "transpose", "movedim", "mT", "contiguous"])
    if kind == "mT":
        b.emit(f"{x.name}.mT")
    elif kind == "transpose":
        b.emit(f"{x.name}.transpose({b.integer(0, x.rank - 1)}, {b.integer(-x.rank, -1)})")
    elif kind == "movedim":
        b.emit(f"torch.movedim({x.name}, {b.integer(0, x.rank - 1)}, {b.integer(0, x.rank - 1)})")
    else:
        end = ".contiguous()" if kind == "contiguous" else ""
        b.emit(f"{x.name}.permute({dims_text(b.order(x.rank))}){end}")


def reshape_chain(b: Builder, x: Value) -> None:
    """reshape, permute, reshape: heads, windows, channel shuffles and whatever else has this form."""
    count = math.prod(x.shape)
    if count < 2:
        raise Refused
    shape, left = [], count
    for _ in range(b.integer(1, 3)):
        shape.append(b.choose(_factors(left)))
        left //= shape[-1]
    shape.append(left)
    order = b.order(len(shape))
    y = b.emit(f"{x.name}.reshape({dims_text(shape)}).permute({dims_text(order)})")
    back = b.choose(["x", "joined", "none"])
    if back == "x":
        b.emit(f"{y.name}.reshape({dims_text(x.shape)})")
    elif back == "joined":
        b.emit(f"{y.name}.flatten(0, 1)")


def cut(b: Builder, x: Value) -> None:
    """A part: slice, select, narrow, diagonal, every second, from the end."""
    dim = _dim(b, x)
    n = x.shape[dim]
    if not n:
        raise Refused
    kind = b.choose(["slice", "select", "narrow", "step", "last", "diagonal", "index"])
    start = b.integer(0, n - 1)
    stop = b.integer(start + 1, n)
    before = ":, " * dim
    if kind == "slice":
        b.emit(f"{x.name}[{before}{start}:{stop}]")
    elif kind == "select":
        b.emit(f"{x.name}.select({dim}, {start})")
    elif kind == "narrow":
        b.emit(f"{x.name}.narrow({dim}, {start}, {stop - start})")
    elif kind == "step":
        b.emit(f"{x.name}[{before}{start}::2]")
    elif kind == "last":
        b.emit(f"{x.name}[{before}{-b.integer(1, n)}:]")
    elif kind == "diagonal" and x.rank >= 2:
        b.emit(f"{x.name}.diagonal(0, 0, -1)")
    else:
        b.emit(f"{x.name}[..., {b.integer(-x.shape[-1], max(0, x.shape[-1] - 1))}]")


def split(b: Builder, x: Value) -> None:
    """Several parts, joined again or not."""
    dim = _dim(b, x)
    n = x.shape[dim]
    if n < 2:
        raise Refused
    kind = b.choose(["chunk", "split", "sizes", "unbind"])
    if kind == "chunk":
        parts = b.emit_several(f"{x.name}.chunk(2, {dim})", 2)
    elif kind == "split":
        size = b.integer(-(-n // 4), n - 1)
        parts = b.emit_several(f"{x.name}.split({size}, {dim})", -(-n // size))
    elif kind == "sizes":
        size = b.integer(1, n - 1)
        parts = b.emit_several(f"{x.name}.split([{size}, {n - size}], {dim})", 2)
    else:
        if n > 4:
            raise Refused
        parts = b.emit_several(f"{x.name}.unbind({dim})", n)
    if b.flag():
        names = [p.name for p in parts[:: b.choose([1, -1])]]
        if kind == "unbind":
            b.emit(f"torch.stack([{', '.join(names)}], {dim})")
        else:
            b.emit(f"torch.cat([{', '.join(names)}], {dim})")


def join(b: Builder, x: Value) -> None:
    """Several values as one."""
    kind = b.choose(["cat", "stack", "cat with itself"])
    if kind == "cat with itself":
        b.emit(f"torch.cat([{x.name}, {x.name}.neg()], {_dim(b, x)})")
        return
    same = [v for v in b.values if v.shape == x.shape]
    others = [b.choose(same) for _ in range(b.integer(1, 2))]
    names = ", ".join(v.name for v in (x, *others))
    dim = b.integer(0, x.rank) if kind == "stack" else _dim(b, x)
    b.emit(f"torch.{kind}([{names}], {dim})")


def spread(b: Builder, x: Value) -> None:
    """Elements several times: expand, repeat, pad, roll, flip, triangles."""
    kind = b.choose(["expand", "repeat", "pad", "roll", "flip", "expand ones", "repeat_interleave", "tril", "pad edge"])
    if kind == "expand" and x.rank <= 4:
        b.emit(f"{x.name}.expand({dims_text([2, *x.shape])})")
    elif kind == "expand ones" and 1 in x.shape:
        b.emit(f"{x.name}.expand({dims_text([3 if n == 1 else -1 for n in x.shape])})")
    elif kind == "repeat":
        b.emit(f"{x.name}.repeat({dims_text([b.integer(1, 2) for _ in x.shape] or [2])})")
    elif kind == "pad":
        low = b.choose([1, 0, -1])
        value = b.choose(["", ", value=0.5"]) if x.is_float else ""
        b.emit(f"F.pad({x.name}, ({low}, 2){value})")
    elif kind == "pad edge" and x.rank >= 3 and x.is_float:
        b.emit(f"F.pad({x.name}, (1, 1), mode='{b.choose(['replicate', 'reflect', 'circular'])}')")
    elif kind == "roll":
        dim = _dim(b, x)
        b.emit(f"{x.name}.roll({b.integer(-2, 2)}, {dim})")
    elif kind == "flip":
        b.emit(f"{x.name}.flip({_dim(b, x)})")
    elif kind == "repeat_interleave":
        b.emit(f"{x.name}.repeat_interleave(2, dim={_dim(b, x)})")
    elif kind == "tril" and x.rank >= 2:
        b.emit(f"{x.name}.{b.choose(['tril', 'triu'])}({b.integer(-1, 1)})")
    else:
        raise Refused


def windows(b: Builder, x: Value) -> None:
    """Window partitions and their inverse, shifted or not, with something done to the windows: as Swin has it."""
    if x.rank != 4:
        raise Refused
    n, h, w, c = x.shape
    size = b.choose([s for s in (2, 3, 4) if h % s == 0 and w % s == 0 and h and w])
    shifted = b.emit(f"torch.roll({x.name}, ({-(size // 2)}, {-(size // 2)}), (1, 2))") if b.flag() else x
    parts = f"{n}, {h // size}, {size}, {w // size}, {size}, {c}"
    apart = b.emit(f"{shifted.name}.view({parts}).permute(0, 1, 3, 2, 4, 5)")
    rows = b.emit(f"{apart.name}.reshape({n * (h // size) * (w // size)}, {size * size}, {c})")
    done = b.emit(b.choose(["{r} + {r}", "{r}.softmax(1)", "torch.relu({r})", "{r}"]).format(r=rows.name))
    if not done.is_float and b.flag():
        return
    back = b.emit(f"{done.name}.view({n}, {h // size}, {w // size}, {size}, {size}, {c}).permute(0, 1, 3, 2, 4, 5)")
    whole = b.emit(f"{back.name}.reshape({dims_text(x.shape)})")
    if b.flag():
        b.emit(f"torch.roll({whole.name}, ({size // 2}, {size // 2}), (1, 2)) + {x.name}")


def shuffles(b: Builder, x: Value) -> None:
    """Moves between channels and pixels."""
    if x.rank != 4:
        raise Refused
    n, c, h, w = x.shape
    kind = b.choose(["channel", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "unfold", "space"])
    if kind in ("channel", "channel_shuffle"):
        groups = b.choose([g for g in (2, 3, 4, 1) if c and c % g == 0])
        if kind == "channel_shuffle":
            b.emit(f"F.channel_shuffle({x.name}, {groups})")
        else:
            split_ = f"{x.name}.view({n}, {groups}, {c // groups}, {h}, {w})"
            b.emit(f"{split_}.transpose(1, 2).contiguous().view({n}, {c}, {h}, {w})")
    elif kind == "unfold":
        b.emit(f"{x.name}.unfold(2, {b.integer(1, max(1, min(3, h)))}, {b.integer(1, 2)})")
    elif kind == "space":
        b.emit(f"{x.name}.permute(0, 2, 3, 1).reshape({n}, {h * w}, {c})")
    else:
        b.emit(f"F.{kind}({x.name}, 2)")


def _dim(b: Builder, x: Value) -> int:
    if not x.rank:
        raise Refused
    return b.integer(0, x.rank - 1)
