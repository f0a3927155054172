"""Predicted seconds of a workload on a GPU or NPU: a roofline over each operator of the rewritten graph.

    seconds    = launch + max(arithmetic, memory)
    arithmetic = FLOPs / (peak * share of the units that have a tile * EFFICIENCY)
    memory     = bytes from DRAM / bandwidth + bytes from the last cache / its bandwidth

Nothing of ours runs on these devices: the efficiencies below are assumptions about good vendor libraries, on the
optimistic side, so that the sum is a lower bound on latency. Weights come from DRAM in every call unless all of them
stay in the last cache; activations stay there where an operator's own fit into half of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...hwdb import Hardware
from ...hwdb.dtypes import BITS
from .workload import Operation, Product, Workload

EFFICIENCY = 0.8  # of peak, in the inner loop of a large product with every unit busy
STREAM_EFFICIENCY = 0.85  # of the memory's peak, what a copy kernel reaches
# Square output tiles libraries have kernels for, and the share of peak their inner loop reaches: a smaller one loads
# more operands for each product.
TILES = ((256, 1.0), (128, 0.95), (64, 0.7), (32, 0.4))
CACHE_GAIN = 4.0  # of the last cache's bandwidth over DRAM's, where its record does not say
WINOGRAD = 2.25  # multiplications saved by F(2x2, 3x3), on lanes: matrix units are faster without
# Of a kernel that needs the result of the one before, in a queue that is full: start, first bytes, last block. NPUs run
# a compiled graph without returning to the host.
GPU_LAUNCH_SECONDS, NPU_LAUNCH_SECONDS = 4.0e-6, 0.2e-6


@dataclass(frozen=True)
class Cost:
    """Seconds of one operator, and what they are made of."""

    seconds: float
    arithmetic: float
    memory: float


def launch_seconds(hw: Hardware) -> float:
    """Seconds to start one kernel."""
    return NPU_LAUNCH_SECONDS if hw.kind == "npu" else GPU_LAUNCH_SECONDS


class Accelerated:
    """A workload on one device in one precision."""

    def __init__(self, work: Workload, hw: Hardware, dtype: str) -> None:
        self.hw = hw
        self.item = BITS[dtype] / 8
        self.peak = hw.peak_flops(dtype) or 0.0
        # Activations functions, norms and softmax run on lanes in float32, or in whatever there is.
        self.lanes = hw.peak_flops("float32") if hw.supports("float32") else self.peak
        self.on_lanes = not hw.matrix_instructions(dtype) and hw.kind == "gpu"
        cache = hw.caches[-1].size_bytes if hw.caches else getattr(hw, "sram_bytes", None)
        self.cache = float(cache or 0.0)
        self.dram = (hw.dram_gbs or 0.0) * 1e9 * STREAM_EFFICIENCY
        level = hw.caches[-1].level if hw.caches else 0
        known = hw.bandwidth_gbs(level) if level else getattr(hw, "sram_gbs", None)
        self.near = max((known or 0.0) * 1e9, CACHE_GAIN * self.dram)
        alive = (work.weight_elements + work.activation_elements) * self.item
        self.resident = alive <= 0.8 * self.cache

    @property
    def known(self) -> bool:
        """Whether the device's rates are."""
        return bool(self.peak and (self.dram or (self.resident and self.near)))

    def cost(self, operation: Operation) -> Cost:
        """What one call of `operation` takes."""
        arithmetic = sum(self._product(p, operation.winograd) for p in operation.products)
        arithmetic += operation.element_flops / (self.lanes or self.peak)
        activations = (operation.read + operation.written) * self.item
        weights = operation.weights * self.item
        near, far = 0.0, weights
        if self.resident:
            near, far = activations + weights, 0.0
        elif activations <= self.cache / 2:
            near = activations
        else:
            far += activations
        memory = near / self.near + (far / self.dram if far else 0.0)
        return Cost(max(arithmetic, memory) + operation.launches * launch_seconds(self.hw), arithmetic, memory)

    def _product(self, product: Product, winograd: bool) -> float:
        if product.columns == 1:  # depthwise: a few terms for each element, on lanes
            return product.flops / ((self.lanes or self.peak) * 0.5)
        flops = product.flops / (WINOGRAD if winograd and self.on_lanes else 1.0)
        return flops / (self.peak * EFFICIENCY * self._share(product))

    def _share(self, product: Product) -> float:
        """The share of peak that the best tile size leaves: padding, units without a tile, and the tile's own."""
        units = self.hw.cores
        best = 0.0
        for size, share in TILES:
            rows, columns = math.ceil(product.rows / size), math.ceil(product.columns / size)
            filled = product.rows * product.columns / (rows * columns * size * size)
            tiles = rows * columns * product.batch
            # Units without a tile share the sums of others along the depth, in pieces of 64 terms or more.
            tiles *= max(1, min(units // max(1, tiles), int(product.depth) // 256))
            busy = tiles / (math.ceil(tiles / units) * units)
            best = max(best, share * filled * busy)
        # Thin products wait for their weights anyway: a whole row of lanes is as good as a tile there.
        return max(best, 0.02)
