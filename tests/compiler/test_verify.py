"""A planted wrong pass, or a planted wrong definition, is found and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import graphwright
from graphwright.backends.lowering import operators, registry
from graphwright.compiler import verify
from graphwright.errors import NumericMismatch
from graphwright.hwdb import Hardware
from graphwright.passes.default import PASSES

aten = torch.ops.aten


def confuse_sines(graph: fx.GraphModule, hw: Hardware) -> int:
    """Wrong on purpose: sin(x) -> cos(x)."""
    count = 0
    for node in graph.graph.nodes:
        if node.target is aten.sin.default:
            node.target = aten.cos.default
            count += 1
    return count


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.linear(x)) * x


def test_a_wrong_pass_is_named_with_its_node() -> None:
    passes = [*PASSES, confuse_sines]
    with pytest.raises(NumericMismatch, match=r"pass confuse_sines changed the numbers, first at node .*cos") as caught:
        graphwright.compile(Gate().eval(), (torch.randn(3, 6),), cache=False, passes=passes)
    assert "torch.sin(self.linear(x)) * x" in str(caught.value)
    assert "The pass was given with passes=[...]: mend it" in str(caught.value)
    with pytest.raises(NumericMismatch, match="pass confuse_sines changed the numbers"):
        verify.verify_model(Gate().eval(), torch.randn(3, 6), passes=passes)


@pytest.mark.parametrize("cached", [False, True])
def test_a_wrong_pass_of_ours_is_left_out_and_reported(
    cached: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(confuse_sines, "__module__", "graphwright.passes.confuse_sines")
    model, x = Gate().eval(), torch.randn(3, 6)
    compiled = graphwright.compile(model, (x,), cache=cached, passes=[*PASSES, confuse_sines])
    torch.testing.assert_close(compiled(x), model(x).detach())
    assert "This is a bug of graphwright" in caplog.text
    report = compiled.report()
    assert "confuse_sines" not in [run.name for run in report.passes]
    assert "confuse_sines left out: pass confuse_sines changed the numbers, first at node" in report.text()
    assert not any(node.target is aten.cos.default for node in compiled.graph.graph.nodes)


def test_a_pass_of_ours_that_fails_is_left_out_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(graph: fx.GraphModule, hw: Hardware) -> int:
        raise ValueError("boom")

    monkeypatch.setattr(fail, "__module__", "graphwright.passes.fail")
    model, x = Gate().eval(), torch.randn(3, 6)
    compiled = graphwright.compile(model, (x,), cache=False, passes=[fail, *PASSES])
    torch.testing.assert_close(compiled(x), model(x).detach())
    assert compiled.report().left_out == {"fail": "pass fail failed after no other pass: boom"}


@pytest.fixture
def wrong_sine(monkeypatch: pytest.MonkeyPatch) -> None:
    right = operators.LOWERINGS[aten.sin.default]

    def wrong(out: Any, x: Any) -> Any:
        from tvm import te

        return te.compute(x.shape, lambda *i: right.compute(out, x)(*i) + te.const(0.25, out.dtype), name="wrong")

    monkeypatch.setitem(operators.LOWERINGS, aten.sin.default, registry.Lowering(wrong, right.can))


@pytest.mark.usefixtures("wrong_sine")
def test_an_operator_of_wrong_machine_code_is_named_and_left_to_pytorch(caplog: pytest.LogCaptureFixture) -> None:

    def model(x: torch.Tensor) -> torch.Tensor:
        return (x.cos() + 1).sin().exp()

    x = torch.randn(5)
    with pytest.raises(NumericMismatch, match=r"the machine code differs .* first at .*aten\.sin"):
        verify.verify_model(model, x)
    compiled = graphwright.compile(model, (x,), cache=False)
    torch.testing.assert_close(compiled(x), model(x))
    (row,) = compiled.report().eager
    assert row.operator == "aten.sin.default"
    assert "in machine code" in row.reason
    assert "report it with the operator and its shapes" in caplog.text


@pytest.mark.usefixtures("wrong_sine")
def test_where_no_single_operator_is_to_blame_the_whole_model_is_left_to_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They differ in the model, and in none of the probes."""
    monkeypatch.setattr(verify, "_first_wrong", lambda *_: None)
    x = torch.randn(5)
    compiled = graphwright.compile(lambda x: x.sin().exp(), (x,), cache=False)
    torch.testing.assert_close(compiled(x), x.sin().exp())
    assert {row.operator for row in compiled.report().eager} == {"aten.sin.default", "aten.exp.default"}


def test_verify_false_does_not_look() -> None:
    net, x = Gate().eval(), torch.randn(3, 6)
    compiled = graphwright.compile(net, (x,), cache=False, verify=False, passes=[*PASSES, confuse_sines])
    assert not torch.allclose(compiled(x), net(x))
    assert compiled.report().errors == ()


def test_a_failing_pass_is_named() -> None:
    def explode(graph: fx.GraphModule, hw: Hardware) -> int:
        raise RuntimeError("boom")

    with pytest.raises(graphwright.PassError, match="pass explode failed after no other pass: boom"):
        graphwright.compile(nn.ReLU(), (torch.ones(2),), cache=False, passes=[explode])


def test_every_stage_is_listed() -> None:
    result = verify.verify_model(Gate().eval(), torch.randn(3, 6))
    stages = [name for name, _ in result.stages]
    assert stages[-1] == "machine code"
    assert len(stages) > 1
    assert "machine code" in result.text()
    assert all(row.relative_l2 < 1e-6 for _, rows in result.stages for row in rows)


def test_a_failing_definition_leaves_the_operator_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(out: Any, x: Any) -> Any:
        raise TypeError("not today")

    monkeypatch.setitem(operators.LOWERINGS, aten.sin.default, registry.Lowering(broken, registry.always))
    x = torch.randn(5)
    compiled = graphwright.compile(lambda x: torch.exp(x.sin()), (x,), cache=False)
    torch.testing.assert_close(compiled(x), torch.exp(x.sin()))
    assert [r.reason for r in compiled.report().eager] == ["its lowering failed: not today"]


def test_failing_code_generation_leaves_the_model_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise TypeError("LLVM has had enough")

    monkeypatch.setattr("graphwright.backends.aot.library.build", fail)
    net, x = Gate().eval(), torch.randn(3, 6)
    compiled = graphwright.compile(net, (x,), cache=False)
    torch.testing.assert_close(compiled(x), net(x).detach())
    assert {row.reason for row in compiled.report().eager} == {"code generation failed: LLVM has had enough"}
    with pytest.raises(graphwright.GraphwrightError, match="code generation for cortex-a72 failed: LLVM"):
        graphwright.compile(net, (x,), cache=False, target="cortex-a72")
