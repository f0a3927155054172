"""Where the zeros of a pruned weight may lie, and which weights become zero for a given importance of each.

    N:M      N of M neighbouring inputs of an output are kept                "2:4"  "1:4"  "4:8"
    RxC      blocks of R neighbouring inputs by C neighbouring outputs are   "1x16" "4x16" "16x16"
             kept or zero as a whole

Weights are seen as a matrix [outputs, taps * input channels] for this: the inputs of a convolution are the channels of
one tap. A block's outputs are the columns of a matrix product, which kernels for CPUs compute a vector at a time; the
last block of outputs may be smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import InputError, suggest
from ..numbers_given import is_number


@dataclass(frozen=True)
class Pattern:
    """`kept` of `inputs` neighbouring inputs of every output; or, with `kept` 0, blocks of inputs x outputs."""

    name: str
    inputs: int
    outputs: int = 1
    kept: int = 0

    @property
    def is_blocks(self) -> bool:
        """Whether blocks are kept or not; otherwise the pattern alone says how many weights are."""
        return not self.kept

    def refusal(self, channels: int) -> str | None:
        """Why a weight with so many input channels cannot have the pattern, or None."""
        if channels % self.inputs:
            return f"its {channels} inputs are no multiple of {self.inputs}"
        return None


PATTERNS: Mapping[str, Pattern] = {
    pattern.name: pattern
    for pattern in (
        *(Pattern("2:4", 4, kept=2), Pattern("1:4", 4, kept=1), Pattern("4:8", 8, kept=4)),
        *(Pattern("1x16", 1, 16), Pattern("4x16", 4, 16), Pattern("16x16", 16, 16)),
    )
}
DEFAULT_SPARSITY = 0.75


def pattern_of(name: Any, sparsity: Any) -> tuple[Pattern, float]:
    """The pattern and the share of zeros. Raises InputError for what there is not."""
    if not isinstance(name, str) or name not in PATTERNS:
        raise InputError(f"pattern={name!r}{suggest(str(name), PATTERNS)}: there are {', '.join(map(repr, PATTERNS))}")
    pattern = PATTERNS[name]
    if pattern.is_blocks:
        share = DEFAULT_SPARSITY if sparsity is None else sparsity
        if not is_number(share) or not 0.0 < share < 1.0:
            raise InputError(f"sparsity={share!r}: the share of blocks that become zero is a number between 0 and 1")
        return pattern, float(share)
    share = 1.0 - pattern.kept / pattern.inputs
    if sparsity is not None and sparsity != share:
        raise InputError(
            f"sparsity={sparsity!r}: {name!r} makes {share:g} of the weights zero, whatever else is asked; leave "
            "sparsity out, or take a pattern of blocks"
        )
    return pattern, share


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """weight[O, C] or [O, C, taps...] as [O, taps * C]."""
    return weight.movedim(1, -1).reshape(len(weight), -1)


def from_matrix(matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The weight of the shape of `like` that `as_matrix` turns into `matrix`."""
    outputs, channels, *taps = like.shape
    return matrix.reshape(outputs, *taps, channels).movedim(-1, 1).contiguous()


def block_scores(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """scores[O, K] added up over the blocks, as [ceil(O / outputs), K / inputs]."""
    outputs, inputs = scores.shape
    rows = -(-outputs // pattern.outputs)
    padded = scores.new_zeros((rows * pattern.outputs, inputs))
    padded[:outputs] = scores
    return padded.view(rows, pattern.outputs, -1, pattern.inputs).sum((1, 3))


def from_blocks(kept: torch.Tensor, pattern: Pattern, outputs: int) -> torch.Tensor:
    """The mask [O, K] of weights for one of blocks."""
    return kept.repeat_interleave(pattern.outputs, 0)[:outputs].repeat_interleave(pattern.inputs, 1)


def neighbours_mask(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Which weights an N:M pattern keeps: the most important of each group."""
    groups = scores.view(len(scores), -1, pattern.inputs)
    best = groups.topk(pattern.kept, dim=2).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, best, True).view(scores.shape)


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of the `count` largest of `scores`, the first ones where some are equal."""
    order = scores.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(scores.shape)


def block_masks(scores: Mapping[str, torch.Tensor], sparsity: float, budget: str) -> dict[str, torch.Tensor]:
    """Which blocks are kept, by the importance of each block of each layer.

    budget "per_layer": the same share of every layer. "global": that share of all blocks, by a block's part of what its
    layer has in all, so that layers of different scales compare; half of what the share leaves is kept in every layer.
    """
    kept = 1.0 - sparsity
    if budget == "per_layer":
        return {name: largest(s, max(1, round(kept * s.numel()))) for name, s in scores.items()}
    floor = {name: largest(s, max(1, round(kept / 2 * s.numel()))) for name, s in scores.items()}
    parts = {name: s.double() / s.double().sum().clamp_min(1e-300) for name, s in scores.items()}
    # What is kept in any case stands before everything else.
    ranked = torch.cat([torch.where(floor[name], torch.inf, part).flatten() for name, part in parts.items()])
    chosen = largest(ranked, round(kept * ranked.numel()))
    pieces = torch.split(chosen, [s.numel() for s in scores.values()])
    return {name: piece.view(s.shape) for (name, s), piece in zip(scores.items(), pieces, strict=True)}
