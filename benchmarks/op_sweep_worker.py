"""The worker of op_sweep.py: reads {"operator": name} lines, compiles the operator's samples, answers with records."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

import graphwright

STATUSES = ("compiled", "partly", "eager", "refused", "failed", "wrong", "crash")
SEED = 42  # the one that OpInfo's wrappers of random operators set around the call


class Call(torch.nn.Module):
    """One operator call: the tensors among its arguments are the inputs, the rest are constants."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.function = function
        leaves, self.spec = pytree.tree_flatten((args, kwargs))
        self.constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        self.tensors = tuple(leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor))

    def forward(self, *tensors: torch.Tensor) -> Any:
        """Call the operator with these tensors."""
        given = iter(tensors)
        pairs = zip(self.is_tensor, self.constants, strict=True)
        leaves = [next(given) if is_tensor else constant for is_tensor, constant in pairs]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.function(*args, **kwargs)

    def eager(self, dtype: torch.dtype | None = None, inputs: Sequence[torch.Tensor] | None = None) -> list[Any]:
        """The leaves of PyTorch's result, for other inputs than the sample's if given; `dtype` replaces float types."""
        torch.manual_seed(SEED)
        clones = (t.clone() for t in (self.tensors if inputs is None else inputs))
        wide = [t.to(dtype) if dtype is not None and t.is_floating_point() else t for t in clones]
        return list(pytree.tree_leaves(self(*wide)))


def _undefined(name: str) -> bool:
    """Whether the result's values are whatever was in memory."""
    return "empty" in name or name.startswith("resize")


def difference(
    call: Call, ours: list[Any], theirs: list[Any], values: bool, inputs: Sequence[torch.Tensor] | None = None
) -> str | None:
    """How our results differ from eager's, or None; judged by eager's own error against float64.

    `inputs` are those of the call where they are not the sample's.
    """
    if len(ours) != len(theirs):
        return f"{len(ours)} results, not {len(theirs)}"
    unequal = []
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not isinstance(b, torch.Tensor):
            if a != b and values:
                return f"result {i} is {a!r}, not {b!r}"
            continue
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"result {i} is {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
        try:
            torch.testing.assert_close(a, b, equal_nan=True, check_stride=False)
        except AssertionError as error:
            if not values:
                continue
            if not b.dtype.is_floating_point:
                return f"result {i}: {error}"
            unequal.append((i, str(error)))
    if not unequal:
        return None
    wide = call.eager(torch.float64, inputs)
    for i, message in unequal:
        exact = wide[i].double()
        scale = exact.nan_to_num(0, 0, 0).norm() + 1e-30
        our_error, their_error = _distance(ours[i], exact, 1e30) / scale, _distance(theirs[i], exact, 0) / scale
        same_nan = bool((ours[i].isnan() == theirs[i].isnan()).all())
        if not same_nan or not our_error <= 4 * their_error + 1e-6:
            return f"result {i}: {message}"
    return None


def _distance(result: torch.Tensor, exact: torch.Tensor, undefined: float) -> torch.Tensor:
    """The norm of the difference; `undefined` stands for a NaN that only one of the two has."""
    alike = (result == exact) | (result.isnan() & exact.isnan())
    difference = (result.double() - exact).masked_fill(alike, 0)
    return difference.nan_to_num(undefined, 1e30, 1e30).norm()


def classify_sample(name: str, call: Call) -> tuple[str, str, list[tuple[str, str]]]:
    """Status, detail and the overloads left to PyTorch."""
    theirs = call.eager()
    try:
        compiled = graphwright.compile(call, call.tensors, verify=False, cache=False, threads=1)
    except graphwright.CaptureError as error:
        return "refused", str(error).strip().split("\n")[0], []
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}".strip(), []
    report = compiled.report()
    left = [(row.operator, row.reason) for row in report.eager]
    torch.manual_seed(SEED)
    try:
        ours = list(pytree.tree_leaves(compiled(*(t.clone() for t in call.tensors))))
    except graphwright.InputError as error:  # sparse tensors
        return "refused", str(error), []
    except Exception as error:
        return "failed", f"the call raised {type(error).__name__}: {error}".strip(), left
    wrong = difference(call, ours, theirs, values=not _undefined(name))
    if wrong is not None:
        return "wrong", wrong, left
    if not left:
        return "compiled", "", []
    return ("partly" if report.kernels else "eager"), "", left


def classify(name: str, samples: int) -> dict[str, Any]:
    """The record of one operator: the status of its worst sample."""
    info = next(info for info in operators() if info.formatted_name == name)
    results = []
    torch.manual_seed(SEED)
    for sample in itertools.islice(info.sample_inputs("cpu", torch.float32), samples):
        call = Call(info.op, (sample.input, *sample.args), sample.kwargs)
        try:
            call.eager()
        except Exception as error:  # a sample for another device
            results.append(("refused", f"PyTorch itself raises {type(error).__name__}", []))
            continue
        results.append(classify_sample(name, call))
    status, detail, _ = max(results, key=lambda r: STATUSES.index(r[0]), default=("refused", "no samples", []))
    left = [pair for _, _, pairs in results for pair in pairs]
    return {"operator": name, "status": status, "detail": detail[:2000], "missing": list(dict.fromkeys(left))}


@functools.cache
def operators() -> list[Any]:
    """The OpInfos that take float32 on the CPU."""
    return [info for info in op_db if torch.float32 in info.supported_dtypes("cpu")]


def main(answers: TextIO) -> None:
    """Answer each line of standard input with one line."""
    for line in sys.stdin:
        question = json.loads(line)
        if "list" in question:
            answer: dict[str, Any] = {"names": list(dict.fromkeys(info.formatted_name for info in operators()))}
        else:
            answer = classify(question["operator"], question["samples"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    # What operators print must not reach the answers.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    main(channel)
