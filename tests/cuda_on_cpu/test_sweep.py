"""PyTorch's own operator samples on the emulated GPU: a fixed few of them; `sweep.py` runs all (hours)."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SWEEP = Path(__file__).with_name("sweep.py")
# Families that TVM's rules take in different ways, and those that were wrong or refused once.
OPERATORS = (
    "any block_diag diff div_floor_rounding gather index_select nn_functional_conv_transpose2d "
    "nn_functional_interpolate_bilinear nn_functional_pad_reflect roll slice_scatter sort special_bessel_j0"
)

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks on x86-64 only")


@pytest.mark.slow
def test_samples_agree_in_both_orders_of_lanes_in_every_dtype(tmp_path):
    out = tmp_path / "records.json"
    names = OPERATORS.split()
    command = [sys.executable, str(SWEEP), "--samples", "2", "--narrow", "1", "--json", str(out)]
    done = subprocess.run([*command, "--ops", ",".join(names)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(out.read_text())["records"]
    assert {record["operator"] for record in records} == set(names)
    assert {record["status"] for record in records} <= {"agrees", "alike", "refused"}
    refused = [(record["operator"], record["dtype"]) for record in records if record["status"] == "refused"]
    assert len(refused) <= 3, refused  # integers where the operator has no definition
    assert not [name for name, dtype in refused if dtype.startswith(("float", "bfloat"))]
    for dtype in ("float32", "bfloat16", "int64", "bool"):
        assert sum(record["dtype"] == dtype for record in records) >= 8
