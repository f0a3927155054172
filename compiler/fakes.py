"""Do custom operators give what their fake kernels promise? Shapes and dtypes of all that reads them rest on that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ..passes.printer import format_type
from .plan import called
from .reference import Keeping

_KEPT = {"aten", "prims", "graphwright"}  # by PyTorch and by us, who test them


def wrong_fake(graph: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> str | None:
    """What is wrong with the fake kernel of a custom operator, and where; None where each keeps its word.

    Runs the captured graph in PyTorch where it has custom operators, on the tensors of one call.
    """
    if not any(_is_custom(node) for node in graph.graph.nodes):
        return None
    watch = _Promises(graph)
    with torch.no_grad():
        watch.run(*inputs)
    return watch.broken


class _Promises(Keeping):
    """Runs a graph; `broken` says which custom operator gave something else than promised first."""

    broken: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self.broken is None and _is_custom(n) and not _keeps(n.meta.get("val"), result):
            trace = n.meta.get("stack_trace")
            where = f"\nwhere the model says:\n{trace.rstrip()}" if trace else ""
            self.broken = (
                f"the fake kernel of {called(n)} is wrong: it promises {format_type(n.meta.get('val'))} where the "
                f"operator gives {format_type(result)}; mend the function given to its register_fake{where}"
            )
        return result


def _is_custom(node: fx.Node) -> bool:
    inner = node.args[0] if isinstance(node.target, torch._ops.HigherOrderOperator) and node.args else node.target
    return isinstance(inner, torch._ops.OpOverload) and inner.namespace not in _KEPT


def _keeps(promised: Any, given: Any) -> bool:
    """Whether results have the shapes and dtypes promised; a size known at run time only is kept by any."""
    pairs = list(zip(tree_leaves(promised), tree_leaves(given), strict=False))
    return all(
        p.dtype == g.dtype
        and p.dim() == g.dim()
        and all(not isinstance(d, int) or d == e for d, e in zip(p.shape, g.shape, strict=True))
        for p, g in pairs
        if isinstance(p, torch.Tensor) and isinstance(g, torch.Tensor)
    )
