"""GPUs as drivers describe them, replayed from recordings (tests/hwdb/machines)."""

from __future__ import annotations

import pytest
from replay import nvidia_smi, unfold

from graphwright.hwdb.host_gpus import FoundGpu, gfx_target, gpus_at, record_of


def replay(name, root):
    unfold(name, root)
    return gpus_at(root, nvidia_smi(root))


def test_a_card_is_known_by_name_without_nvidia_smi(tmp_path):
    assert replay("nvidia-rtx-3090", tmp_path) == (
        FoundGpu("nvidia", "NVIDIA GeForce RTX 3090", None, "0000:01:00.0", driver="590.48.01"),
    )


def test_nvidia_smi_adds_figures_and_excluded_cards_are_left_out(tmp_path):
    first, second = replay("nvidia-h100-two", tmp_path)
    assert (first.name, first.architecture, first.bus) == ("NVIDIA H100 80GB HBM3", "sm_90", "0000:62:00.0")
    assert (first.dram_bytes, first.power_watts, first.clock_mhz) == (81559 << 20, 700.0, 1980.0)
    assert second.power_watts is None  # nvidia-smi printed [N/A]
    assert second.driver == "535.129.03"


def test_cards_that_only_nvidia_smi_shows_count(tmp_path):
    (found,) = gpus_at(tmp_path, "00000000:00:1E.0, Tesla T4, 15360, 7.5, 70.00, 1590\n")
    assert (found.name, found.architecture, found.bus) == ("Tesla T4", "sm_75", "0000:00:1e.0")


def test_radeon_from_the_kfd_topology(tmp_path):
    (found,) = replay("amd-rx-7900-xtx", tmp_path)  # node 0 is the processor
    assert (found.vendor, found.architecture, found.units) == ("amd", "gfx1100", 96)
    assert (found.clock_mhz, found.dram_bytes, found.bus) == (2482.0, 25753026560, "0000:86:00.0")


def test_instinct_counts_all_its_dies(tmp_path):
    (found,) = replay("amd-mi300x", tmp_path)
    assert (found.architecture, found.units, found.dram_bytes) == ("gfx942", 304, 206141652992)


def test_a_node_hidden_by_the_container_is_no_card(tmp_path):
    unfold("amd-mi300x", tmp_path)
    (tmp_path / "sys/class/kfd/kfd/topology/nodes/1/properties").write_text("")
    assert gpus_at(tmp_path) == ()


@pytest.mark.parametrize(
    ("version", "name"),
    [(90402, "gfx942"), (90010, "gfx90a"), (90500, "gfx950"), (100300, "gfx1030"), (110501, "gfx1151")],
)
def test_targets_as_llvm_names_them(version, name):
    assert gfx_target(version) == name


def test_a_card_without_a_driver_for_computing_is_shown_once(tmp_path):
    amd, intel = replay("two-cards", tmp_path)
    assert (amd.architecture, amd.bus) == ("gfx1100", "0000:86:00.0")  # by KFD, not again as a card
    assert intel == FoundGpu("intel", None, None, "0000:03:00.0", driver="xe")
    assert record_of(intel) is None
    nodes = tmp_path / "sys/class/kfd"
    nodes.rename(tmp_path / "gone")
    other = next(gpu for gpu in gpus_at(tmp_path) if gpu.vendor == "amd")
    assert (other.architecture, other.dram_bytes, other.driver) == (None, 25753026560, "amdgpu")


def test_a_machine_without_cards(tmp_path):
    unfold("haswell-i7-4770", tmp_path)
    assert gpus_at(tmp_path) == ()


@pytest.mark.parametrize(
    ("machine", "id"),
    [
        ("nvidia-rtx-3090", "rtx-3090"),
        ("nvidia-h100-two", "h100-sxm"),
        ("amd-rx-7900-xtx", "rx-7900-xtx"),
        ("amd-mi300x", "mi300x"),  # as many units as the MI325X, and less memory
    ],
)
def test_a_card_finds_its_record(tmp_path, machine, id):
    assert record_of(replay(machine, tmp_path)[0]) == id


def test_an_unknown_card_is_its_architecture():
    assert record_of(FoundGpu("amd", None, "gfx942", None, units=7, dram_bytes=1 << 30)) == "gfx942"
    assert record_of(FoundGpu("nvidia", "NVIDIA X1", "sm_90", None)) == "sm_90"
    assert record_of(FoundGpu("nvidia", "NVIDIA X1", None, None)) is None
