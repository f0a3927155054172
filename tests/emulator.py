"""Runs compiled kernels on a software model of another x86-64 processor: Bochs, through the package bochscpu-python.

    call(objects, "main", tensors, work)     # System V calling convention; tensors are copied in and out

The kernels' objects are linked at a fixed address with a serial stand-in for the thread pool, and run in 64-bit mode on
one flat stretch of memory (a file that both processes map), without an operating system. Every call has a process of
its own: Bochs keeps code it has decoded, and the package does not survive a second processor. Bochs is exact in results
and says nothing about time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BASE = 0x10000000  # guest physical and virtual address of the memory
TABLES, STACK, CODE, HEAP = 0x0, 0x100000, 0x200000, 0x800000  # offsets into it
EXIT = CODE + 0x1F0000  # where `main` returns to: a hlt
SIZE = 64 << 20
PAGE = 4096

# Scratch memory comes from the end of the heap and is never reused; parallel tasks run one after another.
STUB = """
#include <stdint.h>
typedef int (*task_function)(int, void *, void *);
static char *top = (char *)%dULL;
static void *take(int a, int b, uint64_t bytes, int c, int d) { top -= (bytes + 63) & ~63ULL; return top; }
static int give(int a, int b, void *p) { return 0; }
static int launch(task_function f, void *data, int tasks) {
    struct { void *sync; int32_t count; } environment = { 0, tasks ? tasks : 1 };
    for (int i = 0; i < environment.count; ++i) { int failed = f(i, &environment, data); if (failed) return failed; }
    return 0;
}
int (*__TVMBackendParallelLaunch)(task_function, void *, int) = launch;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = take;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = give;
void *memset(void *p, int v, uint64_t n) { for (uint64_t i = 0; i < n; ++i) ((volatile char *)p)[i] = v; return p; }
void *memcpy(void *p, const void *q, uint64_t n) {
    for (uint64_t i = 0; i < n; ++i) ((volatile char *)p)[i] = ((const char *)q)[i];
    return p;
}
"""


class Fault(RuntimeError):
    """The code raised an exception of the processor: 6 is an unknown instruction, 13 and 14 are wrong addresses."""


def call(objects: Sequence[bytes], symbol: str, tensors: Sequence[torch.Tensor], work: Path) -> int:
    """Call `symbol` with the tensors' addresses; they hold afterwards what the code left. Returns eax."""
    image = _link(objects, symbol, work)
    path = work / "memory"
    with open(path, "wb+") as file:
        file.truncate(SIZE)
        memory = _Memory(mmap.mmap(file.fileno(), SIZE))
    entry = _load(memory, image)
    addresses = _enter(memory, tensors)
    memory.page_tables()
    stack = BASE + CODE - 0x1000
    memory.write(stack - 8, struct.pack("<Q", BASE + EXIT))
    memory.write(BASE + EXIT, b"\xf4")
    for i, address in enumerate(addresses[6:]):
        memory.write(stack + 8 * i, struct.pack("<Q", address))
    numbers = map(str, (entry, stack - 8, *addresses[:6]))
    done = subprocess.run([sys.executable, __file__, str(path), *numbers], capture_output=True, text=True, check=False)
    if "exception" in done.stdout or "rax" not in done.stdout:
        raise Fault(f"{done.stdout}{done.stderr}")
    for tensor, address in zip(tensors, addresses, strict=True):
        memory.read_into(tensor, address)
    return int(done.stdout.split("rax")[1].split()[0])


class _Memory:
    def __init__(self, content: mmap.mmap) -> None:
        self.content = content

    def write(self, address: int, content: bytes) -> None:
        self.content[address - BASE : address - BASE + len(content)] = content

    def read_into(self, tensor: torch.Tensor, address: int) -> None:
        import torch

        flat = tensor.view(-1).view(torch.uint8)
        start = address - BASE
        flat.copy_(torch.frombuffer(bytearray(self.content[start : start + flat.numel()]), dtype=torch.uint8))

    def page_tables(self) -> None:
        """Three levels that map [BASE, BASE + SIZE) onto itself in pages of 2 MB."""
        present, large = 3, 0x83
        self.write(BASE, struct.pack("<Q", BASE + PAGE | present))
        self.write(BASE + PAGE, struct.pack("<Q", BASE + 2 * PAGE | present))
        for address in range(BASE, BASE + SIZE, 2 << 20):
            self.write(BASE + 2 * PAGE + 8 * (address >> 21), struct.pack("<Q", address | large))


def _link(objects: Sequence[bytes], symbol: str, work: Path) -> bytes:
    paths = []
    for i, content in enumerate(objects):
        paths.append(work / f"kernel{i}.o")
        paths[-1].write_bytes(content)
    (work / "stub.c").write_text(STUB % (BASE + SIZE - PAGE))
    zig = [sys.executable, "-m", "ziglang"]
    flags = ["-target", "x86_64-freestanding-none", "-O1", "-ffreestanding", "-fno-sanitize=all", "-fno-builtin"]
    made = [str(work / "stub.o"), *map(str, paths)]
    for command in (
        [*zig, "cc", *flags, "-c", str(work / "stub.c"), "-o", str(work / "stub.o")],
        # The stub first: its pointers replace the kernels' weak ones.
        [
            *zig,
            "ld.lld",
            "-static",
            f"--image-base={BASE + CODE:#x}",
            "-e",
            symbol,
            *made,
            "-o",
            str(work / "image.elf"),
        ],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.returncode, done.stderr
    return (work / "image.elf").read_bytes()


def _load(memory: _Memory, image: bytes) -> int:
    """Place the segments of an ELF file; returns its entry."""
    entry, table = struct.unpack_from("<QQ", image, 24)
    for i in range(struct.unpack_from("<H", image, 56)[0]):
        kind, _, offset, address, _, filled, size, _ = struct.unpack_from("<IIQQQQQQ", image, table + 56 * i)
        if kind == 1:
            assert address >= BASE + CODE
            assert address + size <= BASE + EXIT, "the code is larger than its place"
            memory.write(address, image[offset : offset + filled] + bytes(size - filled))
    return int(entry)


def _enter(memory: _Memory, tensors: Sequence[torch.Tensor]) -> list[int]:
    import torch

    addresses, end = [], BASE + HEAP
    for tensor in tensors:
        assert tensor.is_contiguous()
        addresses.append(end)
        memory.write(end, bytes(tensor.view(-1).view(torch.uint8).numpy()))
        end += (tensor.numel() * tensor.element_size() + 127) // 64 * 64
    assert end < BASE + SIZE - (8 << 20), "no room for scratch memory"
    return addresses


def _be_sapphire_rapids(library: str) -> None:
    """The package offers no choice of processor and has a Cannon Lake: send the maker of that to another's.

    Needs bochscpu-python 0.4, whose wheel wants glibc 2.38. It has AVX-512 BF16 and VNNI so, and no AMX.
    """
    code, libc = ctypes.CDLL(library), ctypes.CDLL(None)
    names = ("_Z23create_corei3_cnl_cpuidP8BX_CPU_C", "_Z28create_sapphire_rapids_cpuidP8BX_CPU_C")
    old, new = (ctypes.cast(getattr(code, name), ctypes.c_void_p).value or 0 for name in names)
    libc.mprotect(ctypes.c_void_p(old & -PAGE), ctypes.c_size_t(2 * PAGE), 7)
    ctypes.memmove(old, b"\xe9" + struct.pack("<i", new - old - 5), 5)  # jmp


def _run(path: str, entry: int, stack: int, arguments: Sequence[int]) -> None:
    """In the child: set the processor up in 64-bit mode and run until the hlt."""
    import bochscpu
    import bochscpu._bochscpu
    import bochscpu.cpu
    import bochscpu.memory

    _be_sapphire_rapids(bochscpu._bochscpu.__file__)
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), SIZE)
    host = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for offset in range(0, SIZE, PAGE):
        bochscpu.memory.page_insert(BASE + offset, host + offset)
    session, state, hook = bochscpu.Session(), bochscpu.State(), bochscpu.Hook()
    bochscpu.cpu.set_long_mode(state)
    state.cr0 = 0x80050033
    state.cr3 = BASE + TABLES
    state.cr4 = 1 << 5 | 1 << 9 | 1 << 10 | 1 << 18  # PAE, SSE, its exceptions, XSAVE
    state.xcr0 = 0b111 | 0b111 << 5 | 0b11 << 17  # x87, SSE, AVX, AVX-512, AMX
    state.mxcsr, state.mxcsr_mask = 0x1F80, 0xFFFF
    state.rflags = 2
    for name, attributes, selector in (("cs", 0x229B, 8), *((s, 0xC93, 16) for s in ("ss", "ds", "es", "fs", "gs"))):
        segment = bochscpu.Segment()
        segment.base, segment.limit, segment.attr = 0, 0xFFFFFFFF, attributes
        segment.selector, segment.present = selector, True
        setattr(state, name, segment)
    state.rip, state.rsp = entry, stack
    for register, value in zip(("rdi", "rsi", "rdx", "rcx", "r8", "r9"), arguments, strict=False):
        setattr(state, register, value)
    session.cpu.state = state
    faults: list[int] = []

    def fault(vector: int) -> None:
        faults.append(vector)
        session.stop()

    session.missing_page_handler = lambda _address: fault(14)
    hook.exception = lambda _session, _cpu, vector, _code: fault(vector)
    hook.hlt = lambda *_: session.stop()
    session.run([hook])
    memory.flush()
    after = session.cpu.state
    print(f"exception {faults[0]} at {after.rip:#x}" if faults else f"rax {after.rax & 0xFFFFFFFF}", flush=True)
    os._exit(0)  # the package crashes where it cleans up


if __name__ == "__main__":
    _run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [int(a) for a in sys.argv[4:]])
