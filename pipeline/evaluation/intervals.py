"""Confidence intervals: how far a number would move with other documents."""

from __future__ import annotations

import math

import numpy as np

RESAMPLES = 2000
Z_95 = 1.959964

Interval = tuple[float, float]


def resample_counts(documents: int, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each document is drawn, `[resamples, documents]`: `documents` draws with replacement each.

    Use the same counts for what is compared (memory on and off): the comparison is then paired.
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(documents, np.full(documents, 1.0 / documents), size=resamples).astype(np.float64)


def ratio_intervals(sums: np.ndarray, weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """95 % percentile bootstrap intervals of sum(sums) / sum(weights) over documents.

    Args:
        sums, weights: per document, `[documents, ...]`.
        counts: from `resample_counts`.

    Returns:
        Low and high ends, `[2, ...]`; NaN where fewer than two documents have weight (one says nothing about others).
    """
    shape = sums.shape[1:]
    flat_sums, flat_weights = (x.reshape(len(x), -1).astype(np.float64) for x in (sums, weights))
    total = counts @ flat_weights
    means = np.divide(counts @ flat_sums, total, out=np.full(total.shape, np.nan), where=total > 0)
    result = np.full((2, total.shape[1]), np.nan)
    enough = (flat_weights > 0).sum(axis=0) >= 2
    if enough.any():
        # A resample may miss every document of a segment that few reach: it says nothing there.
        result[:, enough] = np.nanpercentile(means[:, enough], (2.5, 97.5), axis=0)
    return result.reshape(2, *shape)


def wilson_interval(successes: int, trials: int) -> Interval:
    """95 % interval of a proportion (Wilson's score): unlike the bootstrap it does not shrink to a point at 0 and 1."""
    share, z2 = successes / trials, Z_95**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)
