"""From what a user gives as target to the Hardware to compile for.

    "raspberry-pi-5", "Raspberry Pi 5", "native"          names of the database
    {"kind": "llvm", "mtriple": ..., "mcpu": ...}         a description as TVM's Target takes it, also as JSON text

Hardware that no record describes is taken as the most specific ancestor known: an sm_101 as the sm_100 before it, a
processor of archspec's as the ancestor archspec gives.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from ..errors import InputError, UnknownTarget, suggest
from . import isa as instruction_set
from .accelerators import Gpu
from .loader import Database, database
from .naming import spelling
from .planning import planned
from .records import Hardware

log = logging.getLogger(__name__)

# The attributes of TVM's targets that mean something here, and those that say nothing about the machine, or what is
# known of it anyway: the width of vectors follows from the features, the ABI from the triple.
_READ = {
    "llvm": ("mtriple", "mcpu", "mattr", "num-cores", "mabi", "vector-width"),
    "cuda": ("arch",),
    "rocm": ("mcpu", "mtriple"),
}
_LIMITS = {
    "max_threads_per_block": "max_threads_per_block",
    "max_shared_memory_per_block": "shared_bytes_per_block",
    "thread_warp_size": "warp_threads",
    "registers_per_block": "registers_per_unit",
}
_IGNORED = {"kind", "tag", "keys", "host", "libs", "device", "opt-level", "max_num_threads", "l2_cache_size_bytes"}
_OLDEST_MAC, _NEWEST_MAC = "apple-m1", "apple-m4"  # of those with code for Arm
_ROOTS = {
    "x86_64": "x86-64",
    "aarch64": "aarch64",
    "arm64": "aarch64",
    "armv7": "armv7",
    "riscv64": "riscv64",
    "loongarch64": "loongarch64",
}


def compile_target(target: str | Mapping[str, Any] | Hardware) -> Hardware:
    """Return the machine to compile for: generic limits where facts are uncertain, one die of a GPU that has several.

    Raises UnknownTarget where there is no such machine, or no code can be made for it; InputError for other types.
    """
    hw = resolve(target)
    if why := hw.refusal():
        raise UnknownTarget(f"cannot compile for {hw.id} ({hw.name}): {why}")
    if isinstance(hw, Gpu):
        return planned(hw)
    uncertain = hw.confidence == "low" and not hw.native and hw.isa in _ROOTS
    return with_generic_limits(hw) if uncertain else hw


def resolve(target: str | Mapping[str, Any] | Hardware) -> Hardware:
    """Return the machine that `target` names or describes. Raises UnknownTarget, InputError."""
    if isinstance(target, Hardware):
        return target
    if isinstance(target, Mapping):
        return from_tvm(target)
    if not isinstance(target, str):
        raise InputError(f"a target is a name of `graphwright hw list` or a TVM target dictionary, not {target!r}")
    if target.lstrip().startswith("{"):
        try:
            return from_tvm(json.loads(target))
        except json.JSONDecodeError as error:
            raise UnknownTarget(f"target {target!r} is not valid JSON: {error}") from error
    if instead := _from_command_line(target):
        raise UnknownTarget(f"target {target!r}: {instead}")
    if spelling(target) == "native":
        from .host import detect

        return detect()
    records = database()
    return records.build(records.find(target) or ancestor(records, target) or records.id_of(target))


def with_generic_limits(hw: Hardware) -> Hardware:
    """Return `hw` with the caches of its instruction set's generic record: kernels then fit wherever they may run."""
    records = database()
    root = records.build(_ROOTS[hw.isa])
    generic = tuple(
        own if (own := hw.cache(cache.level)) and own.size_bytes < cache.size_bytes else cache for cache in root.caches
    )
    caution = f"the facts of {hw.id} are uncertain (confidence low): compiled for caches as {root.name} has them"
    log.info("%s", caution)
    return dataclasses.replace(hw, caches=generic, caution=caution)


def from_tvm(target: Mapping[str, Any]) -> Hardware:
    """Return the machine that a TVM target dictionary describes.

    Raises UnknownTarget for kinds and attributes that are not understood: ignoring one would be wrong code.
    """
    if "kind" not in target:
        raise UnknownTarget(
            f'the TVM target {dict(target)} lacks "kind": one of {", ".join(_READ)}, as {_example(target)}'
        )
    kind = target["kind"]
    if not isinstance(kind, str) or kind not in _READ:
        raise UnknownTarget(
            f"TVM target kind {kind!r} is not understood; one of {', '.join(_READ)}{suggest(str(kind), _READ)}"
        )
    for key in target:
        known = {*_IGNORED, *_READ[kind], *(_LIMITS if kind != "llvm" else ())}
        if key not in known:
            raise UnknownTarget(f"TVM target attribute {key!r} of {kind} is not understood{suggest(str(key), known)}")
        if wrong := _mistake(key, target[key]):
            raise UnknownTarget(f"TVM target attribute {key!r} of {kind} is {target[key]!r}: {wrong}")
    return _from_llvm(target) if kind == "llvm" else _from_gpu(target)


def _example(target: Mapping[str, Any]) -> str:
    kind = "cuda" if "arch" in target else "rocm" if str(target.get("mcpu", "")).startswith("gfx") else "llvm"
    return json.dumps({"kind": kind, **target}, default=str)


def _from_command_line(text: str) -> str | None:
    """What to write instead of TVM's old form of a target, "llvm -mcpu=znver4"; None where `text` is none."""
    kind, _, options = text.strip().partition(" ")
    if kind not in _READ or not (options.lstrip().startswith("-") or text.strip() == "llvm"):
        return None
    pairs = re.findall(r"-+([\w-]+)(?:=| +(?!-))(\S+)", options)
    said: dict[str, Any] = {
        key: value.split(",") if key == "mattr" else int(value) if value.isdigit() else value for key, value in pairs
    }
    return f"a TVM target is written as a dictionary, here {json.dumps({'kind': kind, **said})}"


def _mistake(key: str, value: Any) -> str | None:
    """What is wrong with an attribute: whatever of it went by unread would be another machine."""
    if key in ("mtriple", "mcpu", "arch"):
        return None if isinstance(value, str) else "it is text"
    if key == "mattr":
        signed = isinstance(value, (list, tuple)) and all(isinstance(v, str) and v[:1] in ("+", "-") for v in value)
        return None if signed else "it is a list of '+feature' and '-feature'"
    if key == "num-cores" or key in _LIMITS:
        number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return None if number else "it is a positive whole number"
    return None


def _from_llvm(target: Mapping[str, Any]) -> Hardware:
    import platform

    triple = target.get("mtriple", "")
    family = triple.split("-")[0] if triple else platform.machine().lower()
    isa = {"arm64": "aarch64", "amd64": "x86_64"}.get(
        family, "armv7" if re.fullmatch("armv7[a-z]*", family) else family
    )
    if isa not in _ROOTS:
        raise UnknownTarget(f"mtriple {triple!r}: {family} is not one of {', '.join(_ROOTS)}")
    records = database()
    macos = _macos(triple) if isa == "aarch64" else None
    cpu = target.get("mcpu", _OLDEST_MAC if macos else "generic")
    id = _record_of_cpu(records, isa, cpu)
    features = set(records.merged(id)["features"])
    for attribute in target.get("mattr", ()):
        name = attribute[1:]
        if name in instruction_set.FLAGS[isa]:  # others do not change what kernels are chosen
            (features.add if attribute[0] == "+" else features.discard)(name)
    facts: dict[str, Any] = {"features": frozenset(features)}
    if macos:
        facts["triple"] = macos
        if foreign := features - records.merged(_NEWEST_MAC)["features"]:
            raise UnknownTarget(f"mtriple {triple!r}: no Mac has {', '.join(sorted(foreign))}, which the target has")
    elif triple:
        # LLVM takes arm64 for another architecture, and where the vendor is left out each part for the one before.
        named = re.sub("^arm64-", "aarch64-", triple)
        facts["triple"] = re.sub("^([^-]+)-linux-", r"\1-unknown-linux-", named)
    if "num-cores" in target:
        facts["cores"] = target["num-cores"]
    return records.build(id, **facts)


def _macos(triple: str) -> str | None:
    """The triple of the records of Apple's processors where `triple` is of a macOS that runs code for it."""
    named = re.fullmatch(r"[^-]+-apple-(darwin|macosx|macos)(\d*)[\d.]*", triple)
    if named is None:
        return None
    own: str = database().merged(_OLDEST_MAC)["triple"]
    oldest = int(own.rpartition("macosx")[2].split(".")[0])
    # Darwin 21 is macOS 12; from macOS 26 on, which is Darwin 25, the numbers are one apart.
    if named[2] and int(named[2]) + (0 if named[1] != "darwin" else -9) < oldest:
        raise UnknownTarget(f"mtriple {triple!r}: code is made for macOS {oldest} and newer")
    return own


def _record_of_cpu(records: Database, isa: str, cpu: str) -> str:
    """The architecture that LLVM's name `cpu` means; else its nearest ancestor; else any of the instruction set."""
    for record in records.with_key("llvm_cpu"):
        if (
            record.kind == "architecture"
            and record.values["llvm_cpu"] == cpu
            and records.merged(record.id)["isa"] == isa
        ):
            return record.id
    near = ancestor(records, cpu)
    if near is not None and records.merged(near)["isa"] == isa:
        return near
    if cpu not in ("generic", ""):
        log.warning("unknown processor %s: taken as %s", cpu, _ROOTS[isa])
    return _ROOTS[isa]


def _from_gpu(target: Mapping[str, Any]) -> Hardware:
    cpu = target.get("arch", target.get("mcpu", ""))
    if not cpu:
        key, example = {"cuda": ("arch", "sm_90"), "rocm": ("mcpu", "gfx942")}[target["kind"]]
        raise UnknownTarget(f"a TVM target of kind {target['kind']} says which GPU: {key!r}, such as {example!r}")
    hw = resolve(cpu)
    isa = {"cuda": "nvptx", "rocm": "amdgcn"}[target["kind"]]
    if not isinstance(hw, Gpu) or hw.isa != isa:
        raise UnknownTarget(f"{cpu!r} is not a GPU that {target['kind']} is for")
    return dataclasses.replace(hw, **{_LIMITS[key]: value for key, value in target.items() if key in _LIMITS})


def ancestor(records: Database, name: str) -> str | None:
    """Return the most specific record that hardware called `name`, unknown to the database, descends from, or None."""
    found = _older_gpu(records, name.strip().lower()) or _by_archspec(records, name)
    if found is not None:
        log.warning("unknown hardware %s: taken as %s", name, found)
    return found


def _older_gpu(records: Database, name: str) -> str | None:
    """Of sm_101 the newest compute capability before it of the same major version, whose code it runs.

    None for others, and for AMD's: a gfx943 does not run the code of a gfx942.
    """
    nvidia = re.fullmatch(r"sm[_-](\d+)[a-z]?", name)
    if not nvidia:
        return None
    known = [record.values["llvm_cpu"] for record in records.with_key("llvm_cpu") if record.kind == "architecture"]
    numbers = [int(match.group(1)) for cpu in known if (match := re.fullmatch(r"sm_(\d+)[a-z]?", cpu))]
    wanted = int(nvidia.group(1))
    older = [number for number in numbers if number <= wanted and number // 10 == wanted // 10]
    return records.find(f"sm_{max(older)}") if older else None


def _by_archspec(records: Database, name: str) -> str | None:
    from archspec.cpu import TARGETS

    target = next((target for known, target in TARGETS.items() if spelling(known) == spelling(name)), None)
    ancestors = () if target is None else target.ancestors
    ids = (records.find(other.name.replace("x86_64", "x86-64")) for other in ancestors)
    return next((id for id in ids if id is not None), None)
