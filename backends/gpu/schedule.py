"""A function of tensor expressions, for which there is no kernel of ours -> the ways to run it on a GPU, best first.

    one reduction, shorter than two warps    a thread an element        depthwise convolution, pooling
    product, convolution as implicit GEMM    tiles in shared memory
    matrix times vector                      a block a few rows
    sums, softmax, norms                     a block a row
    the rest                                 a thread an element
    loops in an order of their own (sort)    one thread

All but the first and the last line are rules of TVM's (tvm.s_tir.dlight). Its reduction rule would give a block of 256
threads, of which nine work, to each element of a depthwise convolution: the first line is there for that. A thread an
element is also what is left where a rule fails or its result cannot be lowered.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import tvm_ffi
from tvm import get_global_func, s_tir, tirx
from tvm.s_tir import dlight
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.target import Target

from ..lowering import expressions as ex
from .each import one_thread_each
from .one_thread import in_one_thread, is_imperative
from .single_terms import assign_single_terms

log = logging.getLogger(__name__)

_RULES = (
    ("tiled product", dlight.gpu.Matmul()),
    ("matrix times vector", dlight.gpu.GEMV()),
    ("reduction", dlight.gpu.Reduction()),
    ("row reductions", dlight.gpu.GeneralReduction()),
)
NOTHING = "nothing to compute"  # results without elements, which take no kernel
_EACH = "a thread an element"
_LAST = dlight.gpu.Fallback()


def schedules(function: Any, target: Target, units: int) -> Iterator[tuple[str, Any]]:
    """Name and scheduled function of every rule that applies, in the order to try them; the device has `units`."""
    if not _has_elements(function):
        yield NOTHING, function.with_body(tirx.Evaluate(0))
        return
    _register_reducers()
    if is_imperative(function):
        if (alone := in_one_thread(function, target)) is not None:
            yield "one thread", alone
        return
    function = assign_single_terms(function)
    warp = int(target.attrs["thread_warp_size"])
    rules: list[tuple[str, Callable[[], Any]]] = []
    for name, rule in _RULES:
        rules.append((name, functools.partial(_applied, rule, function, target)))
    # A loop without a reduction has nothing to tile: the first rule for it is the last for others.
    each = (_EACH, functools.partial(one_thread_each, function, units, warp))
    lengths = _reductions(function)
    rules.insert(0 if len(lengths) < 2 and max(lengths, default=0) < 2 * warp else len(rules), each)
    rules.append((_EACH, functools.partial(_applied, _LAST, function, target)))
    for name, apply in rules:
        try:
            scheduled = apply()
        except Exception as error:  # TVM's rules raise what they like on loops they were not made for
            log.info("%s: the rule does not apply: %s", name, str(error).strip().splitlines()[-1:])
            continue
        if scheduled is not None:
            yield name, scheduled


def _applied(rule: Any, function: Any, target: Target) -> Any | None:
    """The function as a rule of TVM's schedules it, or None."""
    found = rule.apply(function, target, False)
    found = found[0] if isinstance(found, list) else found
    return None if found is None else found.mod["main"]


@functools.lru_cache(maxsize=1)
def _register_reducers() -> None:
    """Tell TVM that the maximum and minimum that keep NaN can be reduced by several threads: it knows its own only."""
    register = get_global_func("s_tir.schedule.RegisterReducer")
    for combine, identity in ((ex.maximum, -math.inf), (ex.minimum, math.inf)):
        pair = (
            tvm_ffi.convert(lambda a, b, combine=combine: [combine(a[0], b[0])]),
            tvm_ffi.convert(lambda values, identity=identity: [ex.constant(identity, ex.dtype_of(values[0]))]),
        )
        for function in pair:
            # TVM keeps them in a global that is destroyed when Python is gone: they must never be freed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(function))
        register(1, *pair)


def _has_elements(function: Any) -> bool:
    """Whether a result has elements: loops in an order of their own do not say what they write, unless it is empty."""
    found = False
    parameters = set(function.params)

    def look(block: Any) -> None:
        nonlocal found
        if block.name_hint != "root":
            written = [region.source for region in block.writes]
            results = [buffer.shape for buffer in written if buffer in parameters]
            found = found or not written or any(all(int(extent) for extent in shape) for shape in results)

    tvm_ffi.structural_walk(function.body, [(s_tir.SBlock, look)])
    return found


def _reductions(function: Any) -> list[int]:
    """Over how many elements each reduction of the function goes."""
    infos = normalize_prim_func(s_tir.Schedule(function)) or []
    return [prod(int(i.dom) for i in info.iters if i.kind == "R") for info in infos if info.is_reduction()]
