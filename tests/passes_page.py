"""docs/passes.md, made of the passes themselves: `python tests/passes_page.py` writes it, tests/test_docs.py compares.

A pass's section is the docstring of its module, the family it belongs to, and what it does to its example here: a plain
function, spelt canonically, then rewritten by the pass alone, or behind the passes that it needs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rewriting import HW, trace
from torch import nn
from windows import image, rolled, windows

import graphwright
from graphwright.passes import dialect_int8
from graphwright.passes.default import FAMILIES, PASSES
from graphwright.passes.printer import diff_graphs, format_graph

PAGE = Path(__file__).resolve().parent.parent / "docs" / "passes.md"

HEAD = '''# Passes

A pass is one function in a file of its name: it gets the captured graph and the hardware's facts, rewrites in place,
and returns how many rewrites it made. `compile` runs them in the order of the tuple in `passes/default.py`, and again
until none rewrites. A pass is left out of a round where nothing has changed since it last found nothing, so a second
round costs little; rounds end after 8, or after 10,000 rewrites and 20 a node, with a warning and a line in the report
that name the passes which still rewrote.

`graphwright explain MODEL` prints what each pass changed, what it refused and why, the copies before and behind the
passes, and the predicted time with and without fusions; `--html` writes a page with both graphs side by side:

    graphwright explain resnet18 --html resnet18.html

## Your own

`compile(passes=[...])` runs the passes of that list instead; `graphwright.passes.default.PASSES` is the one to start
from. Verification, the search for the pass to blame, `explain`, `torch.compile(options={"passes": [...]})` and the
cache use the same list.

```python
import logging

import torch
from torch import fx

import graphwright
from graphwright.passes import rewrite
from graphwright.passes.default import PASSES
from graphwright.passes.refusals import keep

log = logging.getLogger(__name__)
aten = torch.ops.aten


def multiply_squares(graph: fx.GraphModule, hw: graphwright.hwdb.Hardware) -> int:
    """pow(x, 2) -> mul(x, x). Refused for other exponents."""
    count = 0
    for node in list(graph.graph.nodes):
        if not rewrite.calls(node, aten.pow.Tensor_Scalar):
            continue
        x, exponent = node.args
        if exponent != 2:
            keep(log, node, "the exponent is %s", exponent)  # for explain, and TORCH_LOGS="+graphwright"
            continue
        # `call` computes meta["val"], the shape and dtype that every node must have.
        rewrite.replace(node, rewrite.call(graph, aten.mul.Tensor, (x, x), before=node))
        count += 1
    return rewrite.finish(graph, count)


canonicalise, *others = PASSES
mine = [canonicalise, multiply_squares, *others]  # where squares are still spelt as powers
compiled = graphwright.compile(lambda x: x**2 + x**3, torch.randn(4), passes=mine)
assert {p.name: p.rewrites for p in compiled.report().passes}["multiply_squares"] == 1
without = [p for p in PASSES if p.__name__ != "fuse_matmul_bias"]  # and this is how to leave one out
```

A pass must be deterministic and find nothing on a second run. Where it raises, returns something else than a count,
leaves a malformed graph, other inputs or outputs, or a node whose `meta["val"]` is missing or wrong, or changes a
constant in place, `compile` raises PassError with the pass and the remedy. Constants are the tensors of your model, not
copies: a pass that wants other numbers adds one (`rewrite.add_constant`). Writes are seen by the tensor's version
and its first and last 32 bytes, so that one through `.data` or NumPy into the middle alone is not. Wrong numbers raise
NumericMismatch with the pass and the node.
A pass of this package that does any of it is left out instead, which a warning and the report say.

In the cache a pass is known by its module, its qualified name, its code and the file that holds it. What those do not
tell (closures, functions typed into a shell, objects) is compiled without the cache, and a warning says so.

## Families of fusions

`compile(kernel_fusion=["conv+relu", "matmul+bias"])` makes the fusions of these families only, `[]` none; on the
command line `--kernel-fusion conv+relu,matmul+bias`. Whatever is chosen, the model compiles and keeps its numbers.

| family | what it fuses | passes that run for it alone |
|---|---|---|
'''


@dataclass(frozen=True)
class Example:
    """A function, or a module's class, with its inputs' shapes, and passes that run before the one it shows."""

    model: Any
    shapes: tuple[tuple[int, ...], ...]
    behind: tuple[str, ...] = ()

    def traced(self) -> Any:
        torch.manual_seed(0)
        model = self.model() if inspect.isclass(self.model) else self.model
        if isinstance(model, nn.Module):
            model.eval()
        return trace(model, [torch.rand(shape) for shape in self.shapes])


def _net(*layers: Callable[[], nn.Module]) -> type[nn.Module]:
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*[layer() for layer in layers])

    return Net


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.scale


class _Weight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.t() * 2)


def _heads(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    q, k, v = (t.view(1, 16, 2, 4).transpose(1, 2) for t in (x, y, z))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 16, 8)


class _Swin(nn.Module):
    """Attention within shifted windows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = windows(rolled(x, -1), 2)
        q, k, v = (f(y).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return rolled(image(y, 2, 4, 6), 1)


class _Shuffled(nn.Module):
    """ShuffleNetV2's block and the product behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.within, self.behind = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, y = self.before(x).chunk(2, 1)
        return self.behind(F.channel_shuffle(torch.cat([kept, self.within(y)], 1), 2))


def _shuffle(x: torch.Tensor) -> torch.Tensor:
    return x.view(1, 2, 4, 6, 6).transpose(1, 2).reshape(1, 8, 6, 6).relu()


def _layer_norm(x: torch.Tensor) -> torch.Tensor:
    y = x - x.mean(-1, keepdim=True)
    return y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def _patches(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)


class _Projections(nn.Module):
    """Queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).view(1, 128, 4, 16).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v)


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.narrow(F.gelu(self.wide(graphwright.gate(x, 0.1))))


class _Pruned(nn.Module):
    """Blocks of zeros, all but one in four."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        with torch.no_grad():
            self.linear.weight *= torch.eye(4).repeat_interleave(16, 0).repeat_interleave(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu()


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / 2.0, -1) @ v


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return dialect_int8.quantize(x, 0.1, 128, torch.uint8)


class _Stored(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Buffer(torch.ones(4, 8, dtype=torch.int8)), nn.Buffer(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, dialect_int8.dequantize_rows(self.weight, self.scale, None, 0)).relu()


class _Integers(_Stored):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = (128, self.weight, self.scale, None, None, 1.0, 0, "relu", [], 1.0, 0, None)
        return _bytes(dialect_int8.qlinear(_bytes(x), *w))


IMAGE = ((1, 3, 8, 8),)
EXAMPLES: dict[str, Example] = {
    "canonicalise": Example(lambda x: x.transpose(0, 1).flatten().clamp_min(0.0), ((2, 3),)),
    "remove_dead": Example(lambda x: F.dropout(x * 1, 0.5, False).reshape(2, 3).relu(), ((2, 3),)),
    "merge_duplicates": Example(lambda x: x.exp() + x.exp().sin(), ((2, 3),)),
    "fold_constants": Example(_Weight, ((2, 8),)),
    "fold_batch_norm": Example(_net(lambda: nn.Conv2d(3, 4, 3), lambda: nn.BatchNorm2d(4)), IMAGE),
    "fold_scale": Example(_Scaled, ((2, 8),)),
    "split_batch_norm": Example(_net(lambda: nn.BatchNorm2d(3)), IMAGE),
    "flatten_conv3d": Example(_net(lambda: nn.Conv3d(3, 4, (2, 3, 3))), ((1, 3, 4, 8, 8),)),
    "recognise_activations": Example(lambda x: x * torch.sigmoid(x), ((2, 3),)),
    "fuse_attention": Example(F.scaled_dot_product_attention, ((1, 2, 8, 4),) * 3),
    "fuse_conv_activation": Example(_net(lambda: nn.Conv2d(3, 4, 3, padding=1), nn.ReLU), IMAGE),
    "fuse_conv_transpose": Example(_net(lambda: nn.ConvTranspose2d(3, 4, 2, 2), nn.ReLU), IMAGE),
    "fuse_matmul_bias": Example(_net(lambda: nn.Linear(8, 4), nn.GELU), ((2, 8),)),
    "assign_layout": Example(
        _net(lambda: nn.Conv2d(3, 8, 3), lambda: nn.MaxPool2d(2)), IMAGE, ("fuse_conv_activation",)
    ),
    "fuse_conv_depthwise": Example(
        _net(lambda: nn.Conv2d(32, 192, 1), nn.ReLU6, lambda: nn.Conv2d(192, 192, 3, padding=1, groups=192)),
        ((1, 32, 112, 112),),
        ("fuse_conv_activation", "assign_layout"),
    ),
    "fuse_reshape_transpose": Example(lambda x: x.view(4, 2, 3).transpose(0, 1).transpose(0, 1).flatten(), ((8, 3),)),
    "merge_pads": Example(lambda x, w: F.conv1d(x, w, padding=2)[:, :, :-1], ((1, 2, 8), (3, 2, 4))),
    "simplify": Example(lambda x: x.neg().neg().relu().relu() / 8, ((2, 3),)),
    "recognise_norms": Example(_layer_norm, ((2, 8),)),
    "recognise_attention": Example(_attention, ((1, 2, 8, 4),) * 3, ("remove_dead",)),
    "recognise_channel_moves": Example(_shuffle, ((1, 8, 6, 6),)),
    "route_channels": Example(
        _Shuffled,
        ((1, 3, 6, 6),),
        ("fuse_conv_activation", "recognise_channel_moves", "assign_layout"),
    ),
    "join_slices": Example(_patches, ((1, 4, 4, 8),)),
    "merge_products": Example(_Projections, ((1, 128, 64),), ("fuse_attention",)),
    "read_planar_images": Example(
        _net(lambda: nn.Conv2d(3, 8, 3, 2)), ((1, 3, 32, 32),), ("fuse_conv_activation", "assign_layout")
    ),
    "sink_moves": Example(
        lambda x, y: x.permute(0, 2, 1, 3) + y.permute(0, 2, 1, 3), ((1, 4, 6, 8),) * 2, ("fuse_reshape_transpose",)
    ),
    "gather_rows": Example(
        lambda x: windows(rolled(x, -1), 2).sin(), ((2, 4, 6, 8),), ("fold_constants", "remove_dead")
    ),
    "sink_row_moves": Example(
        _Swin,
        ((1, 4, 6, 8),),
        ("fuse_attention", "fuse_matmul_bias", "fuse_reshape_transpose", "remove_dead", "gather_rows"),
    ),
    "skip_gated_rows": Example(_Gated, ((128, 64),), ("fuse_matmul_bias",)),
    "skip_zero_blocks": Example(_Pruned, ((128, 64),), ("fuse_matmul_bias",)),
    "fuse_head_moves": Example(_heads, ((1, 16, 8),) * 3, ("fuse_attention", "fuse_reshape_transpose")),
    "recognise_quantised": Example(_Stored, ((2, 8),), ("fuse_matmul_bias",)),
    "hoist_quantise": Example(lambda x: _bytes(x.permute(0, 2, 1)), ((2, 3, 4),)),
    "give_bytes": Example(_Integers, ((2, 8),)),
}


def page() -> str:
    """The page; raises KeyError for a pass without an example, AssertionError for one that shows nothing."""
    rows = [
        f"| `{name}` | {family.meaning} | {', '.join(f'`{p.__name__}`' for p in family.passes) or '-'} |"
        for name, family in FAMILIES.items()
    ]
    order = ", ".join(f"`{p.__name__}`" for p in PASSES)
    sections = [_section(p) for p in dict.fromkeys(PASSES)]
    text = [HEAD + "\n".join(rows), "", "## The passes", "", f"In their order: {order}.", "", *sections]
    return "\n".join(text).rstrip() + "\n"


def _section(one: Any) -> str:
    name = one.__name__
    example = EXAMPLES[name]
    graph = example.traced()
    passes = {p.__name__: p for p in PASSES}
    for behind in example.behind:
        passes[behind](graph, HW)
    before = format_graph(graph)
    count = one(graph, HW)
    if name == "canonicalise":  # `trace` has run it
        count, before = 1, CAPTURED
    assert count, f"{name} does nothing to its example"
    families = [f"`{family}`" for family, entry in FAMILIES.items() if one in entry.passes]
    lines = [f"### `{name}`", "", inspect.getdoc(sys.modules[one.__module__]) or "", ""]
    lines += [f"Family: {', '.join(families)}.", ""] if families else []
    return "\n".join([*lines, "Example:", "", "```diff", diff_graphs(before, format_graph(graph)), "```", ""])


CAPTURED = """%0: f32[2, 3] = input
%1: f32[3, 2] = aten.transpose.int(%0, 0, 1)
%2: f32[6] = aten.flatten.using_ints(%1)
%3: f32[6] = aten.clamp_min.default(%2, 0.0)
return [%3]"""


if __name__ == "__main__":
    PAGE.write_text(page())
