"""Compiling for machines of the database: uncertain ones, described ones, and those no code is made for."""

from __future__ import annotations

import pytest
import torch

import graphwright
from graphwright import hwdb
from graphwright.compiler.explaining.explain import explain
from graphwright.errors import UnknownTarget
from graphwright.hwdb import loader


@pytest.fixture
def guess(monkeypatch):
    """A machine whose facts are uncertain, forgotten after the test."""
    monkeypatch.setattr(loader, "_registered", {})
    yield hwdb.register("guess", extends="zen3", confidence="low", cores=8)
    loader._database.cache_clear()


@pytest.fixture
def linear():
    return torch.nn.Linear(8, 4).eval(), torch.randn(2, 8)


def test_the_report_says_that_facts_are_uncertain(guess, linear):
    said = "the facts of guess are uncertain (confidence low): compiled for caches as any x86-64 has them"
    compiled = graphwright.compile(*linear, target="guess", cache=False)
    assert said in compiled.report().text()
    assert compiled.report().to_dict()["caution"] == said
    assert said in explain(*linear, target="guess")
    assert "uncertain" not in graphwright.compile(*linear, target="zen3", cache=False).report().text()


def test_targets_as_tvm_describes_them(linear):
    target = {"kind": "llvm", "mtriple": "aarch64-unknown-linux-gnu", "mcpu": "cortex-a76", "num-cores": 2}
    assert graphwright.compile(*linear, target=target, cache=False).report().target == "cortex-a76"
    native = graphwright.compile(*linear, target=hwdb.detect(), cache=False)
    torch.testing.assert_close(native(linear[1]), linear[0](linear[1]), rtol=1e-5, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("name", ["arc-a770", "apple-m1-gpu", "hailo-8", "tpu-v5e"])
def test_planning_targets_are_refused_in_one_sentence(name, linear):
    for use in (graphwright.compile, explain):
        with pytest.raises(UnknownTarget, match=r"cannot compile for .*(CUDA and ROCm|planning)"):
            use(*linear, target=name)
