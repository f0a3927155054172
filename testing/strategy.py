"""The Hypothesis strategy: a program is a few inputs and a list of steps, each from one family of operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st

from . import draw_attention, draw_elementwise, draw_gathers, draw_moves, draw_products
from .builder import Builder, Refused, Value
from .program import Program

Step = Callable[[Builder, Value], None]

# The families, and their steps: the first of each is what shrinking goes to.
FAMILIES: dict[str, tuple[Step, ...]] = {
    "elementwise": (draw_elementwise.unary, draw_elementwise.binary, draw_elementwise.with_constant),
    "moves": (
        draw_moves.view,
        draw_moves.permute,
        draw_moves.reshape_chain,
        draw_moves.cut,
        draw_moves.split,
        draw_moves.join,
        draw_moves.spread,
    ),
    "products": (draw_products.linear, draw_products.product, draw_products.convolution, draw_products.convolution),
    "norms": (draw_products.norm, draw_gathers.along, draw_gathers.reduce, draw_products.pool),
    "patterns": (
        draw_elementwise.written_out,
        draw_attention.attention,
        draw_moves.windows,
        draw_moves.shuffles,
        draw_attention.plain,
    ),
    "logic": (draw_elementwise.cast, draw_elementwise.compare, draw_elementwise.select),
    "gathers": (draw_gathers.pick, draw_gathers.position, draw_gathers.create),
    "changes": (draw_elementwise.change,),
}
_SIZES = (2, 1, 3, 4, 5, 6, 7, 8, 11, 13)
_TRIES = 5
_KINDS = ("any", "sequence", "image", "volume", "any", "sequence", "image")


@st.composite
def programs(
    draw: st.DrawFn,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    most: int = 12,
    inputs: int = 2,
    dtypes: Sequence[torch.dtype] | None = None,
    special: bool = False,
) -> Program:
    """A random model and its inputs.

    families: of `FAMILIES`, those that steps come from. most: the most steps. inputs: the most inputs. dtypes: of the
    inputs; None for mostly float32 and sometimes any other. special: inputs hold zeros of both signs, infinities and
    NaN.
    """
    b = Builder(draw, special)
    for _ in range(b.integer(1, inputs)):
        _input(b, dtypes, special)
    steps = [step for family in families for step in FAMILIES[family]]
    for index, place in draw(
        st.lists(st.tuples(st.integers(0, len(steps) - 1), st.integers(0, 5)), min_size=1, max_size=most)
    ):
        # The last value more often than any other: chains are where passes work.
        value = b.values[-1] if place < 4 else b.choose(b.values[::-1])
        for offset in range(_TRIES):  # a step that does not suit the value: another one
            try:
                steps[(index + offset) % len(steps)](b, value)
            except Refused:
                continue
            break
    return b.program(_results(b))


def _input(b: Builder, dtypes: Sequence[torch.dtype] | None, special: bool) -> None:
    shape = _shape(b)
    dtype = b.choose((torch.float32,) * 12 + draw_elementwise.DTYPES[1:] if dtypes is None else tuple(dtypes))
    options = [str(shape), str(dtype), str(b.integer(0, 99))]
    layout = b.choose(["dense"] * 5 + ["order", "gap"])
    if layout == "order" and len(shape) > 1:
        options.append(f"order={b.order(len(shape))}")
    elif layout == "gap":
        options.append("gap=2")
    if special:
        options.append("special=True")
    b.input(f"tensor({', '.join(options)})")


def _shape(b: Builder) -> tuple[int, ...]:
    kind = b.choose(_KINDS)
    small = b.choose((1, 2, 3))
    if kind == "sequence":
        return small, b.integer(1, 7), b.choose((4, 8, 6, 12))
    if kind == "image":
        return small, b.choose((4, 8, 3, 6, 1)), b.choose((4, 6, 5, 8, 1)), b.choose((4, 6, 8, 7, 1))
    if kind == "volume":
        return small, b.choose((2, 4, 3)), b.integer(1, 4), b.integer(2, 4), b.integer(2, 5)
    shape = [b.choose(_SIZES) for _ in range(b.integer(0, 5))]
    if len(shape) > 3:
        shape = [min(n, 5) for n in shape]
    if shape and b.integer(0, 9) == 9:
        shape[b.integer(0, len(shape) - 1)] = 0
    return tuple(shape)


def _results(b: Builder) -> list[Value]:
    """The last value and up to two others: from the middle, an input, or one twice."""
    results = [b.values[-1]]
    for _ in range(b.choose([0, 0, 1, 1, 2])):
        results.append(b.choose(b.values[::-1]))
    return results
