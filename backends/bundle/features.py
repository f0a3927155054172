"""How a program asks which instruction set extensions its processor has.

Linux: bits of the auxiliary vector (arch/arm64/include/uapi/asm/hwcap.h and arch/arm/include/uapi/asm/hwcap.h).
macOS: numbers with names (developer.apple.com/documentation/kernel, "Determining instruction set characteristics").
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..aot.toolchain import is_macos

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


# Of the features in the records of Apple's processors, what the M1 lacks: every Mac with such a processor has the rest.
_QUESTIONS = {"bf16": "hw.optional.arm.FEAT_BF16", "i8mm": "hw.optional.arm.FEAT_I8MM"}


@dataclass(frozen=True)
class Feature:
    """An extension that code uses; bundle.h says what each field means."""

    name: str  # LLVM's
    word: int = 0
    bit: int = 0
    question: str = ""


def needed(isa: str, triple: str, features: Iterable[str]) -> tuple[Feature, ...]:
    """What code with `features` for an LLVM triple asks of the processor it runs on."""
    used = set(features)
    if is_macos(triple):
        return tuple(Feature(name, question=text) for name, text in _QUESTIONS.items() if name in used)
    known = _BITS[isa]
    unknown = used - set(known) - _UNUSED
    assert not unknown, f"no bit of the auxiliary vector is known for {sorted(unknown)}"
    return tuple(Feature(name, *known[name]) for name in known if name in used)
