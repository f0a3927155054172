"""Every float32 through each function of `backends/kernels/vector_math.py`, against float64: the worst error and where.

    python benchmarks/vector_math_grid.py [exp tanh ...] [--step N] [--json F]

All 2^32 bit patterns, both signs, subnormals, infinities and NaN, in chunks. The error is in units of the float32
spacing at the exact result (that of the smallest normal below it). Results that a function may flush, and arguments
outside its domain (where its docstring promises an absolute error or nothing), are listed apart.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from tvm import tirx

from graphwright.backends.kernels.vector_math import INTRINSICS
from graphwright.hwdb import detect

CHUNK = 1 << 22
NORMAL = 2.0**-126
Tensor = torch.Tensor


@dataclass(frozen=True)
class Exact:
    """The function in float64, the arguments it is judged on, and below which size its results may be flushed."""

    function: Callable[[Tensor], Tensor]
    low: float = -math.inf
    high: float = math.inf
    flushed: float = 0.0


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


FUNCTIONS = {
    "exp": Exact(torch.exp),
    "exp_nonpositive": Exact(torch.exp, high=0.0, flushed=NORMAL),
    "expm1": Exact(torch.expm1),
    "log": Exact(torch.log),
    "log1p": Exact(torch.log1p),
    "tanh": Exact(torch.tanh),
    "sigmoid": Exact(torch.sigmoid, flushed=NORMAL),
    "erf": Exact(torch.erf),
    "rsqrt": Exact(torch.rsqrt),
    "one_plus_erf": Exact(lambda x: torch.special.erfc(-x), low=-0.7),
    "gelu": Exact(lambda x: x * 0.5 * torch.special.erfc(-x * math.sqrt(0.5)), low=-1.0),
    "gelu_tanh": Exact(_gelu_tanh, low=-1.0),
    "silu": Exact(lambda x: x * torch.sigmoid(x), low=-80.0),
}


@dataclass
class Worst:
    """What was found of one function."""

    ulp: float = 0.0
    at: float = 0.0
    outside_absolute: float = 0.0  # largest absolute error outside of the domain, over max(1, |x|)
    wrong: int = 0  # NaN, infinity or sign other than the exact result's
    wrong_at: float | None = None
    values: int = 0


def machine_code(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """The function over one chunk, by vectors as long as this machine's registers."""
    hw = detect()
    lanes = hw.lanes("float32")
    source, target = (tirx.decl_buffer((CHUNK,), "float32", n) for n in ("source", "target"))
    i = tirx.Var("i", "int32")
    at = tirx.Ramp(i * lanes, 1, lanes)
    store = tirx.BufferStore(target, INTRINSICS[name](tirx.BufferLoad(source, [at])), [at])
    func = tirx.PrimFunc([source, target], tirx.For(i, 0, CHUNK // lanes, tirx.ForKind.SERIAL, store))
    func = func.with_attr({"tirx.noalias": True, "global_symbol": "main"})
    main = tvm.compile(tvm.IRModule({"main": func}), target=tvm.target.Target(hw.tvm_target()))["main"]
    result = tvm.runtime.empty((CHUNK,), "float32")

    def call(values: np.ndarray) -> np.ndarray:
        main(tvm.runtime.tensor(values), result)
        return np.asarray(result.numpy())

    return call


def judge(found: Worst, exact: Exact, values: np.ndarray, ours: np.ndarray) -> None:
    """Take a chunk into the account."""
    true = exact.function(torch.from_numpy(values).double()).numpy()
    with np.errstate(all="ignore"):
        rounded = true.astype(np.float32)
        inside = ~(values < exact.low) & ~(values > exact.high)
        wrong = (np.isnan(ours) != np.isnan(true)) | (np.isinf(ours) != np.isinf(rounded))
        wrong |= (true != 0) & (ours != 0) & (np.signbit(ours) != np.signbit(true)) & ~np.isnan(true)
        finite = np.isfinite(ours) & np.isfinite(rounded)
        error = np.where(finite, np.abs(ours.astype(np.float64) - true), 0.0)
        outside = np.where(inside, 0.0, error / np.maximum(1.0, np.abs(values)))
        error -= np.where(np.abs(true) < exact.flushed, exact.flushed, 0.0)
        ulp = error / np.spacing(np.maximum(np.abs(rounded), np.float32(NORMAL)))
        ulp = np.where(finite & inside, ulp, 0.0)
    place = int(ulp.argmax())
    if ulp[place] > found.ulp:
        found.ulp, found.at = float(ulp[place]), float(values[place])
    found.outside_absolute = max(found.outside_absolute, float(outside.max()))
    wrong &= inside
    if wrong.any() and found.wrong_at is None:
        found.wrong_at = float(values[wrong.argmax()])
    found.wrong += int(wrong.sum())
    found.values += int(inside.sum())


def measure(name: str, step: int) -> Worst:
    """Every `step`-th bit pattern."""
    call, found = machine_code(name), Worst()
    for start in range(0, 1 << 32, CHUNK * step):
        bits = np.minimum(np.arange(CHUNK, dtype=np.uint64) * step + start, (1 << 32) - 1)
        values = bits.astype(np.uint32).view(np.float32)
        judge(found, FUNCTIONS[name], values, call(values))
    return found


def main() -> int:
    """Measure the functions named; the JSON file keeps what it has of others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("functions", nargs="*", help=f"of {', '.join(FUNCTIONS)}; all by default")
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    failed = 0
    for name in options.functions or FUNCTIONS:
        started = time.perf_counter()
        found = measure(name, options.step)
        failed += found.wrong
        print(
            f"{name:16s} {found.ulp:8.3f} ulp at {found.at!r}; outside of its domain {found.outside_absolute:.1e}; "
            f"{found.wrong} wrong specials ({found.wrong_at}); {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        if options.json:
            kept[name] = {"step": options.step, **asdict(found)}
            options.json.write_text(json.dumps(kept, indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
