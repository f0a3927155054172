"""What an instruction set's features mean: vector shape, dot products, and the LLVM attributes that say them.

Features carry LLVM's names. Only those that change the code LLVM generates are listed; each is turned on or
off by name in the target description, so that the cpu given to LLVM decides scheduling and nothing else.
That matters on virtual machines, which often mask features of the processor underneath.
"""

from __future__ import annotations

from collections.abc import Iterable

# LLVM feature -> flag of /proc/cpuinfo (Linux arch/x86/include/asm/cpufeatures.h), the basic ones first.
X86_FLAGS = {
    "sse": "sse",
    "sse2": "sse2",
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "popcnt": "popcnt",
    "cx16": "cx16",
    "sahf": "lahf_lm",
    "aes": "aes",
    "pclmul": "pclmulqdq",
    "avx": "avx",
    "f16c": "f16c",
    "fma": "fma",
    "avx2": "avx2",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "lzcnt": "abm",
    "movbe": "movbe",
    "adx": "adx",
    "prfchw": "3dnowprefetch",
    "sha": "sha_ni",
    "gfni": "gfni",
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
    "sse4a": "sse4a",
    "fma4": "fma4",
    "xop": "xop",
    "tbm": "tbm",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "avxvnni": "avx_vnni",
    "avxifma": "avx_ifma",
    "avxvnniint8": "avx_vnni_int8",
    "avxvnniint16": "avx_vnni_int16",
    "avxneconvert": "avx_ne_convert",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
    "amx-fp16": "amx_fp16",
}

# LLVM feature -> hardware capability in /proc/cpuinfo (Linux Documentation/arch/arm64/elf_hwcaps.rst).
ARM_FLAGS = {
    "fp-armv8": "fp",
    "neon": "asimd",
    "aes": "aes",
    "sha2": "sha2",
    "crc": "crc32",
    "lse": "atomics",
    "rdm": "asimdrdm",
    "fullfp16": "asimdhp",
    "fp16fml": "asimdfhm",
    "dotprod": "asimddp",
    "rcpc": "lrcpc",
    "rcpc-immo": "ilrcpc",
    "lse2": "uscat",
    "jsconv": "jscvt",
    "complxnum": "fcma",
    "fptoint": "frint",
    "flagm": "flagm",
    "altnzcv": "flagm2",
    "sha3": "sha3",
    "sm4": "sm4",
    "bf16": "bf16",
    "i8mm": "i8mm",
    "sve": "sve",
    "sve2": "sve2",
    "sve-bitperm": "svebitperm",
    "mops": "mops",
    "cssc": "cssc",
}

# LLVM feature -> hardware capability of 32-bit Arm (Linux arch/arm/include/uapi/asm/hwcap.h).
ARMV7_FLAGS = {
    "neon": "neon",
    "vfp2": "vfp",
    "vfp3": "vfpv3",
    "vfp4": "vfpv4",
    "fp16": "vfpv4",
    "hwdiv": "idivt",
    "hwdiv-arm": "idiva",
}

# LLVM feature -> name in the "isa" line (Linux Documentation/arch/riscv/uabi.rst).
RISCV_FLAGS = {
    name: name
    for name in (
        *("m", "a", "f", "d", "c", "v", "zba", "zbb", "zbc", "zbs", "zfh", "zfhmin"),
        *("zvfh", "zvfhmin", "zicond", "zvl256b", "zvl512b", "zvl1024b"),
    )
}

# LLVM feature -> "Features" of /proc/cpuinfo (Linux arch/loongarch/kernel/proc.c).
LOONGARCH_FLAGS = {"f": "fpu", "d": "fpu", "lsx": "lsx", "lasx": "lasx", "ual": "ual"}

FLAGS = {
    "x86_64": X86_FLAGS,
    "aarch64": ARM_FLAGS,
    "armv7": ARMV7_FLAGS,
    "riscv64": RISCV_FLAGS,
    "loongarch64": LOONGARCH_FLAGS,
}

# Features every processor of the family has: never turned off.
BASELINE = {
    "x86_64": frozenset({"sse", "sse2"}),
    "aarch64": frozenset({"fp-armv8", "neon"}),
    "armv7": frozenset({"vfp2", "vfp3"}),
    "riscv64": frozenset({"m", "a", "f", "d", "c"}),
    "loongarch64": frozenset({"f", "d", "ual"}),
}

# Calling convention that LLVM has to be told: floats in floating-point registers.
ABI = {"riscv64": "lp64d", "loongarch64": "lp64d"}

# Matrix registers beside the vector registers, with instructions of their own.
TILE_FEATURES = frozenset({"amx-tile", "amx-int8", "amx-bf16", "amx-fp16"})

# A hypervisor may mask a feature and leave those built on it visible.
_NEEDS = {
    **{name: "avx2" for name in X86_FLAGS if name.startswith("avx") and name not in ("avx", "avx2")},
    **{name: "avx512f" for name in X86_FLAGS if name.startswith("avx512") and name != "avx512f"},
    **{name: "amx-tile" for name in X86_FLAGS if name.startswith("amx-") and name != "amx-tile"},
    **dict.fromkeys(("avx2", "fma", "f16c", "fma4", "xop", "vaes", "vpclmulqdq"), "avx"),
    "sve2": "sve",
    "sve-bitperm": "sve2",
    "fp16fml": "fullfp16",
}


def from_flags(isa: str, flags: Iterable[str]) -> frozenset[str]:
    """Return the LLVM features that flags of /proc/cpuinfo mean, leaving out those whose base is masked."""
    present = set(flags)
    return closed(llvm for llvm, flag in FLAGS[isa].items() if flag in present)


def closed(features: Iterable[str]) -> frozenset[str]:
    """Return `features` without those that cannot run because what they build on is absent."""
    kept = frozenset(features)
    while lacking := {name for name in kept if _NEEDS.get(name, name) not in kept}:
        kept -= lacking
    return kept


def vector_shape(isa: str, features: frozenset[str]) -> tuple[int, int]:
    """Return (bits, registers) of the vector registers the kernels may use.

    AVX-512 counts only with its VL and BW parts, which narrow vectors and byte data need. SVE machines are
    used through NEON, whose registers are the low 128 bits.
    """
    if isa in ("aarch64", "armv7"):
        return (128, 32) if isa == "aarch64" else (128, 16)
    if isa == "riscv64":
        if "v" not in features:
            return 64, 32  # the floating-point registers, one value each
        return max((bits for bits in (1024, 512, 256) if f"zvl{bits}b" in features), default=128), 32
    if isa == "loongarch64":
        return (256, 32) if "lasx" in features else (128, 32)
    if {"avx512f", "avx512vl", "avx512bw"} <= features:
        return 512, 32
    return (256, 16) if "avx" in features else (128, 16)


def dot_product(features: frozenset[str], dtype: str) -> str | None:
    """Return the widest instruction family that multiplies and accumulates `dtype`, or None."""
    families: tuple[tuple[str, str], ...] = ()
    if dtype in ("int8", "uint8"):
        families = (
            ("amx-int8", "amx"),
            ("avx512vnni", "vnni"),
            ("avxvnni", "vnni"),
            ("i8mm", "i8mm"),
            ("dotprod", "sdot"),
        )
    elif dtype == "bfloat16":
        families = (("amx-bf16", "amx"), ("avx512bf16", "bf16"), ("bf16", "bf16"))
    return next((family for feature, family in families if feature in features), None)


def attributes(isa: str, features: frozenset[str]) -> list[str]:
    """Return LLVM's attribute list: every present feature on, then every absent one off.

    Off comes last because turning a feature off also turns off what builds on it.
    """
    known = FLAGS[isa]
    return [f"+{name}" for name in known if name in features] + [
        f"-{name}" for name in known if name not in features and name not in BASELINE[isa]
    ]
