"""Capture: one flat functional graph, composites whole, and a clear reason where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from graphwright.compiler.capture import Constant, TensorSpec, capture, export
from graphwright.compiler.reference import run_eager
from graphwright.compiler.result_names import result_names
from graphwright.errors import CaptureError, InputError

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.shared = self.conv.weight

    def forward(self, x: torch.Tensor, scale: float = 2.0, *, extra: torch.Tensor | None = None) -> dict[str, object]:
        y = self.norm(self.conv(x)) * scale
        return {"y": y if extra is None else y + extra, "scale": scale, "none": None}


def test_parameters_become_attributes_and_user_tensors_placeholders() -> None:
    net, x = Net().eval(), torch.randn(1, 3, 8, 8)
    captured = capture(export(net, (x,), {"extra": torch.ones(1)}))
    ops = [n.op for n in captured.graph.graph.nodes]
    assert ops.count("placeholder") == 2
    targets = [n.target for n in captured.graph.graph.nodes]
    assert aten.conv2d.default in targets
    assert [type(leaf) for leaf in captured.signature.inputs] == [TensorSpec, TensorSpec]
    results = run_eager(captured.graph, [x, torch.ones(1)])
    torch.testing.assert_close(results[0], net(x, extra=torch.ones(1))["y"], rtol=0, atol=0)


def test_arguments_and_results_that_are_not_tensors_become_constants() -> None:
    captured = capture(export(Net().eval(), (torch.randn(1, 3, 8, 8), 3.0)))
    assert captured.signature.inputs[1] == Constant(3.0)
    assert captured.signature.outputs[1:] == (Constant(3.0), Constant(None))


@pytest.mark.parametrize(
    ("module", "kept"),
    [
        (nn.Linear(3, 4), aten.linear.default),
        (nn.LayerNorm(3), aten.layer_norm.default),
        (nn.GELU(), aten.gelu.default),
        (nn.Softmax(-1), aten.softmax.int),
    ],
)
def test_composites_stay_whole(module: nn.Module, kept: object) -> None:
    captured = capture(export(module, (torch.randn(2, 3),)))
    assert kept in [n.target for n in captured.graph.graph.nodes]


def test_one_tensor_given_twice_stays_two_inputs() -> None:
    x = torch.randn(3)
    captured = capture(export(lambda a, b: a + 2 * b, (x, x)))
    assert len(captured.signature.tensors) == 2
    (result,) = run_eager(captured.graph, [torch.ones(3), torch.zeros(3)])
    assert result.tolist() == [1.0, 1.0, 1.0]


def test_a_buffer_that_the_forward_changes_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    with pytest.raises(CaptureError, match=r"changes the buffers .*running_mean.*model\.eval\(\)"):
        capture(export(net, (torch.randn(2, 3, 8, 8),)))


def test_an_input_changed_in_place_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"changes its inputs"):
        capture(export(lambda x: x.add_(1), (torch.randn(3),)))


def test_a_branch_that_returns_its_operand_is_refused_with_a_reason() -> None:
    exported = export(lambda x: torch.cond(x.sum() > 0, lambda a: a, lambda a: -a, (x,)), (torch.ones(3),))
    with pytest.raises(CaptureError, match=r"decompose the model: cond_true might be aliasing[\s\S]*torch.compile"):
        capture(exported)


def test_control_flow_on_data_gives_the_reason_and_the_line() -> None:
    def branchy(x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x
        return -x

    with pytest.raises(CaptureError) as caught:
        export(branchy, (torch.randn(3),))
    assert "branchy" in str(caught.value)
    assert "if x.sum() > 0" in str(caught.value)


def test_what_is_no_model_is_named() -> None:
    with pytest.raises(CaptureError, match="cannot compile a int"):
        export(3)  # type: ignore[arg-type]


def test_a_missing_or_foreign_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="no such file"):
        export(tmp_path / "absent.pt2")
    (tmp_path / "text.pt2").write_text("not a program")
    with pytest.raises(CaptureError, match="not a program saved by"):
        export(tmp_path / "text.pt2")


def test_a_model_elsewhere_than_on_the_cpu_is_refused() -> None:
    with pytest.raises(InputError, match="weight is on device meta"):
        export(nn.Linear(3, 3, device="meta"), (torch.randn(1, 3),))


class Derivative(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda y: (y.sin() ** 2).sum())(x)


@pytest.mark.parametrize("derivative", [Derivative().forward, torch.func.jacrev(torch.cos)])
def test_a_derivative_within_the_forward_is_refused(derivative: Any) -> None:
    with pytest.raises(CaptureError, match=r"belongs to a derivative (.|\n)*torch\.compile\("):
        export(derivative, (torch.randn(4),))


def test_a_derivative_is_named_with_its_line() -> None:
    with pytest.raises(CaptureError, match=r"test_capture.py.*\n +return torch\.func\.grad"):
        export(Derivative(), (torch.randn(4),))


@pytest.mark.parametrize("exported", [False, True])
def test_weights_without_data_are_refused(exported: bool) -> None:
    with FakeTensorMode():
        net = nn.Linear(3, 3)
        model = torch.export.export(net, (torch.randn(1, 3),)) if exported else net
    with pytest.raises(CaptureError, match="weight of the model was made under FakeTensorMode"):
        export(model, (torch.randn(1, 3),))


def test_tied_parameters_are_stored_once() -> None:
    captured = capture(export(Tied().eval(), (torch.tensor([[1, 2]]),)))
    assert len([n for n, _ in captured.graph.named_buffers()]) == 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


def test_nodes_of_a_function_know_its_lines() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x) + 1

    graph = capture(export(model, (torch.randn(3),))).graph
    (sine,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    assert "torch.sin(x) + 1" in sine.meta["stack_trace"]
    assert "functions.py" not in sine.meta["stack_trace"]


class Named(nn.Module):
    """Results under keys that are text, in lists within, and under a number."""

    def forward(self, x: torch.Tensor) -> dict[Any, Any]:
        return {"best": torch.max(x, 1), "more": [x + 1, {"half": x / 2}], 3: x * 3}


def test_results_are_called_by_their_keys() -> None:
    outputs = capture(export(Named(), (torch.zeros(2, 3),))).signature.outputs
    assert [spec.name for spec in outputs] == ["best.0", "best.1", "more.0", "more.1.half", "mul"]


def test_results_without_keys_are_called_by_their_operators() -> None:
    outputs = capture(export(lambda x: (x + 1, [x * 2]), (torch.zeros(2, 3),))).signature.outputs
    assert [spec.name for spec in outputs] == ["add", "mul"]


def test_a_value_that_is_a_result_twice_has_two_names() -> None:
    def model(x: torch.Tensor) -> Any:
        y = x + 1
        return y, y, {"add_1": y * 2}, x

    outputs = capture(export(model, (torch.zeros(2, 3),))).signature.outputs
    assert [spec.name for spec in outputs] == ["add", "add_1", "2.add_1", "args_0"]
    assert result_names(pytree.tree_structure([0, 0, {"a": 0}]), ["a", "a", "b"]) == ["a", "a_1", "2.a"]
    assert result_names(pytree.tree_structure({1: 0, "a": 0, 2: 0}), ["a_1", "x", "a"]) == ["a_1", "a", "a_2"]
