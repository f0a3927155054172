"""int8={"activation": "dynamic"}: inputs of linear layers rounded row by row at run time, without calibration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright.errors import InputError
from graphwright.hwdb import detect

VNNI = detect().vector_dot_product("int8") == "vnni"
pytestmark = pytest.mark.skipif(not VNNI, reason="this machine has no dot product of bytes")
DYNAMIC = {"activation": "dynamic"}


def block() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)).eval()


def rows() -> torch.Tensor:
    return torch.randn(128, 256, generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    int8 = {**DYNAMIC, **options.pop("int8", {})}
    return graphwright.compile(model, x, precision="int8", cache=False, int8=int8, **options)


def forms(report: Any) -> list[str]:
    return [c.form for c in report.precisions if "linear" in c.operator or "conv2d" in c.operator]


def test_no_calibration_is_needed() -> None:
    model, x = block(), rows()
    result = compiled(model, x)
    report = result.report()
    assert forms(report) == ["int8 dynamic", "int8 dynamic"], report.text()
    assert sum("rows rounded at run time" in k.algorithm for k in report.kernels) == 2
    assert 1e-3 < report.errors[0].relative_l2 < 3e-2
    # Norm and GELU differ in the last bit, and at a tie a value of the second layer's input by a step.
    torch.testing.assert_close(result.graph(x)[0], result(x), rtol=1e-4, atol=2e-3)
    assert report.weights_bytes < 0.3 * graphwright.compile(model, x, cache=False).report().weights_bytes


def test_large_rows_keep_their_steps() -> None:
    """One row a thousand times as large as the others leaves those no step of one static scale."""
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.ReLU(), nn.Linear(512, 256, bias=False)).eval()
    x = rows()
    x[5] *= 1e3
    others = torch.arange(128) != 5
    with torch.no_grad():
        expected = model(x)[others]
    found = {}
    for activation in ("dynamic", "minmax"):
        made = graphwright.quantize(model, [x], activation=activation, tolerance=0.5)
        assert any(c.form.startswith("int8") for c in made.report().precisions)
        found[activation] = float((made(x)[others] - expected).norm() / expected.norm())
    assert found["dynamic"] < 0.03
    assert found["minmax"] > 10 * found["dynamic"]


def test_quantize_gives_the_same_numbers_and_compiles() -> None:
    model, x = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).eval(), rows()
    made = graphwright.quantize(model, [x, 2 * x], **DYNAMIC)
    assert {c.form for c in made.report().precisions if "linear" in c.operator} == {"int8 dynamic"}
    assert all(choice.sqnr_db > 30 for choice in made.report().damage())
    assert torch.equal(graphwright.compile(made, x, cache=False)(x), made(x))
    x[3, 7] = torch.nan
    again = graphwright.compile(made, rows(), cache=False)(x)
    assert again[3].isnan().all()
    assert torch.equal(again.isnan(), made(x).isnan())


def test_convolutions_round_image_by_image() -> None:
    """A quiet image beside loud ones keeps its steps, and machine code gives the bits of PyTorch's integers."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(2), nn.Linear(256, 512))
    model, x = nn.Sequential(*layers).eval(), torch.randn(3, 64, 32, 32)
    x[1] *= 1e-3
    with torch.no_grad():
        model[0].bias.zero_()
        model[3].bias.zero_()
        expected = model(x)
    result = compiled(model, x)
    assert forms(result.report()) == ["int8 dynamic", "int8 dynamic"], result.report().text()
    assert any("images rounded at run time" in k.algorithm for k in result.report().kernels)
    assert float((result(x) - expected)[1].norm() / expected[1].norm()) < 0.03
    assert torch.equal(result.graph(x)[0], result(x))


def test_depthwise_convolutions_stay_static_and_need_calibration() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(64, 64, 3, 1, 1, groups=64), nn.Conv2d(64, 256, 1), nn.ReLU(), nn.Conv2d(256, 64, 1))
    model, x = nn.Sequential(*layers).eval(), torch.randn(1, 64, 32, 32)
    report = compiled(model, x).report()
    assert forms(report)[0] == "float32", report.text()
    assert "int8 dynamic" in forms(report)


def test_the_tolerance_is_kept() -> None:
    report = compiled(block(), rows(), tolerance=2e-3).report()
    assert "float32" in forms(report)
    assert report.errors[0].relative_l2 <= 2e-3


def test_saved_and_loaded(tmp_path: Any) -> None:
    result = compiled(block(), rows())
    result.save(tmp_path / "model.gw")
    assert torch.equal(graphwright.load(tmp_path / "model.gw")(rows()), result(rows()))


def test_what_needs_calibration_says_so() -> None:
    with pytest.raises(InputError, match=r"finds the ranges of values on inputs.*'dynamic'"):
        graphwright.compile(block(), rows(), precision="int8")
    with pytest.raises(InputError, match="pass calibration"):
        compiled(block(), rows(), int8={"migration": "smooth"})
    with pytest.raises(InputError, match=r"activation='dinamic'.*did you mean 'dynamic'"):
        compiled(block(), rows(), int8={"activation": "dinamic"})
