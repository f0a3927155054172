"""Two builds of one model: the float32 twin behind a guard, and the rule that picks one by the inputs."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import graphwright
from graphwright.backends.lowering.operators import LOWERINGS
from graphwright.compiler import precision
from graphwright.compiler.cli import app
from graphwright.compiler.variants import Rule, Variants, are_finite, calibrated, scales_of
from graphwright.errors import InputError
from graphwright.passes import dialect_mixed
from graphwright.passes.assign_precision import Choice, Plan


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear rounds its input to float16, as machines with such arithmetic would: PyTorch runs it here."""

    def plan(graph: Any, hw: Any, asked: Any) -> tuple[Plan, tuple[str, ...]]:
        linears = [n for n in graph.graph.nodes if "linear" in str(n.target)]
        choices = [Choice(n.name, "linear", "float16", "for a test", True, None, "float16 products") for n in linears]
        return Plan(tuple(choices)), ()

    monkeypatch.setattr(precision, "decide", plan)
    monkeypatch.delitem(LOWERINGS, dialect_mixed.linear_f16)  # GPUs fall back to it, and it does not round x


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(96, 128), nn.Linear(128, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class Scaled(nn.Module):
    """0.01 x, so that what overflows float16 on the way in is ordinary on the way out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.layer.weight)
        with torch.no_grad():
            self.layer.weight.mul_(0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.usefixtures("halves")
def test_what_overflows_float16_runs_in_float32_and_is_counted() -> None:
    model = Scaled().eval()
    ordinary, large = torch.randn(3, 4), torch.full((3, 4), 1e5)
    plain = graphwright.compile(model, ordinary, precision="fp16", tolerance=1e-2, cache=False)
    assert not plain(large).isfinite().any()
    assert plain.report().calls is None
    guarded = graphwright.compile(model, ordinary, precision="fp16", tolerance=1e-2, fallback="fp32", cache=False)
    assert torch.equal(guarded(ordinary), plain(ordinary))
    assert guarded.report().calls == {"reduced": 1, "float32": 0, "fallbacks": 0, "also_not_finite": 0}
    torch.testing.assert_close(guarded(large), torch.full((3, 4), 1e3))
    assert guarded.report().calls == {"reduced": 1, "float32": 1, "fallbacks": 1, "also_not_finite": 0}
    assert "fallbacks 1" in guarded.report().text()


@pytest.mark.usefixtures("halves")
def test_inputs_that_are_not_finite_themselves_are_no_reason() -> None:
    model = Scaled().eval()
    guarded = graphwright.compile(model, torch.randn(3, 4), precision="fp16", fallback="fp32", cache=False)
    for value in (float("nan"), float("inf")):
        assert not guarded(torch.full((3, 4), value)).isfinite().any()
    assert guarded.report().calls["fallbacks"] == 0
    # 3e38 times 1e2 overflows in float32 too: the twin ran, and says the same.
    with torch.no_grad():
        model.layer.weight.mul_(1e4)
    guarded = graphwright.compile(model, torch.randn(3, 4), precision="fp16", fallback="fp32", cache=False)
    assert guarded(torch.full((3, 4), 3e38)).isinf().all()
    assert guarded.report().calls == {"reduced": 0, "float32": 1, "fallbacks": 1, "also_not_finite": 1}


@pytest.mark.usefixtures("halves")
def test_a_guarded_artifact_is_saved_and_loaded(tmp_path: Path) -> None:
    model, x = Scaled().eval(), torch.randn(3, 4)
    guarded = graphwright.compile(model, x, precision="fp16", fallback="fp32", cache=False)
    for name in ("model.gw", "directory"):
        loaded = graphwright.load(guarded.save(tmp_path / name))
        torch.testing.assert_close(loaded(torch.full((3, 4), 1e5)), torch.full((3, 4), 1e3))
        assert loaded.report().calls == {"reduced": 0, "float32": 1, "fallbacks": 1, "also_not_finite": 0}
        loaded.threads = 1
        assert torch.equal(loaded(x), guarded(x))


@pytest.mark.usefixtures("halves")
def test_many_threads_fall_back_at_once() -> None:
    guarded = graphwright.compile(Scaled().eval(), torch.randn(3, 4), precision="fp16", fallback="fp32", cache=False)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(25):
            if not torch.allclose(guarded(torch.full((3, 4), 1e5)), torch.full((3, 4), 1e3)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert guarded.report().calls == {"reduced": 0, "float32": 100, "fallbacks": 100, "also_not_finite": 0}


@pytest.mark.usefixtures("starved")
def test_through_dynamo() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(1, 96)
    options = {"precision": "auto", "tolerance": 1e-3, "fallback": "fp32", "cache": False}
    with torch.no_grad():
        result = torch.compile(model, backend="graphwright", options=options)(x)
    torch.testing.assert_close(result, model(x), rtol=1e-3, atol=1e-3)


def test_where_nothing_is_reduced_there_is_no_twin() -> None:
    report = graphwright.compile(
        nn.Linear(8, 8), torch.randn(500, 8), precision="fp16", fallback="fp32", cache=False
    ).report()
    assert "nothing to fall back from" in report.text()
    assert report.calls is None


def test_only_elements_decide_where_a_sum_overflows() -> None:
    assert are_finite([torch.full((10,), 3e38), torch.zeros(3, dtype=torch.int64), torch.empty(0)])
    assert are_finite([torch.ones(4, dtype=torch.complex64)])
    for bad in (float("inf"), float("-inf"), float("nan")):
        assert not are_finite([torch.ones(3), torch.tensor([1.0, bad])])
        assert not are_finite([torch.tensor([1 + bad * 1j])])
    assert not are_finite([torch.tensor([float("inf"), float("-inf")])])


def outliers() -> tuple[nn.Module, list[torch.Tensor]]:
    """Inputs of five sizes: exp makes errors grow with the input, so that the largest miss the tolerance."""

    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(96, 128), nn.Linear(128, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.exp(self.first(x)))

    torch.manual_seed(0)
    return Grows().eval(), [torch.randn(1, 96) * size for size in (0.5, 0.7, 1.0, 1.2, 20.0)]


@pytest.mark.usefixtures("starved")
def test_the_rule_accepts_what_keeps_the_tolerance(tmp_path: Path) -> None:
    model, samples = outliers()
    errors = []
    reduced = graphwright.compile(model, samples[2], precision="fp16", cache=False, tolerance=1.0)
    for x in samples:
        exact = model.double()(x.double())
        errors.append(float((reduced(x) - exact).norm() / exact.norm()))
        model.float()
    tolerance = 1.5 * max(errors[:4])
    assert errors[4] > tolerance
    options: dict[str, Any] = {"precision": "adaptive", "tolerance": tolerance, "calibration": samples}
    compiled = graphwright.compile(model, samples[2], cache=False, **options)
    for place in (compiled, graphwright.load(compiled.save(tmp_path / "net.gw"))):
        for number, x in enumerate(samples):
            before = place.report().calls
            exact = model.double()(x.double())
            model.float()
            assert float((place(x) - exact).norm() / exact.norm()) <= tolerance
            after = place.report().calls
            assert after["reduced"] - before["reduced"] == (number < 4)
            assert after["float32"] - before["float32"] == (number == 4)
        assert "keep" in place.report().text()
        # Outside what calibration saw, on both sides, and not finite: float32.
        for x in (samples[0] * 0.01, samples[2] * 5, torch.full((1, 96), float("nan"))):
            before = place.report().calls
            place(x)
            assert place.report().calls["float32"] == before["float32"] + 1
    saved = compiled.save(tmp_path / "directory")
    manifest = json.loads((saved / "manifest.json").read_text())
    rule = manifest["description"]["twin"]["rule"]
    assert rule["statistic"] == "max_abs"
    assert rule["low"] < 1 < rule["high"]
    cached = [graphwright.compile(model, samples[2], **options).report().cached for _ in range(2)]
    assert cached[1]
    options["calibration"] = samples[:3]
    assert not graphwright.compile(model, samples[2], **options).report().cached


@pytest.mark.usefixtures("starved")
def test_a_rule_that_accepts_nothing_leaves_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphwright.compiler.twins.calibrated", lambda *given: None)
    model, samples = outliers()
    compiled = graphwright.compile(model, samples[2], precision="adaptive", calibration=samples, cache=False)
    assert "there is one build, in float32" in compiled.report().text()
    assert compiled.report().calls is None
    torch.testing.assert_close(compiled(samples[4]), model(samples[4]), rtol=1e-4, atol=1e-5)


def test_rules() -> None:
    a, b = torch.tensor([1.0, -4.0]), torch.tensor([3, 5])
    assert scales_of([[a, b], [a / 2, b], [a * 9, b]]) == (4.0, None)
    rule = calibrated((4.0, None), [0.5, 1.0, 2.0, 3.0, 9.0, float("nan")], [True, True, False, True, True, True])
    assert rule is not None
    assert (rule.low, rule.high) == (0.5, 1.0)
    assert rule.accepts([a, b])
    assert not rule.accepts([a * 2, b])
    assert not rule.accepts([torch.tensor([1.0, float("nan")]), b])
    assert calibrated((4.0,), [1.0, 1.0], [True, False]) is None
    assert Rule.from_data(json.loads(json.dumps(rule.to_data()))) == rule
    with pytest.raises(ValueError, match="not known"):
        Rule.from_data({**rule.to_data(), "statistic": "kurtosis"})


def test_the_twin_is_opened_once_and_only_when_needed() -> None:
    opened: list[int] = []

    def open_twin() -> Any:
        opened.append(1)
        return None, lambda tensors: [t.double().float() for t in tensors]

    variants = Variants(lambda tensors: [t * 1e30 for t in tensors], open_twin, True, None)
    variants([torch.ones(2)])
    assert not opened
    for _ in range(3):
        assert variants([torch.full((2,), 1e20)])[0].isfinite().all()
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fallback": "fp32"}, "needs a reduced precision"),
        ({"fallback": "fp23", "precision": "auto"}, "did you mean 'fp32'"),
        ({"calibration": [torch.randn(1, 96)]}, "serves reduced precision"),
        ({"calibration": [], "precision": "auto"}, "got nothing"),
        ({"calibration": 7, "precision": "auto"}, "is a list of inputs"),
        ({"precision": "adaptive"}, "pass calibration="),
        ({"precision": "auto", "calibration": [torch.randn(2, 96)]}, "calibration set 0: x is"),
        ({"precision": "auto", "calibration": {"y": torch.randn(3, 1, 96)}}, "not 'y'"),
        ({"precision": "auto", "calibration": {"x": torch.randn(3, 96)}}, "of shape"),
        ({"precision": "auto", "calibration": {"x": torch.tensor(1.0)}}, "leading axis"),
        ({"precision": "auto", "calibration": {}}, "got nothing"),
    ],
)
def test_options_that_say_nothing_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        graphwright.compile(Net().eval(), torch.randn(1, 96), cache=False, **options)


def test_adaptive_without_examples_or_floats() -> None:
    with pytest.raises(InputError, match="pass example_inputs"):
        graphwright.compile(Net().eval(), precision="adaptive", calibration=[torch.randn(1, 96)])
    tokens = torch.tensor([[1, 2]])
    with pytest.raises(InputError, match="use precision='auto'"):
        graphwright.compile(nn.Embedding(4, 8).eval(), tokens, precision="adaptive", calibration=[tokens], cache=False)


def test_calibration_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "inputs.npz"
    numpy.savez(file, input=numpy.random.default_rng(0).standard_normal((3, 4, 8), dtype=numpy.float32))
    (tmp_path / "calibrated_model.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(8, 8), torch.randn(4, 8)\n"
    )
    given = ["compile", "calibrated_model:make", "-o", str(tmp_path / "m.gw"), "--precision", "auto"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.syspath_prepend(str(tmp_path))
        done = CliRunner().invoke(app, [*given, "--calibration", str(file), "--fallback", "fp32", "--no-cache"])
        assert done.exit_code == 0, done.output
        wrong = CliRunner().invoke(app, [*given, "--calibration", str(tmp_path / "absent.npz")])
        assert wrong.exit_code == 1
