"""Detection replayed from the /proc and /sys of other machines (tests/hwdb/machines, recorded with record.sh)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from replay import unfold

from graphwright.errors import UnknownTarget
from graphwright.hwdb import Cache, Hardware, detect, lookup, missing_features, obstacle
from graphwright.hwdb.host import cpu_quota, detect_at


def replay(name: str, root: Path, allowed: set[int] | None = None) -> Hardware:
    machine = unfold(name, root)
    return detect_at(root, allowed, machine)


def test_masked_avx512_is_not_used(tmp_path):
    hw = replay("zen4-avx512-masked", tmp_path)
    assert (hw.id, hw.name, hw.llvm_cpu, hw.native) == ("zen4", "AMD EPYC", "znver4", True)
    assert (hw.vector_bits, hw.vector_registers) == (256, 16)
    assert hw.fma_per_cycle == 2  # at 256 bits; one at 512
    assert hw.cores == 2
    assert hw.caches == (
        Cache(1, 32 << 10, 64, 8, 1),
        Cache(2, 1 << 20, 64, 8, 1),
        Cache(3, 32 << 20, 64, 16, 2),
    )
    assert hw.clock_mhz == 3700  # no cpufreq: the family's clock, above the 2596 of /proc/cpuinfo
    attributes = hw.tvm_target()["mattr"]
    assert "+avx2" in attributes
    assert "-avx512f" in attributes
    assert hw.dot_product("int8") is None
    assert not hw.supports("bfloat16")


def test_haswell_counts_cores_not_threads(tmp_path):
    hw = replay("haswell-i7-4770", tmp_path)
    assert (hw.id, hw.cores, hw.clock_mhz) == ("haswell", 4, 3900)
    assert (hw.vector_bits, hw.vector_registers, hw.fma_latency_cycles) == (256, 16, 5)
    assert hw.cache(1) == Cache(1, 32 << 10, 64, 8, 1)  # two threads of one core share it: one core
    assert hw.cache(3) == Cache(3, 8 << 20, 64, 16, 4)
    assert "-aes" not in hw.tvm_target()["mattr"]  # cpuinfo shows it, although LLVM's haswell leaves it out


def test_icelake_has_avx512_and_vnni(tmp_path):
    hw = replay("icelake-8375c-vm", tmp_path)
    assert (hw.id, hw.cores, hw.vector_bits, hw.vector_registers) == ("icelake-server", 2, 512, 32)
    assert hw.fma_per_cycle == 2
    assert hw.dot_product("int8") == "vnni"
    assert hw.dot_product("bfloat16") is None
    assert hw.cache(2) == Cache(2, 1280 << 10, 64, 20, 1)


def test_cgroup_quota_bounds_the_cores(tmp_path):
    hw = replay("zen3-container-1.5-cores", tmp_path)
    assert cpu_quota(tmp_path) == 1.5  # of the middle group; the others allow more
    assert (hw.id, hw.cores) == ("zen3", 1)


def test_quota_below_one_core_leaves_one(tmp_path):
    machine = unfold("haswell-i7-4770", tmp_path)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("20000 100000\n")
    assert detect_at(tmp_path, None, machine).cores == 1


def test_quota_of_cgroup_v1(tmp_path):
    machine = unfold("icelake-8375c-vm", tmp_path)
    (tmp_path / "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us").write_text("110000\n")
    assert cpu_quota(tmp_path) == 1.1
    assert detect_at(tmp_path, None, machine).cores == 1


def test_memory_is_what_the_process_may_use(tmp_path):
    machine = unfold("zen3-container-1.5-cores", tmp_path)
    assert detect_at(tmp_path, None, machine).dram_bytes is None  # not recorded
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16000000 kB\nMemFree:        1 kB\n")
    assert detect_at(tmp_path, None, machine).dram_bytes == 16000000 << 10
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1073741824\n")
    assert detect_at(tmp_path, None, machine).dram_bytes == 1 << 30
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert detect_at(tmp_path, None, machine).dram_bytes == 16000000 << 10


def test_affinity_bounds_the_cores(tmp_path):
    assert replay("haswell-i7-4770", tmp_path, {0, 1, 4}).cores == 2  # 0 and 4 are threads of one core


def test_raspberry_pi_4(tmp_path):
    hw = replay("raspberry-pi-4", tmp_path)
    assert (hw.id, hw.isa, hw.name) == ("cortex-a72", "aarch64", "Raspberry Pi 4 Model B Rev 1.4")
    assert (hw.vector_bits, hw.vector_registers, hw.cores, hw.clock_mhz) == (128, 32, 4, 1800)
    assert hw.cache(2) == Cache(2, 1 << 20, 64, 16, 4)
    assert hw.peak_flops() == pytest.approx(57.6e9)  # 4 cores x 1 FMA x 4 lanes x 2 x 1.8 GHz
    assert hw.triple == "aarch64-unknown-linux-gnu"
    assert "-aes" in hw.tvm_target()["mattr"]  # the BCM2711 has no crypto extension
    assert "+neon" in hw.tvm_target()["mattr"]


def test_caches_come_from_the_record_where_the_kernel_does_not_say(tmp_path):
    machine = unfold("raspberry-pi-4", tmp_path)
    for size in tmp_path.glob("sys/devices/system/cpu/cpu*/cache/index*/size"):
        size.unlink()
    assert detect_at(tmp_path, None, machine).cache(2) == Cache(2, 1 << 20, 64, 16, 4)


def test_big_little_uses_the_big_cores(tmp_path):
    hw = replay("rk3588-big-little", tmp_path)
    assert (hw.id, hw.cores, hw.clock_mhz) == ("cortex-a76", 4, 2400)
    assert hw.cache(2) == Cache(2, 512 << 10, 64, 8, 1)
    assert hw.dot_product("int8") == "sdot"
    assert hw.supports("float16")


def test_big_little_confined_to_the_small_cores(tmp_path):
    hw = replay("rk3588-big-little", tmp_path, {0, 1})
    assert (hw.id, hw.cores) == ("cortex-a55", 2)


def test_hybrid_x86_uses_the_performance_cores(tmp_path):
    hw = replay("alderlake-hybrid", tmp_path)
    assert (hw.id, hw.cores, hw.clock_mhz) == ("alderlake", 2, 4400)
    assert hw.cache(1).size_bytes == 48 << 10
    assert hw.dot_product("int8") == "vnni"


def test_unknown_processor_gets_its_nearest_ancestor(tmp_path):
    hw = replay("intel-unreleased", tmp_path)
    assert hw.id == "sapphirerapids"
    assert (hw.vector_bits, hw.cores) == (512, 2)
    assert hw.caches  # the record's: this recording has none
    assert hw.clock_mhz  # "0.000" in cpuinfo is not a clock


def test_unknown_vendor_gets_the_feature_level(tmp_path):
    hw = replay("unknown-vendor-avx2", tmp_path)
    assert (hw.id, hw.name, hw.cores) == ("x86-64-v3", "ZHAOXIN KaiXian KX-7000", 4)
    assert hw.clock_mhz == 3200
    assert "sha" in hw.features


def test_unknown_arm_part_is_generic(tmp_path):
    machine = unfold("raspberry-pi-4", tmp_path)
    file = tmp_path / "proc/cpuinfo"
    file.write_text(file.read_text().replace("0xd08", "0xfff"))
    hw = detect_at(tmp_path, None, machine)
    assert (hw.id, hw.llvm_cpu, hw.cores) == ("aarch64", "generic", 4)


def test_old_processor_without_avx(tmp_path):
    machine = unfold("haswell-i7-4770", tmp_path)
    file = tmp_path / "proc/cpuinfo"
    file.write_text(file.read_text().replace("\t: 60", "\t: 23").replace(" avx ", " ").replace(" sse4_2", ""))
    hw = detect_at(tmp_path, None, machine)
    assert (hw.id, hw.vector_bits, hw.vector_registers) == ("x86-64", 128, 16)
    assert "avx2" not in hw.features  # its base is masked, though the flag itself is still there
    assert "fma" not in hw.features


def test_avx512_with_vnni_and_bf16(tmp_path):
    hw = replay("zen4-avx512-vm", tmp_path)
    assert (hw.id, hw.vector_bits, hw.vector_registers, hw.fma_per_cycle) == ("zen4", 512, 32, 1)
    assert (hw.dot_product("int8"), hw.dot_product("bfloat16")) == ("vnni", "bf16")


def test_granite_rapids_has_amx(tmp_path):
    hw = replay("granite-rapids-6972p", tmp_path)
    assert (hw.id, hw.cores, hw.vector_bits) == ("graniterapids", 96, 512)
    assert (hw.dot_product("int8"), hw.dot_product("bfloat16")) == ("amx", "amx")
    assert hw.vector_dot_product("int8") == "vnni"


def test_favoured_cores_raise_the_clock_by_their_share(tmp_path):
    hw = replay("arrow-lake-285", tmp_path)  # 8 of 24 cores are performance cores, without AVX-512
    assert (hw.cores, hw.vector_bits) == (8, 256)
    assert hw.clock_mhz == pytest.approx((2 * 5600 + 6 * 5400) / 8)
    assert hw.dot_product("int8") == "vnni"


def test_graviton2(tmp_path):
    hw = replay("graviton2", tmp_path)
    assert (hw.id, hw.cores, hw.llvm_cpu) == ("neoverse-n1", 64, "neoverse-n1")
    assert hw.cache(2) == Cache(2, 1 << 20, 64, 8, 1)
    assert hw.cache(3) == Cache(3, 32 << 20, 64, 16, 64)
    assert hw.dot_product("int8") == "sdot"
    assert "-sha3" in hw.tvm_target()["mattr"]


def test_raspberry_pi_5(tmp_path):
    hw = replay("raspberry-pi-5", tmp_path)
    assert (hw.id, hw.name, hw.cores) == ("cortex-a76", "Raspberry Pi 5 Model B Rev 1.0", 4)
    assert hw.peak_flops() == pytest.approx(153.6e9)  # 4 cores x 2 FMA x 4 lanes x 2 x 2.4 GHz
    assert hw.cache(3) == Cache(3, 2 << 20, 64, 16, 4)
    assert hw.supports("float16")


def test_a_phone_with_two_clocks_of_one_big_core(tmp_path):
    hw = replay("kirin-980-phone", tmp_path)
    assert (hw.id, hw.cores) == ("cortex-a76", 4)
    assert hw.clock_mhz == pytest.approx((1920 + 2600) / 2)
    assert hw.supports("float16")
    assert hw.dot_product("int8") is None  # its kernel does not tell of the instructions


def test_arm_features_are_those_of_the_system(tmp_path):
    hw = replay("ampere-one", tmp_path)
    assert hw.cores == 4
    assert hw.dot_product("int8") == "i8mm"
    assert hw.dot_product("bfloat16") == "bf16"
    assert "-sve" in hw.tvm_target()["mattr"]


def test_another_instruction_set_is_not_taken_for_x86(tmp_path):
    with pytest.raises(UnknownTarget, match=r"riscv64.*name a target"):
        replay("spacemit-k1", tmp_path)


def test_nothing_to_read_still_gives_a_machine(tmp_path):
    assert detect_at(tmp_path, {0, 1, 2}, "x86_64").cores == 3


def test_this_machine():
    hw = detect()
    assert hw.native
    assert hw.cores >= 1
    assert hw.caches
    assert hw.clock_mhz
    assert detect() is hw
    assert missing_features(hw.features) == []
    assert missing_features(["sve2", "xop", "sse2" if hw.isa == "x86_64" else "neon"]) == ["sve2", "xop"]


def test_an_obstacle_is_named():
    here = detect()
    assert obstacle(here) is None
    other = lookup("aarch64" if here.isa == "x86_64" else "x86-64")
    assert obstacle(other) == f"it is {other.isa} code and this machine is {here.isa}"
    more = replace(here, features=here.features | {"no-such-feature"})
    assert obstacle(more) == "this machine lacks no-such-feature"


def test_a_mac_under_linux_gets_code_for_linux(tmp_path):
    hw = replay("apple-m1-linux", tmp_path)
    assert (hw.id, hw.cores, hw.triple) == ("apple-m1", 4, "aarch64-unknown-linux-gnu")
    assert hw.dot_product("int8") == "sdot"


def test_code_for_macos_runs_under_linux_nowhere(monkeypatch):
    mac = lookup("apple-m1")
    monkeypatch.setattr("graphwright.hwdb.detect", lambda: replace(mac, native=True))
    monkeypatch.setattr("graphwright.hwdb.missing_features", lambda features: frozenset())
    assert obstacle(replace(mac, triple="aarch64-unknown-linux-gnu")) is None
    assert obstacle(mac) == "it is code for macOS"
