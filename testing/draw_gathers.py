"""Reductions, scans, softmax, and operators that pick elements by position."""

from __future__ import annotations

import torch

from .builder import Builder, Refused, Value


def reduce(b: Builder, x: Value) -> None:
    """Over one dim, several, or all."""
    dims = [] if not x.rank else [b.integer(-x.rank, x.rank - 1)]
    if x.rank > 1 and b.flag():
        dims = sorted({dims[0] % x.rank, b.integer(0, x.rank - 1)})
    keep = b.flag()
    if x.is_bool:
        name = b.choose(["any", "all", "sum"])
    elif x.is_float:
        name = b.choose(["sum", "mean", "amax", "amin", "var", "logsumexp", "std", "norm"])
    else:
        name = b.choose(["sum", "amax", "amin", "any"])
    if not dims:
        b.emit(f"{x.name}.{name}()")
    elif name == "any" or name == "all":
        b.emit(f"{x.name}.{name}({dims[0]}, {keep})")
    elif name in ("var", "std"):
        b.emit(f"({x.name} * 1.0).{name}({dims}, correction={b.choose([0, 1])}, keepdim={keep})")
    elif name == "norm":
        b.emit(f"{x.name}.norm(dim={dims}, keepdim={keep})")
    else:
        b.emit(f"{x.name}.{name}({dims}, {keep})")


def along(b: Builder, x: Value) -> None:
    """One dim, which stays: softmax and scans."""
    if not x.rank or x.is_bool:
        raise Refused
    dim = b.integer(-x.rank, x.rank - 1)
    if not x.is_float:
        b.emit(f"{x.name}.cumsum({dim})")
        return
    b.emit(
        b.choose(
            [
                "{x}.softmax({d})",
                "F.log_softmax({x}, {d})",
                "{x}.cumsum({d})",
                "torch.exp({x} - {x}.amax({d}, keepdim=True))",
                "{x}.softmax({d}, dtype=torch.float32)",
                "F.glu({x}, {d})",
                "{x}.cummax({d})[0]",
                "{x}.flip({d}).cumsum({d}).flip({d})",
            ]
        ).format(x=x.name, d=dim)
    )


def position(b: Builder, x: Value) -> None:
    """Where an extreme lies, and the elements in order."""
    if not x.rank or x.is_bool or not x.is_float:
        raise Refused
    dim = b.integer(0, x.rank - 1)
    b.distinct(x, dim)
    kind = b.choose(["argmax", "argmin", "max", "topk", "sort"])
    if kind in ("argmax", "argmin"):
        b.emit(f"{x.name}.{kind}({dim}, keepdim={b.flag()})")
    elif kind == "topk":
        b.emit_several(f"{x.name}.topk({b.integer(1, max(1, x.shape[dim]))}, {dim})", 2)
    else:
        b.emit_several(f"{x.name}.{kind}({dim})", 2)


def pick(b: Builder, x: Value) -> None:
    """Elements by constant or computed positions: embedding, gather, index, index_select."""
    if not x.rank:
        raise Refused
    if x.tensor.dtype in (torch.int64, torch.int32) and b.flag():
        rows = 11
        table = b.weight((rows, b.integer(1, 6)))
        b.emit(f"F.embedding({x.name}.abs().clamp(max={rows - 1}).long(), {table})")
        return
    dim = b.integer(0, x.rank - 1)
    n = x.shape[dim]
    if not n:
        raise Refused
    kind = b.choose(["index_select", "index", "gather", "take_along_dim", "computed", "two"])
    if kind == "gather" or kind == "take_along_dim":
        index = b.weight(x.shape, torch.int64, below=n)
        call = f"{x.name}.gather({dim}, {index})" if kind == "gather" else f"{x.name}.take_along_dim({index}, {dim})"
        b.emit(call)
    elif kind == "index":
        b.emit(f"{x.name}[{':, ' * dim}{b.weight((b.integer(1, 4),), torch.int64, below=n)}]")
    elif kind == "two" and x.rank >= 2:
        first, second = (b.weight((3,), torch.int64, below=m) for m in x.shape[:2])
        b.emit(f"{x.name}[{first}, {second}]")
    elif kind == "computed":
        counts = [v for v in b.values if v.tensor.dtype == torch.int64 and v.rank == 1]
        b.emit(f"{x.name}.index_select({dim}, {b.choose(counts).name}.remainder({n}))")
    else:
        b.emit(f"{x.name}.index_select({dim}, {b.weight((b.integer(1, 4),), torch.int64, below=n)})")


def create(b: Builder, x: Value) -> None:
    """Tensors made from nothing, joined with x."""
    if not x.rank:
        raise Refused
    n, dtype = x.shape[-1], x.tensor.dtype
    made = b.choose(
        [
            f"torch.arange({n}, dtype={dtype})",
            f"torch.ones({n}, dtype={dtype})",
            f"torch.full(({n},), 3, dtype={dtype})",
            f"torch.zeros(1, {n}, dtype={dtype})",
        ]
    )
    if x.is_bool:
        raise Refused
    y = b.emit(made)
    b.emit(
        b.choose(["{x} + {y}", "{x} * {y}", "torch.cat([{x}.reshape(-1), {y}.reshape(-1)])"]).format(x=x.name, y=y.name)
    )
