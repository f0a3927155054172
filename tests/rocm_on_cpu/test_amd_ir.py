"""Kernels of ours for AMD's GPUs by the LLVM IR that TVM's generator makes of them, against float64, in both orders of
lanes; and what those checks find where a kernel is broken."""

from __future__ import annotations

import functools
import platform
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_on_cpu"))
import amd_kernels
import test_kernels as cases

from graphwright.backends.gpu import lower
from graphwright.backends.gpu.amd_fragments import form_of
from graphwright.backends.gpu.tile import Tile
from graphwright.hwdb import lookup

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 only")

# Matrix units of three kinds: MFMA in waves of 64, WMMA with two copies of operands, and with one.
DEVICES = {"gfx90a": "mi250x", "gfx1100": "rx-7900-xtx", "gfx1201": "gfx1201"}
# What is multiplied on each: by its case, dtype and form in test_kernels.py.
ROUNDED = {
    "gfx90a": ("deep_float16_carried", "odd_float16_wide", "eights_bfloat16_carried16", "ragged_bfloat16_carried"),
    "gfx1100": ("odd_float16_carried", "eights_float16_carried16", "eights_bfloat16_wide"),
    "gfx1201": ("odd_bfloat16_carried", "eights_float16_carried"),
}
MATRIX = {
    "gfx90a": ("causal_float16", "odd_bfloat16", "plain_float16_carried"),
    "gfx1100": ("causal_float16_carried", "odd_bfloat16"),
    "gfx1201": ("odd_float16",),
}
FEW = {"gfx90a": ("one_float32", "tail_bfloat16"), "gfx1100": ("wide_float16",), "gfx1201": ()}
PLAIN = {"gfx90a": ("ragged", "odd"), "gfx1100": ("whole",), "gfx1201": ()}
ATTENTIONS = {"gfx90a": ("causal", "odd"), "gfx1100": ("plain",), "gfx1201": ()}
BROKEN = "rounded_deep_float16_carried"


def functions(arch: str):
    form = form_of(lookup(DEVICES[arch]))
    made = {}
    for name in ROUNDED[arch]:
        case, dtype, how = name.split("_")
        made[f"rounded_{name}"] = cases.rounded(dtype, *cases.SIZES[case], how, form)
    made |= {f"matrix_{name}": cases.attended(*name.split("_"), amd=form) for name in MATRIX[arch]}
    made |= {f"few_{name}": cases.few(*name.split("_"), form.wave) for name in FEW[arch]}
    made |= {
        f"product_{name}": cases.multiplication(Tile(64, 64, 16, 4, 4), *cases.SIZES[name]) for name in PLAIN[arch]
    }
    return made | {f"attention_{name}": cases.attended(name) for name in ATTENTIONS[arch]}


@functools.cache
def everything(arch: str):
    """All kernels, compiled once; on gfx90a with one that is broken in several ways."""
    hw = lookup(DEVICES[arch])
    texts, launches = amd_kernels.generated(functions(arch), hw)
    if arch == "gfx90a":
        texts |= broken(texts[BROKEN], hw)
    return amd_kernels.compiled(texts, launches, hw.warp_threads), tuple(texts)


def broken(text: str, hw) -> dict[str, str]:
    """By what is missing: each barrier, the fence in front of each, the rewriting of views."""
    variants = {
        f"{what} {number}": changed
        for what in ("barrier", "release")
        for number, changed in enumerate(amd_kernels.without(text, what))
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "without_views", lambda module: module)
        case, dtype, how = BROKEN.split("_")[1:]
        function = cases.rounded(dtype, *cases.SIZES[case], how, form_of(hw))
        views, _ = amd_kernels.generated({BROKEN: function}, hw)
    return {f"{BROKEN}:{name}": changed for name, changed in (variants | {"views": views[BROKEN]}).items()}


def failure(arch: str, name: str, reverse: bool) -> tuple[str | None, float]:
    """What went wrong, and the largest difference from float64."""
    run, _ = everything(arch)
    given, exact = cases.arrays(name, lookup(DEVICES[arch]).warp_threads)
    went_wrong = run(name, given, reverse)
    out = given["out0"]
    if out.dtype == np.int16:
        dtype = name.split("_")[2]
        out = torch.from_numpy(out).view(getattr(torch, dtype)).double().numpy()
        exact = exact + (out - exact).clip(*(sign * np.abs(exact) * cases.UNIT[dtype] for sign in (-1, 1)))
    difference = float(np.abs(out - exact).max())
    return went_wrong, np.inf if np.isnan(difference) else difference


@pytest.mark.parametrize("reverse", [False, True], ids=["upwards", "downwards"])
@pytest.mark.parametrize("arch", DEVICES)
def test_kernels_agree_with_float64_in_both_orders_of_lanes(arch, reverse):
    for name in everything(arch)[1]:
        if ":" not in name:
            went_wrong, difference = failure(arch, name, reverse)
            assert went_wrong is None, name
            assert difference < cases.allowed(name), name


def found(what: str) -> list[tuple[str, float]]:
    """Of each broken kernel: the first failure in one order of lanes or the other, and the largest difference."""
    rows = []
    for name in everything("gfx90a")[1]:
        if name.startswith(f"{BROKEN}:{what}"):
            runs = [failure("gfx90a", name, reverse) for reverse in (False, True)]
            rows.append((next((text for text, _ in runs if text), ""), max(difference for _, difference in runs)))
    return rows


def test_views_of_shared_memory_are_found_to_be_addresses_of_nothing():
    """What TVM's generator makes of kernels without without_views.py."""
    ((went_wrong, _),) = found("views")
    assert "which is not in memory of the device" in went_wrong


def test_every_barrier_but_that_behind_the_last_tile_is_needed():
    """LLVM takes the two turns of the loop apart, and after the last one no tile is written any more."""
    *rows, (_, last) = found("barrier")
    assert len(rows) >= 3
    assert all(difference > 20 * cases.allowed(BROKEN) for _, difference in rows)
    assert last < cases.allowed(BROKEN)


def test_every_barrier_waits_for_shared_memory():
    rows = found("release")
    assert len(rows) >= 3
    assert all("at a barrier while accesses of its wave to shared memory are under way" in text for text, _ in rows)
