"""What the narrow matrix product and convolution share: staging the left operand, the inner loop, storing a tile.

staging    the left operand is read in words of `group` elements. Where it does not lie in memory that way (another
           dtype, a depth that is no multiple of the group, signed bytes for an instruction that takes unsigned ones) it
           is first copied to scratch, converted and filled up: M * K elements beside M * N * K products
tile       MR rows x V vectors of accumulators, V vectors of weights, one broadcast word:
           MR * V + V + 1 + spare <= vector registers (spare: dot_product.Dot); MR more by element (register_tile.py)
blocks     accumulators of float16 hold the sum of a few steps (dot_product.Dot.block); it is added to sums in float32,
           which stay in L1, and from which the tile is stored
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tvm import tirx
from tvm.tirx.script import builder as T

from .dot_product import Dot, narrow
from .loops import Shape, between, span
from .register_tile import Left

HIDDEN = 256  # elements: TVM leaves smaller scratch to LLVM, which would hold it in registers the tile needs
FLIP = 128  # signed bytes become unsigned by adding it, unsigned ones signed by taking it off: the same change of bits


class Finish(Protocol):
    """What happens to finished sums before they are stored."""

    @property
    def operands(self) -> Sequence[tuple[Shape, str]]:
        """Shapes and dtypes of what it reads beside the sums, in the kernel's order."""

    @property
    def heavy(self) -> bool:
        """Whether it takes dozens of operations: a loop over the tile in scratch then, instead of unrolled code."""

    @property
    def result(self) -> str:
        """dtype of the result in memory."""

    def store(self, value: Any, row: Any, column: Any, lanes: int, read: Sequence[Any], out: Any) -> None:
        """Finish `lanes` sums of a row from `column` on, and store them; `read` are the operands' buffers."""


@dataclass(frozen=True)
class Tile:
    """A register tile: `rows` x `vectors`."""

    rows: int
    vectors: int


def flips(source: str, dot: Dot) -> bool:
    """Whether bytes of `source` have another sign than the instruction takes: int8_product.offsets sets it right."""
    return {source, dot.left} == {"int8", "uint8"}


def needs_staging(source: str, dot: Dot, depth: int) -> bool:
    """Whether rows of `depth` elements of dtype `source` cannot be read as they lie."""
    return dot.by_word and (source != dot.left or depth % dot.group != 0)


def stage(
    load: Callable[[Any, int], Any], store: Callable[[Any, Any, int], None], depth: int, source: str, dot: Dot
) -> None:
    """Copy a row of `depth` elements as words, converted and filled up with zeros.

    load(k, lanes) reads elements; store(value, word, lanes) writes words. Scratch is written in the type it is read in:
    LLVM takes stores and loads of different types for independent of each other.
    """
    size = dot.lanes * (4 if dot.left in ("int8", "uint8") else 1)  # elements of a vector
    words = size // dot.group
    whole = depth // size
    if whole:
        with T.serial(0, whole) as i:
            store(_words(load(i * size, size), source, dot, words), i * words, words)
    composed = depth // dot.group - whole * words
    if composed:
        with T.serial(0, composed) as i:
            word = whole * words + i
            elements = [load(word * dot.group + j, 1) for j in range(dot.group)]
            store(_word(elements, source, dot), word, 1)
    if depth % dot.group:
        last = depth // dot.group * dot.group
        elements = [load(k, 1) for k in range(last, depth)]
        store(_word(elements, source, dot), depth // dot.group, 1)


def fill_word(source: str, dot: Dot, value: int = 0) -> int:
    """The word whose elements all stand for `value` of dtype `source`."""
    bits, size = dot.element_bits, dot.element_bits * dot.group
    value += FLIP if flips(source, dot) else 0
    word = sum((value & ((1 << bits) - 1)) << (bits * j) for j in range(dot.group))
    return word - (1 << size) if word >> (size - 1) else word


def _words(value: Any, source: str, dot: Dot, words: int) -> Any:
    """A vector of elements as `words` words."""
    many = dot.lanes
    if source == "float32" and dot.left == "uint16":
        value = narrow(value, many)
    elif dot.left == "int16":
        value = tirx.Cast(f"int16x{many}", value)
    elif dot.left == "float16":
        return value if source == "float16" else tirx.Cast(f"float16x{many}", value)
    value = T.reinterpret(f"{dot.word}x{words}", value)
    if flips(source, dot):
        value = tirx.bitwise_xor(value, tirx.Broadcast(tirx.const(fill_word(source, dot), dot.word), words))
    return value


def _word(elements: Sequence[Any], source: str, dot: Dot) -> Any:
    """Elements, low ones first, as one word; what is missing is zero."""
    if dot.left == "float16":
        return tirx.Cast("float16", elements[0])
    bits = dot.element_bits
    word: Any = tirx.const(0, "uint32")
    for j, value in enumerate(elements):
        if source == "float32":
            value = narrow(value, 1)
        elif flips(source, dot):
            value = tirx.Cast("uint8", tirx.Cast("int32", value) + FLIP)
        elif dot.left == "int8":
            value = T.reinterpret("uint8", value)
        elif dot.left == "int16":
            value = T.reinterpret("uint16", tirx.Cast("int16", value))
        word = tirx.bitwise_or(word, tirx.Cast("uint32", value) << tirx.const(bits * j, "uint32"))
    return T.reinterpret(dot.word, word if dot.word == "int32" else tirx.Cast(f"u{dot.word}", word))


def clear(acc: Any, tile: Tile, dot: Dot) -> None:
    """Zero the accumulators of a tile."""
    zero = tirx.Broadcast(tirx.const(0, dot.accumulator), dot.lanes)
    for i in range(tile.rows * tile.vectors):
        T.buffer_store(acc, zero, [span(i * dot.lanes, dot.lanes)])


def multiply(
    acc: Any,
    tile: Tile,
    dot: Dot,
    steps: int,
    left: Left,
    right: Callable[[Any, int], Any],
    by_element: bool = False,
) -> None:
    """Add the products of `steps` steps to `acc`.

    left(row, i, n) are n neighbouring words, or floats where a step takes a group of them; right(step, vector) vectors.
    `by_element`: as in register_tile.
    """
    each = 1 if dot.by_word else dot.group
    together = dot.lanes // each if by_element else 1
    done = steps // together * together if by_element else 0
    if done:
        with T.serial(0, done // together) as block:
            start = T.bind(block * together)
            several = [T.bind(left(row, start * each, together * each)) for row in range(tile.rows)]

            def lanes(i: int) -> Callable[[int], Sequence[Any]]:
                places = [tirx.const(i * each + j, "int32") for j in range(each)]
                return lambda row: [tirx.Shuffle([several[row]], [place]) for place in places]

            for i in range(together):
                step(acc, tile, dot, lanes(i), lambda v, i=i: right(start + i, v))  # type: ignore[misc]
    if done < steps:
        with between(done, steps) as k:
            units = [k] if dot.by_word else [k * each + j for j in range(each)]
            step(acc, tile, dot, lambda row: [left(row, unit, 1) for unit in units], lambda v: right(k, v))


def allocate(tile: Tile, dot: Dot, width: int, finish: Finish) -> tuple[Any, Any]:
    """Accumulators of a task, and the tile's float32 sums or what it passes through on its way; None without need."""
    size = tile.rows * tile.vectors * dot.lanes
    acc = T.alloc_buffer((size,), dot.accumulator, scope="local")
    if dot.block:
        return acc, T.alloc_buffer((max(size, HIDDEN),), "float32", scope="global")
    if not needs_spill(width, tile.vectors * dot.lanes, finish):
        return acc, None
    return acc, T.alloc_buffer((size,), dot.accumulator, scope="local")


def begin(acc: Any, spill: Any, tile: Tile, dot: Dot) -> None:
    """Zero the sums of a tile."""
    if not dot.block:
        clear(acc, tile, dot)
        return
    zero = tirx.Broadcast(tirx.const(0.0, "float32"), dot.lanes)
    for i in range(tile.rows * tile.vectors):
        T.buffer_store(spill, zero, [span(i * dot.lanes, dot.lanes)])


def accumulate(
    acc: Any,
    spill: Any,
    tile: Tile,
    dot: Dot,
    steps: int,
    left: Left,
    right: Callable[[Any, int], Any],
    by_element: bool = False,
) -> None:
    """As `multiply`, in blocks where they hold no more; any number of times between `begin` and `store_tile`."""
    if not dot.block:
        multiply(acc, tile, dot, steps, left, right, by_element)
        return

    def block(first: Any, count: int) -> None:
        clear(acc, tile, dot)
        multiply(
            acc, tile, dot, count, lambda r, k, n: left(r, first + k, n), lambda k, v: right(first + k, v), by_element
        )
        wide = f"float32x{dot.lanes}"
        for i in range(tile.rows * tile.vectors):
            at = span(i * dot.lanes, dot.lanes)
            T.buffer_store(spill, spill[at] + tirx.Cast(wide, acc[at]), [at])

    whole = steps // dot.block
    if whole:
        with T.serial(0, whole) as i:
            block(i * dot.block, dot.block)
    if steps % dot.block:
        block(whole * dot.block, steps % dot.block)


def step(acc: Any, tile: Tile, dot: Dot, left: Callable[[int], Sequence[Any]], right: Callable[[int], Any]) -> None:
    """One step of the inner loop, unrolled."""
    loaded = [T.bind(right(v)) for v in range(tile.vectors)]
    for row in range(tile.rows):
        scalars = [T.bind(s) for s in left(row)]
        for v in range(tile.vectors):
            at = span((row * tile.vectors + v) * dot.lanes, dot.lanes)
            T.buffer_store(acc, dot.multiply(acc[at], scalars, loaded[v]), [at])


def store_tile(
    acc: Any,
    spill: Any,
    tile: Tile,
    dot: Dot,
    row: Any,
    column: Any,
    width: int,
    finish: Finish,
    read: Sequence[Any],
    out: Any,
) -> None:
    """Finish and store the tile's rows from `row`, its first `width` columns from `column`."""
    lanes, columns = dot.lanes, tile.vectors * dot.lanes
    if dot.block:
        lanes //= 2  # of float32
    if width == columns and not finish.heavy:
        sums = spill if dot.block else acc
        for r in range(tile.rows):
            for j in range(0, columns, lanes):
                finish.store(sums[span(r * columns + j, lanes)], row + r, column + j, lanes, read, out)
        return
    if not dot.block:
        for i in range(0, tile.rows * columns, lanes):
            T.buffer_store(spill, acc[span(i, lanes)], [span(i, lanes)])
    finish_rows(spill, tile.rows, columns, lanes, row, column, width, finish, read, out)


def finish_rows(
    spill: Any,
    rows: Any,
    columns: int,
    lanes: int,
    row: Any,
    column: Any,
    width: int,
    finish: Finish,
    read: Sequence[Any],
    out: Any,
) -> None:
    """Finish and store the first `width` sums of `rows` rows of `columns` that lie in scratch."""
    whole = width // lanes
    with T.serial(0, rows) as r:
        if whole:
            with T.serial(0, whole) as v:
                value = T.bind(spill[span(r * columns + v * lanes, lanes)])
                finish.store(value, row + r, column + v * lanes, lanes, read, out)
        if width > whole * lanes:
            with T.serial(0, width - whole * lanes) as j:
                value = T.bind(spill[r * columns + whole * lanes + j])
                finish.store(value, row + r, column + whole * lanes + j, 1, read, out)


def store_panel(total: int, columns: int, panel: Any, store: Callable[[Any, int], None]) -> None:
    """store(first column, how many) of a panel of `columns`, of which the last of `total` may be filled in part."""
    full, tail = divmod(total, columns)
    if not tail:
        store(panel * columns, columns)
    elif not full:
        store(0, tail)
    else:
        with T.If(panel < full):
            with T.Then():
                store(panel * columns, columns)
            with T.Else():
                store(full * columns, tail)


def needs_spill(width: int, columns: int, finish: Finish) -> bool:
    """Whether tiles pass through scratch on their way to the result."""
    return finish.heavy or width % columns != 0
