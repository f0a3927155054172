"""How a stage's loads and stores move along its axes: flat addresses, strides, and where conditions are constant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import sym, tirx
from tvm.ir import Call, Op, Range, TensorLoad, register_op_attr

from .stages import Axis, Buffer, Expr, Stage, Stmt, Var, collect, intrinsic, substitute

# Intrinsics whose vector form LLVM takes, some as one libm call per lane. Others stay scalar.
_VECTOR_CALLS = {
    *("exp", "exp2", "exp10", "log", "log2", "log10", "log1p", "pow", "sqrt", "rsqrt", "sin", "cos", "tan", "tanh"),
    *("sigmoid", "erf", "asin", "acos", "atan", "floor", "ceil", "trunc", "round", "nearbyint", "fabs", "isnan"),
    *("reinterpret", "shift_left", "shift_right", "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"),
    *("likely", "if_then_else"),
}
# Vector forms that LLVM has and TVM may not know of: it would tear a vector loop apart, bindings included, and LLVM
# would put it together again over rows, by gathers.
for _name in ("tirx.isnan", "tirx.nearbyint"):
    if not Op.get(_name).get_attr("TVectorizable"):
        register_op_attr(_name, "TVectorizable", True)


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
    names = {intrinsic(call) for call in collect(body, Call)}
    return all(name in _VECTOR_CALLS or name.startswith("graphwright.") for name in names)


def combiner(nest: Nest) -> tuple[Callable[[Expr, Expr], Expr], Expr] | None:
    """(g, x) where the body stores g(accumulator, x) and g is known to combine accumulators as well; or None."""
    if not nest.simple or nest.init is None or not isinstance(nest.init, tirx.BufferStore):
        return None
    store = nest.body
    value = store.value

    def is_accumulator(node: Any) -> bool:
        return (
            isinstance(node, TensorLoad)
            and node.source.same_as(store.buffer)
            and tvm_ffi.structural_equal(node.indices[0], store.indices[0])
        )

    found: Expr = None
    if isinstance(value, tirx.Add | tirx.Mul | tirx.Max | tirx.Min | tirx.And | tirx.Or):
        for one, other in ((value.a, value.b), (value.b, value.a)):
            if is_accumulator(one):
                found = other
    elif isinstance(value, tirx.Select):
        for one, other in ((value.true_value, value.false_value), (value.false_value, value.true_value)):
            if is_accumulator(one):
                found = other
    if found is None:
        return None
    x = tirx.Var("x", found.ty)
    acc = tirx.Var("acc", value.ty)
    kinds = type(found)

    def generalise(node: Any) -> Any:
        if tvm_ffi.structural_equal(node, found):
            return x
        return acc if is_accumulator(node) else node

    pattern = tvm_ffi.structural_map(value, ((kinds, TensorLoad), generalise), order="pre")
    rest = collect(pattern, TensorLoad)
    free = [v for v in collect(pattern, tirx.Var) if not (v.same_as(x) or v.same_as(acc))]
    if rest or free or str(found.ty.dtype) != str(value.ty.dtype):
        return None
    return lambda a, b: substitute(pattern, {acc: a, x: b}), found
