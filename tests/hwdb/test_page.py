"""docs/hardware.md: its device in ten lines works as it stands, and its table has every key."""

from __future__ import annotations

import re
from pathlib import Path

from graphwright import hwdb
from graphwright.hwdb import loader, schema

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs/hardware.md").read_text()


def test_a_device_in_ten_lines(tmp_path, monkeypatch):
    (block,) = re.findall(r"^```toml\n(.*?)^```", PAGE, re.S | re.M)
    assert len([line for line in block.splitlines() if line]) <= 10
    (tmp_path / "mine.toml").write_text(block)
    monkeypatch.setenv("GRAPHWRIGHT_HWDB", str(tmp_path))
    hw = hwdb.lookup("My Board")
    assert (hw.id, hw.clock_mhz, hw.dram_bytes, hw.cores, hw.confidence) == ("my-board", 2800, 8 << 30, 4, "low")
    assert hw.sources[0].title == "the shop's product page"
    assert hwdb.compile_target("my-board").caution
    loader._database.cache_clear()


def test_the_table_has_every_key():
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", table)) >= set(schema.ALL_KEYS)
    first_column = "\n".join(line.split("|")[1] for line in table.splitlines())
    assert set(re.findall(r"`(\w+)`", first_column)) == set(schema.ALL_KEYS)


def test_every_kind_of_source_is_named():
    for kind in schema.SOURCE_KINDS:
        assert f"`{kind}`" in PAGE
