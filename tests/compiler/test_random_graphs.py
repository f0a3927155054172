"""Random programs through the whole compiler: machine code against PyTorch in float64."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from graphwright.testing import Program, check_compile, programs


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True)
@given(programs(families=("elementwise", "moves", "products", "norms", "patterns")))
def test_random_programs_compile_and_match(program: Program) -> None:
    check_compile(program.module(), program.arguments())
