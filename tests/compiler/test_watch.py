"""Which writes to constants are seen, through PyTorch and behind its back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from graphwright.compiler.watch import SAMPLE, Watch


def batch_norm(t: torch.Tensor) -> None:
    F.batch_norm(torch.randn(8, len(t)), t, torch.ones(len(t)), training=True)


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda t: t.add_(1),
    "one element in place": lambda t: t[len(t) // 2].fill_(7),
    "batch_norm": batch_norm,
    ".data": lambda t: t.data.mul_(2),
    "NumPy": lambda t: t.numpy().fill(3),
    "last through NumPy": lambda t: t.numpy().__setitem__(-1, 3),
    "other memory": lambda t: setattr(t, "data", t.clone()),
    "less memory": lambda t: t.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("size", [1, SAMPLE // 4, 3 * SAMPLE])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_seen(write: Callable[[torch.Tensor], object], size: int) -> None:
    others = [torch.randn(3), torch.randn(2, 2)]
    tensor = torch.rand(size) + 1
    watch = Watch({0: others[0], 2: tensor, 3: others[1]})
    inputs = [others[0], "not watched", tensor, others[1]]
    assert watch.holds(inputs)
    assert watch.changed(inputs) == set()
    write(tensor)
    assert not watch.holds(inputs)
    assert watch.changed(inputs) == {2}


def test_the_ends_of_a_strided_tensor_are_its_own() -> None:
    whole = torch.zeros(40, 40)
    watch = Watch({0: whole[10:30, 10:30].t()})
    part = whole[10:30, 10:30].t()
    whole.numpy()[0] = whole.numpy()[39] = 1
    assert watch.holds([part])
    whole.numpy()[29, 29] = 1
    assert not watch.holds([part])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.complex64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    tensor = torch.ones(100).to(dtype)
    watch = Watch({0: tensor})
    assert watch.holds([tensor])
    tensor.data.zero_()
    assert not watch.holds([tensor])


def test_tensors_without_elements_or_without_a_version() -> None:
    with torch.inference_mode():
        tensor = torch.ones(4)
    empty, meta = torch.empty(0, 3), torch.empty(3, device="meta")
    watch = Watch({0: empty, 1: meta, 2: tensor})
    assert watch.holds([empty, meta, tensor])
    with torch.inference_mode():
        tensor.add_(1)
    assert watch.changed([empty, meta, tensor]) == {2}


def test_memory_that_was_replaced_is_not_given_to_another() -> None:
    tensor = torch.nn.Parameter(torch.ones(1 << 16))
    watch = Watch({0: tensor})
    for _ in range(8):
        tensor.data = torch.ones(1 << 16)
        assert not watch.holds([tensor])
