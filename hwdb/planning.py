"""What kernels for a GPU are planned for: one die of several, and for an architecture alone, its largest device.

Neither changes what the code runs on, only tiles and grids.
"""

from __future__ import annotations

import dataclasses

from .accelerators import Gpu
from .loader import database
from .records import Cache


def planned(gpu: Gpu) -> Gpu:
    """The GPU as a launch finds it; `caution` says what was put in the place of what. A second call changes nothing."""
    return one_die(represented(gpu))


def one_die(gpu: Gpu) -> Gpu:
    """An equal share of the units, memory and caches beyond a unit, where the runtime sees `dies` GPUs."""
    count = gpu.dies
    if count == 1:
        return gpu
    share = dataclasses.replace(
        gpu,
        dies=1,
        cores=gpu.cores // count,
        caches=tuple(cache if cache.shared_by_cores == 1 else _share(cache, count) for cache in gpu.caches),
        dram_bytes=None if gpu.dram_bytes is None else gpu.dram_bytes // count,
        dram_gbs=None if gpu.dram_gbs is None else gpu.dram_gbs / count,
        l2_gbs=None if gpu.l2_gbs is None else gpu.l2_gbs / count,
    )
    said = f"planned for {share.cores} units: the runtime sees {gpu.name} as {count} GPUs"
    return dataclasses.replace(share, caution=f"{gpu.caution}; {said}" if gpu.caution else said)


def represented(gpu: Gpu) -> Gpu:
    """An architecture alone, which has no units, with those of its device with the most: they fill the others too.

    Clock, L2 and memory rate are that device's; how much memory there is stays unknown.
    """
    records = database()
    record = records.records.get(gpu.id)
    if record is None or record.kind != "architecture" or gpu.cores > 1:
        return gpu
    children = [records.build(child.id) for child in records.children(gpu.id) if child.kind == "device"]
    devices = [one_die(device) for device in children if isinstance(device, Gpu) and device.cores > 1]
    if not devices:
        return gpu
    model = max(devices, key=lambda device: (device.cores, device.id))
    return dataclasses.replace(
        gpu,
        cores=model.cores,
        clock_mhz=model.clock_mhz,
        tensor_clock_mhz=model.tensor_clock_mhz,
        caches=model.caches,
        dram_gbs=model.dram_gbs,
        l2_gbs=model.l2_gbs,
        caution=f"{gpu.id} is no device: planned for the {model.cores} units of {model.name}, its largest",
    )


def _share(cache: Cache, count: int) -> Cache:
    return dataclasses.replace(
        cache, size_bytes=cache.size_bytes // count, shared_by_cores=max(1, cache.shared_by_cores // count)
    )
