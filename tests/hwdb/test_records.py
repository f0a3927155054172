"""The records that come with the package, and the messages for mistakes in a record file."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from graphwright import hwdb
from graphwright.errors import RecordError, UnknownTarget
from graphwright.hwdb import loader
from graphwright.hwdb.cost import Work, predict_seconds
from graphwright.hwdb.dtypes import BITS, dtype_name
from graphwright.hwdb.loader import Database, database

IDS = [name for name in hwdb.names() if name != "native"]
PROCESSORS = [id for id in IDS if hwdb.lookup(id).kind in ("cpu", "board")]

SOURCES = """
[source.manual]
kind = "vendor_doc"
title = "a manual"
"""
BASE = (
    SOURCES
    + """
[architecture.base]
name = "base"
isa = "x86_64"
triple = "x86_64-unknown-linux-gnu"
llvm_cpu = "x86-64"
features = ["sse", "sse2"]
fma_per_cycle = 1
fma_latency_cycles = 5
cores = 1
source = ["manual"]
confidence = "low"
"""
)


def read(tmp_path: Path, text: str) -> Database:
    file = tmp_path / "own.toml"
    file.write_text(text)
    records = Database([file])
    records.check()
    return records


def test_short_forms_are_written_out(tmp_path):
    text = BASE + '[device.own]\nextends = "base"\nmemory = "24G 1008.5"\nsource = "high: manual, manual"\n'
    values = read(tmp_path, text).records["own"].values
    assert (values["dram_bytes"], values["dram_gbs"]) == (24 * 2**30, 1008.5)
    assert "memory" not in values
    assert (values["source"], values["confidence"]) == (["manual", "manual"], "high")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('dram_bytes = "24X"', r"own\.toml:19: device\.own: dram_bytes = '24X' is not a whole number"),
        ('memory = "24 1008"', r"own\.toml:19: device\.own: memory = '24 1008' is not like '24G 1008'"),
        ('memory = "24G 1008"\ndram_gbs = 900', r"own\.toml:19: device\.own: memory = .* or says again what"),
        ('source = "manual"', r"own\.toml:17: device\.own: confidence missing"),
        ('source = "high: manual"\nconfidence = "low"', r"own\.toml:19: .* says how sure it is, and so does another"),
        ('clusters = ["4 base 2.4.0"]', r"own\.toml:19: device\.own: clusters = .* is like '4 cortex-a76 2400'"),
        ('source = "sure: manual"', r"own\.toml:17: device\.own: confidence = 'sure' is not one of high"),
    ],
)
def test_wrong_short_forms_are_refused(tmp_path, line, message):
    text = BASE + f'[device.own]\nextends = "base"\n{line}\n'
    text += "" if line.startswith("source") else 'source = "high: manual"\n'
    with pytest.raises(RecordError, match=message):
        read(tmp_path, text)


def test_every_record_fits_the_schema_and_names_what_exists():
    database().check()


def test_records_of_the_package_are_checked_when_one_asks_for_it(tmp_path):
    """They are read unchecked: this test, and not every program, is what keeps mistakes out of them."""
    file = tmp_path / "own.toml"
    file.write_text(BASE + "year = -1\n")
    records = Database([file], trusted=True)
    assert records.merged("base")["year"] == -1
    line = file.read_text().count("\n")
    with pytest.raises(RecordError, match=rf"own\.toml:{line}: architecture\.base: year = -1 is not positive"):
        records.check()


@pytest.mark.parametrize("id", IDS)
def test_every_record_answers_every_question(id):
    hw = hwdb.lookup(id)
    assert hw.id == id
    assert hw.sources
    assert not hw.native
    assert "arm64-" not in hw.triple  # LLVM takes such a triple for another architecture
    assert [cache.level for cache in hw.caches] == sorted({cache.level for cache in hw.caches})
    sizes = [cache.size_bytes for cache in hw.caches]
    assert sizes == sorted(sizes)
    for dtype in BITS:
        dense, sparse = hw.peak_flops(dtype), hw.peak_flops(dtype, sparse=True)
        assert (dense is None) == (sparse is None)
        assert dense is None or 0 < dense <= sparse
        assert isinstance(hw.supports(dtype), bool)


@pytest.mark.parametrize("id", PROCESSORS)
def test_the_facts_of_a_processor_fit_together(id):
    hw = hwdb.lookup(id)
    for cache in hw.caches:
        if cache.ways is not None:
            sets = cache.size_bytes / (cache.ways * cache.line_bytes)
            assert sets == int(sets), f"L{cache.level}: {sets} sets"
    # A tile that hides the FMA latency must fit the registers: latency x rate accumulators beside two operands.
    assert math.ceil(hw.fma_per_cycle * hw.fma_latency_cycles) + 2 <= hw.vector_registers
    rates = [hw.bandwidth_gbs(cache.level) for cache in hw.caches]
    assert rates == sorted(rates, reverse=True)


def test_importing_brings_in_nothing_heavy_and_reads_no_record():
    code = (
        "import sys, graphwright.hwdb as h; from graphwright.hwdb import loader;"
        "print(loader._database.cache_info().currsize); h.lookup('haswell'); h.detect();"
        "print([m for m in ('torch', 'tvm', 'numpy', 'rich', 'rapidfuzz') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[:2] == ["0", "[]"]


def test_the_records_are_small():
    """So that reading all of them takes some tens of milliseconds."""
    assert sum(file.stat().st_size for file in Path(loader.__file__).parent.glob("*.toml")) <= 150 << 10


def test_a_look_up_parses_the_record_and_its_ancestors_only():
    records = Database(sorted(Path(loader.__file__).parent.glob("*.toml")))
    records.build(records.id_of("raspberry-pi-5"))
    parsed = {record.id for record in records.records.values() if "values" in vars(record)}
    assert parsed == {record.id for record in records.lineage("raspberry-pi-5")}
    assert len(parsed) < 6


@pytest.mark.parametrize(
    ("name", "id"),
    [
        ("x86-64-v2", "x86-64-v2"),
        ("x86_64_v3", "x86-64-v3"),
        ("Haswell", "haswell"),
        ("skylake_avx512", "skylake-avx512"),
        ("icelake", "icelake-server"),
        ("znver4", "zen4"),
        ("zen2", "zen2"),
        ("arm64", "aarch64"),
        ("cortex_a53", "cortex-a53"),
        ("cortex-a76", "cortex-a76"),
        ("neoverse-n1", "neoverse-n1"),
        ("Raspberry Pi 4", "raspberry-pi-4b"),
        ("pi5", "raspberry-pi-5"),
    ],
)
def test_names_and_aliases(name, id):
    assert hwdb.lookup(name).id == id


def test_native_is_this_machine():
    assert hwdb.lookup("native") is hwdb.detect()
    assert hwdb.names()[0] == "native"


@pytest.mark.parametrize(
    ("name", "near"),
    [("coretx-a72", "cortex-a72"), ("zen44", "zen4"), ("natve", "native"), ("rasberry-pi-5", "pi-5")],
)
def test_unknown_names_offer_near_ones(name, near):
    with pytest.raises(UnknownTarget) as raised:
        hwdb.lookup(name)
    assert repr(name) in str(raised.value)
    assert near in str(raised.value)
    assert "hw list" in str(raised.value)


def test_nonsense_has_no_near_name():
    with pytest.raises(UnknownTarget, match="unknown target '@@@'"):
        hwdb.lookup("@@@")


def test_known_figures():
    """From the datasheets: Raspberry Pi 4 and 5, and AVX-512 counted as one 512-bit FMA a cycle on Zen 4."""
    assert hwdb.lookup("raspberry-pi-4").peak_flops() == pytest.approx(57.6e9)
    assert hwdb.lookup("raspberry-pi-5").peak_flops() == pytest.approx(153.6e9)
    assert hwdb.lookup("raspberry-pi-5").peak_flops("fp16") == pytest.approx(307.2e9)
    assert not hwdb.lookup("raspberry-pi-4").supports("float16")
    zen4 = dataclasses.replace(hwdb.lookup("zen4"), cores=1, clock_mhz=1000.0)
    assert zen4.peak_flops() == 32e9
    assert zen4.peak_flops("float64") == 16e9
    assert zen4.peak_flops("int8") == 128e9
    assert zen4.lanes() == 16
    assert zen4.lanes("bf16") == 32
    amx = dataclasses.replace(hwdb.lookup("sapphirerapids"), cores=1, clock_mhz=1000.0)
    assert amx.dot_product("int8") == "amx"
    assert amx.peak_flops("int8") == 2048e9  # Intel optimization manual: 2048 int8 operations a cycle and core


@pytest.mark.parametrize(
    ("id", "dtype", "computed"),
    [
        ("raspberry-pi-5", "float8", "float32"),
        ("raspberry-pi-5", "bf16", "float32"),
        ("raspberry-pi-5", "fp16", "float16"),
        ("raspberry-pi-4", "fp16", "float32"),
        ("core-i9-13900k", "float8", "float32"),
        ("core-i9-13900k", "int4", "float32"),
        ("core-i9-13900k", "int64", "int64"),
        ("t4", "bf16", "float32"),
        ("t4", "float8", "float32"),
        ("t4", "int8", "int8"),
        ("v100", "bf16", "float32"),
        ("v100", "int32", None),
        ("apple-m1-gpu", "float64", None),
    ],
)
def test_a_rate_is_that_of_the_type_itself_and_what_lacks_is_widened_alike_everywhere(id, dtype, computed):
    hw = hwdb.lookup(id)
    native = computed is not None and computed == dtype_name(dtype)
    assert (hw.supports(dtype), hw.computed_in(dtype)) == (native, computed)
    assert (hw.peak_flops(dtype) is not None) == native
    seconds = predict_seconds(hw, Work({dtype: 1e12}))
    assert seconds == (None if computed is None else predict_seconds(hw, Work({computed: 1e12})))


@pytest.mark.parametrize("id", IDS)
def test_no_rate_of_what_is_not_computed(id):
    hw = hwdb.lookup(id)
    for dtype in BITS:
        assert hw.supports(dtype) or hw.peak_flops(dtype) is None, dtype
        assert hw.supports(dtype) == (hw.computed_in(dtype) == dtype), dtype


def test_volta_multiplies_bytes_by_dp4a():
    for id in ("v100", "v100-pcie", "v100s", "titan-v"):
        hw = hwdb.lookup(id)
        assert (hw.dot_product("int8"), hw.peak_flops("int8")) == ("dp4a", 4 * hw.peak_flops())


def test_pi_has_no_crypto():
    assert "aes" in hwdb.lookup("cortex-a72").features
    assert "-aes" in hwdb.lookup("raspberry-pi-4").tvm_target()["mattr"]


def test_dram_is_one_stream_per_core_up_to_the_channels():
    records = database()
    assert records.build("jetson-orin-nano", cores=1).dram_gbs == 13.5
    assert records.build("jetson-orin-nano", cores=6).dram_gbs == 68.3


def test_a_good_file_reads(tmp_path):
    records = read(
        tmp_path,
        BASE
        + '[device.board]\nextends = "base"\nname = "Board"\ncores = 2\nfeatures = ["avx", "fma"]\n'
        + 'without = ["sse"]\naliases = ["My Board"]\nsource = ["manual"]\nconfidence = "high"\n'
        + "fma_per_cycle = { 128 = 2, 256 = 1 }\n",
    )
    hw = records.build(records.id_of("my_board"))
    assert (hw.cores, hw.vector_bits, hw.fma_per_cycle) == (2, 256, 1)
    assert hw.features == {"sse2", "avx", "fma"}
    assert hw.clock_mhz is None
    assert hw.peak_flops() is None  # unknown, not 0


MISTAKES = {
    "not TOML": ("[architecture.x\n", "not valid TOML"),
    "unknown kind": (BASE + "[devise.x]\n", r"devise\.x: unknown kind of record; did you mean 'device'"),
    "unknown key": (BASE.replace("cores = 1", "core = 1"), "unknown key 'core'; did you mean 'cores'"),
    "wrong type": (BASE.replace("cores = 1", 'cores = "four"'), "cores = 'four' is not a whole number"),
    "true is no number": (BASE.replace("cores = 1", "cores = true"), "cores = True is not a whole number"),
    "zero for unknown": (BASE + "clock_mhz = 0\n", "leave an unknown value out"),
    "no source": (BASE.replace('source = ["manual"]', ""), "source missing"),
    "no confidence": (BASE.replace('confidence = "low"', ""), "confidence missing"),
    "odd confidence": (BASE.replace('"low"', '"lowest"'), "confidence = 'lowest' is not one of"),
    "unknown source": (BASE.replace('["manual"]', '["manua"]'), "source 'manua'.*did you mean 'manual'"),
    "unknown parent": (BASE + 'extends = "bas"\n', "extends 'bas', which does not exist"),
    "circle": (BASE + 'extends = "base"\n', "extends 'base', which extends it in turn"),
    "missing facts": (BASE.replace('llvm_cpu = "x86-64"', ""), "llvm_cpu missing"),
    "unknown isa": (BASE.replace('"x86_64"', '"vax"'), "isa 'vax' is not one of"),
    "unknown feature": (
        BASE.replace('"sse2"', '"sse22"'),
        "'sse22' is not a known x86_64 feature; did you mean 'sse2'",
    ),
    "list of numbers": (BASE + "aliases = [1]\n", "aliases = .1. is not a list of strings"),
    "list of nothing": (BASE + 'aliases = [""]\n', "aliases = .''. is not a list of strings"),
    "no truth value": (BASE + "in_order = 1\n", "in_order = 1 is not true or false"),
    "no count": (BASE + "load_stall_cycles = -1\n", "load_stall_cycles = -1 is not positive"),
    "infinite": (BASE + "clock_mhz = inf\n", "clock_mhz = inf is not finite"),
    "another isa's triple": (BASE.replace('"x86_64-', '"arm64-'), "'arm64-unknown-linux-gnu' is not one of x86_64"),
    "the machine one works on": (BASE + 'aliases = ["Native"]\n', "'native' means the machine one works on"),
    "header within the line": (BASE + "  [architecture.x]\n  year = 1\n", r"\[architecture\.x\]: a record begins"),
    "header of another kind": (BASE + "[device.'x']\n", r"\[device\]: a record begins a line with \[kind\.id\]"),
    "id with a point": (BASE + "[architecture.x.y]\n", r"\[architecture\.x\]: a record begins a line"),
    "no rate": (BASE.replace("fma_per_cycle = 1", "fma_per_cycle = {}"), "fma_per_cycle = .* has no rate"),
    "empty matrix": (BASE + 'matrix_shapes = ["m0n8k8:int8:int32"]\n', "has 'm0n8k8:int8:int32', which is not like"),
    "odd rate": (BASE.replace("fma_per_cycle = 1", "fma_per_cycle = { 64 = 1 }"), "fma_per_cycle = .* has 64 = 1"),
    "cache without size": (
        BASE + "caches = [{ level = 1 }]\n",
        "caches: each has at least level and size_bytes",
    ),
    "cache key": (
        BASE + "caches = [{ level = 1, size_bytes = 1, way = 2 }]\n",
        "unknown key 'way'; did you mean 'ways'",
    ),
    "cache size 0": (BASE + "caches = [{ level = 1, size_bytes = 0 }]\n", "size_bytes = 0 is not positive"),
    "a clock in Hz": (BASE + "clock_mhz = 1e300\n", r":17: .*clock_mhz = 1e\+300 is not between 1 and 20000"),
    "absurd cores": (BASE.replace("cores = 1", "cores = 1000000000000"), "cores = 1000000000000 is not between 1 and"),
    "absurd rate": (
        BASE.replace("fma_per_cycle = 1", "fma_per_cycle = 1e9"),
        "fma_per_cycle = 1000000000.0 is not between",
    ),
    "absurd cache": (BASE + 'caches = ["900000G"]\n', "size_bytes = 966367641600000 is not between"),
    "absurd cluster": (BASE + 'clusters = ["4 base 99999"]\n', "is not a name, a count and a clock"),
    "year in two digits": (BASE + "year = 24\n", "year = 24 is not between 1970 and 2100"),
    "no identifier": (
        BASE.replace("base]", '"My Laptop!"]'),
        r":\d+: .*the id 'My Laptop!' is not letters, digits and",
    ),
    "no identifier of a source": (
        BASE + '[source."a, b"]\nkind = "press"\ntitle = "x"\n',
        "the id 'a, b' is not letters",
    ),
    "cache order": (
        BASE + "caches = [{ level = 2, size_bytes = 9 }, { level = 1, size_bytes = 1 }]\n",
        "levels must ascend, L1 follows L2",
    ),
    "alias taken": (
        BASE + 'aliases = ["x"]\n' + BASE.replace(SOURCES, "").replace("base]", "x]"),
        "belongs to",
    ),
    "source kind": (BASE.replace('"vendor_doc"', '"blog"'), "kind = 'blog' is not one of"),
    "source without title": (BASE.replace('title = "a manual"', ""), "title missing"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_name_file_and_record(tmp_path, mistake):
    text, message = MISTAKES[mistake]
    with pytest.raises(RecordError, match=message) as raised:
        read(tmp_path, text)
    assert "own.toml" in str(raised.value)
    if mistake not in ("not TOML", "unknown kind", "no identifier of a source"):
        assert "architecture." in str(raised.value) or "source.manual" in str(raised.value)


@pytest.mark.parametrize("content", [b"note = '\xe9'", None])
def test_what_is_no_text_is_named(tmp_path, content):
    file = tmp_path / "own.toml"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(RecordError, match=r"own\.toml: cannot be read as text in UTF-8"):
        Database([file])


def test_files_of_windows_are_read(tmp_path):
    text = BASE.replace("\n", "\r\n")
    (tmp_path / "own.toml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert Database([tmp_path / "own.toml"]).build("base").cores == 1


def test_one_line_is_given_for_what_is_not_toml(tmp_path):
    with pytest.raises(RecordError, match=r"own\.toml:17: not valid TOML: [^0-9]* \(at column 8\)$"):
        read(tmp_path, BASE + "year = = 2\n")


def test_the_line_of_the_key_is_given(tmp_path):
    with pytest.raises(RecordError, match=r"own\.toml:17: architecture\.base: unknown key"):
        read(tmp_path, BASE + "colour = 1\n")
