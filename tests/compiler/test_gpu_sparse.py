"""Weights that are 2 of 4 on GPUs: machine code for sparse matrix units, or the reason why not. No GPU is needed."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
from torch import nn

import graphwright
from graphwright.backends.gpu import instructions
from graphwright.backends.gpu.launches import Description
from graphwright.backends.gpu.matrix_tile import Product
from graphwright.backends.gpu.sparse_weights import weight_tile


def half_zero(weight: torch.Tensor) -> None:
    """Zero the two smallest of every four."""
    groups = weight.data.view(-1, 4)
    groups[torch.arange(len(groups))[:, None], groups.abs().argsort(1)[:, :2]] = 0


def test_2_of_4_weights_are_multiplied_on_sparse_matrix_units_where_that_pays(tmp_path):
    if (tool := instructions.nvidia_disassembler()) is None:
        pytest.skip("no disassembler: pip install nvidia-cuda-nvdisasm")
    torch.manual_seed(0)
    linear = nn.Linear(64, 512).eval()
    half_zero(linear.weight)
    compiled = graphwright.compile(linear, (torch.randn(2048, 64),), target="a100", precision="fp16", cache=False)
    (kernel,) = compiled.report().kernels
    assert kernel.algorithm == "float16 sparse tiled product"
    assert "0.85 of the cycles of dense weights" in kernel.choice
    assert "none spilled" in kernel.choice
    compiled.save(tmp_path / "out")
    image = (tmp_path / "out" / Description.read(tmp_path / "out" / "device.json").image).read_bytes()
    (tmp_path / "cubin").write_bytes(image[image.index(b"\x7fELF") :])
    text = subprocess.run([str(tool), "-c", str(tmp_path / "cubin")], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\bHMMA\S+", text)
    assert found
    assert set(found) == {"HMMA.SP.16832.F32"}


@pytest.mark.parametrize(
    ("target", "rows", "shape", "said"),
    [
        ("a100", 2048, (512, 64), "predicted to take 0.85 of the cycles of dense weights"),
        ("a100", 64, (512, 64), "multiplied as dense ones: without the zeros predicted to take 1.00 of the cycles"),
        ("a100", 2048, (512, 64, 3, 3), "multiplied as dense ones: windows of more than a pixel"),
        ("mi300x", 2048, (512, 64), "multiplied as dense ones: no kernel for them on this device"),
        ("sm_75", 2048, (512, 64), "multiplied as dense ones: no kernel for them on this device"),
    ],
)
def test_the_report_says_why_2_of_4_weights_are_multiplied_as_dense_ones(target, rows, shape, said):
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape).relu() + 1)
    graph = torch.fx.Graph()
    weight = graph.get_attr("weight")
    owner = torch.fx.GraphModule(module, graph)
    hw, product = graphwright.hwdb.lookup(target), Product(1, rows, 512, 64, "float16")
    assert weight_tile(hw, product, weight).note == ""
    half_zero(owner.weight)
    tile = weight_tile(hw, product, weight)
    assert said in tile.note
    assert tile.sparse == ("dense ones" not in said)
    owner.weight.data[0] = 1
    assert weight_tile(hw, product, weight).note.endswith(" % of the weights zero, not 2 of 4")
