"""Random models through the whole compiler: machine code against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from random_graphs import Model, models

import graphwright


@pytest.mark.slow
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(models())
def test_random_models_compile_and_match(case: tuple[Model, tuple[torch.Tensor, ...]]) -> None:
    model, inputs = case
    # verify=True is the comparison: it raises NumericMismatch, naming the pass or the operator.
    compiled = graphwright.compile(model.eval(), inputs, cache=False)
    first, second = compiled(*inputs)
    expected = model(*inputs)
    assert first.shape == expected[0].shape
    assert second.shape == expected[1].shape
    assert len(compiled.report().errors) == 2
    assert compiled.report().eager == ()
