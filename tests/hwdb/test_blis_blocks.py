"""Cache geometry of the records, held against the block sizes that BLIS' authors tuned by hand.

Low, Igual, Smith and Quintana-Orti, "Analytical Modeling Is Enough for High-Performance BLIS" (2016), section 4: A's
micro-panel fills what L1 has left beside B's, and A's block fills what L2 has left beside B's micro-panel:

    ways of A in L1 = floor((W1 - 1) / (1 + nr / mr))         kc = ways * N1 * line / (mr * size)
    ways of B in L2 = ceil(nr * kc * size / (N2 * line))      mc = (W2 - 1 - ways) * N2 * line / (kc * size)

with W ways and N sets a level; mr counts along the vectors. The hand-tuned sizes are those of flame/blis, config/*.
"""

from __future__ import annotations

import pytest

from graphwright import hwdb
from graphwright.hwdb import Hardware


def blocks(hw: Hardware, mr: int, nr: int, size: int) -> tuple[int, int]:
    """Return (kc, mc) of an mr x nr kernel on elements of `size` bytes."""
    first, second = hw.cache(1), hw.cache(2)
    ways = max(1, (first.ways - 1) * mr // (mr + nr))
    kc = ways * first.size_bytes // first.ways // (mr * size)
    way = second.size_bytes // second.ways
    panel = -(-nr * kc * size // way)
    return kc, (second.ways - 1 - panel) * way // (kc * size)


@pytest.mark.parametrize(
    ("mr", "nr", "size", "tuned"),
    [
        (8, 8, 4, (384, 128)),
        (8, 4, 8, (256, 96)),  # doubles, and complex numbers of two floats
        (4, 4, 16, (192, 64)),
    ],
)
def test_sandy_bridge_exactly(mr, nr, size, tuned):
    assert blocks(hwdb.lookup("sandybridge"), mr, nr, size) == tuned


@pytest.mark.parametrize("name", ["haswell", "zen2"])
def test_double_precision_of_haswell_and_zen2_exactly(name):
    assert blocks(hwdb.lookup(name), 8, 6, 8)[0] == 256


@pytest.mark.parametrize(
    ("name", "mr", "nr", "size", "tuned"),
    [
        ("haswell", 16, 6, 4, 256),
        ("zen2", 16, 6, 4, 256),
        ("cortex-a57", 8, 12, 4, 640),
        ("cortex-a57", 6, 8, 8, 240),
        ("cortex-a53", 6, 8, 8, 240),
    ],
)
def test_depth_of_the_block_within_a_factor_of_two(name, mr, nr, size, tuned):
    """The model is a seed for others: prefetching kernels and pseudo-random replacement move the best size."""
    assert 0.5 <= blocks(hwdb.lookup(name), mr, nr, size)[0] / tuned <= 2


@pytest.mark.parametrize(
    ("name", "mr", "nr"),
    [("sandybridge", 8, 8), ("haswell", 6, 16), ("zen2", 6, 16), ("skylake-avx512", 32, 12), ("cortex-a57", 8, 12)],
)
def test_hand_made_register_tiles_hide_the_latency_and_fit(name, mr, nr):
    """mr * nr >= lanes * latency * multiply-adds a cycle (section 4.1), in accumulators that the registers hold."""
    hw = hwdb.lookup(name)
    assert mr * nr >= hw.lanes() * hw.fma_latency_cycles * hw.fma_per_cycle
    assert mr * nr // hw.lanes() < hw.vector_registers
