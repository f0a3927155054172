"""Attention of few queries on the emulator, in both orders of lanes: whole, in parts of the keys, and its rule."""

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

from graphwright.backends.gpu.few_queries import add_key_parts, few_queries
from graphwright.backends.gpu.few_queries_plan import FewPlan, parts_shape, plan_few_queries
from graphwright.backends.kernels.attention_plan import Problem
from graphwright.hwdb import lookup

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 only")

# Batch, heads, heads of keys, queries, keys, depth, depth of values.
CASES = {
    "decode": Problem(2, 3, 3, 1, 200, 64, 64),
    "grouped": Problem(1, 12, 2, 2, 150, 32, 40),  # 12 queries share keys, in two blocks of 6
    "odd": Problem(1, 2, 2, 3, 133, 37, 5),
    "causal": Problem(1, 2, 2, 5, 70, 16, 16),
    "one key": Problem(1, 2, 1, 1, 1, 8, 8),
    "long head": Problem(1, 1, 1, 2, 40, 256, 256),
    "added mask": Problem(1, 2, 1, 2, 260, 64, 32),
    "bool mask": Problem(2, 2, 2, 1, 260, 64, 64),  # a part of the keys, and one head, see nothing
    "filled": Problem(1, 2, 2, 1, 40, 64, 64),
}
PARTED = ("decode", "grouped", "odd", "added mask", "bool mask")
SCALE, FILL = 0.3, -1e30
# Sums of some 200 products of normal numbers in float32; a result is rounded to 16 bits.
ALLOWED = {"float32": 2e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
BROKEN = ("decode", "float32", "parts")


def plan_of(case: str, dtype: str, form: str, target: str = "a100") -> FewPlan:
    """The plan of the rule, cut in three where `form` is "parts"."""
    p = CASES[case]
    plan = replace(plan_few_queries(lookup(target), p, dtype, case == "causal"), parts=1, keys=p.keys)
    pairs = p.batch * p.key_heads * plan.chunks
    steps = -(-p.keys // plan.step)
    parts = min(3, steps) if form == "parts" else 1
    keys = -(-steps // parts) * plan.step
    parts = -(-p.keys // keys)
    return replace(plan, keys=keys, parts=parts, blocks=pairs * parts)


def shapes_of(p: Problem):
    heads = (p.heads, p.key_heads, p.key_heads, p.heads)
    extents = ((p.queries, p.depth), (p.keys, p.depth), (p.keys, p.value_depth), (p.queries, p.value_depth))
    return tuple((p.batch, h, *e) for h, e in zip(heads, extents, strict=True))


def mask_of(case: str) -> np.ndarray | None:
    p = CASES[case]
    if case == "added mask":
        mask = np.random.default_rng(1).standard_normal((1, 1, p.queries, p.keys)).astype(np.float32)
        mask[..., 1, :] = -np.inf  # a query that sees nothing: zeros
        return mask
    if case in ("bool mask", "filled"):
        mask = np.random.default_rng(1).random((p.batch, p.heads, 1, p.keys)) < 0.5
        mask[:, 0, :, :100] = False
        mask[-1, 1] = False
        return mask
    return None


def functions_of(case: str, dtype: str, form: str, target: str = "a100"):
    p, plan = CASES[case], plan_of(case, dtype, form, target)
    mask = mask_of(case)
    given = None if mask is None else (mask.shape, str(mask.dtype), mask.shape)
    fill = FILL if case == "filled" else None
    made = {"": few_queries(p, plan, SCALE, shapes_of(p), case == "causal", given, fill, dtype)}
    if plan.parts > 1:
        made[" second"] = add_key_parts(p, plan, shapes_of(p)[3], fill, dtype)
    return {f"{case} {dtype} {form}{part}": function for part, function in made.items()}


NAMES = [
    *((case, "float32", "whole") for case in CASES),
    *((case, "float32", "parts") for case in PARTED),
    *((case, "float16", "parts") for case in ("decode", "grouped", "odd")),
    *((case, "bfloat16", "whole") for case in ("decode", "odd")),
]
ON_WAVES = [name for name in NAMES[::2] if name[1] == "float32"]


@functools.cache
def everything(warp_threads: int = 32):
    """All kernels, with variants of some, compiled once."""
    functions = {}
    for name in NAMES if warp_threads == 32 else ON_WAVES:
        functions |= functions_of(*name, target="a100" if warp_threads == 32 else "mi250x")
    renamed = {f"kernel{n}": name for n, name in enumerate(functions)}
    by_name = {name: symbol for symbol, name in renamed.items()}
    sources, launches = kernels.generated({s: functions[name] for s, name in renamed.items()}, lookup("a100"))
    variants = dict(sources)
    symbol = by_name.get(" ".join(BROKEN), "")
    for what in ("sync", "shuffle") if warp_threads == 32 else ():
        for number, text in enumerate(kernels.without(sources[symbol], what)):
            variants[f"{symbol}:{what} {number}"] = text
    return kernels.compiled(variants, launches, warp_threads), by_name, tuple(variants)


def operands(case: str, dtype: str):
    """q, k, v and a mask, as the kernel reads them; the result in float64."""
    p, random = CASES[case], np.random.default_rng(0)
    tensors = [torch.from_numpy(random.standard_normal(s)).to(getattr(torch, dtype)) for s in shapes_of(p)[:3]]
    q, k, v = (np.repeat(t.double().numpy(), p.heads // t.shape[1], axis=1) for t in tensors)
    scores = q @ k.swapaxes(-1, -2) * SCALE
    mask = mask_of(case)
    if case == "causal":
        scores[..., np.triu(np.ones((p.queries, p.keys), bool), 1)] = -np.inf
    if mask is not None:
        stopped = FILL if case == "filled" else -np.inf
        scores = np.where(mask, scores, stopped) if mask.dtype == bool else scores + mask
    with np.errstate(invalid="ignore"):
        powers = np.nan_to_num(np.exp(scores - scores.max(-1, keepdims=True)))
    exact = powers @ v / np.maximum(powers.sum(-1, keepdims=True), 1e-300)
    held = [t.numpy() if dtype == "float32" else t.view(torch.int16).numpy() for t in tensors]
    return [*held, *([mask] if mask is not None else [])], exact


def error(case: str, dtype: str, form: str, reverse: bool, warp_threads: int = 32, variant: str = "") -> float:
    """The largest difference; infinite where a kernel did not end, or left something out."""
    run, names, _ = everything(warp_threads)
    plan = plan_of(case, dtype, form, "a100" if warp_threads == 32 else "mi250x")
    given, exact = operands(case, dtype)
    arrays = {f"in{i}": x for i, x in enumerate(given)}
    out = torch.full(exact.shape, torch.nan, dtype=getattr(torch, dtype))
    result = out.numpy() if dtype == "float32" else out.view(torch.int16).numpy()
    between = np.full(parts_shape(CASES[case], plan), np.nan, np.float32)
    symbol = names[f"{case} {dtype} {form}"]
    if run(symbol + variant, {**arrays, "out0": result if plan.parts == 1 else between}, reverse) is not None:
        return np.inf
    if plan.parts > 1 and run(names[f"{case} {dtype} {form} second"], {"in0": between, "out0": result}, reverse):
        return np.inf
    difference = np.abs(out.double().numpy() - exact).max()
    return np.inf if np.isnan(difference) else float(difference)


@pytest.mark.parametrize("name", NAMES, ids=" ".join)
@pytest.mark.parametrize("reverse", [False, True])
def test_few_queries_agree_with_float64_in_both_orders_of_lanes(name, reverse):
    case, dtype, form = name
    assert (plan_of(*name).parts > 1) == (form == "parts")
    assert error(*name, reverse) < ALLOWED[dtype] * max(1.0, np.abs(operands(case, dtype)[1]).max())


@pytest.mark.parametrize("name", ON_WAVES, ids=" ".join)
def test_few_queries_agree_on_waves_of_64(name):
    assert max(error(*name, reverse, 64) for reverse in (False, True)) < 3 * ALLOWED["float32"]


def test_without_a_barrier_or_a_shuffle_the_numbers_are_wrong():
    _, names, variants = everything()
    symbol = names[" ".join(BROKEN)]
    mine = [v.removeprefix(symbol) for v in variants if v.startswith(f"{symbol}:")]
    assert sum("sync" in v for v in mine) == 1
    assert sum("shuffle" in v for v in mine) == 16  # 4 keys, teams of 16 lanes
    for variant in mine:
        assert max(error(*BROKEN, reverse, variant=variant) for reverse in (False, True)) > 1e-3, variant


def test_keys_are_parted_where_units_would_have_no_block_and_a_second_launch_pays():
    hw = lookup("a100")
    long = plan_few_queries(hw, Problem(1, 12, 12, 1, 4096, 64, 64))
    assert long.parts > 1
    assert 12 < long.blocks == 12 * long.parts
    assert long.keys * (long.parts - 1) < 4096 <= long.keys * long.parts
    assert plan_few_queries(hw, Problem(1, 12, 12, 1, 128, 64, 64)).parts == 1  # a launch costs more
    assert plan_few_queries(hw, Problem(8, 12, 12, 1, 4096, 64, 64)).parts == 1  # units have blocks
    assert plan_few_queries(hw, Problem(1, 12, 12, 1, 4096, 64, 64), causal=True).parts == 1  # of a single key
    shared = plan_few_queries(hw, Problem(1, 32, 8, 1, 4096, 128, 128))
    assert (shared.rows, shared.chunks, shared.team) == (4, 1, 32)
    assert plan_few_queries(hw, Problem(1, 12, 12, 9, 4096, 64, 64)) is None
    assert plan_few_queries(hw, Problem(1, 1, 1, 1, 64, 4096, 64)) is None
