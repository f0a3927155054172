"""Weights of which 2 of 4 neighbours of the sum are zero, as sparse matrix units read them: half of them, and places.

    values     [columns][depth / 2]            the two that are kept of every four, in their order
    places     [columns / 16][depth / 64][32]  a word a lane: of each four two numbers of 2 bits, the first one lower

    lane l of 32 has columns l / 4 (lower half of its word) and l / 4 + 8 (upper half) of 16, and 16 of the sum from
    l % 4 * 16: lanes with l % 4 < 2 are those of the first 32 of the sum (sparsity selector 0), the others of the next

PTX ISA, "Matrix multiply-accumulate operation using mma.sp instruction with sparse matrix A": m16n8k32 of .f16 and
.bf16, with ordered metadata: the two numbers differ and ascend. With less than two values that are not zero, zeros fill
up.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx

from ...hwdb import Hardware
from ...hwdb.accelerators import Gpu
from ...passes import rewrite
from ...passes.zero_blocks import zeros_of
from ..kernels.loops import Shape, flat
from .matrix_tile import SIDE, MatrixTile, Product, choose_matrix_tile
from .stage import Weights

GROUP, KEPT = 4, 2
STEP = 32  # of the sum, in one multiplication
PAIR = 2 * STEP  # in a word of places
SPARSE_BYTES = 1.125  # of an element of the dense matrix: half of 2, and 2 bits of each that is kept
PAYS = 0.9  # of the cycles of dense products
_SEVERAL = 0.4  # of weights that are zero: the report says why they are multiplied
_AS_DENSE = "weights 2 of 4, multiplied as dense ones"
_WORDS = 9  # in 32: of values 8, of places 1


def _kept_places() -> torch.Tensor:
    """By which of four are not zero, as bits: the two places that are kept, -1 for more than two."""
    places = []
    for bits in itertools.product((0, 1), repeat=GROUP):
        filled = [i for i in range(GROUP) if bits[GROUP - 1 - i]]
        rest = [i for i in range(GROUP) if i not in filled]
        places.append(sorted([*filled, *rest][:KEPT]) if len(filled) <= KEPT else [-1, -1])
    return torch.tensor(places)


def is_two_of_four(weight: torch.Tensor) -> bool:
    """Whether at most two of every four neighbours of a row of weight[N, K] are not zero."""
    groups = _groups(weight)
    step = max(1, len(groups) // 1024) | 1  # a look at some first: most matrices are dense
    return all(int(some.ne(0).sum(1).max()) <= KEPT for some in (groups[::step], groups)) if len(groups) else False


def _groups(weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(weight, (0, -weight.shape[1] % GROUP)).reshape(-1, GROUP)


def pack(matrix: torch.Tensor, columns: int, dtype: str) -> torch.Tensor:
    """matrix[N, K], which is 2 of 4, as words: values, then places; N up to a multiple of `columns`, K of 64."""
    padding = (0, -matrix.shape[1] % PAIR, 0, -matrix.shape[0] % columns)
    whole = torch.nn.functional.pad(matrix.float(), padding).to(getattr(torch, dtype))
    down, depth = whole.shape
    groups = whole.view(-1, GROUP)
    filled = groups.ne(0).int()
    places = _kept_places()[sum(filled[:, i] << i for i in range(GROUP)).long()]  # type: ignore[union-attr]
    assert int(places.min()) >= 0, "more than two of four weights are not zero"
    values = groups.gather(1, places).contiguous().view(-1).view(torch.int32)
    codes = (places[:, 0] | places[:, 1] << 2).view(down, -1, GROUP)
    bits = sum(codes[..., i] << 4 * i for i in range(GROUP))  # 16 of the sum
    lower, upper = bits.view(-1, 2, SIDE // 2, depth // PAIR, 4).unbind(1)  # type: ignore[union-attr]
    words = (lower | upper << 16).transpose(1, 2).to(torch.int32)
    return torch.cat([values, words.flatten()]).view(down, depth * _WORDS // 32)


def packed_extents(columns: int, depth: int, tile: MatrixTile) -> Shape:
    """The shape of what `pack` makes."""
    return columns + -columns % tile.columns, (depth + -depth % PAIR) * _WORDS // 32


def as_sparse_weights(buffer: Any) -> Weights:
    """A buffer of `pack` as an operand."""
    down, words = (int(extent) for extent in buffer.shape)
    depth = words * 32 // _WORDS
    return Weights(flat(buffer), depth // KEPT, kept=KEPT, places=down * depth // 4)


def weight_tile(hw: Hardware, product: Product, weight: fx.Node, planar: bool = False) -> MatrixTile:
    """The tile for a product with the constant `weight` [N, K, ...]: on sparse units where it is 2 of 4 and that pays.

    The sum may be parted; neither where it multiplies `planar` images (NCHW).
    """
    dense = choose_matrix_tile(hw, product, not planar)
    module = weight.graph.owning_module
    tensor = None if module is None else rewrite.constant(module, weight)
    if tensor is None:
        return dense
    matrix = tensor.flatten(1)
    if not is_two_of_four(matrix):
        zeros = zeros_of(matrix)
        return dense.noted(f"{100 * zeros:.0f} % of the weights zero, not 2 of 4") if zeros >= _SEVERAL else dense
    if tensor.dim() > 2 and tuple(tensor.shape[2:]) != (1, 1):
        return dense.noted(f"{_AS_DENSE}: windows of more than a pixel")
    if planar:
        return dense.noted(f"{_AS_DENSE}: channels are no neighbours (NCHW)")
    if product.batch > 1:
        return dense.noted(f"{_AS_DENSE}: groups")
    if not isinstance(hw, Gpu) or not hw.multiplies_two_of_four(product.dtype):
        return dense.noted(f"{_AS_DENSE}: no kernel for them on this device")
    half = product.sparse(SPARSE_BYTES)
    sparse = choose_matrix_tile(hw, half, True)
    share = half.cycles(hw, sparse)[0] / product.cycles(hw, dense)[0]
    if share > PAYS:
        return dense.noted(f"{_AS_DENSE}: without the zeros predicted to take {share:.2f} of the cycles")
    return sparse.noted(f"predicted to take {share:.2f} of the cycles of dense weights")
