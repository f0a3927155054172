"""What TVM's rules for products (tvm.s_tir.dlight) get wrong, kept from them: results are written beyond their end.

    s[i, j] = sum over k; y[m] = f(s[m // 4, m % 4])      ->      s[i, j] = sum over k | y[m] = f(s[m // 4, m % 4])
    y[i] = sum over k                                     ->      s[i] = sum over k; y[i] = s[i]

Sums are filled up to whole tiles, and the epilogue is put where those are written. The condition that keeps the filling
out of the result is then made anew from the indices of the epilogue (ReverseComputeInline): it says the same only where
these are all of s, a variable for each dim. Any other epilogue becomes a kernel of its own. Sums that several threads
add up lose that condition where they have no epilogue at all (LowerCrossThreadReduction): they get one, a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import TensorLoad


def as_product(
    function: Any, schedule: Callable[[Any], Any | None], schedule_rest: Callable[[Any], Any | None]
) -> Any | None:
    """The function by `schedule`, a rule for products, and an epilogue that must not be joined by `schedule_rest`.

    None where one of the two does not apply.
    """
    cut = _cut(function)
    if cut is None:
        return schedule(_with_copy(function))
    statements, root = list(function.body.block.body.seq), function.body.block
    before, after = statements[:cut], statements[cut:]
    made, read = _written(*before), {load.source for statement in after for load in _loads(statement)}
    between = [buffer for buffer in root.alloc_buffers if buffer in made and buffer in read]
    rest = [buffer for buffer in root.alloc_buffers if buffer not in between]
    blocks = []
    for part in (before, after):
        mine = _written(*part)
        whole = _function(function, [*function.params, *between], part, [buffer for buffer in rest if buffer in mine])
        scheduled = schedule(_with_copy(whole)) if part is before else schedule_rest(whole)
        if scheduled is None:
            return None
        blocks.append(scheduled.body.block)
    buffers = [*between, *(buffer for block in blocks for buffer in block.alloc_buffers)]
    return _function(function, function.params, [block.body for block in blocks], buffers)


def _with_copy(function: Any) -> Any:
    """The function with sums that it returns as they are copied there."""
    (*_, last) = _blocks(function.body)[:-1] or _blocks(function.body)
    if last.init is None:
        return function
    copied = s_tir.Schedule(function)
    copied.cache_write(copied.get_sblock(last.name_hint), 0, "global")
    return copied.mod["main"]


def _cut(function: Any) -> int | None:
    """The number of the first statement behind the sums, where one of those reads at other places."""
    root = function.body.block
    if root.name_hint != "root" or not isinstance(root.body, tirx.SeqStmt):
        return None
    statements = list(root.body.seq)
    sums = [n for n, s in enumerate(statements) if any(block.init is not None for block in _blocks(s))]
    if not sums or sums[-1] + 1 == len(statements):
        return None
    inner = set(root.alloc_buffers)
    behind = [block for statement in statements[sums[-1] + 1 :] for block in _blocks(statement)]
    elsewhere = any(not _is_whole(load, block) for block in behind for load in _loads(block) if load.source in inner)
    return sums[-1] + 1 if elsewhere else None


def _is_whole(load: Any, block: Any) -> bool:
    """Whether a block reads all of a buffer, each dim by a variable of its own."""
    extents = {axis.var: int(axis.dom.extent) for axis in block.iter_vars}
    seen: set[Any] = set()
    for index, extent in zip(load.indices, load.source.shape, strict=True):
        if isinstance(index, tirx.IntImm) and int(extent) == 1:
            continue
        if not isinstance(index, tirx.Var) or index in seen or extents.get(index) != int(extent):
            return False
        seen.add(index)
    return True


def _blocks(statement: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(statement, [(s_tir.SBlock, found.append)])
    return found


def _loads(statement: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(statement, [(TensorLoad, found.append)])
    return found


def _written(*statements: Any) -> set[Any]:
    return {region.source for statement in statements for block in _blocks(statement) for region in block.writes}


def _function(like: Any, parameters: Any, statements: list[Any], buffers: Any) -> Any:
    body = statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)
    root = s_tir.SBlock([], [], [], "root", body, alloc_buffers=buffers)
    return tirx.PrimFunc(parameters, s_tir.SBlockRealize([], True, root), like.ret_type, like.attrs)
