"""Processors and boards: names people type, caches against recorded machines, clusters, and what may be called sure."""

from __future__ import annotations

import dataclasses
import re

import pytest
from replay import unfold

from graphwright import hwdb
from graphwright.errors import RecordError
from graphwright.hwdb import Cache
from graphwright.hwdb.host import detect_at
from graphwright.hwdb.loader import Database, database
from graphwright.hwdb.short_forms import written_out

CPUS = [
    id for id, record in database().records.items() if database().merged(id).get("class", "cpu") in ("cpu", "board")
]


@pytest.mark.parametrize(
    ("name", "id", "isa"),
    [
        ("raspberry-pi-zero-2w", "raspberry-pi-zero-2w", "aarch64"),
        ("raspberry-pi-3b+", "raspberry-pi-3b-plus", "aarch64"),
        ("pi4", "raspberry-pi-4b", "aarch64"),
        ("rpi5", "raspberry-pi-5", "aarch64"),
        ("raspberry-pi-2", "raspberry-pi-2b", "armv7"),
        ("raspberry-pi-3-32bit", "raspberry-pi-3b-32bit", "armv7"),
        ("armv7", "armv7", "armv7"),
        ("arm64", "aarch64", "aarch64"),
        ("android-arm64", "android-arm64", "aarch64"),
        ("apple-m", "apple-m1", "aarch64"),
        ("m4", "apple-m4", "aarch64"),
        ("rk3588s", "rk3588", "aarch64"),
        ("jetson-agx-orin", "jetson-agx-orin", "aarch64"),
        ("beaglebone black", "beaglebone-black", "armv7"),
        ("graviton3", "graviton3", "aarch64"),
        ("grace", "grace", "aarch64"),
        ("N100", "intel-n100", "x86_64"),
        ("Ryzen 9 7950X", "ryzen-9-7950x", "x86_64"),
        ("visionfive2", "visionfive-2", "riscv64"),
        ("3a6000", "loongson-3a6000", "loongarch64"),
    ],
)
def test_the_names_people_type(name, id, isa):
    hw = hwdb.lookup(name)
    assert (hw.id, hw.isa) == (id, isa)


@pytest.mark.parametrize(
    ("machine", "record"),
    [
        ("haswell-i7-4770", "core-i7-4770"),
        ("raspberry-pi-4", "raspberry-pi-4b"),
        ("raspberry-pi-5", "raspberry-pi-5"),
        ("rk3588-big-little", "rk3588"),
        ("graviton2", "graviton2"),
    ],
)
def test_caches_are_those_the_machine_reported(tmp_path, machine, record):
    seen = detect_at(tmp_path, None, unfold(machine, tmp_path))
    stated = hwdb.lookup(record)
    assert [(c.level, c.size_bytes, c.ways, c.shared_by_cores) for c in stated.caches] == [
        (c.level, c.size_bytes, c.ways, c.shared_by_cores) for c in seen.caches
    ]
    assert stated.features == seen.features
    assert stated.cores == seen.cores


def test_multiply_adds_a_cycle_as_measured():
    """InstLatx64: VFMADD132PS of the width the record counts; small cores split 256 bits."""
    rates = {id: hwdb.lookup(id).fma_per_cycle for id in ("raptorlake", "gracemont", "skymont", "zen4", "zen5")}
    assert rates == {"raptorlake": 2, "gracemont": 1, "skymont": 2, "zen4": 1, "zen5": 2}
    latencies = {id: hwdb.lookup(id).fma_latency_cycles for id in rates}
    assert latencies == {"raptorlake": 4, "gracemont": 6, "skymont": 4, "zen4": 4, "zen5": 4}
    assert hwdb.lookup("zen5-mobile").fma_per_cycle == 1


def test_a_narrow_neon_unit_is_half_a_vector():
    """VFP Benchmark: 2 operations a cycle on the A7, 4 on the A8 and A9, 8 on the A15."""
    per_cycle = {id: 8 * hwdb.lookup(id).fma_per_cycle for id in ("cortex-a7", "cortex-a8", "cortex-a9", "cortex-a15")}
    assert per_cycle == {"cortex-a7": 2, "cortex-a8": 4, "cortex-a9": 4, "cortex-a15": 8}


@pytest.mark.parametrize("id", CPUS)
def test_clusters_begin_with_the_fastest_cores(id):
    hw = hwdb.lookup(id)
    if not hw.clusters or hw.clusters[-1].clock_mhz is None:
        return
    rates = [cluster.clock_mhz * hwdb.lookup(cluster.core).fma_per_cycle for cluster in hw.clusters]
    assert rates == sorted(rates, reverse=True)
    assert hw.cores == hw.clusters[0].count


@pytest.mark.parametrize("id", list(database().records))
def test_what_is_only_remembered_is_not_called_sure(id):
    hw = hwdb.lookup(id)
    kinds = {source.kind for source in hw.sources}
    if kinds <= {"memory", "derived"}:
        assert hw.confidence == "low"
    elif "memory" in kinds:
        assert hw.confidence in ("low", "medium")
    values = database().records[id].values
    told = " ".join([values.get("note", ""), *values.get("conflicts", ())])
    assert "memory" in values["source"] or not re.search(r"from memory|\(memory|memory\)", told)


def test_caches_and_clusters_in_short():
    short = {"caches": ["48K", "8M 16 /12 @256", "12M /8"], "clusters": ["4 cortex-a76 2201.6", "2 denver2"]}
    values = written_out(short)
    assert tuple(Cache(**entry) for entry in values["caches"]) == (
        Cache(1, 48 << 10),
        Cache(2, 8 << 20, 256, 16, 12),
        Cache(3, 12 << 20, 64, None, 8),
    )
    assert values["clusters"] == [
        {"core": "cortex-a76", "count": 4, "clock_mhz": 2201.6},
        {"core": "denver2", "count": 2},
    ]


@pytest.mark.parametrize("text", ["36 MB", "12M/8", "0", "32K 8 4"])
def test_caches_in_short_that_are_wrong(text, tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(
        f'[device.x]\nextends = "zen4"\nname = "x"\ncaches = ["{text}"]\nsource = ["typical"]\nconfidence = "low"\n'
    )
    own = Database([file])
    with pytest.raises(RecordError, match=r"own\.toml:4: device\.x: caches .*like '36M 12 /24', not"):
        own.records["x"].values  # noqa: B018  (reading checks it)


# GFLOP/s of float32 multiply-adds over a loop that only computes: VFP Benchmark (flatlib) for the
# first six, a CSDN article on two Jetsons for the A57, the makers' documents for the last two.
MEASURED = [
    ("cortex-a7", 1, 1200, 2.374),
    ("cortex-a8", 1, 800, 3.1),
    ("cortex-a9", 4, 1300, 18.9),
    ("cortex-a15", 1, 1800, 13.371),
    ("cortex-a72", 1, 2000, 15.875),
    ("cortex-a57", 1, 1428, 11.39),
    ("cortex-a57", 1, 2035, 16.197),
    ("a64fx", 48, 2000, 2 * 3072 / 4),  # NEON is a quarter of its SVE registers
    ("la464", 4, 2500, 2 * 160),
]


@pytest.mark.parametrize(("id", "cores", "clock", "gflops"), MEASURED)
def test_peaks_are_just_above_what_was_measured(id, cores, clock, gflops):
    """Such loops come within a tenth of the peak; a rate wrong by a factor of two cannot pass."""
    peak = dataclasses.replace(hwdb.lookup(id), cores=cores, clock_mhz=clock).peak_flops() / 1e9
    assert 0.9 * peak <= gflops <= 1.01 * peak
