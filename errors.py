"""The errors a user can meet. Every message says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable

LEAVES = '\ntorch.compile(model, backend="graphwright") leaves such a graph to PyTorch.'


class GraphwrightError(Exception):
    """Base of everything graphwright raises on purpose.

    `what` is the message without its end, `split`: that torch.compile would help, for those who do not use it.
    """

    def __init__(self, what: str = "", split: str = "") -> None:
        super().__init__(what + split)
        self.what, self.split = what, split


class UnknownTarget(GraphwrightError):
    """The target is not in the hardware database."""


class RecordError(GraphwrightError):
    """A record of the hardware database is malformed; names the file and the record."""


class CaptureError(GraphwrightError):
    """The model could not be turned into one graph."""


class UnsupportedOp(GraphwrightError):
    """Operators that cannot be compiled for a target where PyTorch cannot take over."""


class PassError(GraphwrightError):
    """A pass failed or left a malformed graph; names the pass."""

    rewrite: str | None = None  # the pass, where it is one of this package and can be left out


class NumericMismatch(GraphwrightError):
    """The compiled numbers differ from PyTorch's; names the guilty pass and node."""

    rewrite: str | None = None  # the pass to blame, where it is one of this package and can be left out
    in_machine_code: bool = False
    node: str | None = None  # of the rewritten graph, whose machine code is to blame; None where it is not one alone


class InputError(GraphwrightError, ValueError):
    """A compiled model was called with inputs it was not compiled for."""


class MemoryLimit(GraphwrightError):
    """The activations of a model do not fit into what `memory_limit` allows; names what is alive at once."""


class ArtifactError(GraphwrightError):
    """A saved artifact is damaged, from another version, or made for another machine."""


class ToolMissing(GraphwrightError):
    """An optional program or package is needed for what was asked."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'a' or 'b'?` for the known names nearest to `name`, or an empty string."""
    from rapidfuzz import fuzz, process

    near = [found for found, _, _ in process.extract(name, list(known), scorer=fuzz.ratio, limit=3, score_cutoff=60)]
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def size(count: int) -> str:
    """Bytes for reading."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
