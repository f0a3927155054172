"""Where the time of a call goes: every kernel's measured microseconds beside those the cost model predicted."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..backends.aot.library import Library
from ..backends.gpu.device_library import DeviceLibrary
from ..backends.lowering.registry import KernelInfo
from ..errors import InputError


@dataclass(frozen=True)
class KernelTime:
    """One kernel call of a model: what it is, and the median of its measured microseconds."""

    kernel: KernelInfo
    measured_us: float

    @property
    def ratio(self) -> float | None:
        """Predicted over measured; None where nothing was predicted."""
        predicted = self.kernel.predicted_us
        return None if predicted is None or not self.measured_us else predicted / self.measured_us


@dataclass(frozen=True)
class Profile:
    """The kernel calls of a model in the order they run."""

    rows: tuple[KernelTime, ...]

    @property
    def total_us(self) -> float:
        """Microseconds in kernels; PyTorch operators and the call itself are not in it."""
        return sum(row.measured_us for row in self.rows)

    def text(self) -> str:
        """A table, equal kernels on one line, the most expensive first."""
        groups: dict[KernelInfo, list[float]] = {}
        for row in self.rows:
            groups.setdefault(replace(row.kernel, name="", step=0), []).append(row.measured_us)
        lines = [f"{self.total_us / 1e3:.3f} ms in {len(self.rows)} kernel calls; microseconds of one call:"]
        lines.append(f"{'share':>6s} {'calls':>5s} {'measured':>9s} {'predicted':>9s}  kernel")
        for kernel, times in sorted(groups.items(), key=lambda item: -sum(item[1])):
            predicted = "" if kernel.predicted_us is None else f"{kernel.predicted_us:.1f}"
            share = sum(times) / self.total_us if self.total_us else 0.0
            lines.append(
                f"{share:6.1%} {len(times):5d} {statistics.mean(times):9.1f} {predicted:>9s}  "
                f"{kernel.algorithm}: {kernel.operators} ({kernel.choice})"
            )
        return "\n".join(lines)


def profile(
    library: Library | DeviceLibrary | None, kernels: Sequence[KernelInfo], call: Callable[[], Any], rounds: int
) -> Profile:
    """Time `kernels`, the steps of `library`'s regions in their order, over `rounds` of `call`."""
    if library is None:
        raise InputError("this model has no machine code: all of it runs in PyTorch")
    if isinstance(library, DeviceLibrary):
        raise InputError("kernels are timed on CPUs only; NVIDIA's nsys and AMD's rocprof time those of a GPU")
    if rounds < 1:
        raise InputError(f"rounds must be at least 1, got {rounds!r}")
    call()
    samples: list[list[int]] = []
    with library.trace() as stamps:
        for _ in range(rounds):
            call()
            samples.append(list(stamps))
    medians = [
        statistics.median((sample[i + 1] - sample[i]) / 1e3 for sample in samples) for i in range(len(samples[0]) - 1)
    ]
    return Profile(tuple(KernelTime(k, medians[k.step]) for k in kernels))
