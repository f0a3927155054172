"""What a pass has to keep to, and what is said where it does not.

A pass is a function of (graph, hw) that rewrites in place and returns how many rewrites it made. It changes nothing
where that is 0; it leaves a valid graph with the same inputs and outputs, whose nodes have meta["val"]. For passes of
users it is checked as well that nodes they made or changed compute what their meta["val"] says, and that they leave
constants alone: the model of the user holds the same tensors.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves

from ..errors import PassError
from ..hwdb import Hardware
from ..passes import rewrite
from ..passes.printer import format_type
from . import watch

Pass = Callable[[fx.GraphModule, Hardware], int]

_OURS = __name__.split(".")[0] + ".passes."
_LIKE = "a pass is a function of (graph, hw) that rewrites the graph in place and returns how many rewrites it made"


def name_of(rewrite: Any) -> str:
    """What a pass is called in reports and errors."""
    while isinstance(rewrite, functools.partial):
        rewrite = rewrite.func
    return str(getattr(rewrite, "__name__", None) or type(rewrite).__name__)


def is_ours(rewrite: Pass) -> bool:
    """Whether the pass comes with this package, where its tests hold it to the contract."""
    return str(getattr(rewrite, "__module__", "")).startswith(_OURS)


def checked_passes(passes: Any) -> tuple[Pass, ...]:
    """`passes` as a tuple; raises PassError for what cannot be a list of passes."""
    if not isinstance(passes, Iterable) or isinstance(passes, (str, bytes)):
        raise PassError(f"passes is a list such as [*graphwright.passes.default.PASSES, mine], got {passes!r}")
    found = tuple(passes)
    for place, one in enumerate(found):
        if not callable(one):
            raise PassError(f"passes[{place}] is {one!r}, which is not callable: {_LIKE}")
        try:
            inspect.signature(one).bind(None, None)
        except TypeError as error:
            raise PassError(f"passes[{place}], {name_of(one)}, cannot be called with (graph, hw): {error}") from None
        except ValueError:  # written in C: what it takes is not known
            pass
    return found


class Watch:
    """A graph before a pass; `broken` says what the pass did to it that it may not."""

    def __init__(self, graph: fx.GraphModule, strict: bool) -> None:
        self.graph, self.strict = graph, strict
        self.calling = _calling(graph)
        self.spelt: dict[fx.Node, Spelling] = _spelt(graph) if strict else {}
        self.values = {node: node.meta.get("val") for node in graph.graph.nodes} if strict else {}
        self.constants = _Constants(graph) if strict else None

    def broken(self, count: Any) -> str | None:
        """What is wrong, and what to do about it; None where all is well."""
        if not isinstance(count, int) or isinstance(count, bool):
            return f"returned {count!r}: return how many rewrites it made, 0 where it changed nothing"
        if count < 0:
            return f"returned {count}: a count of rewrites is 0 or more"
        if self.constants is not None and (changed := self.constants.changed()):
            return (
                f"changed the constant {changed} in place, a tensor that the model itself holds, and that has "
                "changed there too: make a new tensor, and let nodes read it by graphwright.passes.rewrite.add_constant"
            )
        if not count:
            if self.strict and _spelt(self.graph) != self.spelt:
                return "returned 0 although it changed the graph: return how many rewrites it made"
            return self._bad_values() or self._calling_changed() if self.strict else None
        try:
            self.graph.graph.lint()
        except Exception as error:
            what = str(error).splitlines()[0]
            return f"left a malformed graph: {what}; nodes must stand behind what they read, and erased ones be unread"
        return self._bad_values() or self._calling_changed()

    def _calling_changed(self) -> str | None:
        now = _calling(self.graph)
        for what, old, new in zip(("inputs", "outputs"), self.calling, now, strict=True):
            if old != new:
                return f"changed the {what} of the graph from {old} to {new}: a model is called as it was before"
        return None

    def _bad_values(self) -> str | None:
        return next((reason for node in self.graph.graph.nodes if (reason := self._bad_value(node))), None)

    def _bad_value(self, node: fx.Node) -> str | None:
        if node.op == "output" or _gives_nothing(node):
            return None
        if node.meta.get("val") is None:
            return (
                f'left {node.format_node()} without meta["val"]: insert nodes with graphwright.passes.rewrite.call, '
                'or set node.meta["val"] = rewrite.run_fake(node)'
            )
        if not self.strict or node.op == "placeholder" or self._as_it_was(node):
            return None
        try:
            value = self._computed(node)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return None
        except Exception as error:
            return f"left {node.format_node()}, which cannot be computed: {error}"
        if _described(value) != _described(node.meta["val"]):
            promised = format_type(node.meta["val"])
            return f'left {node.format_node()}, which gives {format_type(value)}, with meta["val"] of {promised}'
        return None

    def _as_it_was(self, node: fx.Node) -> bool:
        """Whether the node calls what it called, and has the very meta["val"] it had."""
        return self.spelt.get(node) == _spelling(node) and self.values[node] is node.meta["val"]

    def _computed(self, node: fx.Node) -> object:
        return _constant(self.graph, node) if node.op == "get_attr" else rewrite.run_fake(node)


class _Constants:
    """The tensors a graph holds, which it shares with the model: found changed by their versions, or by their bytes."""

    def __init__(self, graph: fx.GraphModule) -> None:
        held = itertools.chain(graph.named_parameters(), graph.named_buffers())
        self.held = [(name, tensor) for name, tensor in held if tensor.layout == torch.strided]
        self.watch = watch.Watch(dict(enumerate(tensor for _, tensor in self.held)))

    def changed(self) -> str:
        """The names of those that are not as they were."""
        found = self.watch.changed([tensor for _, tensor in self.held])
        return ", ".join(self.held[i][0] for i in sorted(found))


def _constant(graph: fx.GraphModule, node: fx.Node) -> object:
    return operator.attrgetter(str(node.target))(graph)


def _gives_nothing(node: fx.Node) -> bool:
    """Whether the node is called for its effect alone: a check that raises, say."""
    return isinstance(node.target, rewrite.Operator) and not node.target._schema.returns


Spelling = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _spelling(node: fx.Node) -> Spelling:
    """What a node calls, with what; fx makes new arguments where they change, and leaves these as they are."""
    return node.target, node.args, node.kwargs


def _spelt(graph: fx.GraphModule) -> dict[fx.Node, Spelling]:
    return {node: _spelling(node) for node in graph.graph.nodes}


def _calling(graph: fx.GraphModule) -> tuple[list[str], list[str]]:
    """The inputs and the outputs."""
    inputs = [f"{n.target}: {format_type(n.meta.get('val'))}" for n in graph.graph.find_nodes(op="placeholder")]
    results = tree_leaves(graph.graph.output_node().args)
    return inputs, [format_type(n.meta.get("val")) if isinstance(n, fx.Node) else repr(n) for n in results]


def _described(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_described(v) for v in value)
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else value
