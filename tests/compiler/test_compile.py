"""graphwright.compile and the model it returns: called like the original, with clear errors where it cannot be."""

from __future__ import annotations

import math
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphwright
from graphwright.compiler.partition import Part
from graphwright.compiler.plan import make_plan
from graphwright.compiler.specialised import LIMIT, Specialised
from graphwright.errors import CaptureError, InputError, UnknownTarget, UnsupportedOp


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(y if scale is None else y * scale)


@pytest.fixture(scope="module")
def block() -> Block:
    torch.manual_seed(0)
    return Block().eval()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    return torch.randn(2, 3, 9, 7)


@pytest.fixture(scope="module")
def compiled(block: Block, image: torch.Tensor) -> Any:
    return graphwright.compile(block, (image, torch.tensor(2.0)))


def close(result: torch.Tensor, expected: torch.Tensor) -> None:
    # Two orders of summation over a few dozen products in float32.
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_called_like_the_model(compiled: Any, block: Block, image: torch.Tensor) -> None:
    expected = block(image, torch.tensor(3.0)).detach()
    close(compiled(image, torch.tensor(3.0)), expected)
    close(compiled(image, scale=torch.tensor(3.0)), expected)
    close(compiled(scale=torch.tensor(3.0), x=image), expected)


def test_results_are_fresh_tensors(compiled: Any, image: torch.Tensor) -> None:
    first = compiled(image, torch.tensor(1.0))
    copy = first.clone()
    second = compiled(image + 1, torch.tensor(1.0))
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, copy)
    assert not first.requires_grad


@pytest.mark.parametrize("view", ["channels_last", "transposed", "strided", "expanded", "misaligned"])
def test_inputs_with_any_strides(compiled: Any, block: Block, view: str) -> None:
    base = torch.randn(2, 3, 9, 7)
    image = {
        "channels_last": lambda: base.to(memory_format=torch.channels_last),
        "transposed": lambda: torch.randn(2, 3, 7, 9).transpose(2, 3),
        "strided": lambda: torch.randn(2, 6, 18, 7)[:, ::2, ::2],
        "expanded": lambda: torch.randn(1, 3, 9, 7).expand(2, 3, 9, 7),
        "misaligned": lambda: torch.randn(base.numel() + 1)[1:].view(2, 3, 9, 7),
    }[view]()
    close(compiled(image, torch.tensor(1.0)), block(image, torch.tensor(1.0)).detach())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.randn(1, 3, 9, 7), torch.tensor(1.0)), r"x: expected float32\[2, 3, 9, 7\], got shape \(1, 3, 9, 7\)"),
        ((torch.randn(2, 3, 9, 7).double(), torch.tensor(1.0)), r"x: expected float32.*got dtype torch.float64"),
        ((torch.randn(2, 3, 9, 7, device="meta"), torch.tensor(1.0)), "x: is on device meta"),
        ((torch.randn(2, 3, 9, 7),), "another structure"),
        ((torch.randn(2, 3, 9, 7), 1.0), "scale: expected a tensor, got float"),
        ((torch.randn(2, 3, 9, 7, requires_grad=True), torch.tensor(1.0)), "requires a gradient"),
    ],
)
def test_wrong_inputs_are_explained(compiled: Any, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compiled(*args)


def test_gradients_are_ignored_where_none_are_recorded(compiled: Any, block: Block, image: torch.Tensor) -> None:
    with torch.no_grad():
        close(compiled(image.clone().requires_grad_(), torch.tensor(1.0)), block(image, torch.tensor(1.0)))


def test_many_threads_on_one_model(compiled: Any, block: Block) -> None:
    inputs = [torch.randn(2, 3, 9, 7) for _ in range(8)]
    expected = [compiled(x, torch.tensor(1.0)) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(compiled(inputs[i], torch.tensor(1.0)), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_can_be_set(block: Block, image: torch.Tensor) -> None:
    one = graphwright.compile(block, (image,), threads=1)
    assert one.threads == 1
    one.threads = 2
    assert one.threads == 2
    close(one(image), block(image).detach())
    with pytest.raises(InputError, match="at least 1"):
        one.threads = 0


Pair = namedtuple("Pair", "left right")


def test_structures_of_arguments_and_results() -> None:
    def model(pair: dict[str, torch.Tensor], *, flip: bool = False) -> Any:
        a, b = pair["a"], pair["b"]
        return {"pair": Pair(b, a) if flip else Pair(a + b, a), "list": [a * 2, None, "text"], "flip": flip}

    pair = {"a": torch.randn(3), "b": torch.randn(3)}
    compiled = graphwright.compile(model, {"pair": pair, "flip": False})
    result = compiled(pair=pair, flip=False)
    assert isinstance(result["pair"], Pair)
    assert torch.equal(result["pair"].left, pair["a"] + pair["b"])
    assert torch.equal(result["pair"].right, pair["a"])
    assert result["pair"].right.data_ptr() != pair["a"].data_ptr()
    assert result["list"][1:] == [None, "text"]
    with pytest.raises(InputError, match="compiled with False and called with True"):
        compiled(pair=pair, flip=True)


def test_one_tensor_as_two_inputs() -> None:
    x = torch.randn(4)
    compiled = graphwright.compile(lambda a, b: a - 2 * b, (x, x))
    assert torch.equal(compiled(x, torch.zeros(4)), x)


def test_a_result_that_is_an_input_or_comes_twice() -> None:
    x = torch.randn(4)
    same, double, again, view = graphwright.compile(lambda a: (a, a * 2, a * 2, a.view(2, 2)), (x,))(x)
    assert torch.equal(same, x)
    assert torch.equal(double, again)
    assert torch.equal(view, x.view(2, 2))
    assert len({t.data_ptr() for t in (x, same, double, again, view)}) == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.int32, torch.bool, torch.complex64, torch.float16])
def test_other_dtypes_are_computed_somewhere(dtype: torch.dtype) -> None:
    x = torch.tensor([[1, 0, 3], [0, 5, 7]]).to(dtype)

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.t(), x.t()], 1) == x.t().repeat(1, 2)

    assert graphwright.compile(model, (x,))(x).all()
    if dtype is not torch.bool:
        assert torch.equal(graphwright.compile(lambda x: x * x + x, (x,))(x), x * x + x)


def test_heads_of_attention_without_elements() -> None:
    """A dimension of one head is put in, and taken out again: reshapes of no elements."""

    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    compiled = graphwright.compile(model, (torch.randn(2, 5, 0),))
    assert compiled(torch.randn(2, 5, 0)).shape == (2, 5, 0)
    assert not compiled.report().eager


def test_random_numbers_are_drawn_in_the_order_of_the_model() -> None:
    """The second draw needs nothing, and could run first."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            dropped = nn.functional.dropout(self.linear(x), 0.5)
            return nn.functional.dropout(self.linear(dropped), 0.5) + torch.randn(8)

    model, x = Noisy(), torch.randn(2, 8)
    compiled = graphwright.compile(model, (x,))
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x), expected.detach())


@pytest.mark.parametrize(
    "model",
    [
        lambda x: (x.mT * 2).as_strided((3, 5), (2, 1), 1),
        lambda x: (x.mT * 2)[1:].as_strided((3,), (1,)),
        lambda x: (x[None, :, :, None].to(memory_format=torch.channels_last) + 1).as_strided((7,), (3,)),
        lambda x: (x + 1)[:, 2:].as_strided((4, 2), (6, 1)),
    ],
)
def test_as_strided_reads_memory_as_pytorch_lays_it_out(model: Any) -> None:
    x = torch.randn(4, 6)
    assert torch.equal(graphwright.compile(model, (x,))(x), model(x))


def test_a_model_that_reads_memory_is_compiled_for_each_order_of_it(tmp_path: Path) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.as_strided(x.clone() + 1, (3, 3), (1, 4)) * 2

    rows = torch.randn(5, 4)
    columns = rows.t().contiguous().t()
    compiled = [graphwright.compile(model, x) for x in (rows, columns)]
    for one, x, other in zip(compiled, (rows, columns), (columns, rows), strict=True):
        loaded = graphwright.load(one.save(tmp_path / f"{x.stride()}.gw"))
        for found in (one, loaded):
            assert torch.equal(found(x), model(x))
            with pytest.raises(InputError, match=r"args_0|x: has strides .* reads its memory \(as_strided\)"):
                found(other)


def test_memory_order_matters_to_no_other_model() -> None:
    compiled = graphwright.compile(lambda x: x.flatten() * 2, torch.randn(5, 4))
    columns = torch.randn(4, 5).t()
    assert torch.equal(compiled(columns), columns.flatten() * 2)


@pytest.mark.parametrize("scale", [1e20, 1e-30])
def test_a_standard_deviation_has_the_range_of_its_dtype(scale: float) -> None:
    x = torch.randn(3, 16) * scale
    found = graphwright.compile(lambda x: x.std(-1), x)(x)
    torch.testing.assert_close(found, x.std(-1), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 0, 8)])
def test_zero_sized_tensors(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)

    def model(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.relu(x) + 1, x.sum((2, 3)), torch.cat([x, x], 1), x.flatten(1)

    for result, expected in zip(graphwright.compile(model, (x,))(x), model(x), strict=True):
        assert torch.equal(result, expected)


def test_a_model_without_operators_or_inputs() -> None:
    x = torch.randn(3)
    assert torch.equal(graphwright.compile(nn.Sequential(), (x,))(x), x)
    assert torch.equal(graphwright.compile(lambda: torch.ones(3), ())(), torch.ones(3))


def test_an_operator_without_lowering_runs_in_pytorch_and_is_reported() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(torch.relu(x) + 3 * torch.eye(3)).sin()

    x = torch.randn(3, 3)
    compiled = graphwright.compile(model, (x,))
    close(compiled(x), model(x))
    assert any("inv" in row.operator for row in compiled.report().eager)


@torch.library.custom_op("graphwright_tests::fill_with_sum", mutates_args={"x", "outs"})
def fill_with_sum(x: torch.Tensor, outs: list[torch.Tensor], by: float) -> torch.Tensor:
    x.mul_(by)
    for out in outs:
        out.copy_(x.sum().expand(out.shape))
    return x.amax()


@fill_with_sum.register_fake
def _(x: torch.Tensor, outs: list[torch.Tensor], by: float) -> torch.Tensor:
    return x.new_empty(())


def test_an_operator_that_writes_to_its_arguments_runs_in_pytorch(tmp_path: Path) -> None:
    def model(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, a, b = x + 1, torch.zeros_like(x), torch.zeros(3)
        before = y.relu()
        largest = fill_with_sum(y[1:], [a[0], b], 3.0)
        return before, y, a + 1, b * largest

    x = torch.randn(2, 4)
    kept = x.clone()
    compiled = graphwright.compile(model, (x,))
    (row,) = compiled.report().eager
    assert row.operator == "graphwright_tests.fill_with_sum.default"
    for run in (compiled, graphwright.load(compiled.save(tmp_path / "model.gw"))):
        for result, expected in zip(run(x), model(x), strict=True):
            close(result, expected)
    assert torch.equal(x, kept)


def test_an_argument_that_cannot_be_kept_is_named_with_operator_and_line() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.ops.aten.relu.default, (x,), {"how": slice(1, 2)})
    node.meta["stack_trace"] = 'File "model.py", line 3, in forward\n    return relu(x)'
    module = torch.fx.GraphModule(nn.Module(), graph)
    with pytest.raises(UnsupportedOp, match=r"aten\.relu\.default: an argument is a slice[\s\S]*model\.py") as raised:
        make_plan(module, [Part(False, (node,), (x,), (node,))])
    assert "torch.compile(" in str(raised.value)


def test_data_dependent_shapes_run_in_pytorch() -> None:
    x = torch.tensor([1.0, -1.0, 2.0])

    def model(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.unique(x.sign())
        return values.shape[0] * torch.relu(x).sum(), values.exp()

    compiled = graphwright.compile(model, (x,))
    for result, expected in zip(compiled(x), model(x), strict=True):
        close(result, expected)
    (count, values), y = compiled(x.abs()), x.abs()
    close(count, model(y)[0])
    assert values.shape == (1,)


def test_without_examples_the_first_call_compiles(block: Block) -> None:
    lazy = graphwright.compile(block)
    assert isinstance(lazy, Specialised)
    with pytest.raises(InputError, match="has not been called yet"):
        lazy.report()
    for batch in (1, 2, 1):
        image = torch.randn(batch, 3, 6, 6)
        close(lazy(image), block(image).detach())
    assert len(lazy.specialisations) == 2
    with pytest.raises(InputError, match=r"compiled for 2 sets of shapes.*specialisations\[0\]"):
        lazy.save("nowhere.gw")


@pytest.mark.parametrize(
    "option",
    [{"threads": v} for v in (True, 0, 2.0, 257, "2")]
    + [{"tolerance": v} for v in (True, 0, -1e-3, 1.5, math.inf, math.nan, "1e-3")],
)
def test_numbers_that_mean_nothing_are_refused(option: dict[str, Any], block: Block, image: torch.Tensor) -> None:
    with pytest.raises(InputError, match=next(iter(option))):
        graphwright.compile(block, (image,), **option)


def test_dynamic_shapes_admit_what_they_declare(block: Block) -> None:
    batch = torch.export.Dim("batch", min=1, max=4)
    lazy = graphwright.compile(block, (torch.randn(2, 3, 6, 6),), dynamic_shapes={"x": {0: batch}})
    for size in (2, 3, 4):
        image = torch.randn(size, 3, 6, 6)
        close(lazy(image), block(image).detach())
    with pytest.raises(InputError, match=r"outside of dynamic_shapes: 5 not in range"):
        lazy(torch.randn(5, 3, 6, 6))
    assert LIMIT >= 8


@pytest.mark.parametrize("named", [False, True])
def test_dynamic_shapes_of_a_function_go_by_its_own_parameters(named: bool) -> None:
    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y.sum()

    rows = {0: torch.export.Dim("rows", min=2, max=9)}
    shapes = {"x": rows, "y": None} if named else (rows, None)
    lazy = graphwright.compile(model, (torch.randn(3, 5), torch.ones(2)), dynamic_shapes=shapes)
    assert lazy(torch.ones(7, 5), torch.ones(2)).shape == (7, 5)
    with pytest.raises(InputError, match="outside of dynamic_shapes"):
        lazy(torch.ones(20, 5), torch.ones(2))


def test_an_exported_program_and_its_file(block: Block, image: torch.Tensor, tmp_path: Path) -> None:
    program = torch.export.export(block, (image,))
    expected = block(image).detach()
    close(graphwright.compile(program)(image), expected)
    torch.export.save(program, tmp_path / "block.pt2")
    close(graphwright.compile(tmp_path / "block.pt2")(image), expected)
    close(graphwright.compile(str(tmp_path / "block.pt2"))(image), expected)


def test_an_fx_graph_module(block: Block, image: torch.Tensor) -> None:
    body = nn.Sequential(block.conv, block.norm)
    close(graphwright.compile(torch.fx.symbolic_trace(body), (image,))(image), body(image).detach())


def test_the_report_and_the_graph(compiled: Any, image: torch.Tensor) -> None:
    report = compiled.report()
    data = report.to_dict()
    assert data["errors"][0]["relative_l2"] < 1e-6
    assert {p["name"] for p in data["passes"]} >= {"fold_batch_norm", "fuse_conv_activation", "fuse_matmul_bias"}
    assert sum(p["rewrites"] for p in data["passes"]) >= 3
    assert any("conv" in k["algorithm"] for k in data["kernels"])
    assert data["arena_bytes"] <= 1.1 * data["arena_lower_bound_bytes"] + 64
    assert "direct conv" in report.text() or "conv" in report.text()
    close(compiled.graph(image, torch.tensor(2.0))[0], compiled(image, torch.tensor(2.0)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "x86-64-v9"}, UnknownTarget, "x86-64-v"),
        ({"target": "raspbery-pi"}, UnknownTarget, "did you mean"),
        ({"threads": 0}, InputError, "from 1 to 256"),
        ({"threads": "2"}, InputError, "whole number"),
        ({"target": None}, InputError, "target is a name"),
        ({"tolerance": "1"}, InputError, "positive and at most 1"),
        ({"tolerance": -1.0}, InputError, "positive"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        graphwright.compile(nn.ReLU(), (torch.ones(2),), **options)


def test_wrong_examples_are_explained() -> None:
    with pytest.raises(InputError, match="example_inputs is a int"):
        graphwright.compile(nn.ReLU(), 3)
    with pytest.raises(CaptureError, match="Sequential"):
        graphwright.compile(nn.Sequential(nn.Linear(3, 4)), (torch.ones(2, 5),))


def test_under_another_default_device_results_are_on_the_cpu(compiled: Any, image: torch.Tensor) -> None:
    expected = compiled(image, torch.tensor(1.0))
    scale = torch.tensor(1.0)
    with torch.device("meta"):
        assert torch.equal(compiled(image, scale), expected)


def test_tensors_without_data_are_refused(compiled: Any, image: torch.Tensor) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake = FakeTensorMode().from_tensor(image)
    with pytest.raises(InputError, match="x: holds no data"):
        compiled(fake, torch.tensor(1.0))
    with pytest.raises(InputError, match="x: expected a dense tensor"):
        compiled(image.to_sparse(), torch.tensor(1.0))


def test_a_pending_negation_is_carried_out(compiled: Any, block: Block, image: torch.Tensor) -> None:
    close(compiled(torch._neg_view(image), torch.tensor(1.0)), block(-image, torch.tensor(1.0)).detach())


def test_a_compiled_model_says_how_it_is_copied(compiled: Any) -> None:
    import copy
    import pickle

    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"save\(\) and graphwright\.load"):
            attempt(compiled)


def test_threads_compile_at_once() -> None:
    """torch.export keeps state in globals: compilations take turns."""
    x = torch.randn(2, 3)
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda k: graphwright.compile(lambda x: x.sin() * k, x, cache=False), range(6)))
    for k, compiled in enumerate(models):
        close(compiled(x), x.sin() * k)


def test_attention_without_keys_gives_zeros() -> None:
    """As operators written out, where the softmax of nothing weighs nothing, and as one."""
    q, k, v = torch.randn(2, 3, 7, 5), torch.randn(2, 3, 0, 5), torch.randn(2, 3, 0, 5)
    for attend in (lambda q, k, v: torch.softmax(q @ k.mT * 0.4, -1) @ v, nn.functional.scaled_dot_product_attention):
        close(graphwright.compile(attend, (q, k, v), cache=False)(q, k, v), torch.zeros(2, 3, 7, 5))


def test_an_example_that_pytorch_cannot_run_is_refused_with_the_line() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 4)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            return self.table(words) * 2.0

    with pytest.raises(InputError, match=r"does not run the model on words torch.int64.*index out of range") as error:
        graphwright.compile(Words(), (torch.tensor([3, 50]),))
    assert "return self.table(words) * 2.0" in str(error.value)
    assert isinstance(error.value.__cause__, IndexError)
