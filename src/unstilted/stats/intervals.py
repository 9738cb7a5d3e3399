"""Intervals for means and paired differences over prompts."""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from unstilted.records import Estimate

Floats = NDArray[np.float64]


def resample_counts(n_items: int, n_bootstrap: int, seed: int) -> Floats:
    """How often each of I items is drawn in each bootstrap resample: shape (n_bootstrap, I)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(n_items, np.full(n_items, 1 / n_items), size=n_bootstrap).astype(np.float64)


def bootstrap_mean(values: Floats, counts: Floats, confidence: float) -> Estimate:
    """Mean of I values with a percentile bootstrap interval (Efron & Tibshirani 1993, ch. 13).

    counts: from `resample_counts`; pass the same counts for every measure, so that all intervals share their resamples.
    """
    means = counts @ values / len(values)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(mean=float(values.mean()), low=float(low), high=float(high))


def wilson(n_hits: int, n_items: int, confidence: float) -> Estimate:
    """A share with its score interval (Wilson 1927), which stays honest at 0 and 1."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = n_hits / n_items
    centre = (share + z**2 / (2 * n_items)) / (1 + z**2 / n_items)
    half = z / (1 + z**2 / n_items) * np.sqrt(share * (1 - share) / n_items + z**2 / (4 * n_items**2))
    return Estimate(mean=share, low=min(share, max(0.0, float(centre - half))), high=max(share, min(1.0, float(centre + half))))


def paired_share_difference(after: Floats, before: Floats, confidence: float) -> Estimate:
    """Difference of two shares on the same I items, each 0 or 1, with the adjusted Wald interval of Bonett & Price 2012, eq. 5.

    Unlike a bootstrap it keeps a width when no item changed.
    """
    n_items, z = len(after), NormalDist().inv_cdf((1 + confidence) / 2)
    gained = (float(((after == 1) & (before == 0)).sum()) + 1) / (n_items + 2)
    lost = (float(((after == 0) & (before == 1)).sum()) + 1) / (n_items + 2)
    half = z * np.sqrt((gained + lost - (gained - lost) ** 2) / (n_items + 2))
    centre = gained - lost
    mean = float(after.mean() - before.mean())
    return Estimate(mean=mean, low=min(mean, max(-1.0, float(centre - half))), high=max(mean, min(1.0, float(centre + half))))
