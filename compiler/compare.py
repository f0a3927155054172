"""Are these the numbers PyTorch would give? The error against float64, and how much of it rounding explains."""

from __future__ import annotations

import functools
import logging
import math
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..errors import GraphwrightError, InputError
from ..passes import dialect_attention, dialect_rows
from .reference import Keeping, max_absolute, relative_l2, rounding_noise, run_float64, widen
from .report import ErrorRow
from .users_line import users_line

log = logging.getLogger(__name__)
aten = torch.ops.aten

# float32 rounds at 6e-8; another order of summation moves a deep network by a few times eager's own error.
FACTOR_OF_EAGER = 8.0
FLOOR = {torch.float32: 4e-6, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# bfloat16 rounds by at most 2^-8, by 2^-8 / sqrt(3) in the mean; a product of two rounded operands errs by about 3e-3
# in L2, and the errors of a chain of products add up like their square root: a hundred in a row give 3e-2. float16 has
# three bits more. A product of values rounded to 8 bits errs by about a hundredth, tens in a row by a tenth. "auto" and
# "adaptive" promise a hundredth where nothing else is asked for.
REDUCED = {"bf16": 3e-2, "fp16": 4e-3, "int8": 1e-1, "auto": 1e-2, "adaptive": 1e-2}
# A model that rounds to 8 bits itself: at a tie, the last bit of what is before decides between two of 255 steps.
STEPS = 1e-2
# A comparison or an argmax may turn over where two values tie within rounding.
FLIPS = 1e-3


# Operators whose results name elements by position: among equal ones PyTorch promises no particular position.
_POSITIONS = {
    aten.argmax.default,
    aten.argmin.default,
    aten.argsort.default,
    aten.kthvalue.default,
    aten.max.dim,
    aten.median.dim,
    aten.min.dim,
    aten.mode.default,
    aten.nanmedian.dim,
    aten.sort.default,
    aten.sort.stable,
    aten.topk.default,
}


@dataclass(frozen=True)
class Chosen:
    """What the positions in an output point into: a tensor, and along which dimension (None: flattened)."""

    source: torch.Tensor
    dim: int | None

    def at(self, positions: torch.Tensor) -> torch.Tensor | None:
        """The elements at `positions`, or None where one lies outside."""
        dim = 0 if self.dim is None else self.dim
        source = self.source.reshape(-1) if self.dim is None or not self.source.dim() else self.source
        extent = source.shape[dim]
        if bool(((positions < 0) | (positions >= extent)).any()):
            return None
        if self.dim is None or not self.source.dim():
            return source[positions]
        if positions.dim() < source.dim():
            return source.gather(dim, positions.unsqueeze(dim)).squeeze(dim)
        return source.gather(dim, positions)


@dataclass(frozen=True)
class Reference:
    """Outputs of the captured graph in float64 and in plain PyTorch, for one set of inputs.

    `chosen` tells, for outputs that hold positions, what they point into; `no_float64`, why `exact` is `eager`; `noise`
    gives, for each output, the norm of what rounding every value of the graph at random changes.
    """

    exact: list[torch.Tensor]
    eager: list[torch.Tensor]
    chosen: dict[int, Chosen] = field(default_factory=dict)
    no_float64: str | None = None
    noise: Callable[[], Sequence[float]] | None = None


@dataclass(frozen=True)
class Difference:
    """An output that is further from float64 than rounding explains."""

    output: int
    error: float
    allowed: float


def reference(graph: fx.GraphModule, inputs: Sequence[torch.Tensor], names: Sequence[str] = ()) -> Reference:
    """Run the captured graph in float64 and in its own dtypes; an operator without a float64 form counts as exact.

    Raises InputError, with the user's line, where PyTorch does not run the model on these inputs; `names` are theirs.
    """
    sources = _sources(graph)
    eager, values = _run(graph, inputs, names, {source for source, _ in sources.values()})
    chosen = {output: Chosen(values[source], dim) for output, (source, dim) in sources.items()}
    try:
        noise = functools.cache(lambda: _noise(graph, inputs, len(eager)))
        return Reference(run_float64(graph, inputs), eager, chosen, noise=noise)
    except Exception as error:
        log.warning("the model does not run in float64, so that PyTorch's own numbers are the reference: %s", error)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Reference([widen(x) for x in eager], eager, chosen, reason)


def _noise(graph: fx.GraphModule, inputs: Sequence[torch.Tensor], outputs: int) -> list[float]:
    try:
        return rounding_noise(graph, inputs)
    except Exception as error:
        log.info("rounded at random the model does not run, so that rounding explains nothing: %s", error)
        return [0.0] * outputs


def _run(
    graph: fx.GraphModule, inputs: Sequence[torch.Tensor], names: Sequence[str], wanted: Collection[fx.Node]
) -> tuple[list[torch.Tensor], dict[fx.Node, Any]]:
    run = Keeping(graph, wanted)
    try:
        with torch.no_grad():
            return list(run.run(*inputs)), run.values
    except GraphwrightError:
        raise
    except Exception as error:
        names = names or [n.name for n in graph.graph.nodes if n.op == "placeholder"]
        taken = ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in zip(names, inputs, strict=True))
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        line = None if run.current is None else users_line(run.current)
        where = f"\nwhere the model says:\n{line}" if line else ""
        raise InputError(f"PyTorch does not run the model on {taken}: {reason}{where}") from error


def _sources(graph: fx.GraphModule) -> dict[int, tuple[fx.Node, int | None]]:
    """For every output that holds positions: the node they point into, and along which dimension."""
    found: dict[int, tuple[fx.Node, int | None]] = {}
    output = next(n for n in graph.graph.nodes if n.op == "output")
    for i, node in enumerate(output.args[0]):
        maker = node.args[0] if node.target is operator.getitem else node
        if maker.target not in _POSITIONS or node.meta["val"].dtype != torch.int64:
            continue
        names = [a.name for a in maker.target._schema.arguments]
        place = names.index("dim")
        default = maker.target._schema.arguments[place].default_value
        dim = maker.args[place] if place < len(maker.args) else maker.kwargs.get("dim", default)
        found[i] = (maker.args[0], dim)
    return found


def tolerance_for(graph: fx.GraphModule, tolerance: float | None) -> float | None:
    """What is allowed of a captured graph: as asked for, or, where it quantises itself, a few steps."""
    if tolerance is not None or not any(map(_quantises, graph.graph.nodes)):
        return tolerance
    return STEPS


def _quantises(node: fx.Node) -> bool:
    """Whether floating point goes in, and 8 bits come out, or are multiplied inside."""
    if node.target in dialect_rows.ROUNDING or node.target in dialect_attention.ROUNDING:
        return True
    result, *operands = (n.meta.get("val") for n in (node, *node.all_input_nodes))
    if not isinstance(result, torch.Tensor) or result.dtype not in (torch.uint8, torch.int8):
        return False
    return any(isinstance(v, torch.Tensor) and v.is_floating_point() for v in operands)


def is_random(graph: fx.GraphModule) -> bool:
    """Whether two runs of the graph differ by design (dropout in training, random tensors)."""
    return any(_draws(node) for node in graph.graph.nodes)


def _draws(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    # Operators that draw only where their dropout probability (dropout_p, p) is not 0.
    names = [a.name for a in node.target._schema.arguments]
    for name in ("dropout_p", "p"):
        if name in names:
            position = names.index(name)
            default = node.target._schema.arguments[position].default_value
            given = node.args[position] if position < len(node.args) else node.kwargs.get(name, default)
            return bool(given != 0.0)
    return True


def compare(results: Sequence[torch.Tensor], expected: Reference, tolerance: float | None) -> Difference | None:
    """The first output whose error is more than rounding explains, or None.

    The error of a floating point output is relative L2 against float64; `tolerance` replaces the default bound of
    a few times eager's own error. An output that cancels to nothing has no relative error: a few roundings of what
    it was computed from are allowed on top. Integers must be equal, but for ties that rounding may turn over; where it
    turns more, the result is held against float64 too.
    """
    for i, (result, exact, eager) in enumerate(zip(results, expected.exact, expected.eager, strict=True)):
        if result.dtype != eager.dtype or result.shape != eager.shape:
            return Difference(i, math.inf, 0.0)
        if not result.numel():
            continue
        if not (result.is_floating_point() or result.is_complex()):
            if i in expected.chosen:
                result, eager, exact = _pointed_at(expected.chosen[i], result, eager, exact)
            wrong = float((result != eager).sum()) / result.numel()
            own = float((exact != eager).sum()) / result.numel()
            if wrong > max(FLIPS, own):
                return Difference(i, wrong, max(FLIPS, own))
            allowed = FACTOR_OF_EAGER * relative_l2(eager, exact)
            if own > FLIPS and not (error := relative_l2(result, exact)) <= allowed:
                return Difference(i, error, allowed)
            continue
        own = relative_l2(eager, exact)
        allowed = _allowed(own, result.dtype, tolerance)
        error = relative_l2(result, exact)
        # Where PyTorch itself overflows, or divides zero by zero, the compiled model has to do just that.
        if not math.isfinite(own):
            allowed = _allowed(0.0, result.dtype, tolerance)
            error = relative_l2(result, _overflowing(eager, exact, result, allowed))
        if not error <= allowed and not _negligible(result, eager) and not _cancelled(i, result, expected, allowed):
            return Difference(i, error, allowed)
    return None


def _overflowing(eager: torch.Tensor, exact: torch.Tensor, result: torch.Tensor, allowed: float) -> torch.Tensor:
    """What PyTorch gives, but where it overflows on the way to numbers that the result has right (sinh, attention)."""
    both = ~eager.isfinite() & result.isfinite()
    right = relative_l2(result[both], exact[both]) <= allowed
    return torch.where(both, result, eager) if right else eager


def errors(names: Sequence[str], results: Sequence[torch.Tensor], expected: Reference) -> tuple[ErrorRow, ...]:
    """The error of every floating point output against the reference, beside eager's own."""
    rows = []
    for name, result, exact, eager in zip(names, results, expected.exact, expected.eager, strict=True):
        if result.is_floating_point():
            rows.append(
                ErrorRow(
                    name,
                    relative_l2(result, exact),
                    max_absolute(result, exact),
                    relative_l2(eager, exact),
                    max_absolute(eager, exact),
                    expected.no_float64,
                )
            )
    return tuple(rows)


def _pointed_at(
    chosen: Chosen, result: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Replace positions by the elements they point at, so that equal elements count as equal; NaNs as one value."""
    elements = chosen.at(result)
    if elements is None:
        return result, eager, exact
    theirs, best = chosen.at(eager), chosen.at(exact)
    assert theirs is not None
    assert best is not None
    return elements.nan_to_num(), theirs.nan_to_num(), best.nan_to_num()


def _allowed(own: float, dtype: torch.dtype, tolerance: float | None) -> float:
    if tolerance is not None:
        return tolerance
    return max(FACTOR_OF_EAGER * own, FLOOR.get(dtype, 4e-6))


def _cancelled(i: int, result: torch.Tensor, expected: Reference, allowed: float) -> bool:
    """Whether an output is so small beside what it was computed from that a few roundings of that explain its error."""
    exact = expected.exact[i]
    if expected.noise is None or result.is_complex() or not bool(result.isfinite().all() and exact.isfinite().all()):
        return False
    difference, scale = (float(torch.linalg.vector_norm(x)) for x in (widen(result) - exact, exact))
    explained = FACTOR_OF_EAGER * expected.noise()[i]
    return explained > FLOOR[torch.float32] * scale and difference <= allowed * scale + explained


def _negligible(result: torch.Tensor, eager: torch.Tensor) -> bool:
    """Whether all that differs is smaller than the smallest normal number of the dtype."""
    if not torch.equal(result.isfinite(), eager.isfinite()) or not result.is_floating_point():
        return False
    return max_absolute(result, eager) <= torch.finfo(eager.dtype).tiny
