"""Few rows times weights of four bits, for products that wait for their weights: sums of bytes, exact in each group.

    x row         unit = max |x| / 127;  q = round(x * 127 / max) in int8;  -8 sum(q) of each group of K
    w packed      [ceil(N / NR)][K / 8][NR] words of eight inputs of a column
    a step        eight inputs of V vectors of columns:

                  word      h7 l3 | h6 l2 | h5 l1 | h4 l0       two masks: four unsigned bytes each
                  & 15      l3 l2 l1 l0   . word of q[0..4)     two dot products of bytes
                  >> 4 & 15 h7 h6 h5 h4   . word of q[4..8)

    a group       sums begin at -8 sum(q), which takes the 8 off that weights are stored with;
                  total = fma(float(sum), scale[group, column], total)
    at the end    fma(total, unit of the row, bias + residual), activation
    registers     R V sums + V words + 2 halves + 2 words of q a row; totals are in L1, touched once a group

Bit for bit `dialect_mixed.linear_w4`, but for activations that are polynomials. NR = V * lanes; cores share the panels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from .bf16_matmul import FloatFinish
from .dot_product import Dot, bytes_dot, importing
from .epilogue import apply_activation
from .gemv import across
from .loops import Shape, between, constant, share, span, spread, typed_kernel, view

VECTORS = 4
MOST_ROWS = 4  # of a tile


@dataclass(frozen=True)
class Int4Plan:
    """Extents and cut: `group` inputs have a scale, `tasks` share the panels."""

    M: int
    K: int
    N: int
    group: int
    dot: Dot
    tasks: int

    @property
    def columns(self) -> int:
        """Of a panel."""
        return VECTORS * self.dot.lanes

    @property
    def panels(self) -> int:
        """Of the weights."""
        return -(-self.N // self.columns)


def choose_int4(hw: Hardware, M: int, K: int, N: int, group: int, *, emulated: bool = False) -> Int4Plan:
    """The plan on `hw`: as many tasks as cores where the weights keep them busy for longer than they take to start."""
    dot = bytes_dot(hw, emulated=emulated)
    microseconds = M * K * N / (4 * dot.lanes) / hw.cycles_per_us
    panels = -(-N // (VECTORS * dot.lanes))
    return Int4Plan(M, K, N, group, dot, min(hw.cores, panels) if microseconds > 2.0 * hw.launch_us else 1)


def pack_halves(stored: torch.Tensor, columns: int) -> torch.Tensor:
    """Rearrange weights [N, K / 2] (uint8, as int4_groups.py stores them) as the kernel reads them, zero filled."""
    return _panels(stored.contiguous().view(torch.int32), columns)


def pack_scales(scales: torch.Tensor, columns: int) -> torch.Tensor:
    """Rearrange scales [N, groups] to [panels, groups, columns], zero filled."""
    return _panels(scales, columns)


def _panels(rows: torch.Tensor, columns: int) -> torch.Tensor:
    n, depth = rows.shape
    padded = rows.new_zeros((-(-n // columns) * columns, depth))
    padded[:n] = rows
    return padded.view(-1, columns, depth).transpose(1, 2).contiguous()


def int4_matmul(plan: Int4Plan, finish: FloatFinish, input_shape: Shape | None = None) -> Any:
    """Return the kernel (x, packed weights, packed scales[, bias][, residual], out)."""
    p = plan
    groups = p.K // p.group
    operands: list[tuple[Shape, str]] = [(input_shape or (p.M, p.K), "float32")]
    operands += [((p.panels, p.K // 8, p.columns), "int32"), ((p.panels, groups, p.columns), "float32")]
    operands += finish.operands

    def body(x: Any, weight: Any, scales: Any, *rest: Any) -> None:
        with importing(p.dot.helpers):
            nest = _Nest(p, finish, view(x, (p.M, p.K)), weight, scales, rest[:-1], view(rest[-1], (p.M, p.N)))
            nest.emit()

    return typed_kernel("int4_matmul", operands, [(finish.output_shape or (p.M, p.N), "float32")], body)


@dataclass(frozen=True)
class _Nest:
    plan: Int4Plan
    finish: FloatFinish
    x: Any
    weight: Any
    scales: Any
    read: Any
    out: Any

    def emit(self) -> None:
        p = self.plan
        words = T.alloc_buffer((p.M, p.K // 4), "int32", scope="global")
        begin = T.alloc_buffer((p.M, p.K // p.group), "int32", scope="global")
        units = T.alloc_buffer((p.M,), "float32", scope="global")
        with T.serial(0, p.M) as row:
            self._round(words, begin, units, row)
        with T.parallel(0, p.tasks) if p.tasks > 1 else T.serial(0, 1) as task:
            size = min(p.M, MOST_ROWS) * p.columns
            acc = T.alloc_buffer((size,), "int32", scope="local")
            total = T.alloc_buffer((size,), "float32", scope="global")
            with between(*share(p.panels, p.tasks, task)) as panel:
                whole, rest = divmod(p.M, MOST_ROWS)
                if whole:
                    with T.serial(0, whole) as i:
                        self._tile(acc, total, words, begin, units, MOST_ROWS, i * MOST_ROWS, panel)
                if rest:
                    self._tile(acc, total, words, begin, units, rest, whole * MOST_ROWS, panel)

    def _round(self, words: Any, begin: Any, units: Any, row: Any) -> None:
        """One row in 8 bits."""
        p, lanes = self.plan, self.plan.dot.lanes
        steps = p.K // lanes
        most = T.alloc_buffer((lanes,), "float32", scope="local")
        every = span(0, lanes)
        T.buffer_store(most, constant(0.0, lanes), [every])
        floats, integers = f"float32x{lanes}", f"int32x{lanes}"
        with T.serial(0, steps) as i:
            size = tirx.call_llvm_pure_intrin(floats, "llvm.fabs", self.x[row, span(i * lanes, lanes)])
            T.buffer_store(most, tirx.max(most[every], size), [every])
        largest = T.bind(across([most[every]], tirx.max, lanes))
        T.buffer_store(units, largest * tirx.const(1 / 127, "float32"), [row])
        zero, one = tirx.const(0.0, "float32"), tirx.const(1.0, "float32")
        inverse = T.bind(tirx.const(127.0, "float32") / tirx.Select(largest > zero, largest, one))
        totals = T.alloc_buffer((lanes,), "int32", scope="local")
        with T.serial(0, p.K // p.group) as g:
            T.buffer_store(totals, spread(tirx.const(0, "int32"), lanes), [every])
            with T.serial(0, p.group // lanes) as i:
                at = T.bind(g * (p.group // lanes) + i)
                y = self.x[row, span(at * lanes, lanes)] * spread(inverse, lanes)
                y = tirx.min(tirx.max(y, constant(-127.0, lanes)), constant(127.0, lanes))
                q = T.bind(tirx.call_llvm_pure_intrin(integers, "llvm.lrint", y))  # to nearest, half to even
                T.buffer_store(totals, totals[every] + q, [every])
                word = "int32" if lanes == 4 else f"int32x{lanes // 4}"
                packed = T.reinterpret(word, tirx.Cast(f"int8x{lanes}", q))
                T.buffer_store(words, packed, [row, span(at * (lanes // 4), lanes // 4)])
            T.buffer_store(begin, across([totals[every]], lambda a, b: a + b, lanes) * -8, [row, g])

    def _tile(self, acc: Any, total: Any, words: Any, begin: Any, units: Any, rows: int, row: Any, panel: Any) -> None:
        """`rows` rows of a panel."""
        p, dot, lanes = self.plan, self.plan.dot, self.plan.dot.lanes
        places = [(r, v, span((r * VECTORS + v) * lanes, lanes)) for r in range(rows) for v in range(VECTORS)]
        low = spread(tirx.const(0x0F0F0F0F, "int32"), lanes)
        four = spread(tirx.const(4, "int32"), lanes)
        for _, _, at in places:
            T.buffer_store(total, constant(0.0, lanes), [at])
        with T.serial(0, p.K // p.group) as g:
            for r, _, at in places:
                T.buffer_store(acc, spread(begin[row + r, g], lanes), [at])
            with T.serial(0, p.group // 8) as i:
                step = T.bind(g * (p.group // 8) + i)
                pairs = [[T.bind(words[row + r, step * 2 + h]) for h in range(2)] for r in range(rows)]
                for v in range(VECTORS):
                    word = T.bind(self.weight[panel, step, span(v * lanes, lanes)])
                    halves = [tirx.bitwise_and(word, low), tirx.bitwise_and(word >> four, low)]
                    for h, half in enumerate(halves):
                        bytes_ = T.bind(half)
                        for r in range(rows):
                            at = span((r * VECTORS + v) * lanes, lanes)
                            T.buffer_store(acc, dot.multiply(acc[at], [bytes_], spread(pairs[r][h], lanes)), [at])
            for _, v, at in places:
                floats = f"float32x{lanes}"
                scale = self.scales[panel, g, span(v * lanes, lanes)]
                sums = tirx.Cast(floats, acc[at])
                T.buffer_store(total, tirx.call_llvm_pure_intrin(floats, "llvm.fma", sums, scale, total[at]), [at])
        for r in range(rows):
            self._store(total, units, r, row + r, panel)

    def _store(self, total: Any, units: Any, place: int, row: Any, panel: Any) -> None:
        """Finish and store a row of a panel."""
        p, lanes = self.plan, self.plan.dot.lanes
        full, tail = divmod(p.N, p.columns)
        start = place * p.columns

        def some(width: int) -> None:
            with T.serial(0, width // lanes) as v:
                sums = total[span(start + v * lanes, lanes)]
                self._finish(sums, units[row], row, panel * p.columns + v * lanes, lanes)
            if width % lanes:
                with between(width // lanes * lanes, width) as c:
                    self._finish(total[start + c], units[row], row, panel * p.columns + c, 1)

        if not tail:
            some(p.columns)
        elif not full:
            some(tail)
        else:
            with T.If(panel < full):
                with T.Then():
                    some(p.columns)
                with T.Else():
                    some(tail)

    def _finish(self, sums: Any, unit: Any, row: Any, column: Any, lanes: int) -> None:
        p, finish, at = self.plan, self.finish, span(column, lanes)
        addend: Any = view(self.read[0], (p.N,))[at] if finish.bias else None
        if finish.residual is not None:
            residual = view(self.read[-1], (p.M, p.N))[row, at]
            addend = residual if addend is None else addend + residual
        y = sums * spread(unit, lanes)
        if addend is not None:
            floats = "float32" if lanes == 1 else f"float32x{lanes}"
            y = tirx.call_llvm_pure_intrin(floats, "llvm.fma", sums, spread(unit, lanes), addend)
        T.buffer_store(self.out, apply_activation(T.bind(y), finish.activation, finish.args), [row, at])
