"""The table of `make bench`: what a row says, what the file keeps, and runners that fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from graphwright.compiler.benchmarking import bench
from graphwright.compiler.benchmarking import models as bench_models
from graphwright.compiler.benchmarking.models import Row
from graphwright.compiler.benchmarking.worker import Failed, Subject, Task, Worker
from graphwright.errors import GraphwrightError


def row(model: str = "m", batch: int = 1, **changes: object) -> Row:
    given = {
        "milliseconds": {"graphwright": 8.0, "eager": 20.0, "openvino": 10.0},
        "relative_l2": {"graphwright": 1e-6, "eager": 5e-7},
        "compile_seconds": {"graphwright": 3.0},
    }
    return Row(model, batch, "fp32", **{**given, **changes})  # type: ignore[arg-type]


def test_the_ratio_is_to_the_fastest_peer() -> None:
    assert row().best_peer == "openvino"
    assert row().ratio == 0.8
    assert row(milliseconds={"eager": 3.0}).ratio is None
    assert row(milliseconds={"graphwright": 3.0}).best_peer is None


@pytest.mark.parametrize(
    ("ours", "eager", "flagged"), [(1e-6, 5e-7, False), (3e-6, 5e-7, True), (3e-5, 2e-5, True), (1e-5, None, False)]
)
def test_errors_beyond_the_limits_are_flagged(ours: float, eager: float | None, flagged: bool) -> None:
    errors = {"graphwright": ours} | ({} if eager is None else {"eager": eager})
    assert row(relative_l2=errors).inexact is flagged


def test_the_file_keeps_other_rows_and_replaces_its_own(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    for batch in (1, 4):
        bench_models.store(path, row(batch=batch), 2)
    bench_models.store(path, row(milliseconds={"graphwright": 1.0}), 2)
    rows = bench_models.read(path)["rows"]
    assert [(r.key, r.milliseconds["graphwright"]) for r in rows] == [(("m", 1, "fp32"), 1.0), (("m", 4, "fp32"), 8.0)]
    assert json.loads(path.read_text())["machine"]["threads"] == 2


@pytest.mark.parametrize("text", ["", "[]", '{"rows": [{"model": "m"}]}'])
def test_a_file_of_another_form_counts_as_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "models.json"
    path.write_text(text)
    assert bench_models.read(path)["rows"] == []


def test_a_runner_that_fails_says_why(tmp_path: Path) -> None:
    worker = Worker(Task(Subject("no-such-model"), "eager", 1, tmp_path))
    with pytest.raises(Failed, match="no-such-model"):
        worker.ready(120)
    worker.stop()
    with pytest.raises(GraphwrightError, match="did you mean 'openvino'"):
        bench_models.check_peers(["openvin"])


def test_every_process_draws_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drawn.py").write_text("import torch\ndef net():\n    return torch.nn.Linear(3, 2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    subject = Subject("drawn:net", inputs=("2x3",))
    first, second = (subject.build()[0].weight for _ in range(2))
    assert torch.equal(first, second)


def test_runners_take_turns_in_one_process() -> None:
    order: list[str] = []
    timing = bench.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warm=1)
    assert set(timing) == {"a", "b"}
    assert order == ["a", "b"] + ["a", "a", "b", "b"] * 2


def test_a_narrowed_model_leaves_the_original_alone() -> None:
    model = torch.nn.Linear(3, 3)
    narrow, inputs = bench.narrowed(model, (torch.ones(3), torch.ones(3, dtype=torch.int64)))
    assert next(narrow.parameters()).dtype == torch.bfloat16
    assert next(model.parameters()).dtype == torch.float32
    assert [x.dtype for x in inputs] == [torch.bfloat16, torch.int64]
