"""The arguments of a call, brought into the places that tensors had when the model was captured."""

from __future__ import annotations

from typing import Any

from torch.utils import _pytree as pytree

from ..errors import InputError
from .capture import Signature, TensorSpec


def tensor_leaves(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any], made: str) -> list[Any]:
    """The tensor leaves of a call, in the order of the captured call; `made`: what the model was, for messages.

    Raises InputError for arguments of another structure, and for others than tensors that have another value.
    """
    spec = signature.in_spec
    expected_args, expected_kwargs = pytree.tree_unflatten([None] * spec.num_leaves, spec)
    args, kwargs = _bound(signature.parameters, args, kwargs, len(expected_args), list(expected_kwargs))
    leaves, given = pytree.tree_flatten((args, kwargs))
    if given != spec:
        raise InputError(
            f"the arguments have another structure than those the model was {made} for: "
            f"expected {_sketch(spec)}, got {_sketch(given)}"
        )
    tensors: list[Any] = []
    for leaf, expected in zip(leaves, signature.inputs, strict=True):
        if isinstance(expected, TensorSpec):
            tensors.append(leaf)
        elif not _same(leaf, expected.value):
            raise InputError(
                f"an argument that is not a tensor is part of the {made} model: it was {made} with "
                f"{expected.value!r} and called with {leaf!r}; make it again for the new value"
            )
    return tensors


def _bound(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], count: int, keywords: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Move arguments between positions and keywords as they were at capture, and order the keywords."""
    kwargs = dict(kwargs)
    for name in names[len(args) : count]:
        if name not in kwargs:
            break
        args = (*args, kwargs.pop(name))
    for position in range(count, min(len(args), len(names))):
        if names[position] in kwargs:
            raise InputError(f"{names[position]} was given twice: by position and by keyword")
        kwargs[names[position]] = args[position]
    if len(args) > count and len(names) >= len(args):
        args = args[:count]
    if set(kwargs) == set(keywords):
        kwargs = {k: kwargs[k] for k in keywords}
    return args, kwargs


def _same(given: Any, expected: Any) -> bool:
    if type(given) is not type(expected):
        return False
    # repr tells 0.0 from -0.0, and takes NaN for NaN.
    return repr(given) == repr(expected) if isinstance(given, float) else bool(given == expected)


def _sketch(spec: pytree.TreeSpec) -> str:
    args, kwargs = pytree.tree_unflatten(["*"] * spec.num_leaves, spec)
    parts = [*(str(a) for a in args), *(f"{k}={v}" for k, v in kwargs.items())]
    return f"({', '.join(parts)})".replace("'*'", "*")
