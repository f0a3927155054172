"""Registers of a thread and shared memory of a block, as kernels of ours declare and write them."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T


def registers(count: int, dtype: str = "float32") -> Any:
    """`count` of them."""
    return T.alloc_buffer((count,), dtype, scope="local")


def shared(count: int) -> Any:
    """`count` floats."""
    return T.alloc_buffer((count,), "float32", scope="shared")


def assign(buffer: Any, at: Any, value: Any) -> None:
    """Store `value` at `at`."""
    T.buffer_store(buffer, value, [at])


def barrier() -> None:
    """Wait for the threads of the block, and for what they wrote to shared memory."""
    T.evaluate(T.tvm_storage_sync("shared"))
