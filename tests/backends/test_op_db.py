"""PyTorch's own operator samples: a fixed few of them compile and agree; benchmarks/op_sweep.py runs all (minutes)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# One or two of every family of definitions, the ones TVM's importer gets wrong among them (select, selu, any, argmin).
COMPILED = (
    "any argmin cumsum div_floor_rounding gather grid_sampler_2d index_select isclose "
    "linalg_vector_norm logsumexp masked_softmax nn_functional_avg_pool2d nn_functional_conv2d "
    "nn_functional_interpolate_bilinear nn_functional_layer_norm nn_functional_scaled_dot_product_attention "
    "nn_functional_selu scatter_add select sort std topk where"
)
LEFT = "linalg_svd randn"


def test_quick_sweep(tmp_path: Path) -> None:
    names = [*COMPILED.split(), *LEFT.split()]
    out = tmp_path / "records.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "op_sweep.py"), "--samples", "1", "--json", str(out)]
    run = subprocess.run([*command, "--ops", ",".join(names)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    status = {record["operator"]: record["status"] for record in json.loads(out.read_text())["operators"]}
    expected = {**dict.fromkeys(COMPILED.split(), "compiled"), **dict.fromkeys(LEFT.split(), "eager")}
    assert status == expected
