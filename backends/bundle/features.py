"""How Linux tells a program which instruction set extensions its processor has: bits of the auxiliary vector.

Sources: arch/arm64/include/uapi/asm/hwcap.h and arch/arm/include/uapi/asm/hwcap.h of Linux.
"""

from __future__ import annotations

from collections.abc import Iterable

_HWCAP, _HWCAP2 = 16, 26  # AT_HWCAP, AT_HWCAP2

# LLVM feature -> (entry, bit).
_BITS = {
    "aarch64": {
        "neon": (_HWCAP, 1),
        "lse": (_HWCAP, 8),
        "fullfp16": (_HWCAP, 10),
        "rdm": (_HWCAP, 12),
        "jsconv": (_HWCAP, 13),
        "complxnum": (_HWCAP, 14),
        "rcpc": (_HWCAP, 15),
        "dotprod": (_HWCAP, 20),
        "sve": (_HWCAP, 22),
        "fp16fml": (_HWCAP, 23),
        "rcpc-immo": (_HWCAP, 26),
        "flagm": (_HWCAP, 27),
        "sve2": (_HWCAP2, 1),
        "sve-bitperm": (_HWCAP2, 4),
        "altnzcv": (_HWCAP2, 7),
        "fptoint": (_HWCAP2, 8),
        "i8mm": (_HWCAP2, 13),
        "bf16": (_HWCAP2, 14),
        "cssc": (_HWCAP2, 34),
        "mops": (_HWCAP2, 43),
    },
    "armv7": {
        "vfp2": (_HWCAP, 6),
        "neon": (_HWCAP, 12),
        "vfp3": (_HWCAP, 13),
        "vfp4": (_HWCAP, 16),
        "hwdiv-arm": (_HWCAP, 17),
        "hwdiv": (_HWCAP, 18),
    },
}
# Instructions that LLVM uses only where a program names them, or (lse2) where it changes 16 bytes at once, which no
# kernel does: their absence does no harm. And conversions of halves on 32-bit Arm, which have no bit of their own:
# processors with VFPv4 have them.
_UNUSED = frozenset({"fp-armv8", "aes", "sha2", "sha3", "sm4", "crc", "lse2", "fp16"})


def bits(isa: str, features: Iterable[str]) -> tuple[tuple[str, int, int], ...]:
    """(LLVM feature, entry, bit) of what code for `features` needs of the processor it runs on."""
    known = _BITS[isa]
    unknown = set(features) - set(known) - _UNUSED
    assert not unknown, f"no bit of the auxiliary vector is known for {sorted(unknown)}"
    return tuple((name, *known[name]) for name in known if name in set(features))
