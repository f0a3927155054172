"""What predictions know of sleeping workers and of weights that lie in memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import graphwright
from graphwright.backends.kernels.softmax import softmax
from graphwright.backends.lowering.registry import KernelInfo
from graphwright.backends.lowering.waking import is_parallel, with_waking
from graphwright.hwdb import detect

HW = dataclasses.replace(detect(), cores=2, launch_us=1.0, wake_us=50.0)


def predictions(*kernels: tuple[float | None, bool]) -> list[float | None]:
    """What becomes of (predicted microseconds, parallel)."""
    infos = [KernelInfo("k", "op", "generic", "", us) for us, _ in kernels]
    return [info.predicted_us for info in with_waking(infos, [shared for _, shared in kernels], HW)]


def test_the_first_parallel_kernel_waits_for_the_workers() -> None:
    assert predictions((101.0, True), (101.0, True)) == [1 + 50 + (200 - 50) / 2, 101.0]
    assert predictions((11.0, True)) == [1 + 20]  # done before anybody woke
    assert predictions((30.0, False), (101.0, True)) == [30.0, 126.0]
    assert predictions((None, True)) == [None]


def test_workers_sleep_through_long_serial_stretches() -> None:
    first = (101.0, True)
    assert predictions(first, (20.0, False), (20.0, False), (101.0, True))[3] == 101.0
    assert predictions(first, (20.0, False), (21.0, False), (101.0, True))[3] == 126.0


def test_one_core_has_nobody_to_wake() -> None:
    info = KernelInfo("k", "op", "generic", "", 101.0)
    assert with_waking([info], [True], dataclasses.replace(HW, cores=1)) == [info]


@pytest.mark.parametrize(("rows", "parallel"), [(1, False), (100_000, True)])
def test_parallel_loops_are_seen(rows: int, parallel: bool) -> None:
    assert is_parallel(softmax((rows, 128), HW, False)) is parallel


def test_rows_of_a_table_beyond_the_caches_come_from_memory() -> None:
    """The same rows out of a table that stays in the last cache are predicted to cost less."""

    def predicted(entries: int) -> float:
        table = nn.Embedding(entries, 256)
        nn.init.zeros_(table.weight)
        places = torch.zeros(64, dtype=torch.int64)
        compiled = graphwright.compile(table, (places,), cache=False, verify=False)
        (kernel,) = compiled.report().kernels
        assert kernel.predicted_us is not None
        return kernel.predicted_us

    last = detect().caches[-1].size_bytes if detect().caches else 0
    if not last or last > 256 << 20:
        pytest.skip("no cache, or one too large to fill")
    assert predicted(last // 1024 + 1) > predicted(100) + 64 * 0.04  # 64 misses of 0.1 us over two cores at least
