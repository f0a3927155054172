"""Activations that were written out become one operator again.

    x * sigmoid(x)                                              -> silu(x)
    x * sigmoid(1.702 * x)                                      -> graphwright::swish(x, 1.702), of whatever factor
    x * tanh(softplus(x))                                       -> mish(x)
    clamp(x + 3, 0, 6) / 6                                      -> hardsigmoid(x)
    x * hardsigmoid(x), x * clamp(x + 3, 0, 6) / 6              -> hardswish(x)
    0.5 * x * (1 + erf(x / sqrt(2)))                            -> gelu(x)
    0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))  -> gelu(x, approximate="tanh")
    clamp(clamp(x, a, None), None, b), a <= b                   -> clamp(x, a, b)

Factors may come in any order, and a quotient as a product. Constants must be those of the formula to float32.
Refused where a value in between is read by anybody else: it would be computed twice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import fx

from ..hwdb import Hardware
from . import dialect, rewrite
from .attention_operands import one_number
from .epilogue import activation_of
from .refusals import keep
from .rewrite import Operator

log = logging.getLogger(__name__)
aten = torch.ops.aten


def recognise_activations(graph: fx.GraphModule, hw: Hardware) -> int:
    """Replace written-out activations by their operators; returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        found = _clamps(node) if node.target is aten.clamp.default else _match(node)
        if found is None:
            continue
        target, args, kwargs = found
        new = rewrite.call(graph, target, args, kwargs, before=node, value=node.meta["val"])
        node.replace_all_uses_with(new)
        rewrite.erase_cone(node)
        count += 1
    return rewrite.finish(graph, count)


Spelling = tuple[Operator, tuple[object, ...], dict[str, object]]


def _match(node: fx.Node) -> Spelling | None:
    if node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    coefficient, factors = _factors(node)
    if not rewrite.is_float(node, *factors) or any(rewrite.shape_of(f) != rewrite.shape_of(node) for f in factors):
        return None
    if len(factors) == 1 and _close(coefficient, 1 / 6, node):
        x = _shifted_relu6(factors[0])
        return None if x is None else (aten.hardsigmoid.default, (x,), {})
    if len(factors) != 2:
        return None
    for x, gate in (factors, factors[::-1]):
        for test, wanted, target, kwargs in _GATES:
            if _close(coefficient, wanted, x) and test(gate, x):
                return target, (x,), dict(kwargs)
        if coefficient == 1 and (beta := _sigmoid_of_multiple(gate, x)) is not None:
            return dialect.swish, (x, beta), {}
    return None


def _factors(node: fx.Node, top: bool = True) -> tuple[float, list[fx.Node]]:
    """A product as a number times the nodes it multiplies, as far as nobody else reads the steps."""
    if not top and rewrite.sole_user(node) is None:
        return 1.0, [node]
    divisor = one_number(node.args[1]) if node.target is aten.div.Tensor else None
    if divisor is not None and isinstance(node.args[0], fx.Node):
        coefficient, factors = _factors(node.args[0], False)
        return (coefficient / divisor if divisor else math.nan), factors
    if node.target is not aten.mul.Tensor:
        return 1.0, [node]
    product, all_factors = 1.0, []
    for operand in node.args:
        number = one_number(operand)
        if number is None and isinstance(operand, fx.Node):
            coefficient, factors = _factors(operand, False)
            product *= coefficient
            all_factors += factors
        else:
            product *= math.nan if number is None else number
    return product, all_factors


def _is_sigmoid(gate: fx.Node, x: fx.Node) -> bool:
    return _inner(gate, aten.sigmoid.default) is x


def _sigmoid_of_multiple(gate: fx.Node, x: fx.Node) -> float | None:
    """beta where the gate is sigmoid(beta * x), and what is in between is read once."""
    inner = _inner(gate, aten.sigmoid.default)
    if inner is None or inner is x or rewrite.sole_user(inner) is None:
        return None
    beta, factors = _factors(inner)
    return beta if factors == [x] and math.isfinite(beta) else None


def _is_tanh_of_softplus(gate: fx.Node, x: fx.Node) -> bool:
    inner = _inner(gate, aten.tanh.default)
    if not rewrite.calls(inner, aten.softplus.default) or rewrite.sole_user(inner) is None:
        return False
    a = rewrite.arguments(inner)
    return a["self"] is x and (a["beta"], a["threshold"]) == (1, 20)


def _is_hardsigmoid(gate: fx.Node, x: fx.Node) -> bool:
    return _inner(gate, aten.hardsigmoid.default) is x


def _is_shifted_relu6(gate: fx.Node, x: fx.Node) -> bool:
    return _shifted_relu6(gate) is x


def _is_one_plus_erf(gate: fx.Node, x: fx.Node) -> bool:
    erf = _plus(gate, 1.0)
    inner = None if erf is None else _inner(erf, aten.erf.default)
    if inner is None or rewrite.sole_user(inner) is None:
        return False
    coefficient, factors = _factors(inner)
    return factors == [x] and _close(coefficient, math.sqrt(0.5), x)


def _is_one_plus_tanh(gate: fx.Node, x: fx.Node) -> bool:
    tanh = _plus(gate, 1.0)
    inner = None if tanh is None else _inner(tanh, aten.tanh.default)
    if inner is None or rewrite.sole_user(inner) is None:
        return False
    coefficient, factors = _factors(inner)
    if not _close(coefficient, math.sqrt(2 / math.pi), x):
        return False
    if len(factors) == 2 and x in factors:  # x * (1 + 0.044715 * x * x)
        other = factors[1] if factors[0] is x else factors[0]
        square = _plus(other, 1.0)
        return square is not None and _is_power(square, x, 2)
    if len(factors) != 1 or factors[0].target is not aten.add.Tensor or factors[0].kwargs:
        return False
    a, b = factors[0].args
    if rewrite.sole_user(factors[0]) is None or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return False
    return (a is x and _is_power(b, x, 3)) or (b is x and _is_power(a, x, 3))


def _is_power(node: fx.Node, x: fx.Node, exponent: int) -> bool:
    """Whether the node is 0.044715 * x ** exponent, and read once."""
    if rewrite.sole_user(node) is None:
        return False
    coefficient, factors = _factors(node)
    if not _close(coefficient, 0.044715, x):
        return False
    if factors == [x] * exponent:
        return True
    power = factors[0] if len(factors) == 1 else None
    return power is not None and _inner(power, aten.pow.Tensor_Scalar) is x and bool(power.args[1] == exponent)


_GATES: tuple[tuple[Callable[[fx.Node, fx.Node], bool], float, Operator, dict[str, object]], ...] = (
    (_is_sigmoid, 1.0, aten.silu.default, {}),
    (_is_tanh_of_softplus, 1.0, aten.mish.default, {}),
    (_is_hardsigmoid, 1.0, aten.hardswish.default, {}),
    (_is_shifted_relu6, 1 / 6, aten.hardswish.default, {}),
    (_is_one_plus_erf, 0.5, aten.gelu.default, {}),
    (_is_one_plus_tanh, 0.5, aten.gelu.default, {"approximate": "tanh"}),
)


def _clamps(node: fx.Node) -> Spelling | None:
    inner = node.args[0]
    if not rewrite.calls(inner, aten.clamp.default) or rewrite.sole_user(inner) is None:
        return None
    a, b = rewrite.arguments(inner), rewrite.arguments(node)
    low, high = a["min"], b["max"]
    if a["max"] is not None or b["min"] is not None or not low <= high:
        keep(log, node, "%s and it do not make one range", inner)
        return None
    if not rewrite.is_float(inner, node, a["self"]):
        return None
    return aten.clamp.default, (a["self"], low, high), {}


def _shifted_relu6(node: fx.Node) -> fx.Node | None:
    """x where the node is clamp(x + 3, 0, 6), read once."""
    if rewrite.sole_user(node) is None or activation_of(node) != ("relu6", []):
        return None
    inner = node.args[0]
    assert isinstance(inner, fx.Node)
    return _plus(inner, 3.0)


def _inner(node: fx.Node, target: Operator) -> fx.Node | None:
    """The operand of a call of `target` that is read once."""
    if node.target is not target or rewrite.sole_user(node) is None:
        return None
    operand = node.args[0]
    return operand if isinstance(operand, fx.Node) else None


def _plus(node: fx.Node, number: float) -> fx.Node | None:
    """x where the node is x + number, read once."""
    if node.target is not aten.add.Tensor or node.kwargs or rewrite.sole_user(node) is None:
        return None
    x, other = node.args
    return x if isinstance(x, fx.Node) and _number(other) and other == number else None


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _close(value: float, wanted: float, x: fx.Node) -> bool:
    """Whether a constant is the one of the formula as far as the dtype of `x` tells."""
    exact = x.meta["val"].dtype == torch.float64
    return math.isclose(value, wanted, rel_tol=1e-15 if exact else 1e-6)
