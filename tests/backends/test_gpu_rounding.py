"""float32 rounded to bfloat16 by integer arithmetic, as kernels for AMD do it, here on the CPU: against PyTorch."""

from __future__ import annotations

import torch
import tvm
from tvm.tirx.script import builder as T

from graphwright.backends.gpu.rounding import BITS, as_kept, rounded
from graphwright.backends.kernels.loops import typed_kernel

# Infinities, NaNs of which some have the bits of infinity in 16 bits, ties to even and to odd, the largest numbers.
SPECIAL = (0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFF800001, 0xFFFFFFFF, 0x3F808000, 0x3F818000)
SPECIAL += (0x3F808001, 0x3F817FFF, 0x7F7FFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x80000000, 0x00000001, 0x00008000, 0x00018000)


def test_bits_are_those_of_torch_and_nan_stays_nan():
    drawn = torch.arange(0, 1 << 32, 65521 * 3, dtype=torch.int64)
    x = torch.cat([torch.tensor(SPECIAL), drawn]).to(torch.int32).view(torch.float32)

    def body(given, out):
        with T.serial(0, len(x)) as i:
            T.buffer_store(out, rounded(given[i], as_kept("bfloat16")), [i])

    function = typed_kernel("main", [((len(x),), "float32")], [((len(x),), BITS)], body)
    out = torch.zeros(len(x), dtype=torch.uint16)
    tvm.compile(function, target="llvm")(*map(tvm.runtime.from_dlpack, (x, out)))
    found = out.view(torch.bfloat16)
    assert torch.equal(found.isnan(), x.isnan())
    assert torch.equal(out.view(torch.int16)[~x.isnan()], x.bfloat16().view(torch.int16)[~x.isnan()])


def test_other_dtypes_are_cast():
    assert as_kept("float16") == "float16"
    assert str(rounded(tvm.tirx.const(1.5, "float32"), "float16").ty.dtype) == "float16"
