"""Whether code for a machine can run here: on this processor, or on a GPU that TVM's runtime finds."""

from __future__ import annotations

from .. import hwdb
from ..hwdb import Hardware


def obstacle(hw: Hardware) -> str | None:
    """Why code made for `hw` cannot run on this machine, or None where it can."""
    if hw.kind != "gpu":
        return hwdb.obstacle(hw)
    from ..backends.gpu.device_library import absence

    return absence(hw)
