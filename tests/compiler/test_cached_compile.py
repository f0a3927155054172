"""Compiling twice: the second time comes from the cache, and nothing but the same model does."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright.compiler import assemble


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every build from now on."""
    calls: list[Any] = []
    original = assemble.build

    def build(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(assemble, "build", build)
    return calls


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).eval()


def test_the_same_model_is_built_once(builds: list[Any]) -> None:
    x = torch.randn(2, 6)
    first = graphwright.compile(net(), (x,))
    second = graphwright.compile(net(), (x,))
    assert len(builds) == 1
    assert not first.report().cached
    assert second.report().cached
    assert torch.equal(first(x), second(x))
    # What the passes made of it is made again, when it is asked for.
    torch.testing.assert_close(second.graph(x)[0], second(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", ["weight", "shape", "structure", "constant", "dtype"])
def test_another_model_is_built(change: str, builds: list[Any]) -> None:
    def model(x: torch.Tensor, scale: float, base: nn.Module) -> torch.Tensor:
        return base(x.float()) * scale

    base, x, scale = net(), torch.randn(2, 6), 2.0
    graphwright.compile(lambda x, s: model(x, s, base), (x, scale))
    if change == "weight":
        base[0].weight.data[0, 0] += 1
    elif change == "shape":
        x = torch.randn(3, 6)
    elif change == "structure":
        base = nn.Sequential(*base, nn.ReLU())
    elif change == "constant":
        scale = 3.0
    else:
        x = x.double()
    compiled = graphwright.compile(lambda x, s: model(x, s, base), (x, scale))
    assert len(builds) == 2
    torch.testing.assert_close(compiled(x, scale), model(x, scale, base).detach(), rtol=1e-5, atol=1e-6)


def test_cache_false_leaves_nothing(cache: Path, builds: list[Any]) -> None:
    x = torch.randn(2, 6)
    for _ in range(2):
        compiled = graphwright.compile(net(), (x,), cache=False)
    assert len(builds) == 2
    assert not (cache / "artifacts").exists()
    directory = compiled._directory
    assert directory.exists()
    del compiled
    assert not directory.exists()


def test_an_unwritable_cache_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GRAPHWRIGHT_CACHE", str(tmp_path / "file"))
    x = torch.randn(2, 6)
    with caplog.at_level(logging.WARNING, logger="graphwright"):
        compiled = graphwright.compile(net(), (x,))
    torch.testing.assert_close(compiled(x), net()(x).detach(), rtol=1e-5, atol=1e-6)
    assert any("cache" in r.message for r in caplog.records)


def test_two_processes_compile_the_same_model_at_once() -> None:
    code = (
        "import torch, graphwright; torch.manual_seed(0); x = torch.randn(2, 6);"
        "m = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh()).eval();"
        "print((graphwright.compile(m, (x,))(x) - m(x)).abs().max().item() < 1e-5)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        out, err = process.communicate(timeout=300)
        assert out.strip() == "True", err


@pytest.mark.parametrize("name", ["model", "model.gw"])
def test_a_model_that_is_partly_left_to_pytorch_is_saved_whole(name: str, tmp_path: Path) -> None:
    table = torch.randn(3, 3)

    def model(x: torch.Tensor) -> dict[str, torch.Tensor]:
        inverse = torch.linalg.inv(x.relu() + 3 * torch.eye(3) + table.abs())
        return {"inverse": inverse.sin(), "svd": torch.linalg.svdvals(table * 2)}

    x = torch.randn(3, 3)
    compiled = graphwright.compile(model, (x,))
    assert compiled.report().eager
    loaded = graphwright.load(compiled.save(tmp_path / name))
    for key, expected in model(x).items():
        torch.testing.assert_close(loaded(x)[key], expected, rtol=1e-4, atol=1e-5)


def test_a_loaded_model_is_called_like_the_original(tmp_path: Path) -> None:
    def model(pair: tuple[torch.Tensor, torch.Tensor], *, bias: float, flip: bool = False) -> dict[str, Any]:
        a, b = pair
        return {"sum": a + b + bias, "none": None, "list": [a - b]}

    pair = (torch.randn(3), torch.randn(3))
    compiled = graphwright.compile(model, {"pair": pair, "bias": 0.5})
    loaded = graphwright.load(compiled.save(tmp_path / "model.gw"), threads=1)
    result = loaded(pair=pair, bias=0.5)
    assert torch.equal(result["sum"], pair[0] + pair[1] + 0.5)
    assert result["none"] is None
    assert torch.equal(result["list"][0], pair[0] - pair[1])
    assert loaded.threads == 1
    assert loaded.report().to_dict()["errors"]
    with pytest.raises(graphwright.InputError, match=r"compiled with 0\.5 and called with 0\.7"):
        loaded(pair=pair, bias=0.7)
    with pytest.raises(graphwright.ArtifactError, match="machine code only"):
        loaded.graph  # noqa: B018


def test_another_process_finds_what_this_one_compiled() -> None:
    code = (
        "import torch, graphwright; torch.manual_seed(0); x = torch.randn(2, 6);"
        "m = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh()).eval();"
        "print(graphwright.compile(m, (x,)).report().cached)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    found = []
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found.append(done.stdout.strip())
    assert found == ["False", "True", "True"]


def test_a_loading_process_needs_no_tvm(tmp_path: Path) -> None:
    x = torch.randn(2, 6)
    path = graphwright.compile(net(), (x,)).save(tmp_path / "model.gw")
    code = (
        "import sys, torch, graphwright;"
        f"m = graphwright.load({str(path)!r}); m(torch.ones(2, 6)); print('tvm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_was_not_verified_is_no_substitute(builds: list[Any]) -> None:
    x = torch.randn(2, 6)
    graphwright.compile(net(), (x,), verify=False)
    assert graphwright.compile(net(), (x,)).report().errors
    with pytest.raises(graphwright.InputError, match="is less than PyTorch's own float32 error"):
        graphwright.compile(net(), (x,), tolerance=1e-15)
    assert len(builds) == 3
