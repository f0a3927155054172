"""How names of hardware are compared: spelling does not matter, and neither do the words that sell it."""

from __future__ import annotations

import re

# Left out of "NVIDIA GeForce RTX 4090", "Intel(R) Xeon(R) Platinum 8480+", "AMD Ryzen 9 7950X 16-Core Processor".
_DECORATION = re.compile(
    r"\((?:r|tm|c)\)|[®™]|@.*"
    r"|\b(?:nvidia|geforce|quadro|tesla|amd|radeon|instinct|intel|apple|genuine|graphics|gpu|cpu|processor|accelerator"
    r"|(?:\d+|quad|six|eight|twelve|sixteen)-core|with|rev [\d.]+|v[0-9] ?@)\b",
    re.IGNORECASE,
)
_MAKERS = {
    "aws": "amazon",
    "tesla": "nvidia",
    "quadro": "nvidia",
    "hailo-8": "hailo",
    "hailo-8l": "hailo",
    "hailo-10h": "hailo",
    "beaglebone": "beagleboard",
    "beagleplay": "beagleboard",
}


def spelling(name: str) -> str:
    """Return `name` as names are compared: lower case, `_`, ` ` and `.` as `-`."""
    return name.strip().lower().replace("_", "-").replace(" ", "-").replace(".", "-")


def bare(name: str) -> str:
    """Return the spelling of `name` without vendor, brand and decoration; empty where nothing else is left."""
    return re.sub(r"-+", "-", spelling(_DECORATION.sub(" ", name))).strip("-")


def squeezed(name: str) -> str:
    """Return `bare(name)` without hyphens and series, for which RTX-4090, rtx4090 and 4090 are one name."""
    return re.sub(r"^(?:[gr]tx|rx)-?(?=\d)", "", bare(name)).replace("-", "")


def maker(name: str) -> str | None:
    """Return who makes the product `name`, which begins with it: "raspberry-pi" of "Raspberry Pi 5"; None for any."""
    first, *rest = name.lower().split()
    if rest and rest[0] in ("pi", "threads"):
        return f"{first}-{rest[0]}"
    return None if first in ("any", "android") or first.startswith("x86") else _MAKERS.get(first, first)
