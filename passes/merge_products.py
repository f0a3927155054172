"""Products of one input become one product of all their weights, and what they were are slices of its rows.

    linear(x, W1, b1), linear(x, W2, b2), ...    -> y = linear(x, [W1; W2; ...], [b1; b2; ...]), slices of y
    conv2d(x, W1, b1), conv2d(x, W2, b2), ...    -> the same with slices of channels; one size, stride and padding

Queries, keys and values, the two halves of a gated feed-forward, parallel branches. x is read once, and one kernel is
started instead of several. That is weighed against what the slices cost (`predicted` seconds): nothing where attention,
elementwise operators or a concat read them, which read a slice where it lies; a copy for any other reader; and a pass
of its own for an activation or an addition that a product alone would have done as it stores. The products whose
saving is the largest are merged, the others stay.

Refused: weights that are computed, or that anybody else reads (they would be stored twice), grouped convolutions, mixed
dtypes, vectors of weights, results without elements; products that wait for weights from memory, which merging does not
shorten (a decoder's step: 1.005 of the time before).
"""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import fx

from ..hwdb import Hardware
from ..hwdb.cost import Work
from . import dialect, rewrite
from .attention_operands import MOVES
from .epilogue import activation_of
from .layout.costs import work_seconds
from .refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten

# What entering a kernel costs whose code has left the inner caches: about ten misses of 0.1 us, an estimate.
ENTRY_SECONDS = 1e-6
_PRODUCTS = frozenset({aten.linear.default, aten.conv1d.default, aten.conv2d.default})
_PARTS = MOVES | {aten.slice.Tensor, aten.select.int, aten.expand.default}


def merge_products(graph: fx.GraphModule, hw: Hardware) -> int:
    """Merge the products of each value where that is predicted to take less time; returns how many went into others."""
    place = {node: i for i, node in enumerate(graph.graph.nodes)}
    readers = Counter(n.target for n in place if n.op == "get_attr" for _ in n.users)
    waits = _waiting(graph, hw)
    count = 0
    for x in list(graph.graph.nodes):
        products = [user for user in x.users if user.target in _PRODUCTS and user.args[0] is x]
        if len(products) < 2:
            continue
        alike: dict[Hashable, list[fx.Node]] = defaultdict(list)
        for product in products:
            if (reason := _refused(graph, product, readers) or waits(product)) is not None:
                keep(log, product, "%s", reason)
                continue
            alike[_kind(product)].append(product)
        for group in alike.values():
            if len(group) > 1:
                count += _merge(graph, hw, x, sorted(group, key=lambda n: place[n]))
    return rewrite.finish(graph, count)


def _refused(graph: fx.GraphModule, product: fx.Node, readers: Mapping[object, int]) -> str | None:
    a = rewrite.arguments(product)
    weight, bias = a["weight"], a["bias"]
    if rewrite.constant(graph, weight) is None or (bias is not None and rewrite.constant(graph, bias) is None):
        return "its weights are no constants"
    if not rewrite.is_float(product, *[n for n in (a["input"], weight, bias) if n is not None]):
        return "not floating point of one dtype"
    if readers[weight.target] > 1:
        return f"its weights are read by {readers[weight.target]} nodes"
    if a.get("groups", 1) != 1:
        return f"{a['groups']} groups of channels"
    if len(rewrite.shape_of(weight)) < 2 or not math.prod(rewrite.shape_of(product)):
        return "one column, or no elements"
    return None


def _waiting(graph: fx.GraphModule, hw: Hardware) -> Callable[[fx.Node], str | None]:
    """Why a product takes as long as its weights take to arrive, where all weights are more than the last cache."""
    nbytes = sum(tensor.numel() * tensor.element_size() for _, tensor in graph.named_buffers())
    bandwidth, rate, caches = hw.dram_gbs, hw.peak_flops(), hw.caches
    if bandwidth is None or rate is None or not caches or nbytes <= caches[-1].size_bytes:
        return lambda product: None

    def waits(product: fx.Node) -> str | None:
        weight = _bytes(rewrite.arguments(product)["weight"])
        arithmetic = sum(_work(product).flops.values()) / rate
        if weight / (bandwidth * 1e9) <= arithmetic:
            return None
        return f"it waits for {weight / 1e6:.1f} MB of weights, merged or not"

    return waits


def _kind(product: fx.Node) -> Hashable:
    """What products have in common that can be one."""
    a = rewrite.arguments(product)
    rest = [str(value) for name, value in a.items() if name not in ("input", "weight", "bias")]
    return product.target, rewrite.shape_of(a["weight"])[1:], rewrite.shape_of(product)[2:] if rest else None, *rest


def _merge(graph: fx.GraphModule, hw: Hardware, x: fx.Node, group: list[fx.Node]) -> int:
    """Merge the products of `group`, in the order of the graph, that gain by it."""
    costs = {product: _cost(product, hw) for product in group}
    merged: list[fx.Node] = []
    best, gain, apart, cost = 0, 0.0, 0.0, 0.0
    work = Work(bytes_read=_bytes(x))
    for product in sorted(group, key=lambda n: costs[n]):
        merged.append(product)
        alone = _work(product)
        work = _sum(work, alone)
        apart += work_seconds(_sum(Work(bytes_read=_bytes(x)), alone), hw) + ENTRY_SECONDS
        cost += costs[product]
        found = apart - work_seconds(work, hw) - ENTRY_SECONDS - cost
        if len(merged) > 1 and found > gain:
            best, gain = len(merged), found
    if not best:
        keep(log, group[0], "its slices would cost %.1f us, %.1f saved", cost * 1e6, (found + cost) * 1e6)
        return 0
    chosen = set(merged[:best])
    _emit(graph, [product for product in group if product in chosen])
    return best - 1


def _work(product: fx.Node) -> Work:
    """A product without the reading of its input."""
    weight = rewrite.arguments(product)["weight"]
    flops = 2.0 * math.prod(rewrite.shape_of(product)) * math.prod(rewrite.shape_of(weight)[1:])
    dtype = str(product.meta["val"].dtype).removeprefix("torch.")
    return Work({dtype: flops}, _bytes(weight), _bytes(product))


def _sum(a: Work, b: Work) -> Work:
    flops = {dtype: a.flops.get(dtype, 0.0) + count for dtype, count in b.flops.items()}
    return Work(flops, a.bytes_read + b.bytes_read, a.bytes_written + b.bytes_written)


def _bytes(node: fx.Node) -> float:
    value = rewrite.value_of(node)
    return 0.0 if value is None else float(value.numel() * value.element_size())


def _cost(product: fx.Node, hw: Hardware) -> float:
    """Seconds that reading the product as a slice takes more than reading it alone."""
    node = product
    while (user := rewrite.sole_user(node)) is not None and user.target is aten.reshape.default:
        node = user
    if user is not None and (activation_of(user) is not None or rewrite.calls(user, aten.add.Tensor)):
        return 0.0 if _read_in_place(user) else _pass_seconds(product, hw)
    return 0.0 if _read_in_place(product) else _pass_seconds(product, hw)


def _pass_seconds(product: fx.Node, hw: Hardware) -> float:
    """Seconds of reading what a product gave, and writing it again."""
    return work_seconds(Work(bytes_read=_bytes(product), bytes_written=_bytes(product)), hw) + ENTRY_SECONDS


def _read_in_place(node: fx.Node) -> bool:
    """Whether all who read the node, and what it is moved and cut to, do so by the strides it has."""
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user.target in _PARTS:
                waiting.append(user)
            elif not _strides(user):
                return False
    return True


def _strides(user: fx.Node) -> bool:
    if rewrite.calls(user, dialect.attention):
        return bool(user.meta["val"].dtype == torch.float32)
    if user.op != "call_function" or not isinstance(user.target, rewrite.Operator):
        return False
    return user.target is aten.cat.default or torch.Tag.pointwise in user.target.tags


def _emit(graph: fx.GraphModule, products: list[fx.Node]) -> None:
    """One product in the place of the first, and slices of it in the place of them all."""
    first = products[0]
    given = [rewrite.arguments(product) for product in products]
    weights = [rewrite.constant(graph, a["weight"]) for a in given]
    biases = [None if a["bias"] is None else rewrite.constant(graph, a["bias"]) for a in given]
    stem = f"{given[0]['weight'].target}_and_{len(products) - 1}_more"
    arguments = given[0] | {"weight": rewrite.add_constant(graph, stem, torch.cat(weights), first), "bias": None}  # type: ignore[arg-type]
    if any(bias is not None for bias in biases):
        whole = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]  # type: ignore[union-attr,arg-type]
        arguments["bias"] = rewrite.add_constant(graph, f"{stem}_bias", torch.cat(whole), first)
    assert isinstance(first.target, rewrite.Operator)
    y = rewrite.call(graph, first.target, tuple(arguments.values()), before=first)
    dim = len(rewrite.shape_of(y)) - (
        1 if first.target is aten.linear.default else len(rewrite.shape_of(given[0]["weight"])) - 1
    )
    start, parts = 0, []
    for product in products:
        end = start + rewrite.shape_of(product)[dim]
        parts.append(rewrite.call(graph, aten.slice.Tensor, (y, dim, start, end), before=first, source=product))
        start = end
    for product, part in zip(products, parts, strict=True):
        rewrite.replace(product, part)
