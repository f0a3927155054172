"""Random models that shrink well, and a check of passes that holds them to all they promise.

    from hypothesis import given
    from graphwright.testing import check_pass, programs

    @given(programs())
    def test_my_pass(program):
        check_pass(my_pass, program.module(), program.arguments())

docs/testing.md says what is drawn and what is checked.
"""

from __future__ import annotations

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as error:  # pragma: no cover - the tests' own environment has it
    raise ImportError(
        "graphwright.testing draws its models with Hypothesis, which is not installed: "
        "pip install 'graphwright[testing]' (or: pip install hypothesis)"
    ) from error

from .baseline import Baseline
from .check import PassFault, check_compile, check_pass, check_passes
from .program import Program, tensor
from .shrink import shrink
from .strategy import FAMILIES, programs
from .tracing import trace, trace_quickly

__all__ = [
    "FAMILIES",
    "Baseline",
    "PassFault",
    "Program",
    "check_compile",
    "check_pass",
    "check_passes",
    "programs",
    "shrink",
    "tensor",
    "trace",
    "trace_quickly",
]
