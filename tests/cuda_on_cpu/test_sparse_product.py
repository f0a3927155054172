"""Products with weights that are 2 of 4 on the emulator, which has mma.sp by the lanes of the PTX ISA."""

from __future__ import annotations

import functools
import platform
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import kernels

from graphwright.backends.gpu.matrix_product import matrix_product
from graphwright.backends.gpu.matrix_tile import MatrixTile
from graphwright.backends.gpu.parts import in_parts
from graphwright.backends.gpu.product import Finish
from graphwright.backends.gpu.product_call import as_words, packed_shape, packed_weights
from graphwright.backends.gpu.sparse_product import SparseMma
from graphwright.backends.gpu.sparse_weights import as_sparse_weights, is_two_of_four
from graphwright.backends.gpu.stage import Halves, Operand
from graphwright.backends.kernels.loops import flat, span
from graphwright.hwdb import lookup

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 only")

SMALL = MatrixTile(32, 32, 32, 2, 2, sparse=True)
TILES = {"small": SMALL, "long": replace(SMALL, rows=64, columns=64), "parts": replace(SMALL, parts=2)}
# Rows, columns and sum: whole tiles, tails everywhere, and what 128-bit accesses cannot have.
SIZES = {"whole": (32, 32, 128), "ragged": (70, 44, 52), "odd": (33, 35, 37), "eights": (40, 37, 200)}
# Tile, size, dtype, and whether activations are 16 bits in memory.
CASES = (
    *(("small", size, "float16", False) for size in SIZES),
    *(("small", "eights", dtype, True) for dtype in ("float16", "bfloat16")),
    ("long", "ragged", "bfloat16", False),
    ("parts", "eights", "float16", True),
)
BROKEN = ("small", "eights", "float16", True)
NAMES = {"kernel" + "_".join(map(str, case)): case for case in CASES}


def multiplication(tile_name: str, size: str, dtype: str, halves: bool):
    """x[rows, depth] w[columns, depth]^T + bias; its parts without the bias."""
    tile, (rows, columns, depth) = TILES[tile_name], SIZES[size]
    deep = 4 if depth % 4 == 0 else 1

    def read(buffers, number):
        x = flat(buffers[0])
        left = Operand(lambda k, r: x[span(r * depth + k, deep)], depth, rows, "depth", deep)
        if halves:
            left = Halves(as_words(buffers[0]), lambda k, r: (r * depth + k, None), depth, rows)
        return left, as_sparse_weights(buffers[1])

    def whole(buffers, out, number):
        bias = flat(buffers[2])
        return *read(buffers, number), Finish(lambda r, c: r * columns + c, 1, lambda r, c, n: bias[span(c, n)])

    buffers = [((rows, depth), dtype if halves else "float32"), packed_shape(columns, depth, tile)]
    given = (dtype, [*buffers, ((columns,), "float32")], (rows, columns), whole)
    if tile.parts > 1:
        given = (dtype, buffers, (tile.parts, rows, columns), in_parts(read, tile, rows, columns))
    return matrix_product("product", tile, tile.parts, rows, columns, *given, SparseMma, True)


@functools.cache
def everything():
    """All kernels, and one without each of its barriers and waits, compiled once."""
    sources, launches = kernels.generated({n: multiplication(*case) for n, case in NAMES.items()}, lookup("a100"))
    variants = dict(sources)
    (broken,) = (name for name, case in NAMES.items() if case == BROKEN)
    for what in ("sync", "wait"):
        for number, text in enumerate(kernels.without(sources[broken], what)):
            variants[f"{broken}:{what} {number}"] = text
    return kernels.compiled(variants, launches), tuple(variants)


def weights(columns: int, depth: int, seed: int = 0) -> torch.Tensor:
    """Random ones, of every four one to three zero, never fewer than two; groups of all zeros among them."""
    random = np.random.default_rng(seed)
    dense = random.standard_normal((columns, depth + -depth % 4)).astype(np.float32).reshape(-1, 4)
    order = random.random(dense.shape).argsort(1)
    dense[order < random.choice([2, 2, 2, 3, 4], (len(dense), 1))] = 0
    return torch.from_numpy(dense.reshape(columns, -1)[:, :depth].copy())


def error(name: str, reverse: bool, change: int | None = None) -> float:
    """The largest difference from float64; with bit `change` of the places flipped."""
    run, _ = everything()
    tile_name, size, dtype, halves = NAMES[name.split(":")[0]]
    tile, (rows, columns, depth) = TILES[tile_name], SIZES[size]
    random = np.random.default_rng(1)
    w, kind = weights(columns, depth), getattr(torch, dtype)
    x = torch.from_numpy(random.standard_normal((rows, depth)).astype(np.float32))
    bias = random.standard_normal(columns).astype(np.float32)
    packed = packed_weights(None, lambda t: t, tile, dtype).pack(w).numpy()
    assert packed.shape == packed_shape(columns, depth, tile)[0]
    if change is not None:
        words = packed.reshape(-1)[packed.size * 8 // 9 :].view(np.uint32)
        words[change // 32] ^= np.uint32(1 << change % 32)
    out = np.full((tile.parts, rows, columns), np.nan, np.float32)
    given = x.to(kind).view(torch.int16).numpy() if halves else x.numpy()
    if run(name, {"in0": given, "in1": packed, "in2": bias, "out0": out}, reverse) is not None:
        return np.inf
    exact = x.to(kind).double().numpy() @ w.to(kind).double().numpy().T + (0 if tile.parts > 1 else bias)
    difference = np.abs(out.sum(0) - exact).max()
    return np.inf if np.isnan(difference) else float(difference)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reverse", [False, True])
def test_products_with_2_of_4_weights_agree_with_float64_in_both_orders_of_lanes(name, reverse):
    assert error(name, reverse) < 3e-5  # sums of 200 products of normal numbers in float32


def test_a_wrong_bit_of_a_place_is_seen():
    name = next(n for n, case in NAMES.items() if case == ("small", "whole", "float16", False))
    columns, depth = SIZES["whole"][1:]
    filled = weights(columns, depth).reshape(columns // 16, 2, 8, depth // 64, 4, 4, 4).ne(0).sum(-1)
    draw = np.random.default_rng(2)
    seen = 0
    for bit in draw.choice(columns * depth, 40, replace=False).tolist():
        word, place = divmod(bit, 32)
        block, lane = divmod(word, 32)
        # Of a word: the upper half is column + 8; 4 bits for every four of the sum.
        fragment, pair = divmod(block, depth // 64)
        values = int(filled[fragment, place // 16, lane // 4, pair, lane % 4, place % 16 // 4])
        wrong = error(name, False, bit) > 1e-4
        assert wrong or values < 2, (bit, values)  # a place of a zero that fills up may be any
        seen += wrong
    assert seen > 15


def test_without_a_barrier_or_a_wait_the_numbers_are_wrong():
    _, variants = everything()
    broken = [variant for variant in variants if ":" in variant]
    assert sum("sync" in variant for variant in broken) == 4  # 3 in the loop, 1 on the way of a fragment to memory
    assert sum("wait" in variant for variant in broken) == 3
    for variant in broken:
        assert max(error(variant, reverse) for reverse in (False, True)) > 1e-3, variant


def test_2_of_4_is_seen_along_the_sum():
    w = weights(16, 64)
    assert is_two_of_four(w)
    w[5, 8:11] = 1
    assert not is_two_of_four(w)
    assert not is_two_of_four(weights(64, 16).t())
    assert is_two_of_four(torch.tensor([[1.0, 1, 0, 0, 1, 1]]))  # zeros past the end count
    assert not is_two_of_four(torch.zeros(0, 8))
