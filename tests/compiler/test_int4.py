"""int8={"weights_only": "int4"}: which layers take four bits, sizes, errors, and going back to eight."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright.errors import InputError
from graphwright.hwdb import detect

VNNI = detect().vector_dot_product("int8") == "vnni"
pytestmark = [
    pytest.mark.usefixtures("starved"),
    pytest.mark.skipif(not VNNI, reason="this machine has no dot product of bytes"),
]


def decode() -> tuple[nn.Module, torch.Tensor]:
    """Linear layers of one row, which wait for their weights."""
    torch.manual_seed(0)
    layers = (nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1000, bias=False), nn.ReLU(), nn.Linear(1000, 512))
    return nn.Sequential(*layers).eval(), torch.randn(1, 512)


def compiled(model: nn.Module, x: torch.Tensor, **options: Any) -> Any:
    int8 = {"weights_only": "int4", **options.pop("int8", {})}
    return graphwright.compile(model, x, precision="int8", calibration=[x], cache=False, int8=int8, **options)


def forms(report: Any) -> list[str]:
    return [c.form for c in report.precisions if "linear" in c.operator]


@pytest.mark.parametrize(("group", "share"), [(32, 0.17), (128, 0.145)])
def test_weights_of_four_bits(group: int, share: float) -> None:
    model, x = decode()
    result = compiled(model, x, tolerance=0.5, int8={"group": group})
    report = result.report()
    # 1000 inputs are no multiple of a group: eight bits.
    assert forms(report) == ["int4 weights", "int4 weights", "int8 weights"]
    assert [k.algorithm for k in report.kernels].count("int4-weight matmul") == 2, report.text()
    assert 1e-2 < report.errors[0].relative_l2 < 0.3
    torch.testing.assert_close(result.graph(x)[0], result(x), rtol=1e-4, atol=1e-5)
    two = nn.Sequential(*list(model)[:3])
    plain = graphwright.compile(two, x, cache=False).report().weights_bytes
    assert compiled(two, x, tolerance=0.5, int8={"group": group}).report().weights_bytes < share * plain
    assert "with weights of 4" in report.text()
    assert f"in 2 of 3 linear layers; 1 not: its 1000 inputs are no multiple of {group}" in report.text()
    assert {c.dtype for c in report.damage()} == {"int4", "int8"}


def test_eight_bits_where_four_cost_too_much() -> None:
    model, x = decode()
    report = compiled(model, x, tolerance=5e-2).report()
    assert "int4 weights" not in forms(report)[:1] or "int8 weights" in forms(report)
    assert set(forms(report)) <= {"int4 weights", "int8 weights"}
    assert report.errors[0].relative_l2 <= 5e-2
    assert any("in 4 it costs more accuracy" in c.reason for c in report.precisions)
    assert any("in 8 bits instead of 4" in note for note in report.notes)


def test_many_rows_do_not_take_them(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = decode()
    with caplog.at_level(logging.WARNING, logger="graphwright"):
        report = compiled(model, torch.randn(512, 512), tolerance=0.5).report()
    assert "int4 weights" not in forms(report)
    assert "weights of 4 bits in 0 of 3 linear layers; 3 not: in 8 bits it is not predicted to wait" in caplog.text


def test_it_is_asked_for() -> None:
    model, x = decode()
    report = compiled(model, x, int8={"weights_only": "int8"}).report()
    assert set(forms(report)) == {"int8 weights"}
    with pytest.raises(InputError, match=r"weights_only='int3'.*'int8', 'int4'"):
        compiled(model, x, int8={"weights_only": "int3"})
    with pytest.raises(InputError, match=r"group=48.*32, 64, 128"):
        compiled(model, x, int8={"group": 48})


def test_saved_and_loaded(tmp_path: Any) -> None:
    model, x = decode()
    result = compiled(model, x, tolerance=0.5)
    result.save(tmp_path / "model.gw")
    assert torch.equal(graphwright.load(tmp_path / "model.gw")(x), result(x))
