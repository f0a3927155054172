"""How a stage's loads and stores move along its axes: flat addresses, strides, and where conditions are constant."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Call, Op, Range, TensorLoad

from .stages import Axis, Buffer, Expr, Stage, Stmt, Var, collect, substitute

# Intrinsics whose vector form LLVM takes (some as one libm call per lane). Others must stay scalar.
_VECTOR_CALLS = {
    *("tirx.exp", "tirx.exp2", "tirx.exp10", "tirx.log", "tirx.log2", "tirx.log10", "tirx.pow", "tirx.sqrt"),
    *("tirx.sin", "tirx.cos", "tirx.floor", "tirx.ceil", "tirx.trunc", "tirx.round", "tirx.nearbyint"),
    *("tirx.fabs", "tirx.reinterpret", "tirx.shift_left", "tirx.shift_right", "tirx.bitwise_and"),
    *("tirx.bitwise_or", "tirx.bitwise_xor", "tirx.bitwise_not", "tirx.likely", "tirx.if_then_else"),
    *("tirx.rsqrt", "tirx.sigmoid"),
}
# These are expanded by expand_math for the narrow floats only; for float64 they are calls of libm.
_FLOAT32_VECTOR_CALLS = {"tirx.tanh", "tirx.erf", "tirx.log1p"}


def element_bits(dtype: str) -> int:
    """Bits of an element in memory; a bool takes a byte."""
    if dtype == "bool":
        return 8
    return int("".join(c for c in dtype if c.isdigit()))


class Views:
    """The one-dimensional buffers that stages address, and the statements that declare them.

    `scratch` maps a buffer to a smaller one that holds a single row: the first `depth` dims are dropped. `own` are the
    buffers that exist only as flat ones: TVM's StorageRewrite overlooks reads through a view when it reuses memory.
    """

    def __init__(self, own: Iterable[Buffer] = ()) -> None:
        self.own = frozenset(own)
        self._flat: dict[Buffer, Buffer] = {}
        self.scratch: dict[Buffer, tuple[Buffer, int]] = {}
        self.declarations: list[Stmt] = []

    def flat(self, buffer: Buffer) -> tuple[Buffer, int]:
        """The flat buffer in the place of `buffer`, and how many leading dims it lacks."""
        if buffer in self.scratch:
            return self.scratch[buffer]
        if buffer not in self._flat:
            size = size_of(buffer)
            if buffer in self.own:
                flat = tirx.decl_buffer((size,), str(buffer.dtype), buffer.name)
            else:
                flat = tirx.decl_buffer((size,), str(buffer.dtype), f"{buffer.name}_flat", data=buffer.data)
                self.declarations.append(tirx.DeclBuffer(flat, data=buffer.data))
            self._flat[buffer] = flat
        return self._flat[buffer], 0


def size_of(buffer: Buffer) -> int:
    """Number of elements."""
    size = 1
    for extent in buffer.shape:
        size *= int(extent)
    return size


@dataclass
class Nest:
    """A stage on flat buffers, its axes ready to be split, fused and reordered."""

    spatial: list[Axis]
    reduce: list[Axis]
    body: Stmt
    init: Stmt | None
    simple: bool

    @property
    def axes(self) -> list[Axis]:
        return [*self.spatial, *self.reduce]

    def accesses(self) -> list[tuple[Expr, str, bool]]:
        """(address, dtype, is a store) of every load and store of the body."""
        loads = [(n.indices[0], str(n.source.dtype), False) for n in collect(self.body, TensorLoad)]
        stores = [(n.indices[0], str(n.buffer.dtype), True) for n in collect(self.body, tirx.BufferStore)]
        return loads + stores


def analyzer_of(axes: Iterable[Axis]) -> Any:
    """An analyzer that knows the axes' ranges."""
    analyzer = sym.Analyzer()
    for axis in axes:
        bind(analyzer, axis)
    return analyzer


def bind(analyzer: Any, axis: Axis) -> None:
    dtype = str(axis.var.ty.dtype)
    analyzer.bind(axis.var, Range(tirx.const(0, dtype), tirx.const(max(axis.extent, 1), dtype)))


def flatten(stage: Stage, views: Views) -> Nest:
    """The stage with every access as flat[address], the address simplified."""
    analyzer = analyzer_of((*stage.spatial, *stage.reduce))

    def address(buffer: Buffer, indices: Sequence[Expr]) -> tuple[Buffer, list[Expr]]:
        flat, depth = views.flat(buffer)
        offset: Expr = None
        for extent, index in list(zip(buffer.shape, indices, strict=True))[depth:]:
            offset = index if offset is None else offset * tirx.const(int(extent), str(index.ty.dtype)) + index
        return flat, [tirx.const(0, "int32") if offset is None else analyzer.simplify(offset)]

    def load(node: Any) -> Any:
        return tirx.BufferLoad(*address(node.source, node.indices))

    def store(node: Any) -> Any:
        flat, indices = address(node.buffer, node.indices)
        return tirx.BufferStore(flat, node.value, indices)

    def rewritten(statement: Stmt) -> Stmt:
        return tvm_ffi.structural_map(statement, ((TensorLoad, load), (tirx.BufferStore, store)))

    init = None if stage.init is None else rewritten(stage.init)
    return Nest(list(stage.spatial), list(stage.reduce), rewritten(stage.body), init, stage.simple)


def stride(address: Expr, var: Var) -> int | None:
    """The constant step of `address` when `var` grows by one, or None."""
    linear = sym.detect_linear_equation(address, [var])
    if not len(linear) or not isinstance(linear[0], tirx.IntImm):
        return None
    return int(linear[0])


def _outside_addresses(body: Stmt) -> set[Var]:
    """Variables used other than in the address of a load or store: in a condition, or as a value."""
    found: set[Var] = set()
    skip = tvm_ffi.structural.WalkResult.SKIP
    stores = collect(body, tirx.BufferStore)
    values = [store.value for store in stores] + [b.value for b in collect(body, tirx.Bind)]
    tvm_ffi.structural_walk(values, ((TensorLoad, lambda _: skip), (tirx.Var, lambda v: _note(found, v))), order="pre")
    return found


def _note(found: set[Var], var: Var) -> None:
    found.add(var)


def split_by_divisors(nest: Nest, fixed: int = 0) -> None:
    """Split axes so that divisions in addresses disappear: in `x[c // 64, s, c % 64]`, c = 64 a + b.

    The first `fixed` axes stay.
    """
    for _ in range(3):
        found = _divisor(nest, fixed)
        if found is None:
            return
        axis, divisor = found
        dtype = str(axis.var.ty.dtype)
        outer = Axis(tirx.Var(f"{axis.var.name}_o", dtype), axis.extent // divisor)
        inner = Axis(tirx.Var(f"{axis.var.name}_i", dtype), divisor)
        value = outer.var * tirx.const(divisor, dtype) + inner.var
        for axes in (nest.spatial, nest.reduce):
            if axis in axes:
                at = axes.index(axis)
                axes[at : at + 1] = [outer, inner]
        _replace_axis(nest, {axis.var: value})


def _replace_axis(nest: Nest, values: dict[Var, Expr]) -> None:
    nest.body = simplify_integers(substitute(nest.body, values), analyzer_of(nest.axes))
    if nest.init is not None:
        nest.init = simplify_integers(substitute(nest.init, values), analyzer_of(nest.axes))


def _divisor(nest: Nest, fixed: int) -> tuple[Axis, int] | None:
    addresses = [address for address, _, _ in nest.accesses()]
    for node in collect(addresses, tirx.FloorDiv, tirx.FloorMod):
        if not isinstance(node.b, tirx.IntImm):
            continue
        divisor = int(node.b)
        for axis in nest.axes[fixed:]:
            if axis.extent > divisor and axis.extent % divisor == 0 and stride(node.a, axis.var) == 1:
                return axis, divisor
    return None


def simplify_integers(statement: Stmt, analyzer: Any) -> Stmt:
    """Simplify addresses and integer comparisons; floating-point values are left alone (TVM ignores NaN)."""

    def load(node: Any) -> Any:
        return tirx.BufferLoad(node.source, [analyzer.simplify(i) for i in node.indices])

    def store(node: Any) -> Any:
        return tirx.BufferStore(node.buffer, node.value, [analyzer.simplify(i) for i in node.indices])

    def compare(node: Any) -> Any:
        return analyzer.simplify(node) if str(node.a.ty.dtype).startswith("int") else node

    comparisons = (tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE)
    return tvm_ffi.structural_map(statement, ((TensorLoad, load), (tirx.BufferStore, store), (comparisons, compare)))


def collapse(nest: Nest, fixed: int) -> None:
    """Fuse neighbouring axes which every access steps over as if they were one; the first `fixed` stay."""
    for axes, first in ((nest.spatial, fixed), (nest.reduce, 0)):
        at = len(axes) - 2
        while at >= first:
            outer, inner = axes[at], axes[at + 1]
            if _collapsible(nest, outer, inner):
                dtype = str(inner.var.ty.dtype)
                fused = Axis(tirx.Var(f"{outer.var.name}_{inner.var.name}", dtype), outer.extent * inner.extent)
                extent = tirx.const(inner.extent, dtype)
                axes[at : at + 2] = [fused]
                values = {
                    outer.var: tirx.floordiv(fused.var, extent),
                    inner.var: tirx.floormod(fused.var, extent),
                }
                _replace_axis(nest, values)
            at -= 1


def _collapsible(nest: Nest, outer: Axis, inner: Axis) -> bool:
    used = _outside_addresses(nest.body)
    if outer.var in used or inner.var in used:
        return False
    for address, _, _ in nest.accesses():
        step, wide = stride(address, inner.var), stride(address, outer.var)
        if step is None or wide is None or wide != step * inner.extent:
            return False
    return True


def vectorisable_calls(body: Stmt) -> bool:
    """Whether every intrinsic has a vector form."""
    for call in collect(body, Call):
        name = call.op.name if isinstance(call.op, Op) else ""
        if name in _FLOAT32_VECTOR_CALLS:
            if str(call.ty.dtype) not in ("float32", "float16"):
                return False
        elif name not in _VECTOR_CALLS and not name.startswith("graphwright."):
            return False
    return True


@dataclass(frozen=True)
class Piece:
    """The part [low, high) of an axis in which `body` holds; `uniform` if no guard there depends on the axis."""

    low: int
    high: int
    body: Stmt
    uniform: bool


def pieces(nest: Nest, axis: Axis, limit: int = 12) -> list[Piece]:
    """Cut an axis where the guards of the body change, so that within a piece they are constant along it.

    `if_then_else(1 <= w and w < 57, x[w - 1], 0)` over w in [0, 58) gives [0, 1), [1, 57) and [57, 58).
    """
    guards = [
        call.args[0]
        for call in collect(nest.body, Call)
        if isinstance(call.op, Op) and call.op.name == "tirx.if_then_else"
    ]
    atoms = [
        atom for atom in collect(guards, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE) if _uses(atom, axis.var)
    ]
    if not atoms:
        return [Piece(0, axis.extent, nest.body, not any(_uses(g, axis.var) for g in guards))]
    cuts = {0, axis.extent}
    for atom in atoms:
        cuts.update(_cuts(atom, axis, nest.axes))
    ordered = sorted(c for c in cuts if 0 <= c <= axis.extent)
    if len(ordered) - 1 > limit:
        return [Piece(0, axis.extent, nest.body, False)]
    return [_piece(nest, axis, low, high) for low, high in itertools.pairwise(ordered)]


def _uses(root: Any, var: Var) -> bool:
    found = tvm_ffi.structural_walk(
        root, (tirx.Var, lambda v: tvm_ffi.VisitInterrupt(True) if v.same_as(var) else None)
    )
    return found is not None


def _cuts(atom: Expr, axis: Axis, axes: Sequence[Axis]) -> set[int]:
    """Where `atom` may change its value along the axis, for every position of the other axes."""
    difference = atom.a - atom.b
    step = stride(difference, axis.var)
    if not step:
        return set()
    rest = sym.Analyzer()
    for other in axes:
        if not other.var.same_as(axis.var):
            bind(rest, other)
    base = substitute(difference, {axis.var: tirx.const(0, str(axis.var.ty.dtype))})
    bound = rest.const_int_bound(rest.simplify(base))
    low, high = int(bound.min_value), int(bound.max_value)
    if high - low > 64 or abs(low) > 1 << 40 or abs(high) > 1 << 40:
        return set()
    cuts = {cut for c in (low, high) for cut in _roots(atom, step, c)}
    return {cut for cut in cuts if 0 < cut < axis.extent}


def _roots(atom: Expr, step: int, c: int) -> tuple[int, ...]:
    """The first v at which `step * v + c` compares otherwise with 0 than at v - 1."""
    if step < 0:
        step, c = -step, -c
        strict = isinstance(atom, tirx.GT | tirx.LE)
    else:
        strict = isinstance(atom, tirx.LT | tirx.GE)
    up, down = -(c // step), -c // step  # ceil and floor of -c / step
    if isinstance(atom, tirx.EQ | tirx.NE):
        return (down, down + 1)
    return (up,) if strict else (down + 1,)


def _piece(nest: Nest, axis: Axis, low: int, high: int) -> Piece:
    dtype = str(axis.var.ty.dtype)
    analyzer = sym.Analyzer()
    analyzer.bind(axis.var, Range(tirx.const(low, dtype), tirx.const(high, dtype)))
    for other in nest.axes:
        if not other.var.same_as(axis.var):
            bind(analyzer, other)
    body = fold_guards(nest.body, analyzer)
    guards = [c.args[0] for c in collect(body, Call) if isinstance(c.op, Op) and c.op.name == "tirx.if_then_else"]
    return Piece(low, high, body, not any(_uses(guard, axis.var) for guard in guards))


def parts_along(nest: Nest, axis: Axis) -> list[Nest]:
    """The nest cut along a spatial axis where its guards change; just the nest, where they do not or cannot be decided."""
    if not nest.simple:
        return [nest]
    cut = merge(pieces(nest, axis))
    if len(cut) < 2 or not any(part.uniform for part in cut):
        return [nest]
    parts = []
    for piece in cut:
        dtype = str(axis.var.ty.dtype)
        own = Axis(tirx.Var(axis.var.name, dtype), piece.high - piece.low)
        if own.extent == 1:
            values = {axis.var: tirx.const(piece.low, dtype)}
        else:
            values = {axis.var: own.var + tirx.const(piece.low, dtype)}
        spatial = [own if a is axis else a for a in nest.spatial if a is not axis or own.extent != 1]
        # The other axes get variables of their own too: no variable may be bound by two loops.
        fresh = {a.var: tirx.Var(a.var.name, str(a.var.ty.dtype)) for a in (*spatial, *nest.reduce) if a is not own}
        values.update(fresh)

        def renamed(axes: list[Axis], fresh: dict[Var, Var] = fresh) -> list[Axis]:
            return [Axis(fresh.get(a.var, a.var), a.extent) for a in axes]

        part = Nest(renamed(spatial), renamed(nest.reduce), piece.body, nest.init, nest.simple)
        analyzer = analyzer_of(part.axes)
        part.body = fold_guards(simplify_integers(substitute(part.body, values), analyzer), analyzer)
        if part.init is not None:
            part.init = simplify_integers(substitute(part.init, values), analyzer)
        parts.append(part)
    return parts


def fold_guards(body: Stmt, analyzer: Any) -> Stmt:
    """Drop the branches of if_then_else that the analyzer can decide."""

    def guard(call: Any) -> Any:
        if not (isinstance(call.op, Op) and call.op.name == "tirx.if_then_else"):
            return call
        condition = analyzer.simplify(call.args[0])
        if isinstance(condition, tirx.IntImm):
            return call.args[1] if int(condition) else call.args[2]
        return tirx.if_then_else(condition, call.args[1], call.args[2])

    return tvm_ffi.structural_map(body, (Call, guard))


def merge(parts: list[Piece]) -> list[Piece]:
    """Join neighbouring pieces with the same body."""
    merged: list[Piece] = []
    for part in parts:
        if merged and merged[-1].uniform == part.uniform and tvm_ffi.structural_equal(merged[-1].body, part.body):
            merged[-1] = replace(merged[-1], high=part.high)
        else:
            merged.append(part)
    return merged
