"""What users give as target, and machines of their own: in files, from programs, and described to TVM."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from archspec.cpu import TARGETS

from graphwright import hwdb
from graphwright.errors import InputError, RecordError, UnknownTarget
from graphwright.hwdb import loader
from graphwright.hwdb.naming import bare, maker

OWN = """
[device.my-board]
extends = "raspberry-pi-5"
name = "My Board 3000"
aliases = ["mine"]
clock_mhz = 2800
source = ["shop"]
confidence = "low"

[source.shop]
kind = "press"
title = "what the shop says"
"""


@pytest.fixture
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "boards.toml").write_text(OWN)
    monkeypatch.setenv("GRAPHWRIGHT_HWDB", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(loader, "_registered", {})
    yield
    loader._database.cache_clear()


def test_files_of_ones_own(own_directory):
    for name in ("my-board", "Mine", "my board 3000"):
        hw = hwdb.lookup(name)
        assert (hw.id, hw.clock_mhz, hw.cores, hw.sources[0].title) == ("my-board", 2800, 4, "what the shop says")
    assert "my-board" in hwdb.names()


def test_several_directories_may_build_on_each_other(own_directory, tmp_path_factory, monkeypatch):
    second = tmp_path_factory.mktemp("second")
    (second / "own.toml").write_text(
        '[device.other]\nextends = "my-board"\ncores = 2\nsource = ["shop"]\nconfidence = "low"'
    )
    monkeypatch.setenv("GRAPHWRIGHT_HWDB", f"{own_directory}:{second}")
    assert (hwdb.lookup("other").cores, hwdb.lookup("other").clock_mhz) == (2, 2800)


def test_a_mistake_in_ones_own_file_is_found_at_once(own_directory):
    file = own_directory / "boards.toml"
    file.write_text(OWN.replace("clock_mhz = 2800", 'clock_mhz = "fast"'))
    with pytest.raises(RecordError, match=r"boards\.toml:6: device\.my-board: clock_mhz = 'fast' is not a number"):
        hwdb.lookup("zen4")
    loader._database.cache_clear()
    file.write_text(OWN.replace("my-board", "raspberry-pi-5"))
    with pytest.raises(RecordError, match=r"boards\.toml:2: .*already exists: .*arm"):
        hwdb.lookup("zen4")


def test_a_source_of_ones_own_is_read_though_nothing_names_it(own_directory):
    (own_directory / "boards.toml").write_text(OWN + '[source.unused]\ntitle = "x"\n  [device.indented]\n')
    with pytest.raises(RecordError, match=r"source\.unused: \[device\]: a record begins a line with \[kind\.id\]"):
        hwdb.lookup("zen4")


def test_no_such_directory(monkeypatch):
    monkeypatch.setenv("GRAPHWRIGHT_HWDB", "/nowhere/at/all")
    with pytest.raises(RecordError, match="'/nowhere/at/all', which is not a directory"):
        hwdb.lookup("zen4")


def test_register():
    hw = hwdb.register("my-cluster", extends="zen4", cores=96, aliases=["bigger"])
    assert (hw.id, hw.cores, hw.llvm_cpu) == ("my-cluster", 96, "znver4")
    assert hw.sources[0].kind == "system"
    assert hwdb.lookup("bigger") == hw
    assert hwdb.register("my-cluster", extends="zen4", cores=64).cores == 64  # replaced
    with pytest.raises(UnknownTarget):
        hwdb.lookup("bigger")


def test_threads_may_register_while_others_look_up():
    def work(number):
        for cores in range(1, 11):
            hwdb.register(f"thread-{number}", extends="zen4", cores=cores, aliases=[f"of-{number}"])
            assert hwdb.lookup("Radeon RX 7900 XTX").id == "rx-7900-xtx"  # by all names, made anew
        return hwdb.lookup(f"thread-{number}").cores

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [10] * 8


def test_what_is_registered_survives_other_directories(own_directory, monkeypatch):
    hwdb.register("my-second", extends="my-board", cores=2)
    monkeypatch.setenv("GRAPHWRIGHT_HWDB", f"{own_directory}:{own_directory.parent}")
    assert hwdb.lookup("my-second").clock_mhz == 2800


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"extends": "raspbery-pi-5"}, "did you mean 'raspberry-pi-5'"),
        ({"extends": "zen4", "clok_mhz": 1}, "unknown key 'clok_mhz'; did you mean 'clock_mhz'"),
        ({"extends": "zen4", "cores": 0}, "cores = 0 is not positive"),
        ({"extends": "zen4", "aliases": ["haswell"]}, "'haswell' already belongs to"),
        ({"extends": "zen4", "aliases": [1]}, "is not a list of strings"),
        ({"extends": "zen4", "aliases": ["native"]}, "'native' means the machine one works on"),
        ({"extends": "zen4", "kind": "source"}, "kind 'source' is none of architecture, device"),
        ({"extends": "zen4", "units": 3}, "units belongs to gpu and npu records, and this one is a cpu"),
    ],
)
def test_a_wrong_registration_changes_nothing(facts, message):
    before = hwdb.register("mine", extends="zen4", cores=3)
    with pytest.raises(RecordError, match=r"register\('mine'\).*" + message):
        hwdb.register("mine", **facts)
    assert hwdb.lookup("mine") == before
    with pytest.raises(RecordError, match="already exists"):
        hwdb.register("zen4", **facts)
    assert hwdb.lookup("zen4").id == "zen4"


def test_the_cache_key_sees_ones_own_facts():
    fingerprint = pytest.importorskip("graphwright.compiler.fingerprint")
    keys = set()
    for facts in ({"clock_mhz": 2000}, {"clock_mhz": 2500}, {"clock_mhz": 2500, "launch_us": 3}, {"cores": 2}):
        keys.add(fingerprint.setting(hwdb.register("mine", extends="raspberry-pi-5", **facts)))
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "rtx-3060-laptop"),
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("AMD Radeon RX 7900 XTX", "rx-7900-xtx"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Intel(R) Core(TM) i7-4770 CPU @ 3.40GHz", "core-i7-4770"),
        ("AMD Ryzen 9 7950X 16-Core Processor", "ryzen-9-7950x"),
        ("Raspberry Pi 4 Model B Rev 1.4", "raspberry-pi-4-model-b"),
        ("AMD", ""),
    ],
)
def test_names_without_decoration(name, short):
    assert bare(name) == short


@pytest.mark.parametrize(
    ("name", "vendor"),
    [
        ("Raspberry Pi 5", "raspberry-pi"),
        ("Milk-V Duo", "milk-v"),
        ("Hailo-8L", "hailo"),
        ("Moore Threads MTT S80", "moore-threads"),
        ("Tesla T4", "nvidia"),
        ("AWS Graviton3", "amazon"),
        ("any x86-64", None),
        ("x86-64-v3 (AVX2, FMA)", None),
    ],
)
def test_a_product_begins_with_its_maker(name, vendor):
    assert maker(name) == vendor


@pytest.mark.parametrize("name", ["arc-a770", "hailo-8"])
def test_what_no_code_is_made_for_is_refused_in_one_sentence(name):
    with pytest.raises(UnknownTarget, match=f"cannot compile for {name} ") as raised:
        hwdb.compile_target(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("Raspberry Pi 5 Model B Rev 1.0\0", "raspberry-pi-5"),  # as the device tree ends it
        ("Raspberry Pi 3 Model B Plus Rev 1.3", "raspberry-pi-3b-plus"),
        ("Raspberry Pi 2 Model B Rev 1.1", "raspberry-pi-2b"),
        ("Radxa ROCK 5 Model B", "rock-5b"),
        ("NVIDIA Jetson Orin Nano Developer Kit", "jetson-orin-nano"),
        ("NVIDIA Jetson AGX Xavier GPU", "jetson-agx-xavier-gpu"),
        ("13th Gen Intel(R) Core(TM) i9-13900K", "core-i9-13900k"),
        ("11th Gen Intel(R) Core(TM) i5-1135G7 @ 2.40GHz", "core-i5-1135g7"),
        ("AMD Ryzen 7 7840U w/ Radeon 780M Graphics", "ryzen-7-7840hs"),
        ("Tesla V100-SXM2-32GB", "v100-sxm2-32gb"),
        ("NVIDIA GeForce RTX 4050 Laptop GPU", "rtx-4050-laptop"),
    ],
)
def test_names_as_firmware_and_drivers_give_them(name, id):
    assert hwdb.lookup(name).id == id


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "did you mean"),  # never the card of the same number
        ("NVIDIA GeForce RTX 2080 with Max-Q Design", "did you mean"),
        ("NVIDIA GeForce RTX 4090 D", "rtx-4090"),
        ("Raspberry Pi 3 Model A Plus Rev 1.0", "raspberry-pi-3"),
        ("Tesla M4", "unknown target"),  # no chip of Apple's
    ],
)
def test_a_variant_is_not_taken_for_another_product(name, near):
    with pytest.raises(UnknownTarget, match=near):
        hwdb.lookup(name)


def test_every_product_is_found_by_its_name():
    records = loader.database()
    for id, record in records.records.items():
        assert records.find(id) == id
        assert not record.name or records.find(record.name) == id, record.name


@pytest.mark.parametrize("id", ["My Laptop!", "", "-x", "a b"])
def test_an_id_is_an_identifier(id):
    with pytest.raises(RecordError, match=r"the id '.*' is not letters, digits and .*`name` says what people call it"):
        hwdb.register(id, extends="zen4")


def test_a_tvm_target_names_processor_features_and_cores():
    hw = hwdb.lookup(
        {
            "kind": "llvm",
            "mtriple": "aarch64-linux-android",
            "mcpu": "cortex-a76",
            "mattr": ["-dotprod", "+i8mm"],
            "num-cores": 2,
        }
    )
    assert (hw.id, hw.cores, hw.dot_product()) == ("cortex-a76", 2, "i8mm")
    assert hw.triple == "aarch64-unknown-linux-android"
    assert hwdb.lookup('{"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "znver4"}').id == "zen4"


def test_code_is_made_for_linux_android_and_macos():
    for triple in ("x86_64-apple-darwin", "arm64-apple-ios", "x86_64-pc-windows-msvc"):
        with pytest.raises(UnknownTarget, match=r"code is made for Linux, Android and macOS .* is none of them"):
            hwdb.compile_target({"kind": "llvm", "mtriple": triple})
    # LLVM would take "linux" for the vendor, and with it another calling convention.
    hw = hwdb.compile_target({"kind": "llvm", "mtriple": "armv7a-linux-gnueabihf"})
    assert (hw.isa, hw.triple) == ("armv7", "armv7a-unknown-linux-gnueabihf")


@pytest.mark.parametrize(
    "triple",
    ["arm64-apple-darwin", "arm64-apple-darwin23.1.0", "aarch64-apple-macosx12.0.0", "arm64-apple-macos26"],
)
def test_a_macs_triple_means_the_oldest_mac(triple):
    hw = hwdb.compile_target({"kind": "llvm", "mtriple": triple})
    assert (hw.id, hw.triple) == ("apple-m1", "aarch64-apple-macosx12.0.0")
    assert hwdb.lookup({"kind": "llvm", "mtriple": triple, "mcpu": "apple-m2"}).dot_product() == "i8mm"


@pytest.mark.parametrize(
    ("described", "why"),
    [
        ({"mtriple": "arm64-apple-macosx11.3"}, "macOS 12 and newer"),
        ({"mtriple": "arm64-apple-darwin20"}, "macOS 12 and newer"),
        ({"mtriple": "arm64-apple-darwin", "mattr": ["+sve2"]}, "no Mac has sve2"),
        ({"mtriple": "arm64-apple-darwin", "mcpu": "neoverse-v1"}, "no Mac has .*sve"),
    ],
)
def test_what_no_mac_runs_is_refused(described, why):
    with pytest.raises(UnknownTarget, match=why):
        hwdb.compile_target({"kind": "llvm", **described})


def test_apples_processors_run_macos_and_linux_where_it_is_named():
    assert hwdb.compile_target("apple-m1-pro").triple == "aarch64-apple-macosx12.0.0"
    linux = hwdb.compile_target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "apple-m1"})
    assert (linux.id, linux.triple) == ("apple-m1", "aarch64-unknown-linux-gnu")


@pytest.mark.parametrize("name", ["zen4", "apple-m2", "raspberry-pi-5", "x86-64-v2", "sapphirerapids", "riscv64"])
def test_what_is_told_to_tvm_leads_back(name):
    hw = hwdb.lookup(name)
    again = hwdb.lookup(json.loads(json.dumps(hw.tvm_target())))
    assert (again.isa, again.triple, again.llvm_cpu, again.features, again.cores) == (
        *(hw.isa, hw.triple, hw.llvm_cpu),
        *(hw.features, hw.cores),
    )


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ({"kind": "vax"}, UnknownTarget, "kind 'vax' is not understood"),
        ({}, UnknownTarget, 'lacks "kind": one of llvm, cuda, rocm'),
        ({"kind": None}, UnknownTarget, "kind None is not understood"),
        ({"mcpu": "znver4"}, UnknownTarget, 'lacks "kind".*as {"kind": "llvm", "mcpu": "znver4"}'),
        ('{"mcpu": "gfx942"}', UnknownTarget, 'lacks "kind".*as {"kind": "rocm", "mcpu": "gfx942"}'),
        ({"arch": "sm_90"}, UnknownTarget, 'lacks "kind".*as {"kind": "cuda", "arch": "sm_90"}'),
        ("llvm -mcpu=znver4", UnknownTarget, 'as a dictionary, here {"kind": "llvm", "mcpu": "znver4"}'),
        ("cuda -arch sm_80", UnknownTarget, 'as a dictionary, here {"kind": "cuda", "arch": "sm_80"}'),
        (
            "llvm -mattr=-avx2,+fma -num-cores=4",
            UnknownTarget,
            r'"mattr": ."-avx2", "\+fma"., "num-cores": 4',
        ),
        ("llvm", UnknownTarget, 'as a dictionary, here {"kind": "llvm"}'),
        ({"kind": "llvm", "mcpus": "zen"}, UnknownTarget, "attribute 'mcpus' of llvm.*did you mean 'mcpu'"),
        ({"kind": ["llvm"]}, UnknownTarget, "kind .'llvm'. is not understood"),
        ({"kind": "llvm", 5: 6}, UnknownTarget, "attribute 5 of llvm is not understood"),
        ({"kind": "llvm", "mcpu": None}, UnknownTarget, "'mcpu' of llvm is None: it is text"),
        ({"kind": "llvm", "mattr": "+avx2,+fma"}, UnknownTarget, "'mattr' of llvm is '.avx2,.fma': it is a list of"),
        ({"kind": "llvm", "mattr": ["avx2"]}, UnknownTarget, "a list of '.feature' and '-feature'"),
        ({"kind": "llvm", "num-cores": 0}, UnknownTarget, "'num-cores' of llvm is 0: it is a positive whole number"),
        ({"kind": "llvm", "num-cores": "4"}, UnknownTarget, "is '4': it is a positive whole number"),
        ({"kind": "llvm", "mtriple": "aarch64_be-linux-gnu"}, UnknownTarget, "aarch64_be is not one of x86_64"),
        ({"kind": "rocm", "mcpu": "sm_80"}, UnknownTarget, "'sm_80' is not a GPU that rocm is for"),
        ({"kind": "cuda"}, UnknownTarget, "of kind cuda says which GPU: 'arch', such as 'sm_90'"),
        ({"kind": "cuda", "arch": "sm_80", "thread_warp_size": -1}, UnknownTarget, "is -1: it is a positive whole"),
        ({"kind": "llvm", "mtriple": "s390x-linux-gnu"}, UnknownTarget, "s390x is not one of x86_64, aarch64"),
        ({"kind": "rocm", "mcpu": "haswell"}, UnknownTarget, "'haswell' is not a GPU"),
        ("{kind", UnknownTarget, "not valid JSON"),
        (3, InputError, "a target is a name"),
    ],
)
def test_targets_that_are_refused(target, error, message):
    with pytest.raises(error, match=message):
        hwdb.lookup(target)


def test_a_processor_we_lack_is_taken_as_its_ancestor(caplog):
    known = loader.database()
    lacking = [
        n
        for n, t in TARGETS.items()
        if t.family.name in ("x86_64", "aarch64") and known.find(n) is None and t.ancestors
    ]
    assert lacking
    for name in lacking:
        hw = hwdb.lookup(name)
        assert hw.id in {known.find(a.name.replace("x86_64", "x86-64")) for a in TARGETS[name].ancestors}
    assert f"unknown hardware {lacking[0]}: taken as" in caplog.text
    assert hwdb.lookup({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "newest-core"}).id == "aarch64"
    assert "unknown processor newest-core: taken as aarch64" in caplog.text


def test_uncertain_facts_compile_for_small_caches():
    hw = hwdb.register("guess", extends="zen4", confidence="low", cores=8)
    limited = hwdb.compile_target("guess")
    generic = hwdb.lookup("x86-64")
    assert [(c.level, c.size_bytes) for c in limited.caches] == [(c.level, c.size_bytes) for c in generic.caches]
    assert limited.caution == (
        "the facts of guess are uncertain (confidence low): compiled for caches as any x86-64 has them"
    )
    assert (limited.features, limited.cores) == (hw.features, 8)
    assert hwdb.compile_target("zen4").caution is None
    assert hwdb.compile_target("native") is hwdb.detect()
    assert hwdb.compile_target(hw) == limited


def test_a_smaller_cache_stays_small():
    tiny = ({"level": 1, "size_bytes": 16384, "ways": 4}, {"level": 2, "size_bytes": 524288})
    hwdb.register("tiny", extends="x86-64-v3", confidence="low", caches=list(tiny))
    assert [cache.size_bytes for cache in hwdb.compile_target("tiny").caches] == [16384, 262144]
