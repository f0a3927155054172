"""torch.compile(model, backend="graphwright")."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import graphwright
from graphwright.compiler import dynamo
from graphwright.errors import InputError


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.body(x), -1)


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def compiled_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every compilation from now on, as it happens."""
    calls: list[Any] = []
    original = graphwright.compile

    def compile(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr("graphwright.compiler.api.compile", compile)
    return calls


def test_found_by_name_without_importing_it() -> None:
    code = (
        "import torch; assert 'graphwright' in torch._dynamo.list_backends();"
        "f = torch.compile(lambda x: x.relu() * 2, backend='graphwright');"
        "x = torch.tensor([-1.0, 2.0]); print(f(x).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[0.0, 4.0]"


def test_a_model_is_compiled_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = compiled_calls(monkeypatch)
    net = Net().eval()
    model = torch.compile(net, backend="graphwright")
    with torch.no_grad():
        for batch in (2, 2, 5, 7, 5):
            x = torch.randn(batch, 8)
            close(model(x), net(x))
    assert len(calls) == 3


def test_graph_breaks() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        if y.sum() > 0:
            return y.exp()
        return y.sin()

    compiled = torch.compile(model, backend="graphwright")
    with torch.no_grad():
        for x in (torch.ones(3), -torch.ones(3)):
            close(compiled(x), model(x))


def test_options_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = compiled_calls(monkeypatch)
    model = torch.compile(Net().eval(), backend="graphwright", options={"threads": 1, "verify": False})
    with torch.no_grad():
        model(torch.randn(2, 8))
    assert calls[0][1]["threads"] == 1
    assert calls[0][1]["verify"] is False


@pytest.mark.parametrize("options", [{"precision": "bf61"}, {"threads": 0}, {"tolerance": -1}, {"fallback": "fp16"}])
def test_a_wrong_value_is_refused(options: dict[str, Any]) -> None:
    model = torch.compile(Net().eval(), backend="graphwright", options=options)
    with pytest.raises(Exception, match=r"precision|threads|tolerance|fallback"):
        model(torch.randn(2, 8))


def test_a_target_whose_code_cannot_run_here_is_refused() -> None:
    model = torch.compile(Net().eval(), backend="graphwright", options={"target": "raspberry-pi-4b"})
    with pytest.raises(Exception, match=r"cannot run here: .*; leave target= out") as raised, torch.no_grad():
        model(torch.randn(2, 8))
    assert isinstance(raised.value.__cause__ or raised.value.inner_exception, InputError)


def test_an_unknown_option_is_refused() -> None:
    model = torch.compile(Net().eval(), backend="graphwright", options={"thread": 1})
    with pytest.raises(Exception, match="no option thread; it takes"):
        model(torch.randn(2, 8))


def test_an_unsupported_operator_still_runs() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(x.relu() + 1)

    x = torch.randn(3, 3)
    with torch.no_grad():
        close(torch.compile(model, backend="graphwright")(x), model(x))


def test_a_derivative_within_the_forward_runs_in_pytorch() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda y: (y.sin() ** 2).sum())(x)

    with torch.no_grad():
        compiled = torch.compile(model, backend="graphwright")
        for x in (torch.zeros(4), torch.ones(4)):
            close(compiled(x), model(x))


def test_weights_that_wrap_other_tensors_run_in_pytorch(caplog: pytest.LogCaptureFixture) -> None:
    net, x = nn.Linear(3, 3).eval(), torch.randn(2, 3)
    net.weight = nn.Parameter(TwoTensor(torch.ones(3, 3), torch.zeros(3, 3)))
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="graphwright"):
        result = torch.compile(net, backend="graphwright")(x)
        close(result.a, net(x).a)
    assert "an input is a TwoTensor, which wraps other tensors" in caplog.text


@pytest.mark.parametrize("change", ["optimizer", "load_state_dict", "data"])
def test_changed_weights_are_seen(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = compiled_calls(monkeypatch)
    net, x = Net().eval(), torch.randn(2, 8)
    model = torch.compile(net, backend="graphwright")
    with torch.no_grad():
        before = model(x)
        close(before, net(x))
    if change == "optimizer":
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        net(x).square().sum().backward()
        optimizer.step()
    elif change == "load_state_dict":
        net.load_state_dict(Net().state_dict())
    else:
        net.body[0].weight.data = torch.randn(16, 8)
    with torch.no_grad():
        after = model(x)
        close(after, net(x))
        assert not torch.allclose(before, after)
        model(x)
    assert len(calls) == 2


def test_statistics_of_batch_norm_are_seen() -> None:
    net, x = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32)).eval(), torch.randn(6, 8)
    model = torch.compile(net, backend="graphwright")
    with torch.no_grad():
        close(model(x), net(x))
        net.train()
        net(torch.randn(64, 8) * 5 + 3)
        net.eval()
        close(model(x), net(x))


class Instead:
    """In the place of compiling: a second passes, and the graph runs in PyTorch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: list[int] = []  # of each compilation
        self.now = 0.0
        monkeypatch.setattr(dynamo, "time", self)
        monkeypatch.setattr("graphwright.compiler.api.compile", self.compile)

    def monotonic(self) -> float:
        return self.now

    def compile(self, module: nn.Module, inputs: Any, **options: Any) -> nn.Module:
        self.inputs.append(len(inputs))
        self.now += 1
        return module


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.exp(-self.step)


def test_a_buffer_that_changes_at_every_call_is_passed_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    instead, net = Instead(monkeypatch), Step()
    model = torch.compile(net, backend="graphwright")
    x = torch.randn(3)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="graphwright"):
        for _ in range(dynamo.CHANGES + 5):
            net.step.add_(0.1)
            close(model(x), net(x))
    assert instead.inputs == [1, 1, 1, 2]
    (message,) = [r.message for r in caplog.records if "passed in" in r.message]
    assert "buffers_step" in message
    assert "torch._dynamo.reset()" in message


def test_another_parameter_at_every_call_is_passed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    instead = Instead(monkeypatch)
    backend = dynamo._Specialised(torch.fx.symbolic_trace(lambda p, x: x @ p), {})
    x = torch.randn(2, 4)
    with torch.no_grad():
        for size in (3, 3, 3, 3, 3, 5, 5, 3):
            p = nn.Parameter(torch.randn(4, size))
            close(backend(p, x), x @ p)
    assert instead.inputs == [1, 1, 1, 2, 2]


def test_constants_that_stay_as_long_as_compiling_took_are_compiled_in_again(monkeypatch: pytest.MonkeyPatch) -> None:
    instead = Instead(monkeypatch)
    backend = dynamo._Specialised(torch.fx.symbolic_trace(lambda w, x: w * x), {})
    w, x = nn.Parameter(torch.ones(3)), torch.ones(3)
    with torch.no_grad():
        for _ in range(2 * dynamo.CHANGES):
            w.mul_(2)
            close(backend(w, x), w * x)
            instead.now += 2
    assert instead.inputs == [1] * (2 * dynamo.CHANGES)


def test_one_change_counts_once_however_many_shapes_it_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    instead = Instead(monkeypatch)
    backend = dynamo._Specialised(torch.fx.symbolic_trace(lambda w, x: w * x), {})
    w = nn.Parameter(torch.ones(1))
    with torch.no_grad():
        for _ in range(dynamo.CHANGES):
            w.mul_(2)
            instead.now = 0.0
            for size in range(1, dynamo.SHAPES):
                close(backend(w, torch.ones(size)), w * torch.ones(size))
    assert set(instead.inputs) == {1}


def test_what_cannot_be_compiled_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = compiled_calls(monkeypatch)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train(), torch.randn(6, 4)
    model = torch.compile(net, backend="graphwright")
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert len(calls) == 1
    assert net[1].num_batches_tracked == 3


def test_with_gradients_it_runs_in_pytorch_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    net, x = Net().train(), torch.randn(2, 8)
    model = torch.compile(net, backend="graphwright")
    with caplog.at_level(logging.WARNING, logger="graphwright"):
        result = model(x)
        result.square().sum().backward()
        model(x)
    assert net.body[0].weight.grad is not None
    assert sum("gradients are needed" in r.message for r in caplog.records) == 1


def test_a_graph_that_changes_its_buffers_runs_in_pytorch() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    x = torch.randn(2, 3, 8, 8)
    before = net[1].running_mean.clone()
    with torch.no_grad():
        torch.compile(net, backend="graphwright")(x)
    assert not torch.equal(before, net[1].running_mean)


def test_numbers_from_python_are_part_of_the_specialisation() -> None:
    model = torch.compile(lambda x, n: x * n + x[:n].sum(), backend="graphwright", dynamic=True)
    with torch.no_grad():
        for n in (2, 3, 4):
            x = torch.arange(6.0)
            close(model(x, n), x * n + x[:n].sum())


def test_more_shapes_than_the_limit_run_in_pytorch() -> None:
    compiled = dynamo._Specialised(torch.fx.symbolic_trace(lambda x: x * 2), {})
    for size in range(1, dynamo.SHAPES + 3):
        assert torch.equal(compiled(torch.ones(size)), 2 * torch.ones(size))
    assert len(compiled.entries) == dynamo.SHAPES


def test_results_have_the_strides_of_eager() -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
        y = torch.relu(x.t())
        torch._dynamo.graph_break()
        return torch.as_strided(y, (2,), (1,)), y.stride()

    x = torch.arange(6.0).view(2, 3)
    with torch.no_grad():
        result, strides = torch.compile(model, backend="graphwright")(x)
    assert torch.equal(result, model(x)[0])
    assert strides == model(x)[1]


def test_results_that_are_views_of_inputs_stay_views() -> None:
    x = torch.ones(2, 3)
    with torch.no_grad():
        first = torch.compile(lambda x: (x[0], x.t() + 1), backend="graphwright")(x)[0]
    first.zero_()
    assert x[0].tolist() == [0.0, 0.0, 0.0]


def test_who_uses_torch_compile_is_not_advised_to(caplog: pytest.LogCaptureFixture) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    x = torch.randn(3)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="graphwright"):
        close(torch.compile(model, backend="graphwright")(x), model(x))
    assert "this graph runs in PyTorch: true_graph_0 is a nested graph" in caplog.text
    assert "torch.compile(" not in caplog.text
