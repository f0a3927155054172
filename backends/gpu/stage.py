"""One operand of a product on its way to the threads of a block: memory, registers, shared memory.

shared      two tiles               one is read while the next is written
registers   what a thread carries of the next tile while it multiplies with this one

                                                              float32: [depth][width + PAD]     16 bits
along the width (k, j..j+3 are neighbours in memory)          one 128-bit load and store        [depth][width + 8]
along the sum   (k..k+3, j are neighbours)                    a load, four stores that turn it  [width][depth + 8]
weights         (16 bits, whole tiles, along the sum)                                           [width][depth + 8]
halves          (16 bits, along the sum or the width)                                           as 16 bits above

Weights and halves need no registers where the device copies past them: cp.async, of 16 bytes (copies.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tvm import tirx
from tvm.tirx.script import builder as T

from ..kernels.loops import constant, span
from .copies import copy_16_bytes, copy_16_bytes_inside
from .rounding import rounded
from .tile import LANES, PAD

PAD16 = 8  # behind a row of 16 bits: matrix units take strides of whole 16 bytes
_PIECE = 8  # elements of 16 bits in 16 bytes
_WORDS = 4


@dataclass(frozen=True)
class Operand:
    """`read(k, place)` is the element at `k` of the sum and `place` of the width: `lanes` neighbours in memory.

    `depth` and `width` are how much there is; `lanes` divides that along which the neighbours lie.
    """

    read: Callable[[Any, Any], Any]
    depth: int
    width: int
    along: Literal["width", "depth"]
    lanes: int
    start: Any = 0  # of the sum, where a block adds up a part of it


@dataclass(frozen=True)
class Weights:
    """A constant operand in 16 bits, two in an int32: rows of `depth`, as many as fill tiles, zeros past the ends."""

    words: Any  # buffer of one dimension
    depth: int  # elements of a row in memory: of an even number of tiles
    start: Any = 0  # as an Operand's
    kept: int = 1  # of so many neighbours of the sum one is in memory
    places: int = 0  # the word where those begin that say which (sparse_weights.py)


@dataclass(frozen=True)
class Halves:
    """An activation in 16 bits, two in an int32: `at(k, place)` is where 8 neighbours begin, `along` the sum or the
    width, and whether they are inside, None for always. Both extents along which they lie are multiples of 8.
    """

    words: Any  # flat buffer
    at: Callable[[Any, Any], tuple[Any, Any]]
    depth: int
    width: int
    along: Literal["width", "depth"] = "depth"
    start: Any = 0  # as an Operand's


class Stage:
    """The tiles of one operand in a block, `depth` x `width` each."""

    def __init__(
        self,
        operand: Operand,
        depth: int,
        width: int,
        threads: int,
        thread: Any,
        dtype: str = "float32",
        slots: int = 2,
    ) -> None:
        """Declare registers and shared memory; `thread` is this thread's number, `dtype` what is stored there."""
        self.dtype = dtype
        self.deep = dtype != "float32" and operand.along == "depth"  # neighbours along the sum stay neighbours
        self.stride = (depth if self.deep else width) + (PAD if dtype == "float32" else PAD16)
        self.operand, self.depth, self.width = operand, depth, width
        self.threads, self.thread = threads, thread
        self.pieces = depth * width // operand.lanes
        self.registers = T.alloc_buffer((self._turns * operand.lanes,), "float32", scope="local")
        # Rounded one by one: for vectors, see product.finish_vector.
        size = self._turns * operand.lanes
        self.rounded = None if dtype == "float32" else T.alloc_buffer((size,), dtype, scope="local")
        self.shared = _tiles((width if self.deep else depth) * self.stride, dtype, slots)

    @property
    def _turns(self) -> int:
        return -(-self.pieces // self.threads)

    def fetch(self, step: Any, first: Any, slot: int) -> None:
        """Load tile `step` of the sum at `first` of the width, which becomes `slot`; zeros past the ends."""
        operand = self.operand
        for turn in range(self._turns):
            k, place = self._place(turn)
            k, place = operand.start + step * self.depth + k, first + place
            value = operand.read(k, place)
            conditions = [k < operand.depth]  # past the last tile of the sum lies one that is fetched and never read
            conditions += [place < operand.width] if operand.width % self.width else []
            if self._partly(turn):
                conditions.append(turn * self.threads + self.thread < self.pieces)
            value = tirx.if_then_else(tirx.all(*conditions), value, constant(0.0, operand.lanes))
            T.buffer_store(self.registers, value, [span(turn * operand.lanes, operand.lanes)])

    def tile(self, slot: int, k: Any, place: Any) -> Any:
        """The 4 neighbours from `place` of the width at `k`, in tile `slot`."""
        return self.shared[slot][span(k * self.stride + place, LANES)]

    def put(self, slot: int) -> None:
        """Store what was fetched as tile `slot`, 0 or 1."""
        for turn in range(self._turns):
            k, place = self._place(turn)
            if self._partly(turn):
                with T.If(turn * self.threads + self.thread < self.pieces), T.Then():
                    self._put(turn, slot, k, place)
            else:
                self._put(turn, slot, k, place)

    def _put(self, turn: int, slot: int, k: Any, place: Any) -> None:
        shared, lanes, stride = self.shared[slot], self.operand.lanes, self.stride
        first = turn * lanes
        if self.rounded is not None:
            for i in range(lanes):
                T.buffer_store(self.rounded, rounded(self.registers[first + i], self.dtype), [first + i])
        carried = self.registers if self.rounded is None else self.rounded
        if self.deep:
            T.buffer_store(shared, carried[span(first, lanes)], [span(place * stride + k, lanes)])
            return
        if self.operand.along == "width":
            T.buffer_store(shared, carried[span(first, lanes)], [span(k * stride + place, lanes)])
            return
        for i in range(lanes):
            T.buffer_store(shared, carried[first + i], [(k + i) * stride + place])

    def _partly(self, turn: int) -> bool:
        """Whether some threads have no piece in this turn."""
        return (turn + 1) * self.threads > self.pieces

    def _place(self, turn: int) -> tuple[Any, Any]:
        """Where in the tile the piece of this thread and turn begins: along the sum, along the width."""
        lanes = self.operand.lanes
        piece = self.thread + turn * self.threads
        across = (self.width if self.operand.along == "width" else self.depth) // lanes
        outer, inner = tirx.floordiv(piece, across), tirx.floormod(piece, across) * lanes
        return (outer, inner) if self.operand.along == "width" else (inner, outer)


class Pieces:
    """The tiles of one operand that is 16 bits in memory, copied in pieces of 16 bytes: past the registers where
    `asynchronous`. `deep`: its neighbours lie along the sum, else along the width.
    """

    def __init__(
        self,
        words: Any,
        extents: tuple[int, int],
        deep: bool,
        threads: int,
        thread: Any,
        dtype: str,
        asynchronous: bool,
        slots: int = 2,
    ) -> None:
        """Declare registers and shared memory; `words` is the flat operand, two elements in an int32."""
        self.words, self.deep, self.asynchronous = words, deep, asynchronous
        self.depth, self.width = extents
        lines, self.across = (self.width, self.depth) if deep else (self.depth, self.width)
        self.stride = self.across + PAD16
        self.threads, self.thread = threads, thread
        self.pieces = lines * self.across // _PIECE
        self.turns = -(-self.pieces // threads)
        self.shared = _tiles(lines * self.stride, dtype, slots)
        if not asynchronous:
            self.registers = T.alloc_buffer((self.turns * _WORDS,), "int32", scope="local")
            size = lines * self.stride // 2
            self.views = [T.decl_buffer((size,), "int32", data=tile.data, scope="shared") for tile in self.shared]

    def place(self, step: Any, first: Any, line: Any, piece: Any) -> tuple[Any, Any]:
        """The element where a piece of tile `step` begins, `first` of the width on, and whether it is inside."""
        raise NotImplementedError

    def fetch(self, step: Any, first: Any, slot: int) -> None:
        """Load tile `step` of the sum at `first` of the width, or begin to copy it to `slot`."""

        def move(turn: int, line: Any, along: Any) -> None:
            element, inside = self.place(step, first, line, along)
            word = tirx.floordiv(element, 2)
            to = line * self.stride + along
            if self.asynchronous and inside is None:
                copy_16_bytes(self.shared[slot], to, self.words, word)
            elif self.asynchronous:
                copy_16_bytes_inside(self.shared[slot], to, self.words, word, inside)
            else:
                value = self.words[span(word, _WORDS)]
                zeros = tirx.Broadcast(tirx.const(0, "int32"), _WORDS)
                value = value if inside is None else tirx.if_then_else(inside, value, zeros)
                T.buffer_store(self.registers, value, [span(turn * _WORDS, _WORDS)])

        self._every_piece(move)

    def put(self, slot: int) -> None:
        """Store what was fetched as tile `slot`; nothing where copies are on their way there."""
        if self.asynchronous:
            return

        def store(turn: int, line: Any, along: Any) -> None:
            word = tirx.floordiv(line * self.stride + along, 2)
            T.buffer_store(self.views[slot], self.registers[span(turn * _WORDS, _WORDS)], [span(word, _WORDS)])

        self._every_piece(store)

    def _every_piece(self, action: Callable[[int, Any, Any], None]) -> None:
        """`action(turn, line of the tile, element of the line)` for the pieces of this thread."""
        across = self.across // _PIECE
        for turn in range(self.turns):
            piece = self.thread + turn * self.threads
            line, along = tirx.floordiv(piece, across), tirx.floormod(piece, across) * _PIECE
            if (turn + 1) * self.threads > self.pieces:
                with T.If(piece < self.pieces), T.Then():
                    action(turn, line, along)
            else:
                action(turn, line, along)


class WeightStage(Pieces):
    """The tiles of weights, of which there are only whole ones."""

    def __init__(
        self, weights: Weights, depth: int, width: int, threads: int, thread: Any, dtype: str, asynchronous: bool
    ) -> None:
        """Declare registers and shared memory."""
        extents = depth // weights.kept, width
        super().__init__(weights.words, extents, True, threads, thread, dtype, asynchronous)
        self.length, self.places = weights.depth, weights.places
        self.start = weights.start if weights.kept == 1 else tirx.floordiv(weights.start, weights.kept)

    def place(self, step: Any, first: Any, line: Any, along: Any) -> tuple[Any, Any]:
        """Always inside: one tile more than there are is fetched, and never read."""
        start = tirx.min(tirx.floordiv(self.start, self.depth) + step, self.length // self.depth - 1) * self.depth
        return (first + line) * self.length + start + along, None


class HalfStage(Pieces):
    """The tiles of an activation in 16 bits; zeros past the ends."""

    def __init__(
        self,
        operand: Halves,
        depth: int,
        width: int,
        threads: int,
        thread: Any,
        dtype: str,
        asynchronous: bool,
        slots: int = 2,
    ) -> None:
        """Declare registers and shared memory."""
        deep = operand.along == "depth"
        super().__init__(operand.words, (depth, width), deep, threads, thread, dtype, asynchronous, slots)
        self.operand = operand

    def place(self, step: Any, first: Any, line: Any, along: Any) -> tuple[Any, Any]:
        """Where the operand has it, inside its ends."""
        operand = self.operand
        k, place = (along, line) if self.deep else (line, along)
        k, place = operand.start + step * self.depth + k, first + place
        element, inside = operand.at(k, place)
        conditions = [k < operand.depth] if inside is None else [k < operand.depth, inside]
        conditions += [place < operand.width] if operand.width % self.width else []
        return element, tirx.all(*conditions)


def _tiles(size: int, dtype: str, count: int) -> list[Any]:
    """Buffers of one dimension: TVM would put barriers between slots of one, and cut the padding of rows."""
    return [T.alloc_buffer((size,), dtype, scope="shared") for _ in range(count)]
