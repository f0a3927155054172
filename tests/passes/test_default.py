"""The whole sequence on whole models: what is left of them, that the numbers stay, and that it scales."""

from __future__ import annotations

import cProfile
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rewriting import HW, assert_same_numbers, check_values, trace, trace_core
from torch import fx

from graphwright.compiler.pipeline import copy_graph, run
from graphwright.passes import dialect
from graphwright.passes.default import PASSES

transformers = pytest.importorskip("transformers")
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
IMAGE, WORDS = torch.randn(1, 3, 64, 64), torch.randint(0, 99, (1, 16))


def resnet(layer):
    sizes = {"depths": [2, 2], "hidden_sizes": [16, 32], "embedding_size": 16, "layer_type": layer}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)), IMAGE


def efficientnet():
    """Depthwise convolutions, uneven padding, gates and silu."""
    blocks = {"in_channels": [32, 8, 16], "out_channels": [8, 16, 24], "strides": [1, 2, 2], "expand_ratios": [1, 6, 6]}
    config = transformers.EfficientNetConfig(
        image_size=64, kernel_sizes=[3, 3, 5], num_block_repeats=[1, 1, 2], hidden_dim=1280, width_coefficient=1.0,
        depth_coefficient=1.0, **blocks,
    )  # fmt: skip
    return transformers.EfficientNetForImageClassification(config), IMAGE


def bert(attention):
    config = transformers.BertConfig(**TEXT, attn_implementation=attention)
    return transformers.BertModel(config), WORDS


def gpt2():
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=99, use_cache=False)
    config.bos_token_id = config.eos_token_id = None
    return transformers.GPT2LMHeadModel(config), WORDS


def vit():
    sizes = {k: v for k, v in TEXT.items() if k != "vocab_size"}
    return transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=8, **sizes)), IMAGE[..., :32, :32]


MODELS = {
    "resnet, basic": (lambda: resnet("basic"), {"conv2d": 10, "permute": 1, "linear": 1}),
    # The first convolution reads its image in NCHW: `planar_conv2d`, which is no operator of `dialect` itself.
    "efficientnet": (efficientnet, {"conv2d": 20, "avg_pool2d": 1, "linear": 1}),
    "bert, eager attention": (lambda: bert("eager"), {"linear": 9, "strided_attention": 2}),
    "gpt2": (gpt2, {"linear": 9, "strided_attention": 2}),
    "vit": (vit, {"conv2d": 1, "linear": 9, "strided_attention": 2, "permute": 1}),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_come_down_to_the_dialect(name):
    build, wanted = MODELS[name]
    torch.manual_seed(0)
    model, x = build()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    graph = trace(model.eval(), [x])
    before = copy_graph(graph)
    rewritten, _ = run(graph, HW, PASSES)
    found = Counter(n.target for n in rewritten.graph.nodes if n.target in dialect.OPERATORS)
    assert {k: v for k, v in found.items() if k is not dialect.max_pool2d} == {
        getattr(dialect, name): count for name, count in wanted.items()
    }
    check_values(rewritten, [x])
    # Folding rounds each weight once more; eager's own error on these models is of the same size.
    assert_same_numbers(before, rewritten, [x], rtol=2e-4, atol=2e-5, wide=1e-5)
    again = run(rewritten, HW, PASSES)[1]
    assert [r.name for r in again if r.rewrites] == []


def repeated(times):
    """A graph of `times` residual blocks, each with something for every pass."""
    w, b = torch.randn(8, 8, 1, 1), torch.randn(8)

    def block(x):
        y = F.relu(F.conv2d(x, w, b)).permute(0, 2, 3, 1).contiguous().clone().permute(0, 3, 1, 2)
        return (F.linear(y, w[:, :, 0, 0].t() * 2) + x) * 1

    one = trace_core(block, [torch.randn(1, 8, 8, 8)])
    graph = fx.Graph()
    (x,) = [n for n in one.graph.nodes if n.op == "placeholder"]
    last = graph.node_copy(x)
    for _ in range(times):
        values = {x: last}
        for node in one.graph.nodes:
            if node.op not in ("placeholder", "output"):
                values[node] = graph.node_copy(node, values.__getitem__)
        last = values[next(n for n in one.graph.nodes if n.op == "output").args[0][0]]
    graph.output((last,))
    return fx.GraphModule(one, graph)


def calls_of(times):
    """How many functions each pass calls, in order, on a graph of `times` blocks."""
    graph, counts = repeated(times), []
    for rewrite in PASSES:
        profile = cProfile.Profile()
        profile.runcall(rewrite, graph, HW)
        counts.append((rewrite.__name__, sum(entry.callcount for entry in profile.getstats())))
    return counts


def test_work_grows_with_the_graph_and_no_faster():
    for (name, few), (_, many) in zip(calls_of(20), calls_of(60), strict=True):
        assert many < 3.3 * few + 10_000, name  # three times the nodes; nine times were quadratic


def test_rounds_over_unlike_blocks_grow_no_faster_either():
    """Seconds of 10,000 nodes: benchmarks/passes.py."""
    varied = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "passes.py"))["varied"]
    work = []
    for nodes in (250, 750):
        graph, profile = varied(nodes), cProfile.Profile()
        profile.runcall(run, graph, HW, PASSES)
        work.append((len(graph.graph.nodes), sum(entry.callcount for entry in profile.getstats())))
    (few, calls), (many, more) = work
    assert more / calls < 1.15 * many / few
