"""Units x rate x clock of the records, held against the peaks that vendors and others publish."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli

from graphwright import hwdb
from graphwright.hwdb.loader import database

PUBLISHED = tomli.loads((Path(__file__).parent / "published_peaks.toml").read_text(encoding="utf-8"))
# Published peaks have two to four digits, and vendors round clocks to 5 or 10 MHz.
TOLERANCE = 0.02


def figures():
    for device, entry in PUBLISHED["peaks"].items():
        for unit in ("matrix", "vector"):
            for source, table in entry.get(unit, {}).items():
                for dtype, tflops in table.items():
                    yield device, unit, source, dtype, tflops


def peak_tflops(hw, unit: str, dtype: str) -> float | None:
    """TFLOP/s of one kind of unit; `peak_flops` says the faster of both."""
    if unit == "matrix":
        assert dtype in hw.matrix_flops, f"{hw.id}: no matrix rate of {dtype}"
        return hw.peak_flops(dtype) / 1e12
    return hw.vector_flops[dtype] * hw.cores * hw.clock_mhz / 1e6


@pytest.mark.parametrize("device", PUBLISHED["peaks"])
def test_peaks_are_those_published(device):
    hw = hwdb.lookup(device)
    excused = PUBLISHED["peaks"][device].get("off", {})
    for name, unit, source, dtype, tflops in figures():
        if name != device:
            continue
        assert source in PUBLISHED["sources"], source
        error = abs(peak_tflops(hw, unit, dtype) / tflops - 1)
        # An excuse for a figure that fits is out of date.
        assert (error > TOLERANCE) == (dtype in excused), f"{unit} {dtype}: {error:.1%} off {tflops} of {source}"


def test_sparse_is_at_least_dense_and_narrower_types_are_no_slower():
    order = ("float64", "tf32", "float16", "float8", "float4")
    for id in hwdb.names():
        hw = hwdb.lookup(id)
        if hw.kind != "gpu" or hw.clock_mhz is None:
            continue
        rates = [hw.peak_flops(dtype) for dtype in order if dtype in hw.matrix_flops]
        assert rates == sorted(rates), id
        for dtype in hw.matrix_flops:
            assert hw.peak_flops(dtype, sparse=True) >= hw.peak_flops(dtype), f"{id}: {dtype}"


def test_a_matrix_rate_has_an_instruction_and_an_instruction_a_rate():
    for id in hwdb.names():
        hw = hwdb.lookup(id)
        if hw.kind == "gpu" and hw.isa != "none":
            assert {shape.dtype for shape in hw.matrix_shapes} == set(hw.matrix_flops), id


def test_where_two_pages_of_google_disagree_both_figures_are_kept():
    records = database()
    assert records.records["tpu-v3"].values["conflicts"][0] == (
        "peak_ops bfloat16: 140e12 (jax-tpu), 123e12 (google-tpu-old)"
    )
    assert (hwdb.lookup("tpu-v3").confidence, hwdb.lookup("tpu-v4").peak_flops("int8")) == ("medium", 275e12)


def test_there_are_figures_for_every_vendor():
    vendors = {hwdb.lookup(device).vendor for device in PUBLISHED["peaks"]}
    assert vendors == {"nvidia", "amd", "intel", "apple"}
    assert len(list(figures())) > 200


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("rtx4090", "rtx-4090"),
        ("9070 XT", "rx-9070-xt"),
        ("NVIDIA Thor", "jetson-agx-thor-gpu"),
        ("h100", "h100-sxm"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("Tesla T4", "t4"),
        ("Quadro RTX 6000", "quadro-rtx-6000"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Radeon RX 7900 XTX", "rx-7900-xtx"),
        ("hopper", "sm_90"),
        ("gfx942", "gfx942"),
    ],
)
def test_names_as_drivers_and_people_write_them(name, id):
    assert hwdb.lookup(name).id == id
