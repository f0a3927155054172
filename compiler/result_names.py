"""What the tensors of a model's result are called, where each has to be told from the others: bundles, .npz files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree


def result_names(spec: pytree.TreeSpec, own: Sequence[str]) -> list[str]:
    """A name for every leaf of the result: its keys or fields (`logits`, `layers.0`), else its `own`.

    No two are equal: a value that is a result twice has a number the second time.
    """
    keyed = _by_key(spec)
    if len(set(keyed) - {None}) != sum(name is not None for name in keyed):
        keyed = [None] * len(keyed)
    return _apart([key or name for key, name in zip(keyed, own, strict=True)])


def _by_key(spec: pytree.TreeSpec) -> list[str | None]:
    """The path of every leaf that lies under a key or a field; None for the others."""
    found: list[str | None] = [None] * spec.num_leaves

    def walk(part: Any, path: str, named: bool) -> None:
        if isinstance(part, _Place):
            found[part.index] = path if named else None
        elif isinstance(part, Mapping):
            for key, value in part.items():
                walk(value, f"{path}.{key}" if path else str(key), named or isinstance(key, str))
        elif isinstance(part, (tuple, list)):
            keys = getattr(part, "_fields", range(len(part)))
            for key, value in zip(keys, part, strict=True):
                walk(value, f"{path}.{key}" if path else str(key), named or isinstance(key, str))

    walk(pytree.tree_unflatten([_Place(i) for i in range(spec.num_leaves)], spec), "", False)
    return found


def _apart(names: Sequence[str]) -> list[str]:
    """The names, with a number behind each that was there before."""
    found: list[str] = []
    for name in names:
        new, number = name, 0
        while new in found or (number and new in names):
            number += 1
            new = f"{name}_{number}"
        found.append(new)
    return found


@dataclass(frozen=True)
class _Place:
    """A leaf of a structure: which."""

    index: int
