"""compile(passes=[...], kernel_fusion=[...]): what runs, what is refused, what the cache knows of it."""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewriting import HW, check_values, trace
from torch import fx, nn

import graphwright
from graphwright.compiler.pipeline import run
from graphwright.compiler.reference import run_eager
from graphwright.compiler.selection import identities, select
from graphwright.compiler.verify import compare, reference
from graphwright.errors import InputError, PassError
from graphwright.passes import dialect, families
from graphwright.passes.default import FAMILIES, PASSES
from graphwright.passes.remove_dead import remove_dead


class Everything(nn.Module):
    """A little of all that families are about."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.same = nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.query, self.key, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(self.first(F.pad(x, (1, 1, 1, 1)))))
        y = y + F.relu6(self.deep(y)) + self.same(y) * self.scale
        y = F.relu(self.up(y) + 1.0)[:, :, :4, :4]
        tokens = y.flatten(2).transpose(1, 2)
        q, k = (f(tokens).view(1, 16, 2, 4).transpose(1, 2) for f in (self.query, self.key))
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        z = self.out((weights @ k).transpose(1, 2).reshape(1, 16, 8)) + tokens
        return z * torch.sigmoid(z)


IMAGE = torch.randn(1, 3, 8, 8)


@pytest.fixture(scope="module")
def graph() -> fx.GraphModule:
    return trace(Everything().eval(), [IMAGE])


SUBSETS = [[], *([name] for name in FAMILIES), *([n for n in FAMILIES if n != name] for name in FAMILIES)]


@pytest.mark.parametrize("names", SUBSETS, ids=lambda names: ",".join(names) if len(names) < 2 else f"{len(names)}")
def test_any_subset_keeps_the_numbers_and_reaches_its_fixpoint(graph: fx.GraphModule, names: list[str]) -> None:
    passes, chosen = select(None, names)
    families.restrict(graph, chosen)
    rewritten, runs = run(graph, HW, passes)
    assert not any(r.unfinished for r in runs)
    check_values(rewritten, [IMAGE])
    assert compare(run_eager(rewritten, [IMAGE]), reference(graph, [IMAGE]), None) is None
    assert [r.name for r in run(rewritten, HW, passes)[1] if r.rewrites] == []


def arguments_of(graph: fx.GraphModule, names: list[str] | None, *operators: Any) -> list[dict[str, Any]]:
    passes, chosen = select(None, names)
    families.restrict(graph, chosen)
    rewritten, _ = run(graph, HW, passes)
    return [
        {a.name: v for a, v in itertools.zip_longest(n.target._schema.arguments, n.args)}
        for n in rewritten.graph.nodes
        if n.target in operators
    ]


def test_families_decide_what_products_take_up(graph: fx.GraphModule) -> None:
    products = (dialect.conv2d, dialect.conv_transpose2d, dialect.linear, dialect.matmul)
    assert all(a["residual"] is None and a["activation"] == "none" for a in arguments_of(graph, [], *products))
    convolutions = arguments_of(graph, ["conv+relu"], dialect.conv2d, dialect.conv_transpose2d)
    assert {a["activation"] for a in convolutions} == {"none", "relu6"}  # batch norm and padding stand between others
    assert all(a["residual"] is None for a in convolutions)
    products = arguments_of(graph, ["matmul+add"], dialect.linear, dialect.matmul)
    assert [a["residual"] is not None for a in products].count(True) == 1
    transposed = arguments_of(graph, ["matmul+transpose"], dialect.matmul)
    assert any(a["transpose_b"] for a in transposed)
    assert not any(a["transpose_b"] for a in arguments_of(graph, [], dialect.matmul))


@pytest.mark.parametrize("names", [[], ["conv+relu", "matmul+bias"]], ids=["none", "two"])
def test_compiled_with_few_fusions(names: list[str]) -> None:
    compiled = graphwright.compile(Everything().eval(), (IMAGE,), kernel_fusion=names, cache=False)
    assert compiled.report().fusions == tuple(sorted(names))
    assert "fold_batch_norm" not in {p.name for p in compiled.report().passes}
    assert not compiled.report().eager


def test_names_that_are_no_family() -> None:
    with pytest.raises(
        InputError, match=r"kernel_fusion names 'conv\+rleu', .*did you mean 'conv\+relu'.*there are conv"
    ):
        select(None, ["conv+rleu"])
    with pytest.raises(InputError, match=r"kernel_fusion is a list such as .*, got 'conv\+relu'"):
        select(None, "conv+relu")
    with pytest.raises(InputError, match="kernel_fusion names 3"):
        graphwright.compile(nn.ReLU(), (IMAGE,), kernel_fusion=[3])  # type: ignore[list-item]


def test_families_leave_passes_out_of_the_users_list_too() -> None:
    (kept,) = FAMILIES["scale"].passes
    (gone,) = FAMILIES["conv+bn"].passes
    assert select([kept, remove_dead, gone], ["scale"])[0] == (kept, remove_dead)


def test_every_pass_of_a_family_is_a_default_one() -> None:
    assert all(p in PASSES for family in FAMILIES.values() for p in family.passes)


def test_without_any_pass_the_model_still_compiles() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    compiled = graphwright.compile(net, (IMAGE,), passes=[], cache=False)
    torch.testing.assert_close(compiled(IMAGE), net(IMAGE).detach(), rtol=1e-5, atol=1e-5)
    assert compiled.report().passes == ()


PASS = '''
def halve(graph, hw):
    """Does nothing yet."""
    return {value}
'''


def loaded(path: Path, value: int) -> Any:
    """The pass of a module that a user wrote to a file."""
    path.write_text(PASS.format(value=value))
    names: dict[str, Any] = {"__name__": "users_passes"}
    exec(compile(path.read_text(), str(path), "exec"), names)
    return names["halve"]


def test_the_cache_tells_a_users_passes_by_their_source(tmp_path: Path) -> None:
    path = tmp_path / "users_passes.py"
    first, reason = identities([remove_dead, loaded(path, 0)])
    assert reason is None
    assert first[0] == "graphwright.passes.remove_dead.remove_dead"
    assert first[1].startswith("users_passes.halve ")
    old = loaded(path, 0)
    assert identities([old])[0] == first[1:]
    edited = loaded(path, 1)
    assert identities([edited])[0] != first[1:]
    # The file is new, the code that runs is not.
    assert identities([old])[0] not in (first[1:], identities([edited])[0])


def test_what_has_no_source_is_not_cached(caplog: pytest.LogCaptureFixture, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path))
    names: dict[str, Any] = {}
    exec("def typed(graph, hw):\n    return 0", names)
    limit = 3

    def closes(graph: fx.GraphModule, hw: Any) -> int:
        return 0 * limit

    for one, reason in (
        (names["typed"], "has no source file"),
        (closes, "holds values besides its source"),
        (nn.Identity(), "is not a plain function"),
    ):
        assert reason in str(identities([one])[1])
    with caplog.at_level(logging.WARNING):
        graphwright.compile(nn.ReLU(), (IMAGE,), passes=[names["typed"]])
        again = graphwright.compile(nn.ReLU(), (IMAGE,), passes=[names["typed"]])
    assert "the result is not cached: pass typed has no source file" in caplog.text
    assert not again.report().cached


def test_passes_and_fusions_are_part_of_the_cache_key(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path))
    for options in ({}, {"passes": [remove_dead]}, {"kernel_fusion": []}, {"kernel_fusion": ["scale"]}):
        assert not graphwright.compile(nn.ReLU(), (IMAGE,), **options).report().cached
        assert graphwright.compile(nn.ReLU(), (IMAGE,), **options).report().cached


def test_through_torch_compile() -> None:
    seen: list[int] = []

    def count(graph: fx.GraphModule, hw: Any) -> int:
        seen.append(len(graph.graph.nodes))
        return 0

    torch._dynamo.reset()
    options = {"passes": [*PASSES, count], "kernel_fusion": ["matmul+relu"], "cache": False}
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    x = torch.randn(2, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, backend="graphwright", options=options)(x), net(x))
    assert seen
    with pytest.raises(Exception, match=r"did you mean 'matmul\+relu'"):
        torch.compile(net, backend="graphwright", options={"kernel_fusion": ["matmul+rleu"]})(x)
    with pytest.raises(Exception, match=r"passes\[0\] is 3, which is not callable"):
        torch.compile(net, backend="graphwright", options={"passes": [3]})(x)
    torch._dynamo.reset()


def test_a_bad_pass_is_refused_before_anything_is_compiled() -> None:
    with pytest.raises(PassError, match=r"passes\[0\] is None, which is not callable"):
        graphwright.compile(nn.ReLU(), passes=[None])  # type: ignore[list-item]


def test_what_a_pass_imports_tells_it_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "far_helper.py").write_text("LIMIT = 1\n")
    (tmp_path / "near_helper.py").write_text(
        "import json\n\ndef limit():\n    import far_helper\n    return far_helper.LIMIT\n"
    )
    own = tmp_path / "own_pass.py"
    own.write_text("from near_helper import limit\n\ndef own(graph, hw):\n    return 0 * limit()\n")
    past = time.time() - 3600
    for name in ("far_helper.py", "near_helper.py"):
        os.utime(tmp_path / name, (past, past))
    rewrite = importlib.import_module("own_pass").own
    (before,), reason = identities([rewrite])
    assert reason is None
    assert identities([rewrite])[0] == [before]

    (tmp_path / "far_helper.py").write_text("LIMIT = 2\n")
    assert "far_helper, whose file was changed while Python ran" in str(identities([rewrite])[1])
    os.utime(tmp_path / "far_helper.py", (past, past))
    assert identities([rewrite])[0] != [before]
