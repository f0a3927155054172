"""The page of damage by 8 bits, read as a browser does: rows in their order, names of layers, reasons."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import pytest

from graphwright.compiler.report import Report
from graphwright.passes.assign_precision import Choice


class Page(HTMLParser):
    """What a page shows: the bars of the plot from top to bottom, and the rows of its table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.bars: list[dict[str, str]] = []
        self.rows: list[list[str]] = []
        self.tags: list[str] = []
        self.headings: list[str] = []
        self.fetched: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.append(tag)
        self.fetched += [str(known[name]) for name in ("src", "href") if name in known]
        if tag == "g":
            self.bars.append({})
        if tag == "rect":
            self.bars[-1] |= {"class": str(known["class"]), "width": str(known["width"]), "y": str(known["y"])}
        if tag == "tr":
            self.rows.append([])
        self._in = tag

    def handle_data(self, data: str) -> None:
        if self._in == "title" and self.bars:
            self.bars[-1]["title"] = self.bars[-1].get("title", "") + data.strip()
        elif self._in == "text" and self.bars and data.strip():
            self.bars[-1].setdefault("name", data.strip())
            self.bars[-1]["label"] = data.strip()
        elif self._in == "td" and data.strip():
            self.rows[-1].append(data)
        elif self._in in ("h1", "h2") and data.strip():
            self.headings.append(data.strip())


def product(name: str, sqnr: float | None, dtype: str = "int8", reason: str = "dot products") -> Choice:
    return Choice(name, "graphwright.conv2d", dtype, reason, sqnr_db=sqnr)


def page(*choices: Choice, title: str = "resnet") -> Page:
    return Page(Report("zen4", "int8", 2, (), precisions=choices, notes=("ranges by kl",)).damage_page(title))


def test_rows_are_ranked_by_damage() -> None:
    shown = page(product("stem", 38.5), product("layer4_conv2", 12.25), product("fc", 25.0))
    assert [bar["name"] for bar in shown.bars] == ["layer4_conv2", "fc", "stem"]
    assert [bar["label"] for bar in shown.bars] == ["12.2", "25.0", "38.5"]
    widths = [float(bar["width"]) for bar in shown.bars]
    assert widths == sorted(widths)
    assert widths[1] == pytest.approx(widths[0] * 25.0 / 12.25, rel=1e-2)  # the plot is to scale
    tops = [float(bar["y"]) for bar in shown.bars]
    assert tops == sorted(set(tops))
    assert [bar["class"] for bar in shown.bars] == ["low", "bar", "bar"]  # below 20 dB is worth a look


def test_what_stays_float32_has_its_reason() -> None:
    shown = page(product("a", 30.0), product("b", None, "float32", "gains nothing"))
    assert [bar["name"] for bar in shown.bars] == ["a"]
    assert [row for row in shown.rows if row] == [["graphwright.conv2d", "b", "gains nothing"]]


def test_what_went_back_to_float32_is_marked() -> None:
    reason = "it costs more accuracy than the tolerance leaves"
    shown = page(product("a", 30.0), product("b", 10.0, "float32", reason))
    assert [(bar["name"], bar["class"]) for bar in shown.bars] == [("b", "back"), ("a", "bar")]
    assert reason in shown.bars[0]["title"]
    assert [row[1] for row in shown.rows if row] == ["b"]


def test_products_without_noise_are_as_long_as_the_longest() -> None:
    shown = page(product("exact", math.inf), product("noisy", 60.0), product("lost", -math.inf))
    assert [bar["name"] for bar in shown.bars] == ["lost", "noisy", "exact"]
    assert float(shown.bars[0]["width"]) == 0.0
    assert shown.bars[1]["width"] == shown.bars[2]["width"]


def test_names_are_text_and_nothing_is_fetched() -> None:
    shown = page(product("<script>alert(1)</script>", 30.0), title="<img src=x>")
    assert "script" not in shown.tags
    assert "img" not in shown.tags
    assert shown.bars[0]["name"] == "<script>alert(1)</script>"
    assert any("<img src=x>" in heading for heading in shown.headings)
    assert shown.fetched == []


def test_a_model_without_products_in_8_bits_says_so() -> None:
    shown = page(product("b", None, "float32", "no dot product of bytes"))
    assert shown.bars == []
    assert "svg" not in shown.tags
    assert "rect" not in shown.tags
