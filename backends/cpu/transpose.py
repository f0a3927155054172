"""Moves whose source is contiguous along one axis and whose result along another: tiles transposed in registers.

    in[v][t]  ->  out[t][v]        `lanes` rows of `lanes` elements are loaded, transposed by shuffles, and stored

A row of tiles along `t` as wide as a cache line is carried down `v`, so that both sides touch whole lines: every line
read is used up while it is in L1, and a written line is completed by the next tile. Tails repeat the last full tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad

from ...hwdb import Hardware
from .access import Nest, element_bits, stride
from .guards import pieces
from .loops import constant, loop, sequence
from .stages import Axis, Expr, Stmt, Var, collect, substitute

CYCLES = 1.2  # an element, measured with AVX2 at 1.05 (to NHWC) and 1.34 (to NCHW)
_SHUFFLED = {f"{kind}{bits}" for kind in ("float", "int", "uint") for bits in (16, 32, 64)}
_PAGE_BYTES = 4096  # rows that far apart fall into one set of an L1 cache


@dataclass(frozen=True)
class Tile:
    """The source is contiguous along `across`, the result along `along`; `width` tiles side by side along `across`."""

    across: Axis
    along: Axis
    lanes: int
    width: int

    @property
    def columns(self) -> Axis:
        """The axis of tile rows, in the place of `across`."""
        step = self.lanes * self.width
        return Axis(self.across.var, -(-self.across.extent // step))


def find_tile(nest: Nest, hw: Hardware) -> Tile | None:
    """The tile by which `nest` is to be moved, or None where no load is transposed."""
    if not nest.simple or nest.reduce or nest.init is not None:
        return None
    target = nest.body.indices[0]
    dtype = str(nest.body.buffer.dtype)
    for along in nest.spatial:
        if stride(target, along.var) != 1:
            continue
        loads = [load for load in collect(nest.body, TensorLoad) if stride(load.indices[0], along.var) not in (0, 1)]
        if not loads or any(str(load.source.dtype) not in _SHUFFLED for load in loads):
            return None
        if any(stride(load.indices[0], along.var) is None for load in loads):
            return None
        for across in nest.spatial:
            if across is along or any(stride(load.indices[0], across.var) != 1 for load in loads):
                continue
            if any(len(pieces(nest, axis)) > 1 or not pieces(nest, axis)[0].uniform for axis in (along, across)):
                return None
            bits = max(element_bits(str(load.source.dtype)) for load in loads)
            lanes = hw.vector_bits // max(bits, element_bits(dtype))
            while lanes > min(across.extent, along.extent):
                lanes //= 2
            if lanes < 2:
                return None
            line = hw.cache(1).line_bytes if hw.cache(1) else 64  # type: ignore[union-attr]
            width = max(1, line * 8 // bits // lanes)
            apart = (stride(target, across.var) or 0) * element_bits(dtype) // 8
            if apart % _PAGE_BYTES == 0 or lanes * width > across.extent:
                width = 1
            return Tile(across, along, lanes, width)
    return None


def emit_tiles(nest: Nest, values: dict[Var, Expr], tile: Tile) -> Stmt:
    """One row of tiles, carried down `along`; `values` has the position of its column in the place of `across`."""
    across, along, lanes = tile.across, tile.along, tile.lanes
    step = lanes * tile.width
    column = values[across.var] * constant(step, across.var)
    if across.extent % step:
        column = tirx.min(column, constant(across.extent - step, across.var))
    first = tirx.Var("column", str(across.var.ty.dtype))

    def row(start: Expr) -> Stmt:
        return sequence(
            [_tile(nest, values, tile, first + constant(k * lanes, first), start) for k in range(tile.width)]
        )

    full, rest = divmod(along.extent, lanes)
    parts = [loop(full, lambda i: row(i * constant(lanes, along.var)), along.var)]
    if rest:
        parts.append(row(constant(along.extent - lanes, along.var)))
    others = [a for a in nest.spatial if a.var not in values and a is not along]
    assert not others, others
    return tirx.SeqStmt([tirx.Bind(first, column), *parts])


def _tile(nest: Nest, values: dict[Var, Expr], tile: Tile, column: Expr, row: Expr) -> Stmt:
    across, along, lanes = tile.across, tile.along, tile.lanes
    statements: list[Stmt] = []
    moved: list[tuple[Any, list[Var]]] = []
    for load in collect(nest.body, TensorLoad):
        if stride(load.indices[0], along.var) in (0, 1) or any(_same(load, known) for known, _ in moved):
            continue
        rows = []
        for j in range(lanes):
            at = {**values, across.var: column, along.var: row + constant(j, along.var)}
            index = tirx.Ramp(substitute(load.indices[0], at), constant(1, across.var), lanes)
            rows.append(_bound(statements, tirx.BufferLoad(load.source, [index])))
        moved.append((load, transpose(rows, _block(load), lambda value: _bound(statements, value))))
    whole = [columns for load, columns in moved if _same(load, nest.body.value)]
    scratch = [tirx.decl_buffer((lanes,), str(load.source.dtype), "row", scope="local") for load, _ in moved]
    if not whole:
        statements = [*[tirx.AllocBuffer(buffer) for buffer in scratch], *statements]
    for i in range(lanes):
        at = {**values, across.var: column + constant(i, across.var), along.var: row}
        if whole:
            index = tirx.Ramp(substitute(nest.body.indices[0], at), constant(1, along.var), lanes)
            statements.append(tirx.BufferStore(nest.body.buffer, whole[0][i], [index]))
            continue
        for buffer, (_, columns) in zip(scratch, moved, strict=True):
            index = tirx.Ramp(constant(0, along.var), constant(1, along.var), lanes)
            statements.append(tirx.BufferStore(buffer, columns[i], [index]))

        def lane(v: Expr, at: dict[Var, Expr] = at) -> Stmt:
            def load(node: Any) -> Any:
                for buffer, (known, _) in zip(scratch, moved, strict=True):
                    if _same(node, known):
                        return tirx.BufferLoad(buffer, [v])
                return node

            body = tvm_ffi.structural_map(nest.body, (TensorLoad, load))
            return substitute(body, {**at, along.var: row + v})

        statements.append(loop(lanes, lane, along.var, tirx.ForKind.VECTORIZED))
    return sequence(statements)


def _same(a: Any, b: Any) -> bool:
    return bool(tvm_ffi.structural_equal(a, b))


def _bound(statements: list[Stmt], value: Expr) -> Var:
    var = tirx.Var("r", value.ty)
    statements.append(tirx.Bind(var, value))
    return var


def _block(load: Any) -> int:
    """Elements in 128 bits: shuffles within such blocks are the cheap ones on every machine."""
    return 128 // element_bits(str(load.source.dtype))


def transpose(rows: list[Var], block: int, bound: Callable[[Expr], Var]) -> list[Var]:
    """The transpose of a square of vectors: interleaved within blocks of 128 bits, then blocks exchanged."""
    n = len(rows)
    block = min(block, n)

    def shuffle(a: Var, b: Var, order: list[int]) -> Var:
        return bound(tirx.Shuffle([a, b], [tirx.const(k, "int32") for k in order]))

    def interleave(a: Var, b: Var, size: int, half: int) -> Var:
        order = []
        for base in range(0, n, block):
            for k in range(base + half * block // 2, base + (half + 1) * block // 2, size):
                order += [*range(k, k + size), *range(n + k, n + k + size)]
        return shuffle(a, b, order)

    def within(group: list[Var], size: int) -> list[Var]:
        if len(group) == 1:
            return group
        pairs = list(zip(group[::2], group[1::2], strict=True))
        halves = [[interleave(a, b, size, half) for a, b in pairs] for half in (0, 1)]
        return within(halves[0], 2 * size) + within(halves[1], 2 * size)

    groups = [within(rows[k : k + block], 1) for k in range(0, n, block)]
    result: list[Var] = [rows[0]] * n
    for c in range(block):
        column = [group[c] for group in groups]
        distance = len(column) // 2
        while distance:
            reach = distance * block
            for i in range(len(column)):
                if i & distance:
                    continue
                low = [lane if not lane & reach else n + lane - reach for lane in range(n)]
                high = [lane + reach if not lane & reach else n + lane for lane in range(n)]
                a, b = column[i], column[i + distance]
                column[i], column[i + distance] = shuffle(a, b, low), shuffle(a, b, high)
            distance //= 2
        for k, vector in enumerate(column):
            result[k * block + c] = vector
    return result
