"""The range of a value that its 8 bits cover, from a histogram of what calibration saw.

minmax      all of it
percentile  all but the largest 1 - PERCENTILE of |x|
mse         the range whose rounding and clipping err least in the mean square
kl          the range whose rounded distribution is closest to the original by Kullback and Leibler: Migacz, 8-bit
            inference with TensorRT, GTC 2017, as NVIDIA's pytorch-quantization computes it (calib/histogram.py,
            _compute_amax_entropy: the bin of zeros counts as its neighbour, what is clipped is added to the last bin);
            a level that nothing was rounded to has the probability EMPTY instead of 0, as MXNet smooths it. A
            histogram of fewer than KL_SEEN numbers is mostly gaps, which fit any rounding: such a value takes `mse`

All but the first look at a histogram of |x| in BINS bins for a threshold T, and keep [max(low, -T), min(high, T)]. It
covers values up to OUTLIER times their mean; the few beyond are clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BINS = 2048
OUTLIER = 100.0  # times the mean |x|: what lies beyond would leave all else in a few bins
PERCENTILE = 0.9999
KL_STEP = 8  # of the thresholds tried, in bins
KL_SEEN = 8 * BINS
EMPTY = 1e-4
MSE_TRIED = 100  # thresholds

Counts = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """What calibration saw: the extremes, and a histogram of |x| over [0, reach], outliers in the last bin."""

    low: float
    high: float
    counts: Counts
    reach: float

    def within(self, threshold: float) -> tuple[float, float]:
        """The range clipped at a threshold of |x|."""
        return max(self.low, -threshold), min(self.high, threshold)


def minmax(seen: Seen) -> tuple[float, float]:
    """All that was seen."""
    return seen.low, seen.high


def percentile(seen: Seen) -> tuple[float, float]:
    """All but the few largest."""
    share = np.cumsum(seen.counts) / max(seen.counts.sum(), 1.0)
    last = int(np.searchsorted(share, PERCENTILE))
    return seen.within(min(last + 1, BINS) * seen.reach / BINS)


def mse(seen: Seen) -> tuple[float, float]:
    """The least mean square error, with a bin's middle for its values."""
    middles = (np.arange(BINS) + 0.5) * seen.reach / BINS
    best, least = seen.reach, np.inf
    for tried in range(1, MSE_TRIED + 1):
        threshold = seen.reach * tried / MSE_TRIED
        low, high = seen.within(threshold)
        step = (high - low) / 255.0
        if step <= 0.0:
            continue
        clipped = np.minimum(middles, threshold)
        error = float((seen.counts * (middles - np.round(clipped / step) * step) ** 2).sum())
        if error <= least:
            best, least = threshold, error
    return seen.within(best)


def kl(seen: Seen) -> tuple[float, float]:
    """The least divergence of the rounded distribution from the original."""
    if seen.counts.sum() < KL_SEEN:
        return mse(seen)
    bins = seen.counts.copy()
    bins[0] = bins[1]
    total = bins.sum()
    if total <= 0.0 or seen.high <= seen.low:
        return seen.low, seen.high
    # Levels that |x| has: 255 over the whole range, of which those of the larger sign count.
    levels = int(np.clip(round(255.0 * seen.reach / (max(seen.high, 0.0) - min(seen.low, 0.0))), 128, 255))
    best, least = BINS, np.inf
    for kept in range(levels, BINS + 1, KL_STEP):
        divergence = _divergence(bins, kept, levels)
        if divergence <= least:
            best, least = kept, divergence
    return seen.within(best * seen.reach / BINS)


def _divergence(bins: Counts, kept: int, levels: int) -> float:
    """KL divergence of the first `kept` bins from the same in `levels` levels; what lies beyond is in the last bin."""
    head = bins[:kept]
    filled = head > 0.0
    level = np.minimum(np.arange(kept) * levels // kept, levels - 1)
    sums = np.bincount(level, weights=head, minlength=levels)
    members = np.bincount(level, weights=filled, minlength=levels)
    rounded = np.where(filled, (sums / np.maximum(members, 1.0))[level], 0.0)
    original = head.copy()
    original[-1] += bins[kept:].sum()
    scale_original, scale_rounded = original.sum(), rounded.sum()
    if scale_rounded <= 0.0:
        return float("inf")
    p, q = original / scale_original, rounded / scale_rounded
    there = p > 0.0
    q = np.maximum(q, EMPTY)
    return float((p[there] * np.log(p[there] / q[there])).sum())


METHODS: dict[str, Callable[[Seen], tuple[float, float]]] = {
    "kl": kl,
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
}
