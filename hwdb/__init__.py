"""Facts about hardware and questions about them. Imports neither torch nor tvm."""

from __future__ import annotations

from .records import Cache, Hardware, Source

__all__ = ["Cache", "Hardware", "Source"]
