"""What explain says, and its page: self-contained, right about what became of what, and shown by a real browser."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rewriting import HW, trace
from torch import fx, nn
from typer.testing import CliRunner

from graphwright.compiler.cli import app
from graphwright.compiler.explaining.explain import Explanation, explained
from graphwright.compiler.explaining.graph_drawing import GAP, HEIGHT, LONGEST, draw
from graphwright.compiler.explaining.trail import Trail
from graphwright.compiler.pipeline import run
from graphwright.passes.default import PASSES
from graphwright.passes.fuse_conv_activation import fuse_conv_activation
from graphwright.passes.fuse_reshape_transpose import fuse_reshape_transpose
from graphwright.passes.remove_dead import remove_dead

NASTY = "</script><script>alert('x')</script> \"&amp;<b>\u2028"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(self.conv(x)))
        z = y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return (z * 3.0).exp() + z.sum()  # a source line with </script><script>document.title = "taken"</script>


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    return explained(Net().eval(), torch.randn(1, 3, 8, 8))


@pytest.fixture(scope="module")
def page(explanation: Explanation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "explained.html"
    path.write_text(explanation.html(f"model {NASTY}"), encoding="utf-8")
    return path


def test_the_text_has_every_part(explanation: Explanation) -> None:
    text = explanation.text()
    for part in ("captured:", "after fold_batch_norm:", "passes:", "refused:", "kernels:", "decisions:"):
        assert f"\n{part}" in text, part
    assert re.search(r"copies: 2 nodes that only move elements \(2\.3 KB\) as captured, [012] \(", text)
    assert re.search(
        r"predicted by the cost model, not measured: [\d.]+ us in \d+ kernels.*; with kernel_fusion=\['layout'\] ", text
    )


def test_fewer_fusions_are_explained_as_such() -> None:
    found = explained(Net().eval(), torch.randn(1, 3, 8, 8), kernel_fusion=["layout"])
    assert "fusions: layout, as kernel_fusion chose" in found.text()
    assert found.costs[0] == found.costs[1]
    found = explained(Net().eval(), torch.randn(1, 3, 8, 8), kernel_fusion=[])
    assert "fusions: none, as kernel_fusion chose" in found.text()
    assert "fold_batch_norm" not in {name for name, _ in found.steps}
    mine = explained(nn.ReLU(), torch.ones(2), passes=[remove_dead])
    assert [p.name for p in mine.report.passes] == ["remove_dead"]


# What became of what.


def trail_of(model: Any, inputs: list[torch.Tensor], passes: Any) -> tuple[fx.GraphModule, dict[str, Any]]:
    trail = Trail()
    rewritten, _ = run(trace(model, inputs), HW, passes, trail.after, before=trail.begin)
    return rewritten, {n: trail.by_name()[n.name] for n in rewritten.graph.nodes if n.op == "call_function"}


def test_a_fused_node_stands_for_all_it_took_up() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).eval()
    _, found = trail_of(net, [torch.randn(1, 3, 8, 8)], [fuse_conv_activation])
    assert [(made, [o.rstrip("_0123456789") for o in origins]) for made, origins in found.values()] == [
        ("fuse_conv_activation", ["conv2d", "relu"]),
        ("", ["reshape_default"]),
    ]


def test_what_is_dropped_is_what_its_readers_read_instead() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x.exp(), 0.5, False).sin()

    _, found = trail_of(model, [torch.ones(3)], [remove_dead])
    (exp, stands_for), (sin, (_, itself)) = [(str(n.target), origins) for n, origins in found.items()]
    assert (exp, sin, itself) == ("aten.exp.default", "aten.sin.default", ["sin"])
    assert len(stands_for[1]) == 2
    assert "exp" in stands_for[1]


def test_a_node_in_the_midst_of_what_is_new_stands_for_the_same() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return F.relu(F.conv1d(x, torch.ones(2, 3, 1)))

    _, found = trail_of(model, [torch.randn(1, 3, 8)], [fuse_conv_activation, fuse_reshape_transpose])
    by_operator = {str(n.target): set(origins) for n, (_, origins) in found.items()}
    assert by_operator["graphwright.conv2d.default"] >= {"conv1d", "relu"}


def test_a_node_that_was_moved_stands_for_itself() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.SiLU()).eval()
    _, found = trail_of(net, [torch.randn(1, 3, 8, 8)], PASSES)
    by_operator = {str(n.target).split(".")[1]: (made, origins) for n, (made, origins) in found.items()}
    made, origins = by_operator["max_pool2d"]  # in NHWC now
    assert made == "assign_layout"
    assert [o for o in origins if "pool" in o] == origins != []


def test_every_captured_node_is_accounted_for_or_gone() -> None:
    trail = Trail()
    graph = trace(Net().eval(), [torch.randn(1, 3, 8, 8)])
    names = {n.name for n in graph.graph.nodes}
    run(graph, HW, PASSES, trail.after, before=trail.begin)
    kept = set().union(*(set(origins) for _, origins in trail.by_name().values()))
    assert kept <= names
    assert {n for n in names if "conv2d" in n or "relu" in n or "exp" in n} <= kept


# The drawing.

edges_of = st.integers(1, 60).flatmap(
    lambda count: st.tuples(
        st.just(count),
        st.lists(st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)), max_size=120).map(
            lambda pairs: sorted({(min(p), max(p)) for p in pairs if p[0] != p[1]})
        ),
    )
)


@settings(max_examples=80, deadline=None)
@given(edges_of, st.floats(10, 200))
def test_boxes_do_not_overlap_and_lines_go_down(case: Any, width: float) -> None:
    count, edges = case
    widths = [width + 3 * (i % 5) for i in range(count)]
    drawing = draw(widths, edges)
    assert len(drawing.lines) + len(drawing.far) == len(edges)
    for a, b, points in drawing.lines:
        assert points[0] == (drawing.places[a][0], drawing.places[a][1] + HEIGHT)
        assert points[-1] == drawing.places[b]
        assert all(above[1] < below[1] for above, below in itertools.pairwise(points))
    rows: dict[float, list[int]] = {}
    for i, (x, y) in enumerate(drawing.places):
        assert widths[i] / 2 <= x <= drawing.width - widths[i] / 2
        assert 0 <= y <= drawing.height - HEIGHT
        rows.setdefault(y, []).append(i)
    for row in rows.values():
        row.sort(key=lambda i: drawing.places[i][0])
        for i, j in itertools.pairwise(row):
            assert drawing.places[j][0] - drawing.places[i][0] >= (widths[i] + widths[j]) / 2 + GAP - 0.2


def test_a_line_over_very_many_layers_is_written_instead() -> None:
    count = LONGEST + 2
    drawing = draw([50.0] * count, [*itertools.pairwise(range(count)), (0, count - 1)])
    assert drawing.far == [(0, count - 1)]


def test_an_operand_without_operands_lies_just_above_its_reader() -> None:
    drawing = draw([50.0] * 5, [(0, 2), (2, 3), (3, 4), (1, 4)])
    assert drawing.places[1][1] == drawing.places[3][1]


# The page.


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else_and_escapes_everything(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parser = Tags()
    parser.feed(text)
    assert not [a for _, a in parser.tags if {"src", "href", "onclick", "onload"} & a.keys()]
    assert [t for t, _ in parser.tags if t in ("link", "img", "iframe", "object")] == []
    assert [t for t, _ in parser.tags].count("script") == 2
    assert "default-src 'none'" in text
    assert "<script>alert" not in text
    assert "<script>document.title" not in text
    assert "document.title" in text  # the source line is there, as data


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_and_searches_it(page: Path, tmp_path: Path) -> None:
    text = browser(tmp_path, "--dump-dom", f"{page.as_uri()}#aten.exp")
    assert 'data-ready="yes"' in text
    assert re.search(r'<span id="hits">1 before, 1 after</span>', text)
    assert len(re.findall(r'class="node [^"]*\bpinned\b', text)) == 1
    assert len(re.findall(r'class="node [^"]*\bkin\b', text)) == 1  # on the other side
    assert "aten.exp.default" in text.split('id="details"')[1].split("</dl>")[0]
    title = re.search("<title>(.*?)</title>", text, re.S)
    assert title is not None
    assert title[1].startswith("model &lt;/script&gt;")
    shot = tmp_path / "shot.png"
    browser(tmp_path, f"--screenshot={shot}", "--window-size=1400,900", page.as_uri())
    assert shot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert shot.stat().st_size > 20_000  # an empty page of this size takes 6,000


def browser(home: Path, *arguments: str) -> str:
    """What chromium prints, started with nothing of the user's and without a network."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--user-data-dir={home}/profile",
    ]
    done = subprocess.run([CHROMIUM, *flags, *arguments], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_the_command_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "few.py").write_text("import torch\ndef make():\n    return torch.nn.ReLU(), (torch.ones(2, 3),)\n")
    monkeypatch.chdir(tmp_path)
    options = ["--html", "out.html", "--kernel-fusion", "conv+relu, matmul+bias"]
    result = CliRunner().invoke(app, ["explain", "few:make", *options])
    assert result.exit_code == 0, result.output
    assert "wrote out.html" in result.output
    assert "predicted by the cost model" in result.output
    assert "fusions: conv+relu, matmul+bias" in (tmp_path / "out.html").read_text()
    wrong = CliRunner().invoke(app, ["explain", "few:make", "--kernel-fusion", "conv+rleu"])
    assert wrong.exit_code == 1
    assert "did you mean 'conv+relu'" in wrong.output
