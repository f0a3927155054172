"""Tensors that hold no bytes of their own, which cannot be constants of a compiled model.

torch.export follows torch.func.grad by running it, and takes its wrapped operands for constants: a model that forgot
its input. FakeTensorMode and subclasses that wrap other tensors leave nothing to read either.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import LEAVES, CaptureError

_PACKAGE = str(Path(__file__).parent)


def without_data(tensor: torch.Tensor) -> str | None:
    """Why the tensor has no bytes of its own, or None where it has."""
    if isinstance(tensor, FakeTensor):
        return "was made under FakeTensorMode and holds no data; make the model outside of it"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return (
            "belongs to a derivative (torch.func.grad, vjp, jacrev, hessian), which torch.export cannot follow; take "
            "the derivative outside the model"
        )
    if is_traceable_wrapper_subclass(tensor):
        return (
            f"is a {type(tensor).__name__}, which wraps other tensors; compile the model with plain ones "
            "(torchao.utils.unwrap_tensor_subclass makes them of torchao's)"
        )
    return None


def require_data(exported: ExportedProgram) -> None:
    """Raise CaptureError, with the user's source line, where a constant of the program has no bytes."""
    signature = exported.graph_signature
    targets = {str(spec.target): spec.arg.name for spec in signature.input_specs if spec.target is not None}
    for name, value in {**exported.state_dict, **exported.constants}.items():
        if isinstance(value, torch.Tensor) and (reason := without_data(value)) is not None:
            node = next((n for n in exported.graph.nodes if n.name == targets.get(name)), None)
            derivative = torch._C._functorch.is_functorch_wrapped_tensor(value)
            raise CaptureError(
                f"the constant {name} of the model {reason}{_where(node)}", split=LEAVES if derivative else ""
            )


def _where(node: fx.Node | None) -> str:
    """The source line of the first operator that the value reaches."""
    waiting = [] if node is None else [node]
    seen = set(waiting)
    while waiting:
        here = waiting.pop(0)
        trace = (here.meta.get("stack_trace") or "").rstrip()
        frames = [line for line in trace.splitlines() if line.lstrip().startswith("File ")]
        if frames and _PACKAGE not in frames[-1]:  # ours calls a model that is a function
            return f"\nwhere the model says:\n{trace}"
        waiting += [user for user in here.users if user not in seen]
        seen.update(here.users)
    return ""
