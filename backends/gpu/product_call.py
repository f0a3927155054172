"""What the operators with products on GPUs share: what follows a sum, and how a call of a kernel is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx
from tvm import tirx
from tvm.tirx.script import builder as T

from ...hwdb import Hardware
from ...hwdb.accelerators import Gpu
from ...hwdb.cost import Work
from ...passes.rewrite import shape_of
from ..kernels.loops import Shape, flat, span
from ..lowering.kernels_matmul import refuse_dtypes, refuse_large
from ..lowering.registry import KernelCall, Packed, Refusal, Second
from . import sparse_weights
from .amd_fragments import AmdUnits, form_of
from .matrix_product import Units, matrix_product
from .matrix_tile import MatrixTile, Product, choose_matrix_tile
from .parts import add_parts, in_parts
from .product import Finish, product
from .rounding import as_kept
from .sparse_product import SparseMma
from .sparse_weights import SPARSE_BYTES, weight_tile
from .stage import Halves, Operand, Weights
from .tile import LANES, Tile, choose_tile
from .wmma import Wmma

FEWEST = 16  # rows and columns of a product that a tile pays for


@dataclass(frozen=True)
class Extra:
    """What follows the product."""

    bias: fx.Node | None = None
    residual: fx.Node | None = None
    activation: str = "none"
    args: Sequence[float] = field(default=())

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        return tuple(operand for operand in (self.bias, self.residual) if operand is not None)

    def refusal(self, out: Shape, length: int) -> Refusal | None:
        """Why it is not that of a kernel whose result has shape `out` and whose bias `length` values, or None."""
        if self.bias is not None and (prod(shape_of(self.bias)) != length or shape_of(self.bias)[-1:] != (length,)):
            return Refusal(f"the bias has shape {shape_of(self.bias)}, not ({length},)")
        if self.residual is not None and shape_of(self.residual) != out:
            return Refusal(f"the residual has shape {shape_of(self.residual)}, the result {out}")
        return None

    def finish(self, buffers: Sequence[Any], place: Any, lanes: int, by_row: Any, first: Any = 0) -> Finish:
        """With the buffers of `operands`; `by_row(row)` is the place in the bias, None for `first` and the column."""
        bias = residual = None
        if self.bias is not None:
            line = flat(buffers[0])

            def bias(row: Any, column: Any, lanes: int) -> Any:
                if by_row is None:
                    return line[span(first + column, lanes)]
                value = line[by_row(row)]
                return value if lanes == 1 else tirx.Broadcast(value, lanes)

        if self.residual is not None:
            residual = flat(buffers[-1])
        return Finish(place, lanes, bias, residual, self.activation, tuple(self.args))


def lanes(*extents: int) -> int:
    """4 where all are multiples of it, or 1."""
    return LANES if all(extent % LANES == 0 for extent in extents) else 1


def refused(node: fx.Node, *read: fx.Node, rounded: str = "float32") -> Refusal | None:
    """Why a kernel does not take these tensors, or None; the result and the first read may be `rounded` ones."""
    wide = [tensor for tensor in (node, *read[:1]) if rounded == "float32" or dtype_of(tensor) != rounded]
    return refuse_dtypes(*wide, *read[1:]) or refuse_large(node, *read)


def narrow(rows: int, columns: int, depth: int) -> Refusal | None:
    """Why a product of this size is none for a tile, or None."""
    if min(rows, columns) < FEWEST or depth == 0:
        return Refusal(f"a product {rows}x{columns}x{depth} is too narrow for a tile")
    return None


def tile_for(
    hw: Hardware,
    sizes: tuple[int, int, int, int],
    dtype: str,
    item_bytes: tuple[float, float] = (4.0, 2.0),
    weight: fx.Node | None = None,
    planar: bool = False,
) -> Tile | MatrixTile:
    """The tile of products of batch, rows, columns and depth `sizes`, on matrix units where `dtype` is narrow.

    `item_bytes` are those of an element of the two operands in memory. With the constant `weight` [N, K, ...] the sum
    may be parted, and its zeros left out, unless images are `planar`.
    """
    if dtype == "float32":
        return choose_tile(hw, *sizes)
    product = Product(*sizes, dtype, *item_bytes)
    return choose_matrix_tile(hw, product) if weight is None else weight_tile(hw, product, weight, planar)


Read = Callable[[Sequence[Any], Any], "tuple[Operand | Halves, Operand | Weights]"]


def kernel_call(
    name: str,
    hw: Hardware,
    sizes: tuple[int, int, int, int],
    tile: Tile | MatrixTile,
    dtype: str,
    operands: Sequence[fx.Node | Packed],
    buffers: Sequence[tuple[Shape, str]],
    out: Shape,
    algorithm: str,
    read: Read,
    finish: Callable[[Sequence[Any], Any], Finish],
    stored: str = "float32",
) -> KernelCall:
    """The kernel of products of batch, rows, columns and depth `sizes` in a tile of `tile_for`.

    `buffers` are shape and dtype of the operands as the kernel reads them, `stored` is the dtype of the result.
    `read(buffers, number)` says how product `number` of the batch is read, `finish(buffers, number)` how it is finished
    with the buffers behind the first two.
    """
    batch, rows, columns, depth = sizes

    def parts(buffers: Sequence[Any], out: Any, number: Any) -> tuple[Operand | Halves, Operand | Weights, Finish]:
        return *read(buffers, number), finish(buffers[2:], number)

    second = None
    if isinstance(tile, Tile):
        func = product(name, tile, batch, rows, columns, buffers, out, parts)
    else:
        amd = hw.isa == "amdgcn"
        units: Callable[..., Units] = partial(AmdUnits, form_of(hw)) if amd else SparseMma if tile.sparse else Wmma
        past = copies_past_registers(hw)
        shared = (rows, columns, dtype)
        algorithm = f"{dtype} sparse {algorithm}" if tile.sparse else f"{dtype} {algorithm}"
        if tile.parts == 1:
            func = matrix_product(name, tile, batch, *shared, buffers, out, parts, units, past, stored)
        else:
            between = (tile.parts, rows, columns)
            parted = in_parts(read, tile, rows, columns)
            func = matrix_product(name, tile, tile.parts, *shared, buffers[:2], between, parted, units, past)
            adding = add_parts(
                tile.parts, rows, columns, buffers[2:], (out, stored), finish, as_kept(stored) if amd else stored
            )
            second = Second(adding, between, 2, "sums of parts", f"{tile.parts} parts")
    right = 4.0 if dtype == "float32" else SPARSE_BYTES if isinstance(tile, MatrixTile) and tile.sparse else 2.0
    work = Work(
        flops={dtype: 2.0 * batch * rows * columns * depth},
        bytes_read=batch * (item_bytes(buffers[0][1]) * rows + right * columns) * depth,
        bytes_written=item_bytes(stored) * batch * rows * columns,
        launches=1 if second is None else 2,
        tasks=tile.blocks,
    )
    return KernelCall(func, tuple(operands), algorithm, tile.reason, work, second=second)


def copies_past_registers(hw: Hardware) -> bool:
    """Whether memory goes to shared memory without registers."""
    return isinstance(hw, Gpu) and hw.copies_past_registers


def item_bytes(dtype: str) -> float:
    """Of an element of float32, float16 or bfloat16."""
    return 4.0 if dtype == "float32" else 2.0


def dtype_of(node: fx.Node) -> str:
    """TVM's name of it."""
    return str(node.meta["val"].dtype).removeprefix("torch.")


def floats(*operands: fx.Node | None) -> list[tuple[Shape, str]]:
    """Shape and dtype of those operands that there are."""
    return [(shape_of(operand), dtype_of(operand)) for operand in operands if operand is not None]


def as_words(buffer: Any) -> Any:
    """A dense buffer of 16 bits as one dimension of int32."""
    size = prod(int(extent) for extent in buffer.shape) // 2
    return T.decl_buffer((size,), "int32", data=buffer.data)


def packed_weights(
    weight: fx.Node, matrix: Callable[[torch.Tensor], torch.Tensor], tile: MatrixTile, dtype: str
) -> Packed:
    """`matrix(weight)` [N, K] in 16 bits, two in an int32, with zeros up to whole tiles, of the sum an even number.

    For sparse units as `sparse_weights.pack` has it.
    """
    depth = 2 * tile.depth
    if tile.sparse:
        layout = f"{dtype}_2:4_{tile.columns}"
        return Packed(weight, layout, lambda tensor: sparse_weights.pack(matrix(tensor), tile.columns, dtype))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        lines = matrix(tensor).float()
        whole = torch.nn.functional.pad(lines, (0, -lines.shape[1] % depth, 0, -lines.shape[0] % tile.columns))
        return whole.to(getattr(torch, dtype)).contiguous().view(torch.int32)

    return Packed(weight, f"{dtype}_{tile.columns}x{depth}", pack)


def packed_shape(columns: int, depth: int, tile: MatrixTile) -> tuple[Shape, str]:
    """Shape and dtype of what `packed_weights` makes."""
    if tile.sparse:
        return sparse_weights.packed_extents(columns, depth, tile), "int32"
    down, across = columns + -columns % tile.columns, depth + -depth % (2 * tile.depth)
    return (down, across // 2), "int32"


def as_weights(buffer: Any, sparse: bool = False) -> Weights:
    """A buffer of `packed_weights` as an operand; `sparse` is that of the tile."""
    if sparse:
        return sparse_weights.as_sparse_weights(buffer)
    return Weights(flat(buffer), 2 * int(buffer.shape[1]))
