"""The operators of 8 bits: machine code gives the bits of their bodies in PyTorch, on random shapes and scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering_harness import build_node, check, host_target, prim_func
from narrow_harness import run
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphwright.backends.cpu.expand_math import expand_math
from graphwright.backends.cpu.schedule import schedule
from graphwright.backends.lowering.operators import KERNELS
from graphwright.backends.lowering.registry import KernelCall, Packed, Refusal
from graphwright.hwdb import detect
from graphwright.passes import dialect_int8
from graphwright.passes.dialect_int8 import RANGES

BYTES = st.sampled_from([torch.uint8, torch.int8])
# The activations whose machine code rounds as torch's does; polynomials (gelu, ...) differ in the last bits.
ACTIVATIONS = st.sampled_from(
    [("none", []), ("relu", []), ("relu6", []), ("clamp", [-3.0, 5.5]), ("leaky_relu", [0.1])]
)


def integers(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    low, high = RANGES[dtype]
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def node_of(op: Any, args: tuple[Any, ...], constants: set[int]) -> tuple[fx.Node, dict[fx.Node, torch.Tensor]]:
    """A call whose tensors are inputs, but for the positions in `constants`."""
    graph, mode, tensors = fx.Graph(), FakeTensorMode(), dict[fx.Node, torch.Tensor]()
    nodes = []
    for i, arg in enumerate(args):
        if not isinstance(arg, torch.Tensor):
            nodes.append(arg)
            continue
        node = graph.get_attr(f"c{i}") if i in constants else graph.placeholder(f"a{i}")
        node.meta["val"] = mode.from_tensor(arg)
        tensors[node] = arg
        nodes.append(node)
    call = graph.call_function(op, tuple(nodes))
    call.meta["val"] = mode.from_tensor(op(*args))
    return call, tensors


def machine_code(op: Any, *args: Any) -> torch.Tensor:
    """What the kernel of `op` gives; weights, scales and biases are constants."""
    node, tensors = node_of(op, args, {2, 3, 4})
    call = KERNELS[op](node, detect())
    assert isinstance(call, KernelCall), call
    given = [o.pack(tensors[o.constant]) if isinstance(o, Packed) else tensors[o] for o in call.operands]
    value = node.meta["val"]
    out = torch.zeros(value.shape, dtype=value.dtype)
    run(call.func, detect(), *given, out)
    return out


@st.composite
def epilogues(draw: st.DrawFn) -> dict[str, Any]:
    result = draw(st.sampled_from([None, torch.uint8, torch.int8]))
    low, high = RANGES[result or torch.uint8]
    activation, args = draw(ACTIVATIONS)
    return {
        "bias": draw(st.booleans()),
        "residual": draw(st.sampled_from([None, torch.float32, torch.uint8, torch.int8])),
        "activation": (activation, args),
        "result": (draw(st.floats(1e-3, 1.0)), draw(st.integers(low, high)) if result else 0, result),
    }


def operands(epilogue: dict[str, Any], columns: int, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Scale, bias, residual and how it is stored."""
    generator = torch.Generator().manual_seed(5)
    scale = torch.rand(columns, generator=generator) * 1e-2 + 1e-5
    bias = torch.randn(columns, generator=generator) if epilogue["bias"] else None
    kind = epilogue["residual"]
    residual = None
    if kind is not None:
        residual = torch.randn(shape, generator=generator) if kind == torch.float32 else integers(kind, *shape, seed=3)
    return scale, bias, residual, 0.037, 7


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.integers(1, 33),
    st.sampled_from([1, 3, 8, 37, 64, 130]),
    st.sampled_from([1, 7, 16, 40, 97]),
    BYTES,
    st.floats(0.0, 1.0),
    epilogues(),
)
def test_qlinear_bit_for_bit(M: int, K: int, N: int, source: torch.dtype, where: float, epilogue: Any) -> None:
    low, high = RANGES[source]
    zero = low + round(where * (high - low))
    x, w = integers(source, M, K), integers(torch.int8, N, K, seed=1)
    args = (x, zero, w, *operands(epilogue, N, (M, N)), *epilogue["activation"], *epilogue["result"])
    assert torch.equal(machine_code(dialect_int8.qlinear, *args), dialect_int8.qlinear(*args))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 2), st.integers(3, 9), st.integers(3, 9)),
    st.sampled_from([(1, 8), (3, 20), (16, 16), (17, 33)]),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(*[st.integers(0, 2)] * 4),
    BYTES,
    st.floats(0.0, 1.0),
    epilogues(),
)
def test_qconv2d_bit_for_bit(
    image: Any, channels: Any, kernel: Any, stride: Any, padding: Any, source: torch.dtype, where: float, epilogue: Any
) -> None:
    low, high = RANGES[source]
    zero = low + round(where * (high - low))
    x, w = integers(source, *image, channels[0]), integers(torch.int8, channels[1], channels[0], *kernel, seed=1)
    sizes = (list(stride), list(padding), [1, 1], 1)
    plain = (x, zero, w, torch.ones(channels[1]), None, None, 1.0, 0, *sizes, "none", [], 1.0, 0, None)
    shape = dialect_int8.qconv2d(*plain).shape
    given = operands(epilogue, channels[1], tuple(shape))
    args = (x, zero, w, *given, *sizes, *epilogue["activation"], *epilogue["result"])
    assert torch.equal(machine_code(dialect_int8.qconv2d, *args), dialect_int8.qconv2d(*args))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("zero", [-7, 0, 100])
def test_quantize_and_dequantize_bit_for_bit(dtype: torch.dtype, zero: int) -> None:
    zero = max(zero, RANGES[dtype][0])
    halves = torch.arange(-300, 300).float() / 2  # ties, which go to the even step
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 0.0, -0.0])
    x = torch.cat([halves * 0.3, special])
    check(dialect_int8.quantize, x, 0.3, zero, dtype, rtol=0, atol=0)
    check(dialect_int8.dequantize, integers(dtype, 7, 33), 0.3, zero, rtol=0, atol=0)


def test_refusals() -> None:
    w = integers(torch.int8, 4, 8)
    args = (integers(torch.uint8, 3, 8), 0, w, torch.ones(4), None, None, 1.0, 0, "none", [], 1.0, 0, None)
    node, _ = node_of(dialect_int8.qlinear, args, {3})
    refused = KERNELS[dialect_int8.qlinear](node, detect())
    assert isinstance(refused, Refusal)
    assert "computed" in refused.reason
    grouped = (
        *(integers(torch.uint8, 1, 4, 4, 8), 0, integers(torch.int8, 8, 4, 3, 3), torch.ones(8), None, None, 1.0, 0),
        *([1, 1], [1, 1, 1, 1], [1, 1], 2, "none", [], 1.0, 0, None),
    )
    node, _ = node_of(dialect_int8.qconv2d, grouped, {2, 3})
    refused = KERNELS[dialect_int8.qconv2d](node, detect())
    assert isinstance(refused, Refusal)
    assert "2 groups" in refused.reason


@pytest.mark.skipif(detect().vector_dot_product("int8") != "vnni", reason="other products may take signed bytes")
def test_depthwise_taps_take_a_byte_and_zero_offsets_are_not_stored() -> None:
    x, w = integers(torch.uint8, 1, 6, 6, 40), integers(torch.int8, 40, 1, 3, 3, seed=1)
    sums = (w, torch.full((40,), 1e-3), None, None, 1.0, 0)
    rest = ([1, 1], [1, 1, 1, 1], [1, 1], 40, "none", [], 1.0, 0, None)
    stored = {}
    for zero in (0, 7):
        node, tensors = node_of(dialect_int8.qconv2d, (x, zero, *sums, *rest), {2, 3})
        call = KERNELS[dialect_int8.qconv2d](node, detect())
        assert isinstance(call, KernelCall), call
        packed = [o for o in call.operands if isinstance(o, Packed)]
        stored[zero] = [o.pack(tensors[o.constant]).nbytes for o in packed]
    channels = 4 * 48  # in blocks of 32 and 16, of which the last begins 8 channels earlier
    assert stored == {0: [9 * 40, channels], 7: [9 * 40, channels, channels]}


def test_rounding_alone_is_vector_code() -> None:
    node, _, _ = build_node(dialect_int8.quantize, torch.randn(1, 14, 14, 64), 0.02, 3, torch.uint8)
    func = expand_math(schedule(prim_func(node)[0], detect()))
    module = tvm.compile(tvm.IRModule({"f": func.with_attr("global_symbol", "f")}), target=host_target())
    text = module.mod.inspect_source("ll")
    assert "@llvm.nearbyint.v" in text
    assert "gather" not in text  # 20 times as slow
