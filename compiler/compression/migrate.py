"""Channels that are much larger than others are scaled down before rounding, and the weights that read them up.

    norm(x) * g + b, then W       ->  g / s, b / s, then W[:, j] * s_j             layer_norm, rms_norm, or x * g
    act(W1 x + b1), then W2       ->  W1 / s, b1 / s by rows, then W2[:, j] * s_j  act: none, relu, leaky_relu

The model computes the same in float32 (a rounding of each weight aside); in 8 bits, one scale then serves all channels.

smooth     s_j = sqrt(max |x_j| / max |W_j|), maxima of calibration: Xiao et al., SmoothQuant, 2023, equation 4, with
           alpha = 0.5
equalise   s_j = sqrt(max |W1_j| / max |W2_j|), by weights alone, until it changes nothing: Nagel et al., Data-free
           quantization through weight equalization and bias correction, 2019, section 4.1; a norm's W1_j is its g_j
auto       whichever of the two, or neither, leaves the least noise in the products, summed as noise over signal

Refused where others read the values, weights are shared or computed, the activation has a bend elsewhere than in 0
(relu6, GELU), or what is computed is a residual's sum.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ...hwdb import Hardware
from ...passes import dialect
from ...passes.precision.int8_forms import is_depthwise, is_product
from ...passes.refusals import keep
from ...passes.rewrite import arguments, constant, shape_of
from .. import pipeline
from .int8_method import Method
from .int8_plan import plan_int8
from .observe import Looking

log = logging.getLogger(__name__)
aten = torch.ops.aten

SWEEPS = 10  # of equalising, at most
SETTLED = 0.01  # the largest change of a factor that counts as none
LEAST_GAIN = 0.9  # of the noise, for `auto` to change anything
_BENT_IN_ZERO = ("none", "relu", "leaky_relu")
_NORMS = (aten.layer_norm.default, aten.rms_norm.default)
_MAKERS = (*_NORMS, aten.mul.Tensor)


@dataclass(frozen=True)
class Link:
    """A value whose channels may be scaled: what makes it, and the products that read it."""

    maker: fx.Node
    readers: tuple[fx.Node, ...]


def migrated(
    graph: fx.GraphModule, hw: Hardware, method: Method, inputs: Sequence[Sequence[torch.Tensor]]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A copy with channels scaled as `method.migration` says, and what to say of it; `inputs` are for calibration."""
    if method.migration == "none":
        return graph, ()
    links = found(graph)
    if not links:
        return graph, (f"migration={method.migration!r}: no channels can be scaled",)
    if method.migration != "auto":
        return scaled(graph, links, method.migration, inputs), (f"{method.migration}: {len(links)} values scaled",)
    tried = {
        way: graph if way == "none" else scaled(graph, links, way, inputs) for way in ("none", "smooth", "equalise")
    }
    noise = {way: _noise(some, hw, replace(method, migration="none"), inputs) for way, some in tried.items()}
    best = min(noise, key=lambda way: noise[way])
    if noise[best] > LEAST_GAIN * noise["none"]:
        best = "none"
    shares = ", ".join(f"{way} {value:.1e}" for way, value in noise.items())
    return tried[best], (f"migration {best} of {len(links)} values: noise over signal, summed over products, {shares}",)


def _noise(graph: fx.GraphModule, hw: Hardware, method: Method, inputs: Sequence[Sequence[torch.Tensor]]) -> float:
    ratios = [c.sqnr_db for c in plan_int8(graph, hw, method, inputs).choices if c.sqnr_db is not None]
    return math.fsum(10.0 ** (-ratio / 10.0) for ratio in ratios)


def found(graph: fx.GraphModule) -> list[Link]:
    """The values whose channels can be scaled."""
    uses = Counter(
        str(operand.target)
        for node in graph.graph.nodes
        for operand in node.all_input_nodes
        if operand.op == "get_attr"
    )
    links = []
    for node in graph.graph.nodes:
        if not (is_product(node) or (node.op == "call_function" and node.target in _MAKERS)):
            continue
        link = Link(node, tuple(node.users))
        why_not = _refusal(graph, link, uses)
        if why_not:
            keep(log, node, "its channels are not scaled: %s", why_not)
        elif link.readers:
            links.append(link)
    return links


def _refusal(graph: fx.GraphModule, link: Link, uses: Mapping[str, int]) -> str:
    for reader in link.readers:
        if not is_product(reader) or arguments(reader)["input"] is not link.maker:
            return f"{reader} reads them"
        if arguments(reader).get("residual") is link.maker:
            return f"{reader} adds them"
        if reader.target is dialect.conv2d:
            given = arguments(reader)
            if given["layout"] != "NHWC" or not (given["groups"] == 1 or is_depthwise(reader)):
                return f"{reader} has groups, or images in NCHW"
    given = arguments(link.maker)
    factor = _factor(link.maker)
    if factor is None:
        return "there is no factor for each channel"
    if is_product(link.maker) and given.get("residual") is not None:
        return "a residual is added to them"
    if is_product(link.maker) and given.get("activation", "none") not in _BENT_IN_ZERO:
        return f"{given['activation']} is bent elsewhere than in 0"
    changed = [factor, given.get("bias"), *(arguments(reader)["weight"] for reader in link.readers)]
    for operand in changed:
        if operand is None:
            continue
        value = constant(graph, operand)
        if value is None or value.dtype != torch.float32:
            return f"{operand} is computed, or not float32"
        if uses[str(operand.target)] != 1:
            return f"{operand.target} is read by others too"
    return ""


def _factor(maker: fx.Node) -> fx.Node | None:
    """The constant whose first axis makes the channels: weights, a norm's factor, or that of a product by element."""
    given = arguments(maker)
    if maker.target is aten.mul.Tensor:
        shape = shape_of(maker)[-1:]
        fitting = (o for o in (given["self"], given["other"]) if isinstance(o, fx.Node) and o.op == "get_attr")
        return next((operand for operand in fitting if shape_of(operand) == shape), None)
    if maker.target in _NORMS and len(given["normalized_shape"]) != 1:
        return None
    found = given["weight"]
    return found if isinstance(found, fx.Node) else None


def scaled(
    graph: fx.GraphModule, links: Sequence[Link], way: str, inputs: Sequence[Sequence[torch.Tensor]]
) -> fx.GraphModule:
    """A copy of `graph` with the channels of `links` scaled."""
    made = pipeline.copy_graph(graph)
    maxima = _maxima(graph, links, inputs) if way == "smooth" else {}
    for _ in range(1 if way == "smooth" else SWEEPS):
        largest = 0.0
        for link in links:
            own = maxima[link.maker] if way == "smooth" else _rows(made, link.maker)
            factors = _factors(own, _columns(made, link))
            if _scale(made, link, factors):
                largest = max(largest, float((factors.log()).abs().max()))
        if largest < SETTLED:
            break
    return made


def _factors(own: torch.Tensor, reading: torch.Tensor) -> torch.Tensor:
    """What each channel is divided by; 1 for channels of zeros, or that nobody weighs."""
    factors = (own / reading).sqrt()
    return torch.where((own > 0.0) & (reading > 0.0) & factors.isfinite(), factors, torch.ones_like(factors))


def _maxima(
    graph: fx.GraphModule, links: Sequence[Link], inputs: Sequence[Sequence[torch.Tensor]]
) -> dict[fx.Node, torch.Tensor]:
    """The largest magnitude of each channel on the inputs."""
    largest: dict[fx.Node, torch.Tensor] = {}

    def look(node: fx.Node, value: torch.Tensor) -> None:
        seen = value.double().abs().reshape(-1, value.shape[-1]).amax(0)
        largest[node] = torch.maximum(largest[node], seen) if node in largest else seen

    runner = Looking(graph, {link.maker for link in links}, look)
    with torch.no_grad():
        for tensors in inputs:
            runner.run(*tensors)
    return largest


def _weight(graph: fx.GraphModule, node: fx.Node) -> torch.Tensor:
    weight = constant(graph, _factor(node))
    assert weight is not None, node
    return weight.double()


def _rows(graph: fx.GraphModule, maker: fx.Node) -> torch.Tensor:
    """The largest weight that makes each channel."""
    weight = _weight(graph, maker)
    return weight.abs().reshape(weight.shape[0], -1).amax(1)


def _columns(graph: fx.GraphModule, link: Link) -> torch.Tensor:
    """The largest weight that reads each channel."""
    found = []
    for reader in link.readers:
        weight = _weight(graph, reader).abs()
        found.append(weight.flatten(1).amax(1) if is_depthwise(reader) else weight.transpose(0, 1).flatten(1).amax(1))
    return torch.stack(found).amax(0)


def _scale(graph: fx.GraphModule, link: Link, factors: torch.Tensor) -> bool:
    """Divide the channels by their factors; False, and nothing changed, where weights would not be finite."""
    given = arguments(link.maker)
    new: dict[str, torch.Tensor] = {}

    def put(operand: Any, by: torch.Tensor, axis: int) -> None:
        value = constant(graph, operand)
        assert value is not None, operand
        places = [-1 if i == axis else 1 for i in range(value.dim())]
        new[str(operand.target)] = (value.double() * by.reshape(places)).to(value.dtype)

    put(_factor(link.maker), 1.0 / factors, 0)
    if given.get("bias") is not None:
        put(given["bias"], 1.0 / factors, 0)
    for reader in link.readers:
        put(arguments(reader)["weight"], factors, 0 if is_depthwise(reader) else 1)
    if not all(bool(value.isfinite().all()) for value in new.values()):
        return False
    for name, value in new.items():
        setattr(graph, name, value)
    log.debug(
        "%s: %d channels scaled by %.3g to %.3g", link.maker, *shape_of(link.maker)[-1:], factors.min(), factors.max()
    )
    return True
