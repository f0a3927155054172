"""What kernels for GPUs are planned for: a die of several, an architecture's largest device."""

from __future__ import annotations

import dataclasses

import pytest

from graphwright.hwdb import compile_target, lookup


@pytest.mark.parametrize(("name", "units", "gigabytes"), [("mi250x", 110, 64), ("mi250", 104, 64)])
def test_a_gpu_of_two_dies_is_planned_for_one(name, units, gigabytes):
    whole, die = lookup(name), compile_target(name)
    assert (whole.cores, whole.dies) == (2 * units, 2)
    assert (die.cores, die.dies) == (units, 1)
    assert die.dram_bytes == gigabytes << 30
    assert die.dram_gbs == pytest.approx(1638.4)
    assert die.cache(2).size_bytes == 8 << 20
    assert die.cache(2).shared_by_cores == units
    assert die.cache(1) == whole.cache(1)
    assert "2 GPUs" in die.caution
    assert compile_target(die) == die


@pytest.mark.parametrize(
    ("name", "model"), [("sm_80", "A100"), ("sm_90", "H200"), ("gfx90a", "MI250X"), ("gfx1100", "RX 7900 XTX")]
)
def test_an_architecture_is_planned_for_its_largest_device_and_says_so(name, model):
    arch = compile_target(name)
    assert arch.id == name
    assert model in arch.caution
    assert 90 < arch.cores < 140
    assert arch.dram_bytes is None
    assert arch.cache(2) is not None
    assert compile_target(arch) == arch


def test_units_that_somebody_gives_are_kept():
    given = dataclasses.replace(lookup("sm_80"), cores=7)
    assert compile_target(given).cores == 7


def test_devices_of_one_die_are_taken_as_they_are():
    assert compile_target("mi210") == lookup("mi210")
    assert compile_target("a100") == lookup("a100")
