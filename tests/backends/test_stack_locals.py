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


def marks(size: int, scope: str) -> bool:
    buffer = tirx.decl_buffer((size,), "float32", "kept", scope=scope)
    return bool(marked(tirx.AllocBuffer(buffer)).annotations)


@pytest.mark.parametrize("log", [False, True])
def test_a_row_kernel_asks_the_runtime_for_nothing(log):
    assert calls(softmax((64, 128), detect(), log)) == 0


def test_what_is_large_or_not_local_is_scratch_memory():
    assert marks(64, "local")
    assert marks(4096, "local")
    assert not marks(4097, "local")
    assert not marks(4096, "global")
