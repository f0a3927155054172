"""Sums of narrow products: acc[lane] += left[k .. k + group) . weight[k .. k + group)[lane], a word of 32 bits a step.

    bfloat16   group 2, float32 sums     vdpbf16ps; without it two shifts and two float32 multiply-adds
    int8       group 4, int32 sums       vpdpbusd and usdot, unsigned left and signed right bytes, never saturate
               group 4, int32 sums       sdot, signed bytes on both sides
               group 2, int32 sums       smull and sadalp: signed bytes, products of 16 bits, their pairs added up
               group 8, int32 sums       smmla and usmmla, two rows by two columns: mmla.py
               group 2, int32 sums       vpmaddwd on bytes widened to 16 bits: two exact products and their sum
                                         (vpmaddubsw would take four bytes, but saturates at 16 bits: 255*127*2 > 32767)
    weights    group 2, float32 sums     float32 left, bfloat16 weights widened by a shift: half the bytes to stream
               group 1, float32 sums     float32 left, float16 weights converted (vcvtph2ps, fcvtl): half the bytes too
               group 1, float32 sums     float32 left, int8 weights converted: a quarter of the bytes
    float16    group 1, float16 sums     fmla of 8 halves by element; after `block` steps they are added to float32 sums

The left word is broadcast; the weights of a step are one word for each lane, so one layout serves every instruction:

    [panel][ceil(K / group)][NR][group]      NR columns, zeros past the last k and the last column

TVM cannot pass bfloat16 vectors to an intrinsic (its legalisation turns them into float32), so instructions are reached
through functions in LLVM's own language that take words and are inlined (`pragma_import_llvm`).

`emulated` replaces the instruction by ordinary arithmetic with the same results (bfloat16: except denormals, which
vdpbf16ps takes as zero), so that the very same loop nest runs on machines without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from tvm import ir, tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ..tiling import Tiling, choose_tiling
from .loops import spread

PrimExpr = Any


@dataclass(frozen=True)
class Dot:
    """One step of an inner loop.

    `left` is the dtype of the left operand in memory ("uint16" holds bfloat16), `group` of which make a word; `weight`
    the dtype of the packed weights, `weights_per_lane` of which belong to one column of a step. `spare` registers are
    needed beside accumulators, weights and the broadcast. `multiply(acc, left scalars, weights)` is the new acc.
    """

    name: str
    lanes: int
    group: int
    accumulator: str
    left: str
    weight: str
    weights_per_lane: int
    spare: int
    helpers: str
    multiply: Callable[[PrimExpr, Sequence[PrimExpr], PrimExpr], PrimExpr]
    at: Callable[[int], Dot] | None = field(default=None, compare=False)  # the same of fewer lanes, where there is one
    vectors: int = 0  # of a tile's row: many where an instruction brings a word into all lanes; 0: the cost model's
    block: int = 0  # steps after which the accumulators are added to sums in float32; 0: never

    @property
    def by_word(self) -> bool:
        """Whether the left operand is read as words of `group` elements, rather than one float at a time."""
        return self.left != "float32"

    @property
    def word(self) -> str:
        """The dtype of a word of the left operand: `group` narrow elements, or one half."""
        if self.left == "float16":
            return "float16"
        return f"int{self.group * self.element_bits}"

    @property
    def element_bits(self) -> int:
        """Bits of an element of a word."""
        return 8 if self.left in ("int8", "uint8") else 16


def _words(left: PrimExpr, lanes: int) -> PrimExpr:
    """A word in every lane; or a vector of them, as it is."""
    return left if "x" in str(left.ty.dtype) else spread(left, lanes)


def bf16_dot(hw: Hardware, *, emulated: bool = False) -> Dot | None:
    """Products of bfloat16 pairs summed in float32; None where the machine has no such vector instruction."""
    family = hw.vector_dot_product("bfloat16")
    if family is None and not emulated:
        return None
    lanes = hw.lanes("float32")
    name = f"gw_dot_bf16_{lanes}"
    if emulated:
        text = _emulated_bf16(name, lanes)
    elif hw.isa == "x86_64":
        text = _bf16_instruction(
            name, lanes, f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}", "+avx512f,+avx512vl,+avx512bf16"
        )
    else:
        text = _bf16_instruction(name, lanes, f"llvm.aarch64.neon.bfdot.v{lanes}f32.v{2 * lanes}bf16", "+neon,+bf16")

    def multiply(acc: PrimExpr, left: Sequence[PrimExpr], weight: PrimExpr) -> PrimExpr:
        return tirx.call_pure_extern(f"float32x{lanes}", name, acc, spread(left[0], lanes), weight)

    what = "vdpbf16ps" if hw.isa == "x86_64" else "bfdot"
    spare = 3 if emulated else 0
    return Dot("emulated " * emulated + what, lanes, 2, "float32", "uint16", "int32", 1, spare, text, multiply)


def bf16_weights(hw: Hardware) -> Dot:
    """float32 times bfloat16 weights: low halves are shifted up, high halves masked, both are then floats."""
    lanes = hw.lanes("float32")

    def multiply(acc: PrimExpr, left: Sequence[PrimExpr], weight: PrimExpr) -> PrimExpr:
        low = T.reinterpret(f"float32x{lanes}", weight << tirx.Broadcast(tirx.const(16, "int32"), lanes))
        acc = acc + spread(left[0], lanes) * low
        if len(left) == 1:
            return acc
        mask = tirx.Broadcast(tirx.const(-65536, "int32"), lanes)
        return acc + spread(left[1], lanes) * T.reinterpret(f"float32x{lanes}", tirx.bitwise_and(weight, mask))

    return Dot("bf16 weights widened", lanes, 2, "float32", "float32", "int32", 1, 3, "", multiply)


def f16_weights(hw: Hardware) -> Dot | None:
    """float32 times float16 weights, converted by one instruction a vector; None where the machine has none."""
    if hw.isa == "x86_64" and "f16c" not in hw.features:
        return None
    lanes = hw.lanes("float32")

    def multiply(acc: PrimExpr, left: Sequence[PrimExpr], weight: PrimExpr) -> PrimExpr:
        return acc + spread(left[0], lanes) * tirx.Cast(f"float32x{lanes}", weight)

    return Dot("f16 weights converted", lanes, 1, "float32", "float32", "float16", 1, 1, "", multiply)


def f16_dot(hw: Hardware, block: int) -> Dot | None:
    """Products and sums of halves, `block` of which are added before the sum goes on in float32; None without them."""
    if not (hw.supports("float16") and hw.multiplies_by_element):
        return None
    lanes = hw.lanes("float16")

    def multiply(acc: PrimExpr, left: Sequence[PrimExpr], weight: PrimExpr) -> PrimExpr:
        return acc + spread(left[0], lanes) * weight

    return Dot("fmla of halves", lanes, 1, "float16", "float16", "float16", 1, 0, "", multiply, block=block)


def int8_weights(hw: Hardware) -> Dot:
    """float32 times int8 weights, sign-extended and converted; their scale is applied to the finished sum."""
    lanes = hw.lanes("float32")

    def multiply(acc: PrimExpr, left: Sequence[PrimExpr], weight: PrimExpr) -> PrimExpr:
        wide = tirx.Cast(f"float32x{lanes}", tirx.Cast(f"int32x{lanes}", weight))
        return acc + spread(left[0], lanes) * wide

    return Dot("int8 weights widened", lanes, 1, "float32", "float32", "int8", 1, 1, "", multiply)


def int8_dot(hw: Hardware, *, emulated: bool = False) -> Dot:
    """Exact products of bytes summed in int32, by the best instruction there is."""
    lanes = hw.lanes("float32")
    if hw.isa == "x86_64" and (hw.vector_dot_product("int8") == "vnni" or emulated):
        return _vnni(hw, lanes, emulated)
    if hw.isa == "aarch64" and hw.vector_dot_product("int8") in ("sdot", "i8mm"):
        return _neon_bytes(hw, lanes)
    if hw.isa == "aarch64" and "neon" in hw.features:
        return _neon_long(lanes)
    name = f"gw_dot_i16_{lanes}"
    intrinsic = _PMADDWD.get(hw.vector_bits) if hw.isa == "x86_64" else None

    def multiply(acc: PrimExpr, left: Sequence[PrimExpr], weight: PrimExpr) -> PrimExpr:
        return tirx.call_pure_extern(f"int32x{lanes}", name, acc, _words(left[0], lanes), weight)

    what = "vpmaddwd" if intrinsic else "widening multiply"
    text = _pair_products(name, lanes, intrinsic)
    return Dot(what, lanes, 2, "int32", "int16", "int8", 2, 1, text, multiply)


def _vnni(hw: Hardware, lanes: int, emulated: bool) -> Dot:
    name = f"gw_dot_u8s8_{lanes}"
    features = "+avx512f,+avx512vl,+avx512vnni" if "avx512vnni" in hw.features else "+avx2,+avxvnni"
    text = _emulated_bytes(name, lanes) if emulated else _vnni_instruction(name, lanes, features)

    def multiply(acc: PrimExpr, left: Sequence[PrimExpr], weight: PrimExpr) -> PrimExpr:
        return tirx.call_pure_extern(f"int32x{lanes}", name, acc, _words(left[0], lanes), weight)

    spare = 3 if emulated else 0
    return Dot("emulated " * emulated + "vpdpbusd", lanes, 4, "int32", "uint8", "int32", 1, spare, text, multiply)


def _neon_bytes(hw: Hardware, lanes: int) -> Dot:
    """usdot where there is i8mm, so that unsigned bytes stay as they are; else sdot."""
    unsigned = "i8mm" in hw.features
    what, feature = ("usdot", "i8mm") if unsigned else ("sdot", "dotprod")
    name = f"gw_dot_{what}_{lanes}"
    text = _neon_instruction(name, lanes, f"llvm.aarch64.neon.{what}.v{lanes}i32.v{4 * lanes}i8", f"+neon,+{feature}")

    def multiply(acc: PrimExpr, left: Sequence[PrimExpr], weight: PrimExpr) -> PrimExpr:
        return tirx.call_pure_extern(f"int32x{lanes}", name, acc, _words(left[0], lanes), weight)

    return Dot(what, lanes, 4, "int32", "uint8" if unsigned else "int8", "int32", 1, 0, text, multiply)


def _neon_long(lanes: int) -> Dot:
    """Two products of signed bytes a lane: smull gives them 16 bits, sadalp adds a pair to 32."""
    name = f"gw_dot_long_{lanes}"
    i, h, b = f"<{lanes} x i32>", f"<{2 * lanes} x i16>", f"<{2 * lanes} x i8>"
    multiply_long = f"@llvm.aarch64.neon.smull.v{2 * lanes}i16"
    add_pairs = f"@llvm.aarch64.neon.saddlp.v{lanes}i32.v{2 * lanes}i16"
    text = f"""
{_HEAD} {i} @{name}({i} %c, <{lanes} x i16> %a, {b} %b) {_attributes("+neon")} {{
  %x = bitcast <{lanes} x i16> %a to {b}
  %p = call {h} {multiply_long}({b} %b, {b} %x)
  %s = call {i} {add_pairs}({h} %p)
  %r = add {i} %c, %s
  ret {i} %r
}}
declare {h} {multiply_long}({b}, {b})
declare {i} {add_pairs}({h})
"""

    def multiply(acc: PrimExpr, left: Sequence[PrimExpr], weight: PrimExpr) -> PrimExpr:
        return tirx.call_pure_extern(f"int32x{lanes}", name, acc, _words(left[0], lanes), weight)

    return Dot("smull and sadalp", lanes, 2, "int32", "int8", "int8", 2, 4, text, multiply, vectors=4)


def bytes_dot(hw: Hardware, lanes: int | None = None, *, emulated: bool = False) -> Dot:
    """Four exact products of bytes a lane, at any width: by instruction where there is one."""
    lanes = hw.lanes("float32") if lanes is None else lanes
    if hw.isa == "aarch64" and hw.vector_dot_product("int8") in ("sdot", "i8mm") and not emulated:
        made = _neon_bytes(hw, lanes)
    else:
        made = _vnni(hw, lanes, emulated or hw.isa != "x86_64" or hw.vector_dot_product("int8") != "vnni")
    return replace(made, at=lambda fewer: bytes_dot(hw, fewer, emulated=emulated))


def choose_dot_tiling(hw: Hardware, dot: Dot, rows: int, columns: int, depth: int) -> Tiling:
    """The tiling of a product of `depth` elements: that of a float32 product with as many steps."""
    fewer = replace(hw, vector_registers=hw.vector_registers - dot.spare)
    if dot.word == "float16":  # as if registers of floats were twice as wide
        fewer = replace(fewer, vector_bits=2 * hw.vector_bits)
    steps = -(-depth // dot.group) if dot.by_word else depth
    width = dot.vectors * dot.lanes if columns > dot.vectors * dot.lanes else 0
    tiling = choose_tiling(fewer, rows, columns, steps, row_stride_bytes=4 * steps, fixed_columns=width or None)
    # The panel of a step is a word a column, so the blocks of k that float32 needs for L2 are not needed as early.
    return replace(tiling, depth_blocks=1)


@contextmanager
def importing(*texts: str) -> Iterator[None]:
    """The statements inside may call the functions that `texts` (LLVM's language) define."""
    text = "\n".join(dict.fromkeys(t for t in texts if t))
    if not text:
        yield
        return
    with T.attr(tirx.const(0, "int32"), "pragma_import_llvm", ir.StringImm(_joined(text))):
        yield


def narrow(value: PrimExpr, lanes: int) -> PrimExpr:
    """float32 rounded to nearest even as bfloat16, in 16 bits; needs `narrow_text(hw)` imported."""
    return tirx.call_pure_extern("uint16" if lanes == 1 else f"uint16x{lanes}", f"gw_narrow_{lanes}", value)


def widen(value: PrimExpr, lanes: int) -> PrimExpr:
    """bfloat16 in 16 bits -> float32."""
    many = "" if lanes == 1 else f"x{lanes}"
    word = tirx.Cast(f"uint32{many}", value) << spread(tirx.const(16, "uint32"), lanes)
    return T.reinterpret(f"float32{many}", word)


def narrow_text(hw: Hardware) -> str:
    """The functions behind `narrow` for one element and for a vector. A NaN stays one, quietened."""
    by_instruction = hw.isa == "x86_64" and "avx512bf16" in hw.features
    return "\n".join(_narrow(n, by_instruction and n > 1) for n in (1, hw.lanes("float32")))


_PMADDWD = {
    128: "llvm.x86.sse2.pmadd.wd",
    256: "llvm.x86.avx2.pmadd.wd",
    512: "llvm.x86.avx512.pmaddw.d.512",
}
# `linkonce_odr`: every kernel brings its own copy, of which nothing remains once it is inlined.
_HEAD = "define linkonce_odr"


def _attributes(features: str = "") -> str:
    wanted = f' "target-features"="{features}"' if features else ""
    return f"alwaysinline nounwind memory(none){wanted}"


def _joined(text: str) -> str:
    """Declarations may be repeated by several texts, which LLVM's parser refuses."""
    lines, seen = [], set()
    for line in text.splitlines():
        if line.startswith("declare"):
            if line in seen:
                continue
            seen.add(line)
        lines.append(line)
    return "; inlined into the kernels of graphwright\n" + "\n".join(lines) + "\n"


def _bf16_instruction(name: str, lanes: int, intrinsic: str, features: str) -> str:
    f, i, b = f"<{lanes} x float>", f"<{lanes} x i32>", f"<{2 * lanes} x bfloat>"
    return f"""
{_HEAD} {f} @{name}({f} %c, {i} %a, {i} %b) {_attributes(features)} {{
  %x = bitcast {i} %a to {b}
  %y = bitcast {i} %b to {b}
  %r = call {f} @{intrinsic}({f} %c, {b} %x, {b} %y)
  ret {f} %r
}}
declare {f} @{intrinsic}({f}, {b}, {b})
"""


def _emulated_bf16(name: str, lanes: int) -> str:
    """vdpbf16ps adds the product of the high halves first; products of two bfloat16 are exact in float32."""
    f, i = f"<{lanes} x float>", f"<{lanes} x i32>"
    fma = f"@llvm.fma.v{lanes}f32"
    return f"""
{_HEAD} {f} @{name}({f} %c, {i} %a, {i} %b) {_attributes()} {{
  %a0 = shl {i} %a, splat (i32 16)
  %b0 = shl {i} %b, splat (i32 16)
  %a1 = and {i} %a, splat (i32 -65536)
  %b1 = and {i} %b, splat (i32 -65536)
  %x0 = bitcast {i} %a0 to {f}
  %y0 = bitcast {i} %b0 to {f}
  %x1 = bitcast {i} %a1 to {f}
  %y1 = bitcast {i} %b1 to {f}
  %r = call {f} {fma}({f} %x1, {f} %y1, {f} %c)
  %s = call {f} {fma}({f} %x0, {f} %y0, {f} %r)
  ret {f} %s
}}
declare {f} {fma}({f}, {f}, {f})
"""


def _vnni_instruction(name: str, lanes: int, features: str) -> str:
    i, b = f"<{lanes} x i32>", f"<{4 * lanes} x i8>"
    intrinsic = f"@llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    return f"""
{_HEAD} {i} @{name}({i} %c, {i} %a, {i} %b) {_attributes(features)} {{
  %x = bitcast {i} %a to {b}
  %y = bitcast {i} %b to {b}
  %r = call {i} {intrinsic}({i} %c, {b} %x, {b} %y)
  ret {i} %r
}}
declare {i} {intrinsic}({i}, {b}, {b})
"""


def _neon_instruction(name: str, lanes: int, intrinsic: str, features: str) -> str:
    i, b = f"<{lanes} x i32>", f"<{4 * lanes} x i8>"
    # The factor that may be a lane is the last one, or of usdot (as sudot) the first.
    factors = f"{b} %x, {b} %y" if "usdot" in intrinsic else f"{b} %y, {b} %x"
    return f"""
{_HEAD} {i} @{name}({i} %c, {i} %a, {i} %b) {_attributes(features)} {{
  %x = bitcast {i} %a to {b}
  %y = bitcast {i} %b to {b}
  %r = call {i} @{intrinsic}({i} %c, {factors})
  ret {i} %r
}}
declare {i} @{intrinsic}({i}, {b}, {b})
"""


def matrix_text(name: str, what: str) -> str:
    """A function behind smmla or usmmla of words: 2 rows of 8 bytes by 2 columns of 8, sums of four products each."""
    i, b, intrinsic = "<4 x i32>", "<16 x i8>", f"llvm.aarch64.neon.{what}.v4i32.v16i8"
    return f"""
{_HEAD} {i} @{name}({i} %c, {i} %a, {i} %b) {_attributes("+neon,+i8mm")} {{
  %x = bitcast {i} %a to {b}
  %y = bitcast {i} %b to {b}
  %r = call {i} @{intrinsic}({i} %c, {b} %x, {b} %y)
  ret {i} %r
}}
declare {i} @{intrinsic}({i}, {b}, {b})
"""


def _emulated_bytes(name: str, lanes: int) -> str:
    """Four products of an unsigned and a signed byte, each extended to 32 bits."""
    i = f"<{lanes} x i32>"
    lines, total = [], "%c"
    for n in range(4):
        lines += [
            f"  %a{n} = shl {i} %a, splat (i32 {24 - 8 * n})",
            f"  %b{n} = shl {i} %b, splat (i32 {24 - 8 * n})",
            f"  %x{n} = lshr {i} %a{n}, splat (i32 24)",
            f"  %y{n} = ashr {i} %b{n}, splat (i32 24)",
            f"  %p{n} = mul {i} %x{n}, %y{n}",
            f"  %s{n} = add {i} {total}, %p{n}",
        ]
        total = f"%s{n}"
    body = "\n".join(lines)
    return f"\n{_HEAD} {i} @{name}({i} %c, {i} %a, {i} %b) {_attributes()} {{\n{body}\n  ret {i} {total}\n}}\n"


def _pair_products(name: str, lanes: int, intrinsic: str | None) -> str:
    """Pairs of int16 on the left, pairs of int8 on the right."""
    i, s, b = f"<{lanes} x i32>", f"<{2 * lanes} x i16>", f"<{2 * lanes} x i8>"
    if intrinsic is not None:
        products = f"  %p = call {i} @{intrinsic}({s} %x, {s} %y)"
        declared = f"declare {i} @{intrinsic}({s}, {s})"
    else:
        products = f"""  %w = bitcast {s} %y to {i}
  %a0 = shl {i} %a, splat (i32 16)
  %b0 = shl {i} %w, splat (i32 16)
  %x0 = ashr {i} %a0, splat (i32 16)
  %y0 = ashr {i} %b0, splat (i32 16)
  %x1 = ashr {i} %a, splat (i32 16)
  %y1 = ashr {i} %w, splat (i32 16)
  %p0 = mul {i} %x0, %y0
  %p1 = mul {i} %x1, %y1
  %p = add {i} %p0, %p1"""
        declared = ""
    return f"""
{_HEAD} {i} @{name}({i} %c, {i} %a, {b} %b) {_attributes()} {{
  %x = bitcast {i} %a to {s}
  %y = sext {b} %b to {s}
{products}
  %r = add {i} %c, %p
  ret {i} %r
}}
{declared}
"""


def _narrow(lanes: int, by_instruction: bool) -> str:
    def of(scalar: str) -> str:
        return scalar if lanes == 1 else f"<{lanes} x {scalar}>"

    def number(value: int) -> str:
        return str(value) if lanes == 1 else f"splat (i32 {value})"

    f, i, h, flag = of("float"), of("i32"), of("i16"), of("i1")
    if by_instruction:
        return f"""
{_HEAD} {h} @gw_narrow_{lanes}({f} %x) {_attributes("+avx512f,+avx512vl,+avx512bf16")} {{
  %r = fptrunc {f} %x to {of("bfloat")}
  %q = bitcast {of("bfloat")} %r to {h}
  ret {h} %q
}}
"""
    return f"""
{_HEAD} {h} @gw_narrow_{lanes}({f} %x) {_attributes()} {{
  %u = bitcast {f} %x to {i}
  %high = lshr {i} %u, {number(16)}
  %odd = and {i} %high, {number(1)}
  %half = add {i} %odd, {number(32767)}
  %sum = add {i} %u, %half
  %rounded = lshr {i} %sum, {number(16)}
  %quiet = or {i} %high, {number(64)}
  %nan = fcmp uno {f} %x, %x
  %w = select {flag} %nan, {i} %quiet, {i} %rounded
  %r = trunc {i} %w to {h}
  ret {h} %r
}}
"""
