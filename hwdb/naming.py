"""How names of hardware are compared: spelling does not matter, and neither do the words that sell it."""

from __future__ import annotations

import re

# Left out of "NVIDIA GeForce RTX 4090", "13th Gen Intel(R) Core(TM) i9-13900K", "AMD Ryzen 9 7950X 16-Core Processor",
# "AMD Ryzen 7 5700U with Radeon Graphics", "NVIDIA Jetson Nano Developer Kit". "Laptop" stays: it is another chip.
_DECORATION = re.compile(
    r"\((?:r|tm|c)\)|[®™\0]|@.*|\b(?:with|w/) ?radeon\b.*|\b\d+(?:st|nd|rd|th) gen\b"
    r"|\b(?:nvidia|geforce|quadro|tesla|amd|radeon|instinct|intel|apple|genuine|graphics|gpu|cpu|processor|accelerator"
    r"|(?:\d+|quad|six|eight|twelve|sixteen)-core|with|rev [\d.]+|v[0-9] ?@|(?:developer|development|dev) ?kit)\b",
    re.IGNORECASE,
)
_GENERATION = re.compile(r"^\s*\d+(?:st|nd|rd|th) gen\b", re.IGNORECASE)
_MODEL = re.compile(r"[ -]model[ -]([a-z])\b", re.IGNORECASE)
_BRANDS = {
    "nvidia": "nvidia",
    "geforce": "nvidia",
    "quadro": "nvidia",
    "tesla": "nvidia",
    "amd": "amd",
    "radeon": "amd",
    "instinct": "amd",
    "intel": "intel",
    "apple": "apple",
}
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
    """Return `bare(name)` without hyphens and series, for which RTX-4090, rtx4090 and 4090 are one name; + is plus."""
    return re.sub(r"^(?:[gr]tx|rx)-?(?=\d)", "", bare(name)).replace("-", "").replace("+", "plus")


def without_model(name: str) -> tuple[str, str]:
    """Return `name` with its model letter at the number, and without: "ROCK 5B", "ROCK 5" of "ROCK 5 Model B"."""
    return _MODEL.sub(r"\1", name), _MODEL.sub("", name)


def brand(name: str) -> str | None:
    """Return the maker whose brand is the first word of `name`: "nvidia" of "Tesla M4", or None."""
    first = re.match(r"\W*(\w+)", _GENERATION.sub("", name))
    return _BRANDS.get(first[1].lower()) if first else None


def maker(name: str) -> str | None:
    """Return who makes the product `name`, which begins with it: "raspberry-pi" of "Raspberry Pi 5"; None for any."""
    first, *rest = name.lower().split()
    if rest and rest[0] in ("pi", "threads"):
        return f"{first}-{rest[0]}"
    return None if first in ("any", "android") or first.startswith("x86") else _MAKERS.get(first, first)
