"""The roofline: figures that can be checked by hand, and the direction in which every input moves it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphwright import hwdb
from graphwright.hwdb.cost import Work, predict_seconds

HW = dataclasses.replace(hwdb.lookup("zen3"), cores=4, clock_mhz=3000.0, dram_gbs=60.0)  # 384 GFLOP/s
LAUNCH = HW.launch_us * 1e-6


def test_arithmetic_bound():
    work = Work({"float32": 384e9}, bytes_read=1000, efficiency=0.5)
    assert predict_seconds(HW, work) == pytest.approx(2.0 + LAUNCH)


def test_memory_bound():
    assert predict_seconds(HW, Work(bytes_read=50e9, bytes_written=10e9)) == pytest.approx(1.0 + LAUNCH)


def test_nothing_is_hidden_in_order():
    work = Work({"float32": 384e9}, bytes_read=60e9, efficiency=0.5)
    assert predict_seconds(HW, work) == pytest.approx(2.0 + LAUNCH)
    assert predict_seconds(dataclasses.replace(HW, in_order=True), work) == pytest.approx(3.0 + LAUNCH)


def test_cores_in_order():
    slow = {"cortex-a53": 2, "cortex-a55": 2, "raspberry-pi-zero-2w": 2}
    assert {name: hwdb.lookup(name).load_stall_cycles for name in slow} == slow
    assert all(hwdb.lookup(name).in_order for name in slow)
    assert not any(hwdb.lookup(name).in_order for name in ("cortex-a72", "rk3588", "neoverse-e1", "zen4"))


def test_a_footprint_in_cache_is_faster_than_dram():
    # 1 MB over four cores stays in their L2 (512 KB each): 32 bytes per core and cycle.
    assert predict_seconds(HW, Work(bytes_read=1e6)) == pytest.approx(1e6 / (4 * 32 * 3e9) + LAUNCH)


def test_static_split_imbalance():
    flops = {"float32": 1e9}
    four, five, eight = (predict_seconds(HW, Work(flops, tasks=tasks)) - LAUNCH for tasks in (4, 5, 8))
    assert four == pytest.approx(eight)
    assert five == pytest.approx(four * 8 / 5)  # two rounds of four cores for five pieces
    assert predict_seconds(HW, Work(flops, tasks=1)) - LAUNCH == pytest.approx(4 * four)


def test_one_core_starts_no_threads():
    alone = dataclasses.replace(HW, cores=1)
    assert predict_seconds(alone, Work(launches=100)) < 0.1 * predict_seconds(HW, Work(launches=100))


def test_a_cache_of_unknown_rate_counts_as_the_dram_behind_it():
    gpu = hwdb.lookup("rtx-4060")
    assert gpu.bandwidth_gbs(2) is None
    assert predict_seconds(gpu, Work(bytes_read=gpu.cache(2).size_bytes / 2, launches=0)) == pytest.approx(
        gpu.cache(2).size_bytes / 2 / (gpu.dram_gbs * 1e9)
    )


def test_unknown_rates_give_no_figure():
    assert predict_seconds(dataclasses.replace(HW, clock_mhz=None), Work({"float32": 1.0})) is None
    assert predict_seconds(dataclasses.replace(HW, dram_gbs=None), Work(bytes_read=1e12)) is None
    assert predict_seconds(dataclasses.replace(HW, clock_mhz=None, dram_gbs=None), Work(bytes_read=1.0)) is None


def test_resnet18_is_in_a_sane_range():
    """3.6 GFLOP and 47 MB of weights, fp32: some ms on two AVX2 cores at 3.7 GHz, some hundred on a Pi 3."""
    work = Work({"float32": 3.6e9}, bytes_read=47e6, launches=40)
    desktop = dataclasses.replace(hwdb.lookup("zen3"), cores=2, clock_mhz=3700.0)
    assert 0.015 < predict_seconds(desktop, work) < 0.03
    assert 0.09 < predict_seconds(hwdb.lookup("raspberry-pi-3b-plus"), work) < 0.2


WORKS = st.builds(
    Work,
    flops=st.floats(0, 1e13).map(lambda flops: {"float32": flops}),
    bytes_read=st.floats(0, 1e10),
    bytes_written=st.floats(0, 1e10),
    launches=st.integers(0, 1000),
    tasks=st.none() | st.integers(1, 1000),
    efficiency=st.floats(0.05, 1.0),
)
MACHINES = st.sampled_from(
    [hw for name in hwdb.names() if (hw := hwdb.lookup(name)).kind in ("cpu", "board") and hw.clock_mhz and hw.dram_gbs]
)


@given(MACHINES, WORKS, st.floats(1.0, 100.0))
def test_more_work_never_takes_less(hw, work, factor):
    base = predict_seconds(hw, work)
    assert base is not None
    assert base >= 0
    more = [
        dataclasses.replace(work, flops={"float32": work.flops["float32"] * factor}),
        dataclasses.replace(work, bytes_read=work.bytes_read * factor),
        dataclasses.replace(work, bytes_written=work.bytes_written * factor),
        dataclasses.replace(work, launches=int(work.launches * factor)),
        dataclasses.replace(work, efficiency=work.efficiency / factor),
    ]
    for heavier in more:
        assert predict_seconds(hw, heavier) >= base * (1 - 1e-12)


@given(MACHINES, WORKS, st.floats(1.0, 10.0))
def test_a_faster_clock_never_takes_longer(hw, work, factor):
    faster = dataclasses.replace(hw, clock_mhz=hw.clock_mhz * factor, dram_gbs=hw.dram_gbs * factor)
    assert predict_seconds(faster, work) <= predict_seconds(hw, work) * (1 + 1e-12)
