"""GPUs and NPUs: rates, occupancy, targets, on records small enough to check by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphwright import hwdb
from graphwright.errors import InputError, RecordError, UnknownTarget
from graphwright.hwdb import Hardware, Occupancy
from graphwright.hwdb.accelerators import Gpu
from graphwright.hwdb.loader import Database

# Limits and rates of compute capability 8.0 (CUDA programming guide, tables of compute capabilities; GA100 whitepaper).
AMPERE = """
[source.guide]
kind = "vendor_doc"
title = "CUDA programming guide"

[architecture.sm_80]
class = "gpu"
vendor = "nvidia"
name = "GA100"
isa = "nvptx"
llvm_cpu = "sm_80"
warp_threads = 32
max_warps_per_unit = 64
max_blocks_per_unit = 32
max_threads_per_block = 1024
schedulers_per_unit = 4
registers_per_unit = 65536
max_registers_per_thread = 255
register_allocation = 256
shared_bytes_per_unit = 167936
shared_bytes_per_block = 166912
shared_allocation_bytes = 128
shared_reserved_bytes = 1024
shared_banks = 32
vector_flops = { float32 = 128, float64 = 64, int8 = 512 }
matrix_flops = { float16 = 2048, tf32 = 1024 }
matrix_shapes = ["m16n8k16:float16", "m16n8k8:float16:float16", "m16n8k8:tf32:float32"]
sparse_factor = { float16 = 2 }
source = ["guide"]
confidence = "high"

[device.a100]
extends = "sm_80"
name = "A100"
units = 108
clock_mhz = 1410
l2_bytes = 41943040
dram_gbs = 1555
source = ["guide"]
confidence = "high"

[device.slow-tensor]
extends = "a100"
name = "cut down"
tensor_clock_mhz = 705
rate_scale = { tf32 = 0.5 }
source = ["guide"]
confidence = "low"

[device.box]
class = "npu"
vendor = "acme"
name = "Box"
isa = "none"
peak_ops = { int8 = 26e12 }
dtypes = ["int8", "int4"]
source = ["guide"]
confidence = "low"

[architecture.cdna]
class = "gpu"
vendor = "amd"
name = "CDNA"
isa = "amdgcn"
llvm_cpu = "gfx90a"
warp_threads = 64
max_threads_per_block = 1024
shared_bytes_per_block = 65536
vector_flops = { float32 = 256 }
matrix_flops = { float16 = 1024 }
source = ["guide"]
confidence = "high"
"""


def read(tmp_path: Path, text: str = AMPERE) -> Database:
    file = tmp_path / "own.toml"
    file.write_text(text)
    records = Database([file])
    records.check()
    return records


@pytest.fixture
def a100(tmp_path: Path) -> Hardware:
    return read(tmp_path).build("a100")


def test_a_peak_is_units_times_rate_times_clock(a100):
    assert a100.peak_flops() == 128 * 108 * 1410e6  # 19.5 TFLOP/s in NVIDIA's datasheet
    assert a100.peak_flops("fp16") == 2048 * 108 * 1410e6  # 312
    assert a100.peak_flops("fp16", sparse=True) == 2 * a100.peak_flops("fp16")
    assert a100.peak_flops("tf32", sparse=True) == a100.peak_flops("tf32")
    assert a100.peak_flops("uint8") == a100.peak_flops("int8") == 512 * 108 * 1410e6
    assert a100.peak_flops("bf16") is None
    assert a100.computed_in("bf16") == a100.computed_in("fp4") == "float32"
    assert a100.computed_in("int32") is None  # float32 does not hold all its values


def test_the_questions_are_those_of_a_cpu(a100):
    assert (a100.cores, a100.vector_bits, a100.vector_registers, a100.lanes()) == (108, 1024, 255, 32)
    assert 2 * a100.lanes() * a100.fma_per_cycle * a100.cores * a100.clock_mhz * 1e6 == a100.peak_flops()
    assert (a100.dot_product("fp16"), a100.dot_product("int8"), a100.dot_product("fp64")) == ("mma", "dp4a", None)
    assert a100.supports("tf32")
    assert not a100.supports("bf16")
    assert [str(shape) for shape in a100.matrix_instructions("fp16")] == [
        "m16n8k16:float16:float32",
        "m16n8k8:float16:float16",
    ]
    assert a100.bandwidth_gbs(0) == 1555
    assert a100.bandwidth_gbs(1) == pytest.approx(128 * 108 * 1.41)  # a word a bank and clock
    assert a100.bandwidth_gbs(2) is None  # unknown, not guessed
    assert a100.cache(2).size_bytes == 40 << 20


def test_matrix_units_may_run_slower_and_be_cut_down(tmp_path):
    hw = read(tmp_path).build("slow-tensor")
    assert hw.peak_flops("fp16") == 2048 * 108 * 705e6
    assert hw.peak_flops("tf32") == 0.5 * 1024 * 108 * 705e6
    assert hw.peak_flops() == 128 * 108 * 1410e6


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "blocks", "by"),
    [
        # Worked out with NVIDIA's occupancy calculator for compute capability 8.0.
        (32, 0, 256, 8, "threads"),
        (32, 0, 1024, 2, "threads"),
        (64, 0, 256, 4, "registers"),
        (65, 0, 256, 3, "registers"),  # 65 x 32 rounds up to 2304 a warp: 7 warps a scheduler
        (255, 0, 256, 1, "registers"),
        (32, 49152, 128, 3, "shared memory"),  # 49152 + 1024 three times in 167936
        (32, 166912, 128, 1, "shared memory"),
        (16, 0, 32, 32, "blocks"),
        (256, 0, 32, 0, "registers"),
        (32, 166913, 128, 0, "shared memory"),
        (32, 0, 1056, 0, "threads"),
    ],
)
def test_occupancy(a100, registers, shared, threads, blocks, by):
    warps = blocks * -(-threads // 32)
    assert a100.occupancy(registers, shared, threads) == Occupancy(blocks, warps, warps / 64, by)


GPUS = [hw for name in hwdb.names() if isinstance(hw := hwdb.lookup(name), Gpu) and hw.occupancy(32, 0, 32)]


@given(st.sampled_from(GPUS), st.integers(0, 300), st.integers(0, 300_000), st.integers(1, 1100), st.integers(1, 100))
def test_a_bigger_block_is_never_there_more_often(hw, registers, shared, threads, more):
    base = hw.occupancy(registers, shared, threads)
    assert 0 <= base.warps_per_unit <= hw.max_warps_per_unit
    assert base.share == base.warps_per_unit / hw.max_warps_per_unit
    for heavier in (
        hw.occupancy(registers + more, shared, threads),
        hw.occupancy(registers, shared + more, threads),
        hw.occupancy(registers, shared, threads + more),
    ):
        assert heavier.blocks_per_unit <= base.blocks_per_unit
    # What is resident fits into the unit.
    assert base.blocks_per_unit * shared <= (hw.shared_bytes_per_unit or 0) or not base.blocks_per_unit * shared
    assert base.warps_per_unit * registers * hw.warp_threads <= hw.registers_per_unit


def test_no_block_without_threads(a100):
    with pytest.raises(InputError, match="no block has 0 threads"):
        a100.occupancy(32, 0, 0)


def test_occupancy_is_unknown_where_the_limits_are(tmp_path):
    assert read(tmp_path).build("cdna").occupancy(64, 0, 256) is None


def test_targets_of_tvm(a100, tmp_path):
    assert a100.tvm_target() == {
        "kind": "cuda",
        "arch": "sm_80",
        "max_num_threads": 1024,
        "max_threads_per_block": 1024,
        "max_shared_memory_per_block": 166912,
        "thread_warp_size": 32,
        "registers_per_block": 65536,
        "l2_cache_size_bytes": 41943040,
    }
    cdna = read(tmp_path).build("cdna")
    target = cdna.tvm_target()
    assert (target["kind"], target["mcpu"], target["max_num_threads"]) == ("rocm", "gfx90a", 256)
    assert cdna.dot_product("fp16") == "mfma"


def test_operands_of_matrix_units_are_twice_in_a_wave_of_rdna_3_alone():
    names = ("gfx942", "gfx1103", "gfx1100", "gfx1151", "gfx1201", "sm_80")
    copies = {name: hwdb.lookup(name).operand_copies for name in names}
    assert copies == dict.fromkeys(names, 1) | dict.fromkeys(("gfx1103", "gfx1100", "gfx1151"), 2)


def test_tvm_takes_the_targets(a100, tmp_path):
    target = pytest.importorskip("tvm.target")
    for hw in (a100, read(tmp_path).build("cdna")):
        described = hw.tvm_target()
        built = target.Target(described)
        assert built.kind.name == described["kind"]
        for key in ("max_threads_per_block", "max_shared_memory_per_block", "thread_warp_size"):
            assert built.attrs[key] == described[key]


def test_an_npu_has_published_peaks_only(tmp_path):
    box = read(tmp_path).build("box")
    assert (box.kind, box.cores, box.vector_bits, box.features) == ("npu", 1, 0, frozenset())
    assert (box.peak_flops("int8"), box.peak_flops("fp32")) == (26e12, None)
    assert box.supports("int4")
    assert not box.supports("fp16")
    assert box.occupancy(1, 0, 1) is None
    with pytest.raises(UnknownTarget, match="Box: TVM has no code generator"):
        box.tvm_target()


def test_what_cannot_be_compiled_for_says_why(a100, tmp_path):
    assert a100.refusal() is None
    assert "made with CUDA and ROCm, not metal" in dataclasses.replace(a100, isa="metal").refusal()
    assert "no open compiler" in read(tmp_path).build("box").refusal()


MISTAKES = {
    "key of another class": ("units = 108", "units = 108\ncores = 4", "cores belongs to cpu and board records"),
    "sparse slower than dense": ("{ float16 = 2 }", "{ float16 = 0.5 }", "is below 1 for float16"),
    "unknown dtype": ("float64 = 64", "flota64 = 64", "unknown dtype 'flota64'; did you mean 'float64'"),
    "odd shape": ("m16n8k8:tf32:float32", "m16n8:tf32:float32", "is not like 'm16n8k16:float16'"),
    "unknown class": ('class = "npu"', 'class = "tpu"', "class = 'tpu' is not one of cpu, board, gpu, npu"),
    "unknown isa": ('isa = "nvptx"', 'isa = "nvpxt"', "isa 'nvpxt' is not one of"),
    "needed for code": ("warp_threads = 64\n", "", "warp_threads missing here and in what it extends"),
    "no vendor": ('vendor = "amd"\n', "", "vendor missing here and in what it extends"),
    "features": ("units = 108", 'units = 108\nfeatures = ["avx"]', "'avx' is not a known nvptx feature"),
    "zero": ("dram_gbs = 1555", "dram_gbs = 0", "dram_gbs = 0 is not positive: leave an unknown value out"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_file_and_line(tmp_path, mistake):
    old, new, message = MISTAKES[mistake]
    assert old in AMPERE
    with pytest.raises(RecordError, match=r"own\.toml:\d+: (architecture|device)\.[\w-]+: .*" + message):
        read(tmp_path, AMPERE.replace(old, new, 1))


def test_tables_are_inherited_entry_by_entry(tmp_path):
    text = AMPERE.replace("tensor_clock_mhz = 705", "matrix_flops = { tf32 = 512, bfloat16 = 2048 }")
    hw = read(tmp_path, text).build("slow-tensor")
    assert hw.matrix_flops == {"float16": 2048, "tf32": 512, "bfloat16": 2048}


def test_clusters_give_cores_and_clock(tmp_path):
    board = """
[source.guide]
kind = "vendor_doc"
title = "a guide"

[architecture.big]
name = "big"
isa = "aarch64"
triple = "aarch64-linux-gnu"
llvm_cpu = "cortex-a76"
fma_per_cycle = 2
fma_latency_cycles = 4
cores = 1
clock_mhz = 1000
source = ["guide"]
confidence = "low"

[architecture.small]
extends = "big"
name = "small"
source = ["guide"]
confidence = "low"

[device.board]
class = "board"
extends = "big"
name = "Board"
soc = "SOC1"
clusters = [{ core = "big", count = 4, clock_mhz = 2400 }, { core = "small", count = 2 }]
source = ["guide"]
confidence = "low"
"""
    hw = read(tmp_path, board).build("board")
    assert (hw.kind, hw.cores, hw.clock_mhz, hw.board.soc) == ("board", 4, 2400, "SOC1")
    assert [(cluster.core, cluster.count) for cluster in hw.clusters] == [("big", 4), ("small", 2)]
    assert read(tmp_path, board.replace("clusters =", "cores = 3\nclusters =")).build("board").cores == 3
    for old, new, message in (
        ('{ core = "small"', '{ core = "smal"', "core 'smal' does not exist; did you mean 'small'"),
        ("count = 2 }", "number = 2 }", "each has core, count and maybe clock_mhz"),
        ('soc = "SOC1"', 'gpu = "mali"', "gpu 'mali' does not exist"),
    ):
        assert old in board
        with pytest.raises(RecordError, match=message):
            read(tmp_path, board.replace(old, new))
    swapped = board.replace('core = "big", count = 4', 'core = "small", count = 4')
    with pytest.raises(RecordError, match="the fastest cores come first, and the record extends theirs: 'big'"):
        read(tmp_path, swapped)
