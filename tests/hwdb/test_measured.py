"""Figures measured on this machine: kept, put in place of the record's, and left aside where they cannot be used."""

from __future__ import annotations

import dataclasses
import json

import pytest

from graphwright import hwdb
from graphwright.hwdb import measured
from graphwright.hwdb.measured import Measured, applied, identity, read, store

HW = dataclasses.replace(hwdb.lookup("zen4"), cores=2, native=True)
FOUND = Measured(identity(HW), "2026-11-30", 240e9, {1: 400.0, 2: 200.0, 0: 32.0}, 0.5, 40.0)


@pytest.fixture(autouse=True)
def _own_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHWRIGHT_DATA", str(tmp_path / "data"))


def test_figures_replace_the_records():
    assert applied(HW) is HW
    store(HW, FOUND)
    assert read(HW) == FOUND
    now = applied(HW)
    assert now.peak_flops() == pytest.approx(240e9)
    assert (now.bandwidth_gbs(1), now.bandwidth_gbs(2), now.bandwidth_gbs(0)) == (400.0, 200.0, 32.0)
    assert now.bandwidth_gbs(3) == pytest.approx(16 * 2 * now.clock_mhz / 1e3)  # not measured: the rule of thumb
    assert (now.launch_us, now.wake_us, now.calibrated) == (0.5, 40.0, "2026-11-30")
    assert now.sources[0].kind == "measured"
    assert dataclasses.replace(now, cores=1).bandwidth_gbs(1) == 200.0


def test_other_features_or_cores_are_another_machine():
    store(HW, FOUND)
    assert applied(dataclasses.replace(HW, cores=4)).calibrated is None
    assert applied(dataclasses.replace(HW, vector_bits=256)).calibrated is None


BROKEN = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "true for a number": json.dumps({"version": 1, **dataclasses.asdict(FOUND), "flops": True}),
    "a level below memory": json.dumps({"version": 1, **dataclasses.asdict(FOUND), "level_gbs": {"-1": 3.0}}),
    "nothing": "",
    "a list": "[]",
    "another version": json.dumps({"version": 99}),
    "zero": json.dumps({"version": 1, **dataclasses.asdict(FOUND), "flops": 0}),
    "infinite": json.dumps({"version": 1, **dataclasses.asdict(FOUND), "launch_us": float("inf")}),
    "not a number": json.dumps({"version": 1, **dataclasses.asdict(FOUND), "wake_us": "soon"}),
    "a level without a number": json.dumps({"version": 1, **dataclasses.asdict(FOUND), "level_gbs": {"L1": 3.0}}),
    "another machine": json.dumps({"version": 1, **dataclasses.asdict(FOUND), "machine": "a pocket calculator"}),
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_cannot_be_used_is_left_aside_with_a_warning(text, caplog):
    path = measured.path_of(HW)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert applied(HW) is HW
    assert "hw calibrate" in caplog.text
    assert str(path) in caplog.text


def test_a_directory_in_its_place_is_a_warning(caplog):
    measured.path_of(HW).mkdir(parents=True)
    assert applied(HW) is HW
    assert "is not used" in caplog.text


def test_measuring_again_keeps_the_cache_key_and_describing_facts_are_not_in_it():
    from graphwright.compiler.fingerprint import setting

    store(HW, FOUND)
    key = setting(applied(HW))
    assert key != setting(HW)
    store(HW, dataclasses.replace(FOUND, flops=240.5e9, wake_us=90.0, date="2027-01-01"))
    assert setting(applied(HW)) == key
    store(HW, dataclasses.replace(FOUND, flops=300e9))
    assert setting(applied(HW)) != key
    assert setting(dataclasses.replace(HW, name="x", dram_bytes=5, tdp_watts=3.0)) == setting(HW)
    assert setting(dataclasses.replace(HW, cores=3)) != setting(HW)
