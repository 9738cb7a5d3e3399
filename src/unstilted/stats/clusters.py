"""Uncertainty of votes that share raters and items: two-way clustered variances with the jackknife.

Shapes: `N` votes, `P` parameters. A vote is no independent draw: the same rater and the same item speak in many of them.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.special import expit, logit, stdtr, stdtrit

from unstilted.records import Record

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]

FEWEST_CLUSTERS = 3
"""With fewer raters or items no interval is given: two of them cannot tell how much people differ."""


class Share(Record):
    """A share of votes with an interval that holds for other raters and other items of the same kind."""

    share: float
    low: float | None
    high: float | None
    """Both None where the votes cannot give an interval; `reason` says why."""
    p_value: float | None
    """Two-sided, against one half."""
    n_votes: int
    n_raters: int
    n_items: int
    reason: str = ""


def clustered_share(values: Floats, rater: Ints, item: Ints, confidence: float) -> Share | None:
    """Mean of N values in [0, 1] with a two-way cluster interval over raters x items on the logit scale; None without votes.

    values, rater, item: shape (N,), integer codes. The variance is the cluster jackknife of both ways minus that of the cells, or
    one way's alone where that is larger; the quantile is Student's with min(R, I) - 1 degrees of freedom. Where all values are 0 or
    all are 1, the bound is Clopper & Pearson's with min(R, I) for the number of trials.
    Cameron, Gelbach & Miller 2011; MacKinnon, Nielsen & Webb 2024, "Jackknife inference with two-way clustering".
    """
    if not len(values):
        return None
    rater, item = _dense(rater), _dense(item)
    n_raters, n_items = int(rater.max()) + 1, int(item.max()) + 1
    share, fewest = float(values.mean()), min(n_raters, n_items)
    about: dict[str, Any] = {"share": share, "n_votes": len(values), "n_raters": n_raters, "n_items": n_items}
    if fewest < FEWEST_CLUSTERS:
        return Share(**about, low=None, high=None, p_value=None, reason=too_few(n_raters, n_items))
    tail = (1 - confidence) / 2
    if share in (0.0, 1.0):
        bound = float(tail ** (1 / fewest))
        low, high = (bound, 1.0) if share else (0.0, 1 - bound)
        return Share(**about, low=low, high=high, p_value=2 * 0.5**fewest)
    variance = _jackknife_variance(values - share, rater, item)
    if variance <= 0:
        return Share(**about, low=None, high=None, p_value=None, reason="all votes are the same")
    error = variance**0.5 / (share * (1 - share))
    half = -float(stdtrit(fewest - 1, tail)) * error
    low, high = expit(logit(share) - half), expit(logit(share) + half)
    p_value = 2 * float(stdtr(fewest - 1, -abs(logit(share)) / error))
    return Share(**about, low=float(low), high=float(high), p_value=p_value)


def too_few(n_raters: int, n_items: int) -> str:
    """Why so few raters or items give no interval."""
    few = [f"{n} {name}{'' if n == 1 else 's'}" for n, name in ((n_raters, "rater"), (n_items, "item")) if n < FEWEST_CLUSTERS]
    return f"too few: {' and '.join(few)}; an interval needs {FEWEST_CLUSTERS} of each at least"


def _jackknife_variance(residuals: Floats, rater: Ints, item: Ints) -> float:
    """Variance of the mean whose N residuals these are. Without variation between clusters it is that of independent votes."""
    cell = _dense(rater.astype(np.int64) * (int(item.max()) + 1) + item)
    by_rater, by_item, by_cell = (_one_way_variance(residuals, code) for code in (rater, item, cell))
    largest = max(by_rater + by_item - by_cell, by_rater, by_item)
    return largest if largest > 1e-9 * by_cell else by_cell


def _one_way_variance(residuals: Floats, cluster: Ints) -> float:
    """Delete-one-cluster jackknife variance of a mean: leaving out cluster g moves the mean by -sum_g / (N - N_g)."""
    sums, sizes = np.bincount(cluster, residuals), np.bincount(cluster)
    moves = sums / (len(residuals) - sizes)
    return float((len(sums) - 1) / len(sums) * (moves**2).sum())


def _dense(codes: Ints) -> NDArray[np.int64]:
    """The same clusters coded 0, 1, ... without gaps."""
    if len(codes) and codes.min() >= 0 and codes.max() < 4 * len(codes):
        present = np.bincount(codes) > 0
        return (np.cumsum(present) - 1)[codes]
    return np.unique(codes, return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True)
class Sandwich:
    """Covariances of P parameters by which clusters vary: both ways, raters alone, items alone; or only raters, shape (1, P, P)."""

    covariances: Floats
    df: int
    """Student's degrees of freedom: the smallest number of clusters less 1."""

    def errors(self, contrasts: Floats) -> Floats:
        """Standard errors of linear contrasts, shape (C, P) to (C,): from the largest variance of each."""
        variances = np.einsum("cp,kpq,cq->kc", contrasts, self.covariances, contrasts)
        errors: Floats = np.sqrt(np.maximum(variances.max(axis=0), 0.0))
        return errors

    def quantile(self, confidence: float) -> float:
        return -float(stdtrit(self.df, (1 - confidence) / 2))

    def p_values(self, estimates: Floats, contrasts: Floats) -> Floats:
        """Two-sided, against 0."""
        errors = self.errors(contrasts)
        with np.errstate(divide="ignore", invalid="ignore"):
            p_values: Floats = 2 * stdtr(self.df, -np.abs(estimates) / errors)
        return np.where(errors > 0, p_values, 1.0)


def sandwich(scores: csr_array, inverse_information: Floats, rater: Ints, item: Ints | None = None) -> Sandwich:
    """Cluster-robust covariance of estimates whose per-vote scores, shape (N, P), sum to 0: by rater and item, or by rater alone.

    inverse_information: shape (P, P). Each way is scaled by G / (G - 1). Cameron, Gelbach & Miller 2011.
    """
    rater = _dense(rater)
    if item is None:
        by_rater = inverse_information @ _meat(scores, rater) @ inverse_information
        return Sandwich(by_rater[None], int(rater.max()))
    item = _dense(item)
    cell = _dense(rater.astype(np.int64) * (int(item.max()) + 1) + item)
    by_rater, by_item, by_cell = (inverse_information @ _meat(scores, code) @ inverse_information for code in (rater, item, cell))
    return Sandwich(np.stack([by_rater + by_item - by_cell, by_rater, by_item]), min(int(rater.max()), int(item.max())))


def _meat(scores: csr_array, cluster: Ints) -> Floats:
    n_clusters = int(cluster.max()) + 1
    ones = np.ones(len(cluster))
    sums = csr_array((ones, (cluster, np.arange(len(cluster)))), shape=(n_clusters, len(cluster))) @ scores
    meat: Floats = (sums.T @ sums).toarray() * (n_clusters / max(n_clusters - 1, 1))
    return meat
