"""Models on this machine's NVIDIA GPU against PyTorch's eager mode and torch.compile: one command, one table.

    python benchmarks/gpu.py                                 all of the list below, on the GPU that the driver names
    python benchmarks/gpu.py --only resnet50 bert            some of them
    python benchmarks/gpu.py --target a100 --batch 16 --precision fp16

It has never run on a GPU: no machine of ours has one. A test runs it on a small model over an emulated driver.

Every subject gets the same inputs, is checked against eager on the CPU in float64, warmed up, and timed by events of
the device around each call; the table has the median and the fastest tenth. The column "with copies" is the host's
clock around a call whose inputs come from the CPU and whose result goes back. A PyTorch without CUDA runs eager mode on
the CPU, and has no events: the first column is empty then.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import graphwright
from graphwright.backends.gpu.device_library import absence
from graphwright.compiler.benchmarking import zoo
from graphwright.hwdb import lookup
from graphwright.hwdb.host_gpus import detect_gpus, record_of

MODELS = ("resnet18", "resnet50", "mobilenetv2", "bert", "gpt2", "vit")
WARM_UP, CALLS = 10, 50
TOLERANCE = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 3e-2}  # relative L2: beyond it, a time means nothing


@dataclass(frozen=True)
class Row:
    """Milliseconds of one subject."""

    model: str
    subject: str
    device_ms: float | None  # between events on the device
    with_copies_ms: float
    fastest_ms: float  # tenth percentile, with copies
    error: float  # relative L2 against eager in float64 on the CPU


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="this machine's GPU, where the driver does not name it")
    parser.add_argument("--only", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="fp32", choices=sorted(TOLERANCE))
    options = parser.parse_args()
    target = options.target or present()
    if target is None:
        sys.exit("benchmarks/gpu.py measures on an NVIDIA GPU, and no driver names one here: name it with --target")
    hw = lookup(target)
    if reason := absence(hw):
        sys.exit(f"benchmarks/gpu.py measures on a GPU, and {reason}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    print(f"{hw.name}, torch {torch.__version__}, batch {options.batch}, {options.precision}")
    print(f"{'model':14}{'subject':18}{'device ms':>11}{'with copies':>13}{'fastest':>10}{'error':>10}")
    for name in options.only:
        for row in measured(name, target, options.batch, options.precision):
            device = "" if row.device_ms is None else f"{row.device_ms:.3f}"
            print(
                f"{row.model:14}{row.subject:18}{device:>11}{row.with_copies_ms:13.3f}{row.fastest_ms:10.3f}"
                f"{row.error:10.1e}",
                flush=True,
            )


def present() -> str | None:
    """The record of the first NVIDIA GPU here, or None."""
    return next((record for gpu in detect_gpus() if gpu.vendor == "nvidia" and (record := record_of(gpu))), None)


def measured(name: str, target: str, batch: int, precision: str) -> list[Row]:
    """The rows of one model: eager, torch.compile, ours. Raises SystemExit where a result is wrong."""
    model, inputs = zoo.build(name, batch=batch)
    with torch.no_grad():
        exact = first(model.double()(*[x.double() if x.is_floating_point() else x for x in inputs]))
        model = model.float()
        ours = graphwright.compile(model, inputs, target=target, precision=precision, cache=False)
        if not torch.cuda.is_available():
            subjects: dict[str, Callable[..., object]] = {"eager on the CPU": model, "graphwright": ours}
            rows = [on_host(name, subject, call, inputs, exact) for subject, call in subjects.items()]
        else:
            there = model.cuda()
            subjects = {"eager": there, "torch.compile": torch.compile(there), "graphwright": ours}
            rows = [on_device(name, subject, call, inputs, exact) for subject, call in subjects.items()]
    for row in rows:
        if not row.error <= TOLERANCE[precision]:  # nor NaN
            sys.exit(f"{name}: {row.subject} is wrong by {row.error:.1e}: its time means nothing")
    return rows


def on_device(
    name: str, subject: str, call: Callable[..., object], inputs: tuple[torch.Tensor, ...], exact: torch.Tensor
) -> Row:
    """The time on the device, and with copies from and to the CPU."""
    there = [x.cuda() for x in inputs]
    for _ in range(WARM_UP):
        call(*there)
    events = []
    for _ in range(CALLS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(*there)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    device = statistics.median(start.elapsed_time(end) for start, end in events)
    times, result = timed(lambda: first(call(*[x.cuda() for x in inputs])).cpu())
    return Row(name, subject, device, *times, difference(result, exact))


def on_host(
    name: str, subject: str, call: Callable[..., object], inputs: tuple[torch.Tensor, ...], exact: torch.Tensor
) -> Row:
    """The time of calls from the CPU."""
    times, result = timed(lambda: call(*inputs))
    return Row(name, subject, None, *times, difference(result, exact))


def timed(call: Callable[[], object]) -> tuple[tuple[float, float], object]:
    """Median and tenth percentile of a call's milliseconds, which end with its result on the CPU, and that result."""
    for _ in range(WARM_UP):
        result = call()
    times = []
    for _ in range(CALLS):
        started = time.perf_counter()
        result = call()
        times.append((time.perf_counter() - started) * 1e3)
    return (statistics.median(times), sorted(times)[CALLS // 10]), result


def first(result: object) -> torch.Tensor:
    """The first tensor of a model's result."""
    while not isinstance(result, torch.Tensor):
        result = next(iter(result.values() if isinstance(result, dict) else result))  # type: ignore[call-overload]
    return result


def difference(result: object, exact: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((first(result).double().cpu() - exact).norm() / exact.norm())


if __name__ == "__main__":
    main()
