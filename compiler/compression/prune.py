"""`graphwright.prune`: a model -> a copy with zeros where a pattern wants them; `keep_zeros` lets it be trained so."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ...errors import InputError, suggest
from ..calibration import listed
from . import importance as weigh
from .modules import check_keep, check_module, few
from .sparsity_patterns import (
    Pattern,
    as_matrix,
    block_masks,
    block_scores,
    from_blocks,
    from_matrix,
    neighbours_mask,
    pattern_of,
)

log = logging.getLogger(__name__)

BUDGETS = ("per_layer", "global")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Layer:
    """A layer that can be pruned, with its weight as a matrix [outputs, taps * input channels]."""

    module: nn.Linear | nn.Conv1d | nn.Conv2d
    matrix: torch.Tensor

    @property
    def groups(self) -> int:
        """Groups of outputs with inputs of their own."""
        return 1 if isinstance(self.module, nn.Linear) else self.module.groups

    def set(self, matrix: torch.Tensor) -> None:
        """Store another matrix as the weight."""
        with torch.no_grad():
            self.module.weight.copy_(from_matrix(matrix, self.module.weight))


def prune(
    model: nn.Module,
    pattern: str = "2:4",
    sparsity: float | None = None,
    importance: str = "magnitude",
    budget: str = "per_layer",
    calibration: Iterable[Any] | None = None,
    keep: Sequence[str] = (),
) -> nn.Module:
    """A copy of `model` whose linear and convolution weights (1d, 2d) have zeros in a pattern; else it is the same.

    pattern: "2:4", "1:4", "4:8": so many of neighbouring inputs of every output are kept; "1x16", "4x16", "16x16":
        blocks of inputs x outputs are zero as a whole, which `compile` has kernels for (docs/compression.md).
    sparsity: the share of blocks that become zero, 0.75 unless given; an N:M pattern has its own.
    importance: "magnitude"; "wanda" and "hessian" also look at the inputs of each layer on `calibration`, and "hessian"
        corrects the weights that stay (compiler/compression/importance.py has the formulas and papers).
    budget: "per_layer" makes the same share of every layer zero, "global" that share of all blocks.
    calibration: inputs, each as example_inputs of compile: a few dozen like those the model will get.
    keep: names of modules that are not pruned; * and ? as in a shell.

    Left alone, with a line in the log: layers whose inputs are no multiple of the pattern's, that share their weight
    with another module, or that calibration never ran.
    Raises InputError for options that do not fit, where no layer is left, and for inputs with infinities or NaN.
    """
    check_module(model, "prune", "prune")
    chosen, share = pattern_of(pattern, sparsity)
    _check(chosen, importance, budget, calibration)
    pruned = copy.deepcopy(model)
    layers = _layers(pruned, chosen, keep)
    if importance != "magnitude":
        assert calibration is not None
        data = listed(calibration)
        if not data:
            raise InputError(f"calibration is empty: importance={importance!r} looks at inputs")
    if importance == "hessian":
        _by_hessian(pruned, layers, chosen, share, budget, data)
        return pruned
    seen = {} if importance == "magnitude" else _observed(pruned, layers, data)
    scores = {name: _scores(layer, seen.get(name)) for name, layer in layers.items()}
    for name, mask in _masks(scores, chosen, share, budget).items():
        layers[name].set(torch.where(mask, layers[name].matrix, 0.0))
    return pruned


class KeptZeros:
    """Weights whose zeros stay zeros: `keep_zeros` makes it; leaving it as a context, or `remove`, ends that."""

    def __init__(self, zeros: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._zeros = dict(zeros)
        self._handle: Any = None

    @property
    def names(self) -> tuple[str, ...]:
        """The weights, by the names of their parameters."""
        return tuple(self._zeros)

    def apply(self) -> None:
        """Set the weights to zero where they were."""
        with torch.no_grad():
            for weight, zeros in self._zeros.values():
                weight.masked_fill_(zeros, 0.0)

    def remove(self) -> None:
        """Let the optimizer change them again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __enter__(self) -> KeptZeros:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def keep_zeros(model: nn.Module, optimizer: torch.optim.Optimizer) -> KeptZeros:
    """Let the zeros of pruned weights stay zeros while `optimizer` trains them: they are set again after every step.

    Of linear layers and convolutions, whoever put the zeros there and however few they are; a weight that is zero as a
    whole (a layer that begins so) is left to the optimizer.
    Raises InputError where no weight has zeros, or `optimizer` trains none of those that do, and for what is no module
    and no optimizer.
    """
    if isinstance(model, torch.optim.Optimizer) and isinstance(optimizer, nn.Module):
        raise InputError("keep_zeros takes the model first: keep_zeros(model, optimizer)")
    check_module(model, "keep_zeros", "prune")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"keep_zeros sets zeros again after each step of an optimizer of torch.optim, and got a "
            f"{type(optimizer).__name__}: pass the one that trains the model"
        )
    zeros = {
        f"{name}.weight".lstrip("."): (module.weight, (module.weight == 0).detach())
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS)
    }
    found = {n: (w, z) for n, (w, z) in zeros.items() if bool(z.any()) and not bool(z.all())}
    if not found:
        raise InputError("keep_zeros: no linear layer or convolution has zeros in its weights: prune the model first")
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if trained.isdisjoint(id(weight) for weight, _ in found.values()):
        raise InputError(
            f"keep_zeros: the optimizer trains none of the weights with zeros, {few(found)}: make it with the "
            "parameters of the pruned model, which is a copy"
        )
    kept = KeptZeros(found)
    kept._handle = optimizer.register_step_post_hook(lambda *_: kept.apply())
    return kept


def _check(pattern: Pattern, importance: Any, budget: Any, calibration: Any) -> None:
    for option, value, allowed in (("importance", importance, weigh.IMPORTANCE), ("budget", budget, BUDGETS)):
        if value not in allowed:
            there = ", ".join(map(repr, allowed))
            raise InputError(f"{option}={value!r}{suggest(str(value), allowed)}: there are {there}")
    if budget == "global" and not pattern.is_blocks:
        raise InputError(
            f"budget='global' moves zeros between layers, and {pattern.name!r} wants as many in every group of "
            "weights: take a pattern of blocks, or budget='per_layer'"
        )
    if importance != "magnitude" and calibration is None:
        raise InputError(
            f"importance={importance!r} looks at the inputs of every layer: pass calibration=[inputs, ...], a few "
            "dozen that look like those the model will get"
        )


def _layers(model: nn.Module, pattern: Pattern, keep: Sequence[str]) -> dict[str, Layer]:
    """The layers to prune. Raises InputError where there is none, or where `keep` names none."""
    candidates = {name: m for name, m in model.named_modules() if isinstance(m, _LAYERS)}
    if not candidates:
        raise InputError(f"{type(model).__name__} has no nn.Linear, nn.Conv1d or nn.Conv2d to prune")
    check_keep(keep, "are not pruned", candidates)
    shared = _shared(model)
    layers, refused = {}, {}
    for name, module in candidates.items():
        if any(fnmatchcase(name, one) for one in keep):
            refused[name] = "keep names it"
        elif (reason := _refusal(module, pattern, shared)) is not None:
            refused[name] = reason
            log.info("%s is not pruned: %s", name, reason)
        else:
            layers[name] = Layer(module, as_matrix(module.weight.detach()))
    if not layers:
        reasons = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(refused.items())[:5])
        raise InputError(f"no layer can be pruned to {pattern.name!r}: {reasons}")
    return layers


def _shared(model: nn.Module) -> set[int]:
    """The parameters that several modules hold."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {parameter for parameter, count in owners.items() if count > 1}


def _refusal(module: nn.Module, pattern: Pattern, shared: set[int]) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a parametrization"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if id(weight) in shared:
        return "another module reads its weight too"
    groups = getattr(module, "groups", 1)
    if pattern.is_blocks and groups > 1 and (len(weight) // groups) % pattern.outputs:
        return f"its groups of {len(weight) // groups} outputs are no multiple of {pattern.outputs}"
    return pattern.refusal(weight.shape[1])


def _scores(layer: Layer, squares: torch.Tensor | None) -> torch.Tensor:
    scores = layer.matrix.float() ** 2
    return scores if squares is None else scores * weigh.by_row(squares, len(scores))


def _observed(model: nn.Module, layers: dict[str, Layer], data: Sequence[Any]) -> dict[str, torch.Tensor]:
    seen = weigh.observe(model, {name: layer.module for name, layer in layers.items()}, data, weigh.squares)
    _drop_unseen(layers, seen)
    return seen


def _drop_unseen(layers: dict[str, Layer], seen: Mapping[str, torch.Tensor]) -> None:
    for name in [name for name in layers if name not in seen]:
        log.info("%s is not pruned: calibration never ran it", name)
        del layers[name]
    if not layers:
        raise InputError("calibration ran no layer that can be pruned")


def _masks(scores: dict[str, torch.Tensor], pattern: Pattern, share: float, budget: str) -> dict[str, torch.Tensor]:
    """Which elements of each matrix stay."""
    if not pattern.is_blocks:
        return {name: neighbours_mask(s, pattern) for name, s in scores.items()}
    blocks = {name: block_scores(s, pattern) for name, s in scores.items()}
    return {
        name: from_blocks(kept, pattern, len(scores[name])) for name, kept in block_masks(blocks, share, budget).items()
    }


def _by_hessian(
    model: nn.Module, layers: dict[str, Layer], pattern: Pattern, share: float, budget: str, data: Sequence[Any]
) -> None:
    """Masks by the price of each weight, and what stays corrected, layers in their order: later ones see what is left.

    With a global budget the prices of all layers are found first, in the dense model.
    """
    masks: dict[str, torch.Tensor] = {}
    if budget == "global":
        scores: dict[str, torch.Tensor] = {}
        for part in _parts(layers):
            scores |= {name: _prices(part[name], f) for name, f in _factors(model, part, data).items()}
        for name in [name for name in layers if name not in scores]:
            del layers[name]
        masks = _masks(scores, pattern, share, budget)
    done = 0
    for part in _parts(layers):
        for name, factors in _factors(model, part, data).items():
            layer = part[name]
            mask = masks.get(name)
            if mask is None:
                mask = _masks({name: _prices(layer, factors)}, pattern, share, budget)[name]
            rows, kept = layer.matrix.chunk(layer.groups), mask.chunk(layer.groups)
            layer.set(torch.cat([weigh.corrected(*each) for each in zip(rows, kept, factors, strict=True)]))
            done += 1
    if not done:
        raise InputError("calibration ran no layer that can be pruned")


def _parts(layers: Mapping[str, Layer]) -> Iterator[dict[str, Layer]]:
    """Layers in their order, as many at once as there is room for their matrices."""
    part: dict[str, Layer] = {}
    held = 0
    for name, layer in layers.items():
        size = 4 * layer.groups * layer.matrix.shape[1] ** 2
        if part and held + size > weigh.MOST_BYTES:
            yield part
            part, held = {}, 0
        part[name] = layer
        held += size
    if part:
        yield part


def _factors(model: nn.Module, part: Mapping[str, Layer], data: Sequence[Any]) -> dict[str, list[torch.Tensor]]:
    """For each layer that runs, a factor for each of its groups."""
    seen = weigh.observe(model, {name: layer.module for name, layer in part.items()}, data, weigh.products)
    for name in part:
        if name not in seen:
            log.info("%s is not pruned: calibration never ran it", name)
    return {name: [weigh.inverse_factor(h) for h in seen[name]] for name in part if name in seen}


def _prices(layer: Layer, factors: Sequence[torch.Tensor]) -> torch.Tensor:
    rows = layer.matrix.chunk(layer.groups)
    return torch.cat([weigh.prices(r, f) for r, f in zip(rows, factors, strict=True)])
