"""Seconds that the passes take: `python benchmarks/passes.py [NODES ...]`, or MODEL names for their share of a compile.

The graphs are chains of unlike blocks, each with weights of its own: convolutions with batch norms and residuals,
inverted bottlenecks, attention written out, shuffled channels, shifted windows, gates. Prints JSON; passes are linear
where `us_per_node` stays the same. The goal is 10,000 nodes in less than 10 s.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn

import graphwright
from graphwright import hwdb
from graphwright.compiler.capture import capture, export
from graphwright.compiler.pipeline import run
from graphwright.passes.default import PASSES

C, SIZE = 16, 8


class Residual(nn.Module):
    """ResNet's block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(C, C, 3, padding=1, bias=False) for _ in range(2))
        self.an, self.bn = nn.BatchNorm2d(C), nn.BatchNorm2d(C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.b(F.relu(self.an(self.a(x))))) + x)


class Bottleneck(nn.Module):
    """MobileNet's, with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(C, 2 * C, 1), nn.Conv2d(2 * C, C, 1)
        self.deep = nn.Conv2d(2 * C, 2 * C, 3, groups=2 * C)
        self.few, self.many = nn.Conv2d(2 * C, 4, 1), nn.Conv2d(4, 2 * C, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.hardswish(self.deep(F.pad(F.relu6(self.up(x)), (1, 1, 1, 1))))
        gate = torch.clamp(self.many(F.relu(self.few(y.mean((2, 3), keepdim=True)))) + 3, 0, 6) / 6
        return x + self.down(y * gate)


class Attention(nn.Module):
    """A transformer's layer, attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(C, C) for _ in range(4))
        self.wide, self.narrow = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.first, self.second = nn.LayerNorm(C), nn.LayerNorm(C)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t = x.flatten(2).transpose(1, 2)
        n = self.first(t)
        q, k, v = (f(n).view(1, -1, 4, C // 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        p = F.dropout(F.softmax(q @ k.transpose(-1, -2) / (C // 4) ** 0.5, -1), 0.1, False)
        t = t + self.o((p @ v).transpose(1, 2).contiguous().view(1, -1, C))
        w = self.wide(self.second(t))
        w = 0.5 * w * (1 + torch.tanh(0.7978845608028654 * (w + 0.044715 * w**3)))
        return (t + self.narrow(w)).transpose(1, 2).reshape(x.shape)


class Shuffle(nn.Module):
    """ShuffleNet's: half of the channels pass, all are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(C // 2, C // 2, 1), nn.Conv2d(C // 2, C // 2, 3, padding=1, groups=C // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, y = x.chunk(2, 1)
        y = torch.cat([kept, self.b(F.relu(self.a(y)))], 1)
        return y.view(1, 2, C // 2, SIZE, SIZE).transpose(1, 2).reshape(x.shape)


class Windows(nn.Module):
    """Swin's: rolled, cut into windows, mixed, put together, rolled back."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.scale = nn.Linear(C, C), nn.Parameter(torch.rand(C))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.roll(x.permute(0, 2, 3, 1), (-2, -2), (1, 2))
        y = y.view(1, 2, SIZE // 2, 2, SIZE // 2, C).permute(0, 1, 3, 2, 4, 5).reshape(4, -1, C)
        y = self.mix(y * 1.0) * self.scale
        y = y.view(1, 2, 2, SIZE // 2, SIZE // 2, C).permute(0, 1, 3, 2, 4, 5).reshape(1, SIZE, SIZE, C)
        return x + torch.roll(y, (2, 2), (1, 2)).permute(0, 3, 1, 2)


class Gates(nn.Module):
    """Elementwise chains that several read, and what is computed twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * torch.sigmoid(x) + x.exp().clamp(0.1, 2.0)
        return (y * torch.sigmoid(x)).tanh() - y.mean(1, keepdim=True).sqrt().clone() + x.exp().clamp(0.1, 2.0)


BLOCKS = (Residual, Bottleneck, Attention, Shuffle, Windows, Gates)


def varied(nodes: int) -> fx.GraphModule:
    """A captured graph of at least so many nodes: the blocks in turn, every time with new weights."""
    x = torch.randn(1, C, SIZE, SIZE)
    with torch.no_grad():
        captured = [capture(export(block().eval(), (x,))).graph for block in BLOCKS]
    root, graph = nn.Module(), fx.Graph()
    last = graph.node_copy(next(iter(captured[0].graph.find_nodes(op="placeholder"))))
    for count, block in _in_turn(captured):
        if len(graph.nodes) >= nodes:
            break
        values: dict[fx.Node, fx.Node] = {}
        for node in block.graph.nodes:
            if node.op == "placeholder":
                values[node] = last
            elif node.op == "get_attr":
                name, stored = f"{node.target}_{count}", getattr(block, node.target)
                new = stored + 0.01 * torch.randn_like(stored) if stored.is_floating_point() else stored
                root.register_buffer(name, new)
                values[node] = graph.get_attr(name)
                values[node].meta = dict(node.meta)
            elif node.op == "output":
                last = values[node.args[0][0]]
            else:
                values[node] = graph.node_copy(node, values.__getitem__)
    graph.output((last,))
    return fx.GraphModule(root, graph)


def _in_turn(captured: list[fx.GraphModule]) -> Iterator[tuple[int, fx.GraphModule]]:
    count = 0
    while True:
        for block in captured:
            yield count, block
            count += 1


def measure(nodes: int) -> dict[str, object]:
    """Run the passes over a graph of so many nodes."""
    graph = varied(nodes)
    count = len(graph.graph.nodes)
    started = time.perf_counter()
    rewritten, runs = run(graph, hwdb.lookup("x86-64-v3"), PASSES)
    seconds = time.perf_counter() - started
    return {
        "nodes": count,
        "nodes_left": len(rewritten.graph.nodes),
        "seconds": round(seconds, 2),
        "us_per_node": round(seconds / count * 1e6),
        "rewrites": sum(r.rewrites for r in runs),
        "rounds": max(r.runs for r in runs),
        "passes": {f"{i} {r.name}": round(r.seconds, 3) for i, r in enumerate(runs)},
    }


def share(model: str) -> dict[str, float]:
    """The passes' part of compiling a model of the zoo, verification left out."""
    from graphwright.compiler.commands.model_argument import load_model

    loaded, examples = load_model(model, ())
    report = graphwright.compile(loaded, examples, cache=False, verify=False).report()
    passes = report.stages["passes"]
    return {
        "compile_seconds": round(report.compile_seconds, 2),
        "passes_seconds": round(passes, 3),
        "share": round(passes / report.compile_seconds, 4),
        "rounds": max(r.runs for r in report.passes),
    }


if __name__ == "__main__":
    given = sys.argv[1:] or ["1000", "3000", "10000"]
    torch.manual_seed(0)
    measure(100)  # what is done once a process
    print(json.dumps({text: measure(int(text)) if text.isdigit() else share(text) for text in given}, indent=1))
