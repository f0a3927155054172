"""The runtime: where it is found; calls with tensors that are on the GPU already, as run_streams.py makes them."""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import emulator

RUN = Path(__file__).parent / "run_streams.py"

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 only")


@pytest.fixture(scope="module")
def result():
    done = subprocess.run([sys.executable, str(RUN)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_tensors_on_the_gpu_run_on_the_current_stream_and_keep_their_numbers(result):
    assert result["streams"] == [11, 11, 12]
    assert len(result["errors"]) == 5
    assert max(result["errors"]) < 1e-6  # float32 sums in another order


def test_a_call_waits_for_the_stream_of_the_call_before(result):
    """Calls share memory: the second stream waits for the first, and a call from the CPU for the second."""
    assert result["asked"] == [[], ["wait for 11", "synchronize"]]
    assert not result["on_cpu"]  # TVM's own stream


def test_a_tensor_that_wide_loads_do_not_take_is_copied(result):
    assert result["copies"] == 1


def test_tensors_on_two_devices_and_on_another_gpu_are_refused(result):
    mixed, other = result["refused"]
    assert "some inputs are on the CPU and some on the GPU" in mixed
    assert "cuda:1" in other
    assert 'x.to("cuda:0")' in other


def test_what_was_recorded_outlives_the_thread_of_the_first_call(result):
    assert result["ended"] < 1e-6  # float32 sums in another order


def test_the_benchmark_for_gpus_runs_and_checks_its_results(result):
    (eager, _, exact), (ours, no_events, error) = result["benchmark"]
    assert (eager, ours, no_events) == ("eager on the CPU", "graphwright", None)
    assert max(error, exact) < 1e-6  # float32 against float64


def test_a_result_of_nan_ends_the_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(gpu.zoo, "build", lambda name, batch: (nn.Linear(2, 2), (torch.ones(1, 2),)))
    monkeypatch.setattr(gpu.graphwright, "compile", lambda *args, **options: lambda x: x * math.nan)
    monkeypatch.setattr(gpu, "CALLS", 1)
    with pytest.raises(SystemExit, match="graphwright is wrong by nan"):
        gpu.measured("small", "a100", 1, "fp32")


# TVM does not load its runtime by itself, as on a machine without CUDA's toolkit; this one may have it.
NOT_FOUND = {"TVM_DEVICE_BACKEND_AUTOLOAD": "0"}
ABSENCE = """
from graphwright.backends.gpu.device_library import absence
from graphwright.hwdb import lookup
print(absence(lookup("a100")))
"""


@pytest.mark.parametrize("driver", [True, False], ids=["with the driver", "without"])
def test_the_cuda_runtime_that_pip_installs_is_found(driver, tmp_path):
    """It lies where the loader does not look. What nvidia-cuda-runtime installs is the emulator's here."""
    package, system = tmp_path / "nvidia" / "cu13" / "lib", tmp_path / "system"
    package.mkdir(parents=True)
    (tmp_path / "nvidia" / "__init__.py").touch()  # in front of the one that is installed
    system.mkdir()
    emulator.build_driver("libcudart.so.13", package)
    if driver:
        emulator.build_driver("libcuda.so.1", system)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", ABSENCE],
        env={**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": str(system), **NOT_FOUND},
        capture_output=True,
        text=True,
        check=True,
    )
    if driver:
        assert done.stdout == "None\n"
    else:
        assert "needs libcuda.so.1 (NVIDIA's driver) and libcudart.so.13 (CUDA's toolkit" in done.stdout
