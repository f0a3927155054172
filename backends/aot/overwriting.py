"""Whether a kernel may write its result over one of its operands, and the kernel that does.

It may where every element of the operand is read before anything is written in its place. Shapes are known, so this is
not argued but counted: the loops around every access to the two are run through, conditions and tails included, and
give for every access the elements it touches and the instance of each enclosing scope (sequence, iteration, branch) in
which it does. A read and a write of one element are in order where, in the innermost scope that encloses both, the read
comes first and both belong to one instance; for then no other iteration, on whichever thread, has anything to do with
that element. A vector is an iteration a lane, and all its lanes are read before one is written.

    for i in parallel(n): y[i] = exp(x[i])         one instance, read first: yes
    for i in ...: y[i] = x[i] + x[0]               x[0] is read in all instances, and overwritten in the first: no
    tail = max(n - 8, 0): y[tail:] = f(x[tail:])   some elements are computed twice, the second time from results: no

Operands of kernels are declared to share no memory (tirx.noalias), which LLVM makes use of. So the kernel that
overwrites has one parameter in the place of two, and one view of it: the sharing is written down, not hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm_ffi
from numpy.typing import NDArray
from tvm import tirx
from tvm.ir import Call, TensorLoad
from tvm.tirx.buffer import is_buffer_var

Array = NDArray[np.int64]

# What is gone through of one kernel, a second or about 600 MB: loop iterations, and elements over all accesses.
_MOST_ROWS = 1 << 21
_MOST_ELEMENTS = 1 << 23
_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "FloorDiv": np.floor_divide,
    "FloorMod": np.mod,
    "Min": np.minimum,
    "Max": np.maximum,
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "And": np.logical_and,
    "Or": np.logical_or,
}


class _Unknown(Exception):
    """Why nothing can be said."""


@dataclass(frozen=True)
class _Access:
    """The elements that one load or store touches, and where."""

    elements: Array
    path: tuple[tuple[int, int, Array], ...]  # scopes from outside in: number, position in it, instance of each element


@dataclass
class _Place:
    """A point of the walk: the values of variables in every iteration that reaches it."""

    values: dict[Any, Array]
    rows: int
    path: tuple[tuple[int, int, Array], ...] = ()

    def taken(self, rows: Array) -> _Place:
        values = {var: value if value.ndim == 0 else value[rows] for var, value in self.values.items()}
        return _Place(values, len(rows), tuple((scope, at, ids[rows]) for scope, at, ids in self.path))

    def inside(self, scope: int, position: int) -> _Place:
        return _Place(self.values, self.rows, (*self.path, (scope, position, np.arange(self.rows))))


def overwriting(func: Any, operand: int, result: int) -> Any | str:
    """`func` with parameters `operand` and `result` as one, in the place of `result`; or the reason why not."""
    x, y = func.params[operand], func.params[result]
    size = math.prod(int(n) for n in x.ty.shape)
    if str(x.ty.dtype) != str(y.ty.dtype) or size != math.prod(int(n) for n in y.ty.shape):
        return "they have different sizes"
    if type(func.body).__name__ != "SBlockRealize":
        return "its body is not in one block"
    walk = _Walk(x, y)
    try:
        walk.visit(func.body, _Place({}, 1))
        for load in walk.loads:
            for store in walk.stores:
                _in_order(load, store, size)
        walk.require_no_other_use(func.body)
    except _Unknown as why:
        return str(why)
    return _merged(func, x, y, walk.views, size)


def _in_order(load: _Access, store: _Access, size: int) -> None:
    """Raise _Unknown unless every element that both touch is read first."""
    common = -1
    for (scope, here, _), (other, there, _) in zip(load.path, store.path, strict=False):
        if scope != other:
            break
        common += 1
        if here != there:
            break
    _, read_at, readers = load.path[common]
    _, written_at, writers = store.path[common]
    instance = np.full(size, -1)
    instance[store.elements] = writers
    if (instance[store.elements] != writers).any():
        raise _Unknown("an element is written by two iterations")
    met = instance[load.elements]
    if read_at > written_at and (met >= 0).any():
        raise _Unknown("an element is read after it is written")
    if ((met >= 0) & (met != readers)).any():
        raise _Unknown("an element is read by one iteration and written by another")


class _Walk:
    """Goes through a function and records the accesses to two of its parameters."""

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y
        self.views: dict[Any, Any] = {x: x, y: y}  # buffer -> parameter
        self.loads: list[_Access] = []
        self.stores: list[_Access] = []
        self.kept: dict[Any, list[tuple[int, Array]]] = {}  # variable -> scope it is bound in, elements it is made of
        self.scopes = 0
        self.elements = 0  # gone through

    def visit(self, stmt: Any, place: _Place) -> None:
        kind = type(stmt).__name__
        if kind == "DeclBuffer":
            self._view(stmt)
        elif kind == "SeqStmt":
            scope = self._scope()
            for position, child in enumerate(stmt.seq):
                if type(child).__name__ == "Bind":
                    self._bind(child, place.inside(scope, position), scope)
                    place.values.pop(child.var, None)
                    self._known(child, place)
                else:
                    self.visit(child, place.inside(scope, position))
        elif kind == "BufferStore":
            self._store(stmt, place)
        elif not self._touches(stmt):
            self._declared(stmt)
        elif kind == "SBlockRealize" and not stmt.block.iter_vars and stmt.block.init is None:
            self.visit(stmt.block.body, place)
        elif kind == "For" and stmt.thread_binding is None:
            self._loop(stmt, place)
        elif kind == "IfThenElse":
            self._branch(stmt, place)
        elif kind == "AttrStmt":
            self.visit(stmt.body, place)
        else:
            raise _Unknown(f"it is touched by a {kind}")

    def _scope(self) -> int:
        self.scopes += 1
        return self.scopes

    def _view(self, stmt: Any) -> None:
        owner = next((v for v in _arguments(stmt.data) if any(v.same_as(known) for known in self.views)), None)
        if owner is not None:
            parameter = next(p for known, p in self.views.items() if known.same_as(owner))
            if str(stmt.buffer.dtype) != str(parameter.ty.dtype):
                raise _Unknown("it is read as another dtype")
            self.views[stmt.buffer] = parameter

    def _declared(self, stmt: Any) -> None:
        """Views declared where nothing is touched."""
        for view in _collect(stmt, tirx.DeclBuffer):
            self._view(view)

    def _owner(self, buffer: Any) -> Any:
        return self.views.get(buffer)

    def require_no_other_use(self, body: Any) -> None:
        """Addresses of the two may be taken by views only: whoever else has them reads and writes unseen."""
        taken = [call for call in _collect(body, Call) if any(a in self.views for a in call.args if _is_buffer(a))]
        views = [d for d in _collect(body, tirx.DeclBuffer) if any(a in self.views for a in _arguments(d.data))]
        if len(taken) > len(views):
            raise _Unknown("its address is passed on")

    def _touches(self, stmt: Any) -> bool:
        declared = [
            d.buffer for d in _collect(stmt, tirx.DeclBuffer) if any(a in self.views for a in _arguments(d.data))
        ]
        known = {*self.views, *declared}
        if any(load.source in known for load in _collect(stmt, TensorLoad)):
            return True
        if any(store.buffer in known for store in _collect(stmt, tirx.BufferStore)):
            return True
        return bool(self.kept) and any(var in self.kept for var in _collect(stmt, tirx.Var))

    def _bind(self, stmt: Any, place: _Place, scope: int) -> None:
        """What is loaded into a variable is read here, and once more wherever the variable is (TVM may inline it)."""
        made_of = self._read(stmt.value, place)
        if made_of:
            self.kept[stmt.var] = [(scope, elements) for elements in made_of]

    def _known(self, stmt: Any, place: _Place) -> None:
        """The value of a variable, where it depends on loops alone; who needs another for an address says so."""
        with suppress(_Unknown):
            place.values[stmt.var] = np.asarray(_evaluate(stmt.value, place))

    def _read(self, value: Any, place: _Place) -> list[Array]:
        """Record the elements of the operand that an expression reads; for each access, those of every iteration."""
        made_of = [
            self._elements(load.source, load.indices, place)
            for load in _collect(value, TensorLoad)
            if (owner := self._owner(load.source)) is not None and owner.same_as(self.x)
        ]
        instances = {scope: ids for scope, _, ids in place.path}
        for var in _collect(value, tirx.Var) if self.kept else ():
            made_of += [elements[instances[scope]] for scope, elements in self.kept.get(var, ())]
        self.loads += [_access(elements, place) for elements in made_of]
        return made_of

    def _loop(self, loop: Any, place: _Place) -> None:
        first = np.broadcast_to(_evaluate(loop.min, place), (place.rows,))
        extent = np.maximum(np.broadcast_to(_evaluate(loop.extent, place), (place.rows,)), 0)
        total = int(extent.sum())
        if total > _MOST_ROWS:
            raise _Unknown(f"the loops have {total} iterations, too many to go through")
        rows = np.repeat(np.arange(place.rows), extent)
        starts = np.cumsum(extent) - extent
        inner = place.taken(rows)
        inner.values[loop.loop_var] = first[rows] + np.arange(total) - starts[rows]
        self.visit(loop.body, inner.inside(self._scope(), 0))

    def _branch(self, stmt: Any, place: _Place) -> None:
        condition = np.broadcast_to(_evaluate(stmt.condition, place), (place.rows,)).astype(bool)
        scope = self._scope()
        place = place.inside(scope, 0)
        self.visit(stmt.then_case, place.taken(np.flatnonzero(condition)))
        if stmt.else_case is not None:
            self.visit(stmt.else_case, place.taken(np.flatnonzero(~condition)))

    def _store(self, stmt: Any, place: _Place) -> None:
        owner = self._owner(stmt.buffer)
        if owner is not None and owner.same_as(self.x):
            raise _Unknown("the kernel writes its operand")
        scope = self._scope()
        for part in (stmt.value, *stmt.indices):
            self._read(part, place.inside(scope, 0))
        if owner is not None:
            place = place.inside(scope, 1)
            self.stores.append(_access(self._elements(stmt.buffer, stmt.indices, place), place))

    def _elements(self, buffer: Any, indices: Any, place: _Place) -> Array:
        """For every iteration the elements that its lanes touch; -1 for what a condition in the expression guards."""
        offset = np.asarray(0)
        for extent, index in zip(buffer.shape, indices, strict=True):
            offset = np.add(*_aligned(offset * int(extent), _evaluate(index, place)))
        lanes = offset.shape[1] if offset.ndim == 2 else 1
        self.elements += place.rows * lanes
        if self.elements > _MOST_ELEMENTS:
            raise _Unknown(f"it is touched more than {_MOST_ELEMENTS} times, too often to go through")
        offset = np.broadcast_to(offset if offset.ndim != 1 else offset[:, None], (place.rows, lanes))
        size = math.prod(int(n) for n in buffer.shape)
        return np.where((offset >= 0) & (offset < size), offset, -1)


def _access(elements: Array, place: _Place) -> _Access:
    touched = np.flatnonzero(elements.ravel() >= 0)
    rows = touched // elements.shape[1]
    return _Access(elements.ravel()[touched], tuple((scope, at, ids[rows]) for scope, at, ids in place.path))


def _evaluate(node: Any, place: _Place) -> Array:
    """An integer expression in every iteration: a number, one a row, or a row of lanes a row."""
    kind = type(node).__name__
    if kind == "IntImm":
        return np.asarray(int(node.value))
    if kind == "Var":
        if node not in place.values:
            raise _Unknown(f"an address or a condition depends on {node.name}")
        return place.values[node]
    if kind in _BINARY:
        a, b = _evaluate(node.a, place), _evaluate(node.b, place)
        return _BINARY[kind](*_aligned(a, b))
    if kind == "Not":
        return np.logical_not(_evaluate(node.a, place))
    if kind == "Cast" and str(node.ty.dtype).startswith(("int", "uint", "bool")):
        return _evaluate(node.value, place)
    if kind == "Ramp":
        base, step = _aligned(_evaluate(node.base, place), _evaluate(node.stride, place))
        base, step = (v[:, None] if v.ndim == 1 else v for v in (base, step))
        return np.asarray(base + step * np.arange(int(node.lanes))[None, :])
    if kind == "Broadcast":
        return _evaluate(node.value, place)
    if kind == "Call" and getattr(node.op, "name", "").endswith("likely"):
        return _evaluate(node.args[0], place)
    raise _Unknown(f"an address or a condition has a {kind}")


def _aligned(a: Array, b: Array) -> tuple[Array, Array]:
    """Two values of which one may have lanes: the other's rows become columns."""
    if a.ndim == 1 and b.ndim == 2:
        return a[:, None], b
    return (a, b[:, None]) if b.ndim == 1 and a.ndim == 2 else (a, b)


def _merged(func: Any, x: Any, y: Any, views: dict[Any, Any], size: int) -> Any:
    """Both parameters as one flat view of `y`, and every access through it."""
    flat = tirx.decl_buffer((size,), str(y.ty.dtype), f"{y.name}_in_place", data=y.data)

    def offset(buffer: Any, indices: Any) -> Any:
        at: Any = None
        for extent, index in zip(buffer.shape, indices, strict=True):
            at = index if at is None else at * tirx.const(int(extent), _scalar(index)) + index
        return [tirx.const(0, "int32") if at is None else at]

    def load(node: Any) -> Any:
        return tirx.BufferLoad(flat, offset(node.source, node.indices)) if node.source in views else node

    def store(node: Any) -> Any:
        return tirx.BufferStore(flat, node.value, offset(node.buffer, node.indices)) if node.buffer in views else node

    root = func.body.block
    body = tvm_ffi.structural_map(root.body, [(TensorLoad, load), (tirx.BufferStore, store)])
    body = tvm_ffi.structural_map(body, (tirx.Var, lambda var: y if var.same_as(x) else var))
    body = tirx.SeqStmt([tirx.DeclBuffer(flat, data=y.data), body])
    block = type(root)([], [], [], root.name_hint, body, None, root.alloc_buffers, root.match_buffers, root.annotations)
    realize = type(func.body)(func.body.iter_values, func.body.predicate, block)
    parameters = [p for p in func.params if not p.same_as(x)]
    return tirx.PrimFunc(parameters, realize, func.ret_type, func.attrs)


def _scalar(index: Any) -> str:
    return str(index.ty.dtype).partition("x")[0]


def _is_buffer(node: Any) -> bool:
    return type(node).__name__ == "Var" and is_buffer_var(node)


def _arguments(data: Any) -> list[Any]:
    """The buffers whose address an expression takes."""
    return list(data.args) if isinstance(data, Call) else [data]


def _collect(node: Any, kind: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(node, ((kind,), found.append))
    return found
