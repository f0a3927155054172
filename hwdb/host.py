"""What machine this is: microarchitecture, features, caches, clock, and how many cores this process may use.

Everything is read below a root directory, so that a recorded /proc and /sys replays in a test. The
processor's family and model (part number on Arm) name the record that gives rates and latencies; a
processor newer than the records gets the nearest ancestor that archspec or the feature levels give.
Features always come from the system itself: a hypervisor may mask what the silicon has, and the code must
not use what is masked.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..errors import UnknownTarget
from . import isa as instruction_set
from .loader import Database, database
from .records import Cache, Hardware

log = logging.getLogger(__name__)

_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


@functools.cache
def detect() -> Hardware:
    """Return this machine as its process may use it: affinity, cgroup quota and masked features applied.

    Rates that `graphwright hw calibrate` measured here replace the record's.
    """
    from .measured import applied

    return applied(detect_plain())


def detect_plain() -> Hardware:
    """Return this machine as `detect` does, with the record's rates whatever was measured."""
    return detect_at(Path("/"), _affinity(), platform.machine())


def detect_at(root: Path, allowed: Collection[int] | None, machine: str) -> Hardware:
    """Return the machine whose /proc and /sys lie below `root`, for a process that may use CPUs `allowed`.

    Raises UnknownTarget where `machine`, as uname prints it, is of another instruction set than the records'.
    """
    isa = _MACHINES.get(machine.lower())
    if isa is None:
        raise UnknownTarget(
            f"this machine is {machine}, and what can be detected is {', '.join(sorted(set(_MACHINES.values())))}; "
            "name a target instead of 'native' (`graphwright hw list`)"
        )
    processors = _cpuinfo(root / "proc/cpuinfo")
    usable = [cpu for cpu in sorted(processors) if allowed is None or cpu in allowed] or sorted(processors)
    if not usable:
        return _without_proc(isa, allowed)
    usable = _largest_cluster(root, usable, processors, isa)
    flags = set.intersection(*(_flags(processors[cpu], isa) for cpu in usable))
    features = instruction_set.from_flags(isa, flags) | instruction_set.BASELINE[isa]

    records = database()
    first = processors[usable[0]]
    id = _record_of(records, isa, first, flags, features)
    values = records.merged(id)
    groups = {_siblings(root, cpu) & frozenset(usable) or frozenset({cpu}) for cpu in usable}
    cores = len(groups)
    quota = cpu_quota(root)
    if quota is not None:
        cores = max(1, min(cores, int(quota)))
    facts: dict[str, Any] = {
        "name": _name(first, root) or values["name"],
        "features": features,
        "cores": cores,
        "clock_mhz": _clock_mhz(root, usable, processors, values.get("clock_mhz")),
        "native": True,
        "dram_bytes": memory_bytes(root),
        "sources": tuple(records.source(source) for source in ("host", *values["source"])),
    }
    if "-apple-" in values["triple"]:  # Linux on Apple's processors, whose records are of macOS
        facts["triple"] = records.merged("aarch64")["triple"]
    caches = _caches(root, usable[0])
    if caches:
        facts["caches"] = caches
    hardware = records.build(id, **facts)
    log.debug("detected %s as %s: %d cores, %d-bit vectors", hardware.name, id, cores, hardware.vector_bits)
    return hardware


def memory_bytes(root: Path) -> int | None:
    """Return the bytes of main memory, or the tightest limit that this process's control groups set below that."""
    total = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    if total is None:
        return None
    limits = [int(total[1]) << 10]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, path = line.partition("::")
        for group in _upwards(root / "sys/fs/cgroup", path) if path else ():
            if (text := _read(group / "memory.max").strip()).isdigit():
                limits.append(int(text))
    return min(limits)


def cpu_quota(root: Path) -> float | None:
    """Return the cores' worth of time this process's control groups grant, or None where there is no limit.

    The tightest limit from the process's group up to the root counts (cgroup v2 cpu.max; v1
    cpu.cfs_quota_us).
    """
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        _, controllers, path = parts
        if controllers == "":
            mounts = ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        elif "cpu" in controllers.split(","):
            mounts = [f"sys/fs/cgroup/{controllers}", "sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"]
        else:
            continue
        for mount in mounts:
            for group in _upwards(root / mount, path):
                limits.append(_limit(group))
    return min((limit for limit in limits if limit is not None), default=None)


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    group = Path(path.lstrip("/"))
    for part in (group, *group.parents):
        if ".." not in part.parts:  # a group outside this process's namespace
            yield mount / part


def _limit(group: Path) -> float | None:
    both = _read(group / "cpu.max").split()
    if len(both) != 2:
        both = [_read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip()]
    try:
        quota, period = int(both[0]), int(both[1])
    except ValueError:  # "max", or no such file
        return None
    return quota / period if quota > 0 and period > 0 else None


def _affinity() -> frozenset[int] | None:
    try:
        return frozenset(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return None


def _cpuinfo(file: Path) -> dict[int, dict[str, str]]:
    """Return the fields of every logical CPU; fields that some kernels print once (old Arm) go to all."""
    processors: dict[int, dict[str, str]] = {}
    common: dict[str, str] = {}
    current = common
    for line in _read(file).splitlines():
        key, colon, value = line.partition(":")
        key, value = key.strip(), value.strip()
        if not colon:
            current = common
        elif key == "processor" and value.isdigit():
            current = processors.setdefault(int(value), {})
        else:
            current[key] = value
    return {cpu: {**common, **fields} for cpu, fields in processors.items()}


def _flags(fields: dict[str, str], isa: str) -> set[str]:
    return set(fields.get("flags" if isa == "x86_64" else "Features", "").split())


def _largest_cluster(root: Path, usable: list[int], processors: dict[int, dict[str, str]], isa: str) -> list[int]:
    """Return the usable CPUs of the fastest kind: equal shares of work end with the slowest core."""

    def capacity(cpu: int) -> int:
        base = root / f"sys/devices/system/cpu/cpu{cpu}"
        for file in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
            if (text := _read(base / file).strip()).isdigit():
                return int(text)
        return 0

    def kind(cpu: int) -> tuple[str, ...]:
        return tuple(processors[cpu].get(key, "") for key in ("CPU implementer", "CPU part", "model"))

    kinds = Counter(kind(cpu) for cpu in usable)
    if isa == "aarch64" and len(kinds) > 1:
        best = max(kinds, key=lambda k: max(capacity(cpu) for cpu in usable if kind(cpu) == k))
        return [cpu for cpu in usable if kind(cpu) == best]
    # Hybrid x86 prints one model for both kinds; the kernel lists the small cores of such machines here.
    small = _cpu_list(_read(root / "sys/devices/cpu_atom/cpus"))
    return [cpu for cpu in usable if cpu not in small] or usable


def _record_of(records: Database, isa: str, fields: dict[str, str], flags: set[str], features: frozenset[str]) -> str:
    """Return the processor's record: by its numbers, else by archspec's nearest ancestor, else by level."""
    numbers = _numbers(isa, fields)
    key = "cpuid" if isa == "x86_64" else "parts"
    for record in records.with_key(key):
        if any(_matches(pattern, numbers) for pattern in record.values[key]):
            return _specialised(records, record.id, features)
    found = _archspec_ancestor(records, isa, fields.get("vendor_id", "generic"), flags)
    if found is not None:
        log.info("unknown processor %s: taken as %s", "/".join(numbers), found)
        return found
    if isa == "aarch64":
        return "aarch64"
    for level in ("x86-64-v4", "x86-64-v3", "x86-64-v2"):
        if records.merged(level)["features"] <= features:
            return level
    return "x86-64"


def _specialised(records: Database, id: str, features: frozenset[str]) -> str:
    """Return the record with `id`'s numbers and more features: Cascade Lake has those of Skylake-SP."""
    for record in records.children(id):
        if record.kind == "architecture":
            shares = not ({"cpuid", "parts"} & set(record.values))
            if shares and records.merged(record.id)["features"] <= features:
                return record.id
    return id


def _numbers(isa: str, fields: dict[str, str]) -> tuple[str, ...]:
    keys = ("vendor_id", "cpu family", "model") if isa == "x86_64" else ("CPU implementer", "CPU part")
    return tuple(fields.get(key, "") for key in keys)


def _matches(pattern: str, numbers: tuple[str, ...]) -> bool:
    parts = pattern.split("/")
    if len(parts) == 3 and "-" in parts[2]:
        first, last = parts[2].split("-")
        return parts[:2] == list(numbers[:2]) and numbers[2].isdigit() and int(first) <= int(numbers[2]) <= int(last)
    return tuple(parts) == numbers


def _archspec_ancestor(records: Database, isa: str, vendor: str, flags: set[str]) -> str | None:
    """Return the record of archspec's most specific microarchitecture whose features are all there."""
    if isa != "x86_64":
        return None  # archspec knows Arm processors by the names the part numbers already gave
    from archspec.cpu import TARGETS

    # archspec's derived names (lib/archspec/json "feature_aliases") for what cpuinfo spells differently.
    present = flags | ({"sse3"} if "pni" in flags or "ssse3" in flags else set())
    root = TARGETS["x86_64"]
    fitting = [
        target
        for target in TARGETS.values()
        if (target == root or root in target.ancestors)
        and target.vendor in (vendor, "generic")
        and target.features <= present
    ]
    fitting.sort(
        key=lambda target: (target.vendor == vendor, len(target.ancestors), len(target.features)),
        reverse=True,
    )
    for target in fitting:
        for name in (target.name, *(ancestor.name for ancestor in target.ancestors)):
            found = records.find(name.replace("x86_64", "x86-64"))
            if found is not None:
                return found
    return None


def _name(fields: dict[str, str], root: Path) -> str:
    """Return the processor's marketing name, or the board's on Arm."""
    board = _read(root / "proc/device-tree/model").rstrip("\0\n ")
    return board or fields.get("model name", "") or fields.get("Model", "") or fields.get("Hardware", "")


def _clock_mhz(
    root: Path, usable: Collection[int], processors: dict[int, dict[str, str]], typical: float | None
) -> float | None:
    """Return the highest clock of the usable cores; the mean where favoured cores or a second cluster differ.

    Without cpufreq (virtual machines) /proc/cpuinfo shows the guaranteed clock, which the cores exceed: the
    family's typical clock counts where it is higher, so that a peak stays an upper bound.
    """
    highest = []
    shown = 0.0
    for cpu in usable:
        text = _read(root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq/cpuinfo_max_freq").strip()
        if text.isdigit() and int(text):
            highest.append(int(text) / 1e3)
        match = re.match(r"[0-9.]+", processors[cpu].get("cpu MHz", ""))
        shown = max(shown, float(match.group()) if match else 0.0)
    return sum(highest) / len(highest) if highest else max(shown, typical or 0.0) or None


def _caches(root: Path, cpu: int) -> tuple[Cache, ...]:
    """Return the data and unified caches of `cpu`, or nothing where the kernel does not describe them."""
    found = {}
    for index in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index[0-9]*")):
        if _read(index / "type").strip() not in ("Data", "Unified"):
            continue
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size").strip())
        level = _read(index / "level").strip()
        if not size or not level.isdigit() or int(size.group(1)) == 0:
            continue
        line = _read(index / "coherency_line_size").strip()
        ways = _read(index / "ways_of_associativity").strip()
        sharing = _cpu_list(_read(index / "shared_cpu_list")) or {cpu}
        found[int(level)] = Cache(
            level=int(level),
            size_bytes=int(size.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30}[size.group(2)],
            line_bytes=int(line) if line.isdigit() and int(line) else 64,
            ways=int(ways) if ways.isdigit() and int(ways) else None,
            shared_by_cores=len({_siblings(root, other) for other in sharing}),
        )
    return tuple(found[level] for level in sorted(found))


def _siblings(root: Path, cpu: int) -> frozenset[int]:
    """Return the logical CPUs of the core that `cpu` belongs to."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    text = _read(topology / "thread_siblings_list") or _read(topology / "core_cpus_list")
    return frozenset(_cpu_list(text) or {cpu})


def _cpu_list(text: str) -> set[int]:
    """Return the numbers of a list such as 0-3,8."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _read(file: Path) -> str:
    """Return the text of `file`, or an empty string where the system does not have it."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _without_proc(isa: str, allowed: Collection[int] | None) -> Hardware:
    """Return what is known without /proc/cpuinfo: archspec's host, and the cores that Python counts."""
    from archspec.cpu import host

    records = database()
    target = host()
    names = (target.name, *(ancestor.name for ancestor in target.ancestors))
    ids = (records.find(name.replace("x86_64", "x86-64")) for name in names)
    id = next((id for id in ids if id is not None and records.merged(id)["isa"] == isa), None)
    cores = len(allowed) if allowed else os.cpu_count() or 1
    return records.build(id or {"x86_64": "x86-64"}.get(isa, isa), cores=cores, native=True)
