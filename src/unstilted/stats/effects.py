"""How much raters and items differ: normal effects on the log-odds of a choice."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]

MAX_SD = 5.0
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclass(frozen=True)
class Effects:
    """Standard deviations of raters' and items' log-odds around a mean at which the population's share is `share`."""

    share: float
    rater_sd: float
    item_sd: float


@cache
def mean_logit(share: float, spread: float) -> float:
    """The mean log-odds at which normal log-odds with standard deviation `spread` give `share` on average."""
    return float(brentq(lambda mean: float(_WEIGHTS @ expit(mean + spread * _NODES)) - share, -60, 60))


def likeness(share: float, shared_sd: float, other_sd: float) -> float:
    """Covariance of two choices that share an effect with standard deviation `shared_sd` and differ in all else."""
    mean = mean_logit(share, float(np.hypot(shared_sd, other_sd)))
    by_shared = expit(mean + shared_sd * _NODES[:, None] + other_sd * _NODES) @ _WEIGHTS
    return float(_WEIGHTS @ by_shared**2) - share**2


def estimate_effects(gains: Floats, rater: Ints, item: Ints) -> Effects:
    """The effects behind N choices, 1 or 0, by moments: votes of one rater on different items are as alike as raters differ.

    gains, rater, item: shape (N,), each rater once an item. Rough below some dozens of raters and items; 0 where votes of one rater
    (on one item) are not more alike than others, 5 at most.
    """
    share = float(gains.mean())
    if not 0 < share < 1:
        return Effects(share, 0.0, 0.0)
    by_rater, by_item = (_pair_covariance(gains - share, code) for code in (rater, item))
    rater_sd = item_sd = 0.0
    for _ in range(20):  # each sd changes the other's likeness a little
        rater_sd = _sd_for(by_rater, share, item_sd)
        item_sd = _sd_for(by_item, share, rater_sd)
    return Effects(share, rater_sd, item_sd)


def _pair_covariance(residuals: Floats, cluster: Ints) -> float:
    """Mean product of the residuals of two votes of one cluster, over all such pairs."""
    sums, squares, sizes = (np.bincount(cluster, weights) for weights in (residuals, residuals**2, np.ones(len(cluster))))
    n_pairs = float((sizes * (sizes - 1)).sum())
    return float((sums**2 - squares).sum()) / n_pairs if n_pairs else 0.0


def _sd_for(covariance: float, share: float, other_sd: float) -> float:
    if covariance <= 0:
        return 0.0
    if likeness(share, MAX_SD, other_sd) <= covariance:
        return MAX_SD
    return float(brentq(lambda sd: likeness(share, sd, other_sd) - covariance, 0.0, MAX_SD, xtol=1e-4))
