"""Local buffers become variables of the machine code, scratch memory stays the runtime's."""

from __future__ import annotations

import pytest
from tvm import tirx

from graphwright.backends.aot import codegen
from graphwright.backends.aot.stack_locals import marked
from graphwright.backends.kernels.softmax import softmax
from graphwright.hwdb import detect


def calls(func) -> int:
    """How many allocations ask the runtime."""
    return codegen.lower({"kernel": func}, detect().tvm_target()).script().count("TVMBackendAllocWorkspace")


def marks(*sizes: int, scope: str = "local") -> list[bool]:
    """Which of the buffers of one function become variables."""
    buffers = [tirx.decl_buffer((size,), "float32", "kept", scope=scope) for size in sizes]
    body = marked(tirx.SeqStmt([tirx.AllocBuffer(b) for b in (*buffers, tirx.decl_buffer((1,)))]))
    return [bool(statement.annotations) for statement in list(body.seq)[: len(sizes)]]


@pytest.mark.parametrize("log", [False, True])
def test_a_row_kernel_asks_the_runtime_for_nothing(log):
    assert calls(softmax((64, 128), detect(), log)) == 0


def test_what_is_large_or_not_local_is_scratch_memory():
    assert marks(64) == [True]
    assert marks(8192) == [True]
    assert marks(8193) == [False]
    assert marks(64, scope="global") == [False]


def test_the_buffers_of_a_function_share_its_stack_the_smallest_first():
    assert marks(4096, 4096) == [True, True]
    assert marks(4096, 4097) == [True, False]
    assert marks(4097, 64, 4096) == [False, True, True]
    assert marks(3000, 3000, 3000) == [False, False, False]
