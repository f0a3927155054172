"""Random programs through the passes: each alone, in any order, and the whole pipeline."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from random_programs import Subject, check_alone, check_order, check_pipeline

from graphwright.errors import CaptureError
from graphwright.testing import FAMILIES, Program, programs

PURE = tuple(family for family in FAMILIES if family != "changes")
FORMS = st.sampled_from(["whole", "core"])
# To shrink and explain runs a program hundreds of times: graphwright.testing.shrink is quicker.
PHASES = [Phase.explicit, Phase.generate]


def budget(count: int) -> settings:
    """The same programs every time: `make fuzz` is what looks for new ones."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=PHASES,
        print_blob=True,
    )


@budget(150)
@given(programs(families=PURE), FORMS)
def test_each_pass_alone(program: Program, how: str) -> None:
    check_alone(Subject(program, how))


@budget(120)
@given(programs(families=PURE), FORMS)
def test_any_order(program: Program, how: str) -> None:
    check_order(Subject(program, how))


@budget(140)
@given(programs(families=PURE), FORMS)
def test_the_pipeline(program: Program, how: str) -> None:
    check_pipeline(Subject(program, how))


@budget(25)
@given(programs(families=("elementwise", "moves", "changes", "changes"), inputs=1))
def test_programs_that_change_values_in_place(program: Program) -> None:
    try:
        check_pipeline(Subject(program, "captured"))
    except CaptureError:
        assume(False)


@budget(45)
@given(programs(families=("moves", "elementwise", "logic"), special=True), FORMS)
def test_zeros_of_both_signs_infinities_and_nan(program: Program, how: str) -> None:
    check_alone(Subject(program, how))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@budget(10)
@given(data=st.data())
def test_halves(dtype: str, data: st.DataObject) -> None:
    import torch

    program = data.draw(programs(families=PURE, dtypes=[getattr(torch, dtype)]))
    check_pipeline(Subject(program, "whole"))
