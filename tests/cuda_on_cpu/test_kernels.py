"""Kernels of ours for GPUs, alone on the emulator, in both orders of lanes; and without each barrier and shuffle."""

from __future__ import annotations

import functools
import platform
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tvm.tirx.script import builder as T

sys.path.insert(0, str(Path(__file__).parent))
import kernels

from graphwright.backends.gpu.amd_fragments import AmdLanes, AmdUnits, Form
from graphwright.backends.gpu.attention import Plan, attention, plan_attention
from graphwright.backends.gpu.dots import Dots, dots
from graphwright.backends.gpu.matrix_attention import MatrixPlan, matrix_attention
from graphwright.backends.gpu.matrix_product import matrix_product
from graphwright.backends.gpu.matrix_tile import MatrixTile, Product, choose_matrix_tile
from graphwright.backends.gpu.mma import MmaLanes
from graphwright.backends.gpu.product import Finish, product
from graphwright.backends.gpu.product_call import as_weights, as_words, packed_shape, packed_weights
from graphwright.backends.gpu.stage import Halves, Operand
from graphwright.backends.gpu.tile import CANDIDATES, LANES, Tile, choose_tile
from graphwright.backends.gpu.wmma import Wmma
from graphwright.backends.kernels.attention_plan import Problem
from graphwright.backends.kernels.loops import flat, span
from graphwright.hwdb import lookup

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 only")

# Rows, columns and sum of a product: whole tiles, tails everywhere, and what 128-bit accesses cannot have.
SIZES = {"whole": (64, 64, 64), "ragged": (70, 44, 52), "odd": (33, 35, 37), "deep": (64, 64, 128)}
SIZES["eights"] = (70, 37, 72)
NARROW = ("float16", "bfloat16")
ROUNDED = ("deep", "ragged", "odd", "eights")  # on matrix units
# How their weights come in: float32, 16 bits, 16 bits past the registers; with 16: the activations, in and out, too.
FORMS = ("wide", "carried", "copied", "carried16", "copied16")
ROUNDINGS = [
    (case, dtype, form)
    for case in ROUNDED
    for dtype in NARROW
    for form in FORMS
    if not form.endswith("16") or SIZES[case][2] % 8 == 0
]
# Barriers, shuffles and waits for copies of the kernels they are taken out of. On tensor cores: 3 in the loop, and
# those between the four fragments of a warp on their way through shared memory.
COUNTS = {
    "product_whole_32x32": (3, 0, 0),
    "attention_causal": (4, 8, 0),
    "rounded_deep_float16_copied": (10, 0, 3),
    "rounded_eights_float16_copied16": (10, 0, 3),
    "few_one_float16": (0, 5, 0),
    "matrix_causal_float16": (5, 16, 0),
    "matrix_plain_float16_copied": (5, 16, 4),
}
BROKEN = ("sync", "shuffle", "wait")
# Shuffles of attention where both halves of a wave of AMD's need all powers: maxima, sums, and four for each 16 keys.
HALVES, SHUFFLES = "matrix_odd_float16", 12
# Of matrix units: with a thread for each piece of the weights, and on waves of 64 with more.
TILES = {32: MatrixTile(64, 64, 32, 2, 2), 64: MatrixTile(32, 32, 32, 2, 2, warp_threads=64)}
# Rows, columns, sum; a lane takes 8 (4) of the sum at a time.
FEW = {"one": (1, 4, 512), "tail": (5, 37, 264), "wide": (15, 20, 256)}
FEW_DTYPES = ("float32", *NARROW)
# Batch, heads, heads of keys, queries, keys, depth, depth of values.
ATTENTIONS = {"plain": (2, 2, 2, 20, 70, 24, 24), "causal": (1, 4, 2, 77, 77, 16, 24), "odd": (1, 3, 1, 17, 33, 7, 5)}
# Operands in float32, in 16 bits through registers, and past them.
ROUNDED_ATTENTIONS = [
    (name, dtype, form)
    for name, sizes in ATTENTIONS.items()
    for dtype in NARROW
    for form in ("", "carried", "copied")
    if form == "" or sizes[-1] % 8 == 0
]
# The powers of scores are rounded to 16 bits by as much as 2^-11 or 2^-8 of themselves, against what v has of up to 4.
TOLERANCE = {"float16": 1e-3, "bfloat16": 8e-3}
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def multiplication(tile: Tile, rows: int, columns: int, depth: int):
    """act(a[rows, depth] b[depth, columns] + bias + residual)"""

    def parts(buffers, out, number):
        a, b, bias, residual = (flat(buffer) for buffer in buffers)
        deep, wide = LANES if depth % LANES == 0 else 1, LANES if columns % LANES == 0 else 1
        return (
            Operand(lambda k, r: a[span(r * depth + k, deep)], depth, rows, "depth", deep),
            Operand(lambda k, c: b[span(k * columns + c, wide)], depth, columns, "width", wide),
            Finish(lambda r, c: r * columns + c, wide, lambda r, c, n: bias[span(c, n)], residual, "relu"),
        )

    buffers = [(shape, "float32") for shape in ((rows, depth), (depth, columns), (columns,), (rows, columns))]
    return product("product", tile, 1, rows, columns, buffers, (rows, columns), parts)


def rounded(dtype: str, rows: int, columns: int, depth: int, form: str, amd: Form | None = None):
    """a[rows, depth] b[depth, columns] + bias + residual on matrix units, in the smallest tile.

    `form`: see FORMS; `amd`: how waves of AMD's hold fragments.
    """
    tile, halves = TILES[amd.wave if amd else 32], form.endswith("16")
    units = functools.partial(AmdUnits, amd) if amd else Wmma
    deep, wide = LANES if depth % LANES == 0 else 1, LANES if columns % LANES == 0 else 1

    def parts(buffers, out, number):
        a, b, bias, residual = (flat(buffer) for buffer in buffers)
        right = Operand(lambda k, c: b[span(k * columns + c, wide)], depth, columns, "width", wide)
        left = Operand(lambda k, r: a[span(r * depth + k, deep)], depth, rows, "depth", deep)
        if halves:
            left = Halves(as_words(buffers[0]), lambda k, r: (r * depth + k, None), depth, rows)
        return (
            left,
            right if form == "wide" else as_weights(buffers[1]),
            Finish(lambda r, c: r * columns + c, wide, lambda r, c, n: bias[span(c, n)], residual),
        )

    weights = ((depth, columns), "float32") if form == "wide" else packed_shape(columns, depth, tile)
    stored = dtype if halves else "float32"
    buffers = [((rows, depth), stored), weights, ((columns,), "float32"), ((rows, columns), "float32")]
    sizes, past = (1, rows, columns), form.startswith("copied")
    return matrix_product("product", tile, *sizes, dtype, buffers, (rows, columns), parts, units, past, stored)


def few(case: str, dtype: str, warp_threads: int = 32):
    """relu(x[rows, depth] w[columns, depth]^T + bias + residual)"""
    rows, columns, depth = FEW[case]
    count = {"one": 1, "tail": 2, "wide": 4}[case]
    plan = Dots(count, dtype, -(-columns // (4 * count)), warp_threads)
    lanes = LANES if count == LANES else 1
    words = ((columns, depth), "float32") if dtype == "float32" else ((columns, depth // 2), "int32")
    buffers = [((rows, depth), "float32"), words, ((columns,), "float32"), ((rows, columns), "float32")]

    def finish(buffers):
        bias, residual = (flat(buffer) for buffer in buffers)
        return Finish(lambda r, c: r * columns + c, lanes, lambda r, c, n: bias[span(c, n)], residual, "relu")

    return dots(plan, (rows, columns, depth), buffers, (rows, columns), finish)


def attended(name: str, dtype: str = "float32", form: str = "", amd: Form | None = None):
    p = Problem(*ATTENTIONS[name])
    shapes = (
        (p.batch, p.heads, p.queries, p.depth),
        (p.batch, p.key_heads, p.keys, p.depth),
        (p.batch, p.key_heads, p.keys, p.value_depth),
        (p.batch, p.heads, p.queries, p.value_depth),
    )
    mask = ((1, 1, p.queries, p.keys), "float32", (p.queries, p.keys)) if name == "odd" else None
    if dtype == "float32":
        return attention(p, Plan(16, 32, 1), 0.3, shapes, causal=name == "causal", mask=mask)
    wave, copies = (amd.wave, amd.copies) if amd else (32, 1)
    plan = MatrixPlan(2, 16 if name == "odd" else 32, dtype, 1, wave, copies)
    units = functools.partial(AmdLanes, amd) if amd else MmaLanes
    dtypes = ["float32" if form == "" else dtype] * 4
    return matrix_attention(p, plan, 0.3, shapes, units, name == "causal", mask, None, dtypes, form == "copied")


class Emulated(Form):
    """Matrix instructions by functions of include/amd_matrix.h, which have the lanes of AMD's documentation."""

    def multiply(self, dtype, sums, at, rows, row_at, columns, column_at):
        parts = (T.address_of(part) for part in (columns[column_at], rows[row_at], sums[at]))
        T.evaluate(T.call_extern("void", f"amd_{dtype}_{self.copies}", *parts))


# CDNA, RDNA 3, RDNA 4
AMD = {"mfma": Emulated(64), "wmma3": Emulated(32, 2), "wmma4": Emulated(32)}


@functools.cache
def on_amd(units: str):
    """Kernels on AMD's matrix units, with the instruction emulated; and others for waves of 64."""
    form = AMD[units]
    cases = ROUNDED if form.wave == 64 else ("odd", "eights")
    functions = {
        f"rounded_{case}_{dtype}_{how}": rounded(dtype, *SIZES[case], how, form)
        for case, dtype, how in ROUNDINGS
        if case in cases and not how.startswith("copied")
    }
    functions |= {
        "_".join(["matrix", name, dtype, how]).rstrip("_"): attended(name, dtype, how, form)
        for name, dtype, how in ROUNDED_ATTENTIONS
        if how != "copied"
    }
    if form.wave == 64:
        functions["product_ragged_64x64"] = multiplication(Tile(64, 64, 16, 4, 4), *SIZES["ragged"])
        functions["attention_causal"] = attended("causal")
        functions["few_tail_bfloat16"] = few("tail", "bfloat16", 64)
    sources, launches = kernels.generated(functions, lookup("a100"), amd=True)
    broken = kernels.without(sources[HALVES], "shuffle") if form.copies == 2 else []
    variants = sources | {f"{HALVES}:shuffle {number}": text for number, text in enumerate(broken)}
    return kernels.compiled(variants, launches, form.wave), tuple(functions), len(broken)


@functools.cache
def everything():
    """All kernels with their variants, compiled once; and how many barriers and shuffles each has."""
    functions = {}
    for name, sizes in SIZES.items():
        for tile in CANDIDATES if name == "ragged" else CANDIDATES[-1:]:
            functions[f"product_{name}_{tile[0]}x{tile[1]}"] = multiplication(Tile(*tile), *sizes)
    functions |= {f"attention_{name}": attended(name) for name in ATTENTIONS}
    functions |= {"_".join(["matrix", *parts]).rstrip("_"): attended(*parts) for parts in ROUNDED_ATTENTIONS}
    for case, dtype, form in ROUNDINGS:
        functions[f"rounded_{case}_{dtype}_{form}"] = rounded(dtype, *SIZES[case], form)
    functions |= {f"few_{case}_{dtype}": few(case, dtype) for case in FEW for dtype in FEW_DTYPES}
    sources, launches = kernels.generated(functions, lookup("a100"))
    variants = dict(sources)
    counts = {}
    for name in COUNTS:
        for what in BROKEN:
            broken = kernels.without(sources[name], what)
            counts[name, what] = len(broken)
            variants |= {f"{name}:{what} {number}": text for number, text in enumerate(broken)}
    return kernels.compiled(variants, launches), counts


def arrays(name: str, wave: int = 32) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Operands, an output of NaN, and the result in float64."""
    random = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    kind, case, *rest = name.split(":")[0].split("_")
    if kind == "product":
        rows, columns, depth = SIZES[case]
        operands = [drawn(rows, depth), drawn(depth, columns), drawn(columns), drawn(rows, columns)]
        a, b, bias, residual = (x.astype(np.float64) for x in operands)
        exact = np.maximum(a @ b + bias + residual, 0)
    elif kind == "rounded":
        rows, columns, depth = SIZES[case]
        operands = [drawn(rows, depth), drawn(depth, columns), drawn(columns), drawn(rows, columns)]
        dtype = getattr(torch, rest[0])
        a, b = (torch.from_numpy(x).to(dtype).double().numpy() for x in operands[:2])
        exact = a @ b + operands[2].astype(np.float64) + operands[3]
        if rest[1] != "wide":
            tile = TILES[wave]
            pack = packed_weights(None, lambda w: w.t(), tile, rest[0]).pack
            operands[1] = pack(torch.from_numpy(operands[1])).numpy()
        if rest[1].endswith("16"):
            operands[0] = halves(operands[0], dtype)
    elif kind == "few":
        rows, columns, depth = FEW[case]
        operands = [drawn(rows, depth), drawn(columns, depth), drawn(columns), drawn(rows, columns)]
        weights = torch.from_numpy(operands[1]).to(getattr(torch, rest[0]))
        operands[1] = (weights if rest[0] == "float32" else weights.view(torch.int32)).numpy()
        x, bias, residual = (operands[i].astype(np.float64) for i in (0, 2, 3))
        exact = np.maximum(x @ weights.double().numpy().T + bias + residual, 0)
    else:
        batch, heads, key_heads, queries, keys, depth, width = ATTENTIONS[case]
        operands = [drawn(batch, heads, queries, depth), drawn(batch, key_heads, keys, depth)]
        operands.append(drawn(batch, key_heads, keys, width))
        dtype = getattr(torch, rest[0] if rest else "float32")
        seen = (torch.from_numpy(x).to(dtype).double().numpy() for x in operands)
        if rest[1:]:
            operands = [halves(x, dtype) for x in operands]
        q, k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in seen)
        scores = q @ k.swapaxes(-1, -2) * 0.3
        if case == "causal":
            scores[..., np.triu(np.ones((queries, keys), bool), 1)] = -np.inf
        if case == "odd":
            operands.append(drawn(queries, keys))
            operands[3][3] = -np.inf  # a row of nothing: zeros
            scores += operands[3]
        with np.errstate(invalid="ignore"):
            powers = np.nan_to_num(np.exp(scores - scores.max(-1, keepdims=True)))
        exact = powers @ v / np.maximum(powers.sum(-1, keepdims=True), 1e-300)
    named = {f"in{i}": x for i, x in enumerate(operands)}
    nothing = np.full(exact.shape, np.nan, np.float32)
    stored = halves(nothing, dtype) if rest[1:] and (kind == "matrix" or rest[1].endswith("16")) else nothing
    return {**named, "out0": stored}, exact


def halves(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Rounded to 16 bits, as numbers without a meaning for numpy."""
    return torch.from_numpy(x).to(dtype).view(torch.int16).numpy()


def error(name: str, reverse: bool, units: str = "") -> float:
    """The largest difference; infinite where the kernel did not end, or left something out."""
    run = on_amd(units)[0] if units else everything()[0]
    given, exact = arrays(name, AMD[units].wave if units else 32)
    if run(name, given, reverse) is not None:
        return np.inf
    out = given["out0"]
    if out.dtype == np.int16:
        out = torch.from_numpy(out).view(getattr(torch, name.split("_")[2])).double().numpy()
        exact = exact + (out - exact).clip(*(sign * np.abs(exact) * UNIT[name.split("_")[2]] for sign in (-1, 1)))
    difference = np.abs(out - exact).max()
    return np.inf if np.isnan(difference) else float(difference)


def allowed(name: str) -> float:
    """Sums of up to 512 products of normal numbers in float32: roundings of 2^-24 of some 50; or what is rounded on
    purpose in the middle."""
    return TOLERANCE[name.split("_")[2]] if name.startswith("matrix") else 5e-5


NAMES = [
    f"product_{name}_{c[0]}x{c[1]}" for name in SIZES for c in (CANDIDATES if name == "ragged" else CANDIDATES[-1:])
]


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True], ids=["upwards", "downwards"])
@pytest.mark.parametrize(
    "name",
    [
        *NAMES,
        *(f"attention_{name}" for name in ATTENTIONS),
        *("_".join(["matrix", *parts]).rstrip("_") for parts in ROUNDED_ATTENTIONS),
        *(f"rounded_{case}_{dtype}_{form}" for case, dtype, form in ROUNDINGS),
        *(f"few_{case}_{dtype}" for case in FEW for dtype in FEW_DTYPES),
    ],
)
def test_kernels_keep_their_numbers_in_both_orders_of_lanes(name, reverse):
    assert error(name, reverse) < allowed(name)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True], ids=["upwards", "downwards"])
@pytest.mark.parametrize("units", AMD)
def test_kernels_on_matrix_units_of_amd_keep_their_numbers(units, reverse):
    """With the instruction emulated by the documented lanes: all else is the same code."""
    _, names, _ = on_amd(units)
    for name in names:
        assert error(name, reverse, units) < allowed(name), name


@pytest.mark.slow
def test_every_shuffle_between_the_halves_of_a_wave_is_needed():
    _, _, count = on_amd("wmma3")
    assert count == SHUFFLES
    for number in range(count):
        variant = f"{HALVES}:shuffle {number}"
        assert max(error(variant, reverse, "wmma3") for reverse in (False, True)) > 20 * allowed(HALVES), variant


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_every_barrier_shuffle_and_wait_is_needed(name):
    """Taken out alone, each makes the numbers wrong in one order of lanes or the other."""
    _, counts = everything()
    assert tuple(counts[name, what] for what in BROKEN) == COUNTS[name]
    for what in BROKEN:
        for number in range(counts[name, what]):
            variant = f"{name}:{what} {number}"
            assert max(error(variant, reverse) for reverse in (False, True)) > 20 * allowed(name), variant


@pytest.mark.parametrize("target", ["a100", "mi300x", "orin", "h100"])
@pytest.mark.parametrize("sizes", [(1, 16, 16, 1), (1, 4096, 4096, 4096), (1000, 17, 31, 5), (1, 64, 12544, 147)])
def test_tiles_are_within_what_every_gpu_allows(target, sizes):
    tile = choose_tile(lookup(target), *sizes)
    assert tile.threads <= 256
    assert tile.threads % 64 == 0  # whole warps of either maker
    assert tile.rows % (tile.thread_rows // LANES * LANES) == 0


def test_a_large_product_gets_the_large_tile_and_a_small_one_gives_every_unit_a_block():
    hw = lookup("a100")
    assert (choose_tile(hw, 1, 8192, 8192, 1024).rows, choose_tile(hw, 1, 8192, 8192, 1024).columns) == (128, 128)
    small = choose_tile(hw, 1, 128, 768, 768)
    assert small.rows * small.columns < 64 * 64
    # Where a unit has one block at most and waits for memory, more of them wait at the same time.
    last = choose_tile(hw, 1, 256, 196, 1024)
    assert (last.rows, last.columns) == (32, 32)


def test_sums_are_parted_where_units_would_wait_and_a_second_launch_pays():
    hw = lookup("a100")

    def chosen(*sizes, may_part=True, left=4.0):
        return choose_matrix_tile(hw, Product(1, *sizes, "float16", left), may_part)

    last = chosen(49, 512, 4608)  # of ResNet-50
    whole = chosen(49, 512, 4608, may_part=False)
    assert last.parts > 1 == whole.parts
    assert last.blocks > whole.blocks
    assert last.part(4608) * (last.parts - 1) < 4608 <= last.part(4608) * last.parts
    # 8 images: units have a block, and one that waits for 144 tiles in turn.
    full = [chosen(392, 512, 4608, may_part=may_part) for may_part in (True, False)]
    assert full[0].parts > 1 == full[1].parts
    assert chosen(1568, 256, 1024).parts == 1  # a gain if latency is what the rule takes it for, a loss if half
    assert chosen(32, 32, 64).parts == 1  # nothing to part
    assert chosen(32, 32, 256).parts == 1  # a launch costs more
    assert chosen(8192, 8192, 8192).parts == 1


def test_what_is_16_bits_in_memory_counts_half():
    hw = lookup("a100")
    product = Product(1, 1024, 768, 768, "float16", 2.0)
    tile = MatrixTile(128, 64, 32, 4, 2, product.blocks((128, 64)))
    assert product.cycles(hw, tile)[1] == 768 * (2 * 128 + 2 * 64) / 32
    wide = replace(product, left_bytes=4.0)
    assert wide.cycles(hw, tile)[1] == 768 * (4 * 128 + 2 * 64) / 32


def test_plans_of_attention_fit_shared_memory_or_are_refused():
    hw = lookup("a100")
    assert plan_attention(hw, Problem(1, 12, 12, 512, 512, 64, 64)) == Plan(32, 64, 192)
    assert plan_attention(hw, Problem(1, 1, 1, 16, 16, 2048, 2048)) is None
