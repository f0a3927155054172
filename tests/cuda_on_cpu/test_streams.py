"""Calls with tensors that are on the GPU already: where they run, and what waits for what. run_streams.py says how."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parent / "run_streams.py"

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 only")


@pytest.fixture(scope="module")
def result():
    done = subprocess.run([sys.executable, str(RUN)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_tensors_on_the_gpu_run_on_the_current_stream_and_keep_their_numbers(result):
    assert result["streams"] == [11, 11, 12]
    assert len(result["errors"]) == 4
    assert max(result["errors"]) < 1e-6  # float32 sums in another order


def test_a_call_waits_for_the_stream_of_the_call_before(result):
    """Calls share memory: the second stream waits for the first, and a call from the CPU for the second."""
    assert result["asked"] == [[], ["wait for 11", "synchronize"]]
    assert not result["on_cpu"]  # TVM's own stream


def test_tensors_on_two_devices_and_on_another_gpu_are_refused(result):
    mixed, other = result["refused"]
    assert "some inputs are on the CPU and some on the GPU" in mixed
    assert "cuda:1" in other
    assert 'x.to("cuda:0")' in other
