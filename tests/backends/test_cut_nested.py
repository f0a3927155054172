"""Nested transcendental functions: the same numbers, and code whose size is linear in their nesting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tvm import tirx

import graphwright
from graphwright.backends.aot.cut_nested import cut
from graphwright.backends.kernels import vector_math


def depth(root: Any) -> int:
    """How many of our functions are applied one upon another in the deepest expression."""
    if isinstance(root, tirx.SeqStmt):
        return max(depth(statement) for statement in root.seq)
    if isinstance(root, tirx.BufferStore | tirx.Bind):
        return depth(root.value)
    if isinstance(root, tirx.Add):
        return max(depth(root.a), depth(root.b))
    args = getattr(root, "args", ())
    ours = int(str(getattr(getattr(root, "op", None), "name", "")).startswith("graphwright."))
    return ours + max((depth(argument) for argument in args), default=0)


@pytest.fixture
def buffer() -> Any:
    return tirx.decl_buffer((4,), "float32", "x")


def test_arguments_go_through_memory(buffer: Any) -> None:
    x = tirx.BufferLoad(buffer, [0])
    value = vector_math.tanh(x + vector_math.sigmoid(vector_math.exp(x)))
    store = tirx.BufferStore(buffer, value, [1])
    assert depth(store) == 3
    assert depth(cut(store)) == 1


def test_a_binding_is_cut_and_stays_visible(buffer: Any) -> None:
    var = tirx.Var("v", "float32")
    bind = tirx.Bind(var, vector_math.tanh(tirx.BufferLoad(buffer, [0])))
    body = cut(tirx.SeqStmt([bind, tirx.BufferStore(buffer, vector_math.tanh(var), [1])]))
    assert not any(isinstance(statement, tirx.SeqStmt) for statement in body.seq)
    bound = next(statement for statement in body.seq if isinstance(statement, tirx.Bind))
    assert depth(bound) == 0


@pytest.mark.parametrize("guard", ["branch", "let", "single"])
def test_left_alone(buffer: Any, guard: str) -> None:
    x = tirx.BufferLoad(buffer, [0])
    var = tirx.Var("v", "float32")
    inner = vector_math.exp(x)
    value = {
        "branch": lambda: tirx.if_then_else(tirx.Var("i", "int32") < 1, vector_math.tanh(inner), x),
        "let": lambda: tirx.Let(var, x, vector_math.tanh(vector_math.exp(var))),
        "single": lambda: inner + vector_math.tanh(x),
    }[guard]()
    store = tirx.BufferStore(buffer, value, [1])
    assert cut(store).same_as(store)


def test_a_guard_inside_an_argument_moves_with_it(buffer: Any) -> None:
    x = tirx.BufferLoad(buffer, [0])
    guarded = tirx.if_then_else(tirx.Var("i", "int32") < 1, vector_math.exp(x), x)
    body = cut(tirx.BufferStore(buffer, vector_math.tanh(guarded), [1]))
    assert depth(body) == 1
    assert body.seq[1].value.same_as(guarded)


def test_deep_nests_compile_and_keep_their_numbers() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = torch.tanh(torch.exp(-torch.sigmoid(x)) * y)
        return x

    x, y = torch.randn(3, 37), torch.randn(3, 37)
    compiled = graphwright.compile(model, (x, y), cache=False)
    # Eighteen functions of at most 2 ulp each, one upon another.
    torch.testing.assert_close(compiled(x, y), model(x, y), rtol=1e-5, atol=1e-6)


def test_nests_with_choices_in_them() -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.sigmoid(x) * y + torch.nn.functional.mish(x))

    x, y = torch.randn(3, 37), torch.randn(3, 37)
    torch.testing.assert_close(graphwright.compile(model, (x, y), cache=False)(x, y), model(x, y), rtol=1e-5, atol=1e-6)
