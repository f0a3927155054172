"""MessagePack, in the forms that LLVM writes into the notes of code objects (https://msgpack.org, specification)."""

from __future__ import annotations

from typing import Any


def unpacked(data: bytes) -> Any:
    """The value that `data` begins with. Raises ValueError for forms that are not among those."""
    return _value(data, 0)[0]


def _value(data: bytes, at: int) -> tuple[Any, int]:
    """A value and where it ends."""
    tag = data[at]
    if tag < 0x80:
        return tag, at + 1
    if tag >= 0xE0:
        return tag - 256, at + 1
    if tag in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[tag], at + 1
    if tag in (0xCC, 0xCD, 0xCE, 0xCF):
        width = 1 << (tag - 0xCC)
        return int.from_bytes(data[at + 1 : at + 1 + width], "big"), at + 1 + width
    if 0xA0 <= tag < 0xC0 or tag in (0xD9, 0xDA):
        width = 0 if tag < 0xC0 else tag - 0xD8
        length = tag & 31 if width == 0 else int.from_bytes(data[at + 1 : at + 1 + width], "big")
        end = at + 1 + width + length
        return data[end - length : end].decode(), end
    if 0x80 <= tag < 0xA0 or tag in (0xDC, 0xDE):
        return _collection(data, at)
    raise ValueError(f"a MessagePack form that is not read here: {tag:#x}")


def _collection(data: bytes, at: int) -> tuple[Any, int]:
    tag = data[at]
    width = 2 if tag in (0xDC, 0xDE) else 0
    is_map = tag < 0x90 or tag == 0xDE
    count = tag & 15 if width == 0 else int.from_bytes(data[at + 1 : at + 3], "big")
    values: list[Any] = []
    at += 1 + width
    for _ in range(count * (1 + is_map)):
        value, at = _value(data, at)
        values.append(value)
    return (dict(zip(values[::2], values[1::2], strict=True)) if is_map else values), at
