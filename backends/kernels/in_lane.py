"""Moves of bytes that stay in the 16-byte lanes of a vector, as functions in LLVM's own language.

    gw_taps_k     four rows of bytes -> words of four rows, those of the k-th quarter of each lane
    gw_pack       four vectors of words in the order that gw_taps_k leaves -> their bytes in natural order
    gw_wide_k     bytes -> words of the same quarters
    gw_natural_m  four such vectors of floats -> the m-th of four in natural order
    gw_steps      floats -> integers, to nearest, half to even

    channel  16 lane + 4 quarter + i      stands at 4 lane + i of the vector of its quarter: `order`

x86 unpacks and packs in lanes, so that none of these moves but gw_natural crosses one.
"""

from __future__ import annotations

from collections.abc import Sequence

_HEAD = "define linkonce_odr"
_PACKS = {
    4: ("sse2.packssdw.128", {"uint8": "sse2.packuswb.128", "int8": "sse2.packsswb.128"}, "+sse2"),
    8: ("avx2.packssdw", {"uint8": "avx2.packuswb", "int8": "avx2.packsswb"}, "+avx2"),
    16: (
        "avx512.packssdw.512",
        {"uint8": "avx512.packuswb.512", "int8": "avx512.packsswb.512"},
        "+avx512f,+avx512bw,+avx512vl",
    ),
}


def order(lanes: int) -> list[int]:
    """The channels of a block of 4 * `lanes` as the four vectors of words have them, one after the other."""
    return [16 * lane + 4 * quarter + i for quarter in range(4) for lane in range(lanes // 4) for i in range(4)]


def taps_text(lanes: int) -> str:
    """gw_taps_{lanes}_{k}(row 0, row 1, row 2, row 3)."""
    quarter, text = lanes // 4, ""
    i, b, h = f"<{lanes} x i32>", f"<{4 * lanes} x i8>", f"<{2 * lanes} x i16>"
    for k in range(4):
        high_bytes, high_words = divmod(k, 2)
        bytes_ = [
            source + 16 * lane + 8 * high_bytes + n
            for lane in range(quarter)
            for n in range(8)
            for source in (0, 4 * lanes)
        ]
        words = [
            source + 8 * lane + 4 * high_words + n
            for lane in range(quarter)
            for n in range(4)
            for source in (0, 2 * lanes)
        ]
        text += f"""
{_HEAD} {i} @gw_taps_{lanes}_{k}({i} %r0, {i} %r1, {i} %r2, {i} %r3) {_attributes()} {{
  %a = bitcast {i} %r0 to {b}
  %b = bitcast {i} %r1 to {b}
  %c = bitcast {i} %r2 to {b}
  %d = bitcast {i} %r3 to {b}
  %s = shufflevector {b} %a, {b} %b, {_mask(bytes_)}
  %t = shufflevector {b} %c, {b} %d, {_mask(bytes_)}
  %u = bitcast {b} %s to {h}
  %v = bitcast {b} %t to {h}
  %w = shufflevector {h} %u, {h} %v, {_mask(words)}
  %r = bitcast {h} %w to {i}
  ret {i} %r
}}
"""
    return text


def pack_text(lanes: int, dtype: str, saturating: bool) -> str:
    """gw_pack_{dtype}_{lanes}(words of quarter 0, ..., 3); `saturating`: by x86's packs, which clip on the way."""
    i, b = f"<{lanes} x i32>", f"<{4 * lanes} x i8>"
    head = f"{_HEAD} {b} @gw_pack_{dtype}_{lanes}({i} %a, {i} %b, {i} %c, {i} %d)"
    if not saturating:
        twice, all_ = f"<{2 * lanes} x i32>", f"<{4 * lanes} x i32>"
        natural = [0] * (4 * lanes)
        for at, channel in enumerate(order(lanes)):
            natural[channel] = at
        return f"""
{head} {_attributes()} {{
  %s = shufflevector {i} %a, {i} %b, {_mask(range(2 * lanes))}
  %t = shufflevector {i} %c, {i} %d, {_mask(range(2 * lanes))}
  %u = shufflevector {twice} %s, {twice} %t, {_mask(natural)}
  %r = trunc {all_} %u to {b}
  ret {b} %r
}}
"""
    words, bytes_, features = _PACKS[lanes]
    s = f"<{2 * lanes} x i16>"
    return f"""
{head} {_attributes(features)} {{
  %s = call {s} @llvm.x86.{words}({i} %a, {i} %b)
  %t = call {s} @llvm.x86.{words}({i} %c, {i} %d)
  %r = call {b} @llvm.x86.{bytes_[dtype]}({s} %s, {s} %t)
  ret {b} %r
}}
declare {s} @llvm.x86.{words}({i}, {i})
declare {b} @llvm.x86.{bytes_[dtype]}({s}, {s})
"""


def wide_text(lanes: int, dtype: str) -> str:
    """gw_wide_{dtype}_{lanes}_{k}(bytes)."""
    i, b, q, text = f"<{lanes} x i32>", f"<{4 * lanes} x i8>", f"<{lanes} x i8>", ""
    extend = "zext" if dtype == "uint8" else "sext"
    for k in range(4):
        text += f"""
{_HEAD} {i} @gw_wide_{dtype}_{lanes}_{k}({b} %x) {_attributes()} {{
  %q = shufflevector {b} %x, {b} poison, {_mask(order(lanes)[k * lanes : (k + 1) * lanes])}
  %r = {extend} {q} %q to {i}
  ret {i} %r
}}
"""
    return text


def natural_text(lanes: int) -> str:
    """gw_natural_{lanes}_{m}(floats of quarter 0, ..., 3), and gw_quarter_{lanes}_{k}, which undoes it."""
    f, twice, text = f"<{lanes} x float>", f"<{2 * lanes} x float>", ""
    back = order(lanes)
    there = sorted(range(4 * lanes), key=lambda at: back[at])
    for name, places in (("natural", there), ("quarter", back)):
        for m in range(4):
            text += f"""
{_HEAD} {f} @gw_{name}_{lanes}_{m}({f} %a, {f} %b, {f} %c, {f} %d) {_attributes()} {{
  %s = shufflevector {f} %a, {f} %b, {_mask(range(2 * lanes))}
  %t = shufflevector {f} %c, {f} %d, {_mask(range(2 * lanes))}
  %r = shufflevector {twice} %s, {twice} %t, {_mask(places[m * lanes : (m + 1) * lanes])}
  ret {f} %r
}}
"""
    return text


def steps_text(lanes: int, instruction: bool) -> str:
    """gw_steps_{lanes}(floats); by `instruction` of x86, which gives the least integer for what does not fit."""
    f, i = f"<{lanes} x float>", f"<{lanes} x i32>"
    head = f"{_HEAD} {i} @gw_steps_{lanes}({f} %x)"
    if not instruction:
        name = f"@llvm.lrint.v{lanes}i32.v{lanes}f32"
        return f"""
{head} {_attributes()} {{
  %r = call {i} {name}({f} %x)
  ret {i} %r
}}
declare {i} {name}({f})
"""
    if lanes == 16:
        call, declared = f"({f} %x, {i} zeroinitializer, i16 -1, i32 4)", f"({f}, {i}, i16, i32)"
        name, features = "avx512.mask.cvtps2dq.512", "+avx512f,+avx512vl"
    else:
        call, declared = f"({f} %x)", f"({f})"
        name, features = ("avx.cvt.ps2dq.256", "+avx") if lanes == 8 else ("sse2.cvtps2dq", "+sse2")
    return f"""
{head} {_attributes(features)} {{
  %r = call {i} @llvm.x86.{name}{call}
  ret {i} %r
}}
declare {i} @llvm.x86.{name}{declared}
"""


def _attributes(features: str = "") -> str:
    wanted = f' "target-features"="{features}"' if features else ""
    return f"alwaysinline nounwind memory(none){wanted}"


def _mask(places: Sequence[int]) -> str:
    return f"<{len(places)} x i32> <{', '.join(f'i32 {n}' for n in places)}>"
