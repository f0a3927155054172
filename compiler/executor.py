"""Runs a plan: machine code and PyTorch operators over numbered values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ..backends.gpu.device_library import DeviceLibrary
from ..passes.memory import in_order
from .plan import OperatorCall, Plan, RegionCall, decode, resolve

if TYPE_CHECKING:
    from ..backends.aot.library import Library

Run: TypeAlias = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


def executor(plan: Plan, library: Library | DeviceLibrary | None, constants: Mapping[str, torch.Tensor]) -> Run:
    """The function from the plan's tensor inputs to its results; one region and nothing else is the fast path."""
    if len(plan.calls) == 1 and isinstance(call := plan.calls[0], RegionCall) and plan.outputs == call.outputs:
        assert library is not None
        return _region(library, call, call.inputs)
    steps: list[Callable[..., Any]] = []
    for call in plan.calls:
        if isinstance(call, RegionCall):
            assert library is not None
            steps.append(_region(library, call, range(len(call.inputs))))
        else:
            steps.append(resolve(call.operator))
    fixed = {slot: constants[name] for slot, name in plan.constants.items()}

    def run(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        slots: list[Any] = [None] * plan.slots
        slots[: plan.inputs] = tensors
        for slot, tensor in fixed.items():
            slots[slot] = tensor.to(tensors[0].device) if tensors else tensor  # results are where the inputs are
        with torch.no_grad():
            for call, step in zip(plan.calls, steps, strict=True):
                if isinstance(call, OperatorCall):
                    args = in_order(step, decode(call.args, slots))
                    slots[call.output] = step(*args, **decode(call.kwargs, slots))
                    continue
                for slot, value in zip(call.outputs, step([slots[i] for i in call.inputs]), strict=True):
                    slots[slot] = value
            return _fresh(plan, slots)

    return run


def _region(library: Library | DeviceLibrary, call: RegionCall, order: Sequence[int]) -> Run:
    """The function that calls one region with the tensors at `order` of those it is given."""
    if isinstance(library, DeviceLibrary):
        device = library.call
        return lambda tensors: device([tensors[i].resolve_neg() for i in order])
    region, run, empty = call.region, library.run, torch.empty
    outputs = tuple(zip(call.shapes, call.dtypes, strict=True))

    def invoke(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # Held until the call returns: `contiguous` may have made a copy.
        operands = [tensors[i].contiguous().resolve_neg() for i in order]
        results = [empty(shape, dtype=dtype, device="cpu") for shape, dtype in outputs]
        run(region, [t.data_ptr() for t in operands], [t.data_ptr() for t in results])
        return results

    return invoke


def _fresh(plan: Plan, slots: Sequence[Any]) -> list[torch.Tensor]:
    """The results, copied where they share memory with an input, a constant or an earlier result."""
    held = {_address(slots[i]) for i in (*range(plan.inputs), *plan.constants)}
    results: list[torch.Tensor] = []
    for slot in plan.outputs:
        value = slots[slot]
        if (address := _address(value)) in held:
            value = value.clone()
        held.add(address)
        results.append(value)
    return results


def _address(tensor: Any) -> object:
    """What two tensors that share memory have in common."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or not tensor.numel():
        return object()
    return tensor.untyped_storage().data_ptr()
