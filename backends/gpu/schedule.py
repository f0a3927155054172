"""A function of tensor expressions, for which there is no kernel of ours -> the ways to run it on a GPU, best first.

    one reduction, shorter than two warps    a thread an element        depthwise convolution, pooling
    product, convolution as implicit GEMM    tiles in shared memory
    matrix times vector                      a block a few rows
    sums, softmax, norms                     a block a row
    the rest                                 a thread an element
    loops in an order of their own (sort)    a thread a line, or one thread

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
from .epilogues import as_product
from .own_order import in_own_order, is_imperative
from .single_terms import assign_single_terms

log = logging.getLogger(__name__)

_PRODUCTS = (
    ("tiled product", dlight.gpu.Matmul()),
    ("matrix times vector", dlight.gpu.GEMV()),
)
_RULES = (
    ("reduction", dlight.gpu.Reduction()),
    ("row reductions", dlight.gpu.GeneralReduction()),
)
NOTHING = "nothing to compute"  # results without elements, which take no kernel
_EACH = "a thread an element"
_LAST = dlight.gpu.Fallback()


def schedules(function: Any, target: Target, units: int) -> Iterator[tuple[str, Any]]:
    """Name and scheduled function of every rule that applies, in the order to try them; the device has `units`.

    Raises ValueError, with what each rule says, where none applies.
    """
    if not _has_elements(function):
        yield NOTHING, function.with_body(tirx.Evaluate(0))
        return
    _register_reducers()
    if is_imperative(function):
        yield "loops in order", in_own_order(function, target, units)
        return
    function = assign_single_terms(function)
    warp = int(target.attrs["thread_warp_size"])
    last = functools.partial(_applied, _LAST, target)
    rules: list[tuple[str, Callable[[], Any]]] = []
    for name, rule in _PRODUCTS:
        whole = functools.partial(_applied, rule, target)
        rules.append((name, functools.partial(as_product, function, whole, last)))
    for name, rule in _RULES:
        rules.append((name, functools.partial(_applied, rule, target, function)))
    # A loop without a reduction has nothing to tile: the first rule for it is the last for others.
    each = (_EACH, functools.partial(one_thread_each, function, units, warp))
    lengths = _reductions(function)
    rules.insert(0 if len(lengths) < 2 and max(lengths, default=0) < 2 * warp else len(rules), each)
    rules.append((_EACH, functools.partial(last, function)))
    refused = []
    for name, apply in rules:
        try:
            scheduled = apply()
        except Exception as error:  # TVM's rules raise what they like on loops they were not made for
            log.info("%s: the rule does not apply: %s", name, reason := reason_of(error))
            refused.append(f"{name}: {reason}")
            continue
        if scheduled is not None:
            yield name, scheduled
        else:
            refused.append(f"{name}: loops of another form")
    if len(refused) == len(rules):
        raise ValueError(f"no rule applies ({'; '.join(refused)})")


def reason_of(error: BaseException) -> str:
    """What an error says, in one line, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _applied(rule: Any, target: Target, function: Any) -> Any | None:
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
