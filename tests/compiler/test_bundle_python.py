"""The Python example of a bundle, on this machine: its library is linked for here as it is for a board."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphwright
from graphwright.backends.aot import library
from graphwright.backends.bundle import link
from graphwright.backends.bundle.table import c_source
from graphwright.compiler import bundle, loading
from graphwright.hwdb import detect


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("python")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "BUNDLED", (detect().isa,))
        compiled: Any = graphwright.compile(nn.Linear(5, 3).eval(), (torch.zeros(2, 5),), cache=False)
    directory = compiled._directory
    # What a processor must have is asked on ARM only; here nothing is.
    target = {"id": "here", "isa": "aarch64", "triple": "aarch64-linux-gnu", "features": []}
    described = loading.describe(directory)
    table = bundle.table_of(directory, target, described.plan, described.signature)
    link.library(directory / "model.o", c_source(table), detect().triple, out / "model.so", out)
    shutil.copyfile(directory / "weights.safetensors", out / "weights.safetensors")
    shutil.copyfile(Path(link.__file__).with_name("example.py"), out / "example.py")
    expected = compiled(torch.ones(2, 5))
    np.save(out / "expected.npy", expected.numpy())
    return out


def test_the_example_runs(made: Path) -> None:
    done = subprocess.run([sys.executable, str(made / "example.py")], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("linear: float32[2, 3] [")


def test_its_class_gives_the_numbers_from_several_threads(made: Path) -> None:
    model = runpy.run_path(str(made / "example.py"))["Model"](threads=1)
    expected, found = np.load(made / "expected.npy"), []

    def call() -> None:
        for _ in range(20):
            found.append(model(np.ones((2, 5), np.float32))[0])

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 60
    assert all(np.array_equal(result, expected) for result in found)


def test_its_class_refuses(made: Path, tmp_path: Path) -> None:
    example = runpy.run_path(str(made / "example.py"))
    model = example["Model"]()
    with pytest.raises(ValueError, match=r"float32\(2, 5\) expected, float64\(2, 5\) given"):
        model(np.ones((2, 5)))
    with pytest.raises(ValueError, match="the model has 1 inputs, not 2"):
        model(np.ones((2, 5), np.float32), 0)
    shutil.copyfile(made / "model.so", tmp_path / "model.so")
    with pytest.raises(RuntimeError, match="weights are in a file"):
        example["Model"](tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(RuntimeError, match="5 bytes"):
        example["Model"](tmp_path)
