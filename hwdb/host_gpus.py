"""The GPUs of this machine, as their drivers describe them; nothing is loaded or initialised.

    NVIDIA   /proc/driver/nvidia/gpus/*/information    the marketing name; nvidia-smi, where it is installed, adds
                                                       memory, compute capability, power limit and clock
    AMD      /sys/class/kfd/kfd/topology/nodes/*       the LLVM target, compute units, clock and memory
    others   /sys/class/drm/card*/device               that there is a card, and its vendor: no driver for computing

A card names its record by marketing name (NVIDIA) or by target and compute units (AMD, whose drivers know no names).
Everything is read below a root directory, so that a recorded /proc and /sys replays in a test.
"""

from __future__ import annotations

import functools
import logging
import re
import shutil
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

# The columns of each line that nvidia-smi is asked for.
NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=pci.bus_id,name,memory.total,compute_cap,power.limit,clocks.max.sm",
    "--format=csv,noheader,nounits",
)
_SMI_SECONDS = 10.0  # the driver wakes sleeping cards first
_AMD_VENDOR = 4098
_VENDORS = {"0x10de": "nvidia", "0x1002": "amd", "0x8086": "intel"}  # of PCI


@dataclass(frozen=True)
class FoundGpu:
    """One card and what its driver says of it; None where the driver does not say."""

    vendor: str  # "nvidia", "amd" or "intel"
    name: str | None  # as marketed
    architecture: str | None  # "sm_90", "gfx942"
    bus: str | None  # PCI domain:bus:device.function
    units: int | None = None  # compute units; NVIDIA's driver files do not count multiprocessors
    clock_mhz: float | None = None
    dram_bytes: int | None = None
    power_watts: float | None = None  # the limit that is set
    driver: str | None = None


@functools.cache
def detect_gpus() -> tuple[FoundGpu, ...]:
    """Return the GPUs of this machine whose driver is loaded; read once."""
    return gpus_at(Path("/"), _ask_nvidia_smi())


def gpus_at(root: Path, smi: str | None = None) -> tuple[FoundGpu, ...]:
    """Return the GPUs that /proc and /sys below `root` describe; `smi` is what NVIDIA_SMI printed there."""
    known = [*_nvidia(root, smi or ""), *_amd(root)]
    return (*known, *_drawing(root, {gpu.bus for gpu in known}))


def record_of(found: FoundGpu) -> str | None:
    """Return the id of the record of `found`, or that of its architecture, or None where it is in no record.

    AMD's drivers know no names: the device of the same target and compute units, of several the one whose memory is
    nearest, where it is not a quarter off.
    """
    from .loader import database

    records = database()
    named = records.find(found.name) if found.name else None
    if named is not None or found.architecture is None:
        return named
    architecture = records.find(found.architecture)
    likely: dict[str, float] = {}
    for id, record in records.records.items():
        if record.kind == "device" and record.values.get("extends") == architecture and found.units is not None:
            facts = records.build(id)
            if facts.cores == found.units and facts.dram_bytes and found.dram_bytes:
                likely[id] = abs(facts.dram_bytes / found.dram_bytes - 1)
    best = min(likely, key=lambda id: likely[id], default=None)
    return best if best is not None and likely[best] < 0.25 else architecture


def _ask_nvidia_smi() -> str | None:
    if shutil.which(NVIDIA_SMI[0]) is None:
        return None
    try:
        asked = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("nvidia-smi does not answer (%s): NVIDIA cards are known by name only", error)
        return None
    if asked.returncode:
        log.warning("nvidia-smi failed (%s): NVIDIA cards are known by name only", asked.stdout.strip()[:200])
        return None
    return asked.stdout


def _nvidia(root: Path, smi: str) -> list[FoundGpu]:
    version = re.search(r"\b\d{3}\.[\d.]+\b", _read(root / "proc/driver/nvidia/version"))
    rows = dict(_smi_rows(smi))
    found = []
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        fields = _fields(_read(file), ":")
        if fields.get("GPU Excluded") == "Yes":
            continue
        bus = fields.get("Bus Location", file.parent.name).lower()
        row = rows.pop(_bus_key(bus), {})
        found.append(_nvidia_gpu(bus, row, row.get("name") or fields.get("Model"), version))
    # In a container nvidia-smi sees the cards it was given, and /proc may be another view.
    found += [_nvidia_gpu(bus, row, row["name"], version) for bus, row in rows.items()]
    return found


def _nvidia_gpu(bus: str, row: dict[str, str], name: str | None, version: re.Match[str] | None) -> FoundGpu:
    memory, capability = _number(row.get("memory")), row.get("capability", "")
    return FoundGpu(
        "nvidia",
        name if name and not name.lower().startswith("unknown") else None,
        f"sm_{capability.replace('.', '')}" if re.fullmatch(r"\d+\.\d", capability) else None,
        bus,
        clock_mhz=_number(row.get("clock")),
        dram_bytes=None if memory is None else int(memory) << 20,
        power_watts=_number(row.get("power")),
        driver=version.group() if version else None,
    )


def _smi_rows(smi: str) -> list[tuple[str, dict[str, str]]]:
    keys = ("name", "memory", "capability", "power", "clock")
    rows = []
    for line in smi.splitlines():
        bus, *values = (part.strip() for part in line.split(","))
        if len(values) == len(keys):
            rows.append((_bus_key(bus), dict(zip(keys, values, strict=True))))
    return rows


def _bus_key(bus: str) -> str:
    """A PCI address with a domain of four digits: nvidia-smi prints eight."""
    domain, _, rest = bus.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def _amd(root: Path) -> list[FoundGpu]:
    driver = _read(root / "sys/module/amdgpu/version").strip() or None
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("[0-9]*")
    found = []
    for node in sorted(nodes, key=lambda path: int(path.name)):
        fields = _fields(_read(node / "properties"), " ")
        version, simds = _whole(fields, "gfx_target_version"), _whole(fields, "simd_count")
        if not version or not simds or _whole(fields, "vendor_id") not in (None, _AMD_VENDOR):
            continue  # a processor, or a card that this process may not use: its file is empty
        each = _whole(fields, "simd_per_cu")
        location = _whole(fields, "location_id")
        found.append(
            FoundGpu(
                "amd",
                None,
                gfx_target(version),
                None if location is None else _pci(_whole(fields, "domain") or 0, location),
                units=simds // each if each else None,
                clock_mhz=_number(fields.get("max_engine_clk_fcompute")),
                dram_bytes=_bank_bytes(node) or _whole(fields, "local_mem_size") or None,
                driver=driver,
            )
        )
    return found


def _drawing(root: Path, known: Collection[str | None]) -> list[FoundGpu]:
    """Cards that only the graphics driver shows."""
    found: list[FoundGpu] = []
    for device in sorted((root / "sys/class/drm").glob("card*/device")):
        event = _fields(_read(device / "uevent"), "=")
        vendor = _VENDORS.get(_read(device / "vendor").strip())
        bus = event.get("PCI_SLOT_NAME", "").lower() or None
        if vendor is None or bus in known or bus in {gpu.bus for gpu in found}:
            continue
        memory = _read(device / "mem_info_vram_total").strip()
        size = int(memory) if memory.isdigit() and int(memory) else None
        found.append(FoundGpu(vendor, None, None, bus, dram_bytes=size, driver=event.get("DRIVER")))
    return found


def gfx_target(version: int) -> str:
    """Return LLVM's name of KFD's decimal `version`: 90402 is gfx942, 90010 gfx90a, 110501 gfx1151."""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def _pci(domain: int, location: int) -> str:
    """A PCI address from KFD's numbers: bus << 8 | device << 3 | function."""
    return f"{domain:04x}:{location >> 8 & 0xFF:02x}:{location >> 3 & 0x1F:02x}.{location & 7}"


def _bank_bytes(node: Path) -> int:
    """Bytes of the card's own memory (heap types 1 and 2, of which 0 is the host's)."""
    banks = [_fields(_read(file), " ") for file in sorted(node.glob("mem_banks/*/properties"))]
    return sum(_whole(bank, "size_in_bytes") or 0 for bank in banks if _whole(bank, "heap_type") in (1, 2))


def _fields(text: str, separator: str) -> dict[str, str]:
    pairs = (line.partition(separator) for line in text.splitlines())
    return {key.strip(): value.strip() for key, found, value in pairs if found}


def _whole(fields: dict[str, str], key: str) -> int | None:
    text = fields.get(key, "")
    return int(text) if text.isdigit() else None


def _number(text: str | None) -> float | None:
    """A number, or None for what a driver prints where it has none: "[N/A]"."""
    return float(text) if text and re.fullmatch(r"\d+(\.\d+)?", text) else None


def _read(file: Path) -> str:
    """Return the text of `file`, or an empty string where the system does not have or show it."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
