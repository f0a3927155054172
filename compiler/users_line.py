"""The user's own source line of a node: the innermost frame that lies outside PyTorch."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'^\s*File "(?P<file>.+)", line \d+, in .*(?:\n(?!\s*File ").*)?', re.MULTILINE)
_TORCH = Path(torch.__file__).resolve().parent


def users_line(node: fx.Node) -> str | None:
    """`File "model.py", line 9, in forward: z = self.bag(x)`; where PyTorch's own modules do it all, which of them."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    for frame in reversed(frames):
        if not Path(frame["file"]).resolve().is_relative_to(_TORCH):
            return ": ".join(line.strip() for line in frame[0].splitlines())
    modules = list((node.meta.get("nn_module_stack") or {}).values())
    if modules:
        path, kind = modules[-1]
        return f"in the module {path or 'itself'!r}, {getattr(kind, '__name__', kind)}"
    return None
