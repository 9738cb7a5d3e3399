"""Agreement of raters beyond chance, with intervals that hold for other items and other raters.

Shapes: `U` units (what two raters can agree about), `C` categories. Counts (U, C): how many raters put the unit in the category.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from unstilted.records import Record

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]
Coefficient = Literal["percent", "alpha", "fleiss", "ac1"]
Metric = Literal["nominal", "ordinal", "interval", "ratio"]
COEFFICIENTS: tuple[Coefficient, ...] = ("percent", "alpha", "fleiss", "ac1")
FEWEST = 3
"""Fewer raters or units give no interval."""


class Agreed(Record):
    """An agreement coefficient; 1: perfect, 0: as by chance."""

    value: float
    low: float | None
    high: float | None
    error_items: float
    """Standard error from the choice of items."""
    error_raters: float | None
    """Standard error from the choice of raters."""
    reason: str = ""
    """Why there is no interval."""


def count_categories(unit: Ints, category: Ints, n_categories: int) -> tuple[Floats, Ints]:
    """Counts, shape (U, C), of the units that occur, and each vote's row among them, shape (N,)."""
    _, row = np.unique(unit, return_inverse=True)
    counts = np.bincount(row * n_categories + category, minlength=(int(row.max()) + 1) * n_categories)
    return counts.reshape(-1, n_categories).astype(np.float64), row


def coefficients(counts: Floats) -> dict[Coefficient, float] | None:
    """Percent agreement, Krippendorff's alpha (nominal), Fleiss' kappa and Gwet's AC1; None when no unit has two raters.

    Percent and kappa as generalised to missing ratings by Gwet 2014; alpha: Krippendorff 2011. Where only one
    category occurs, alpha and kappa say nothing and are given as 1, as agreement is perfect.
    """
    if not (counts.sum(axis=1) >= 2).any():
        return None
    values = _from_totals(_moments(counts).sum(axis=0))
    return {name: float(value) for name, value in zip(COEFFICIENTS, values, strict=True)}


def _moments(counts: Floats) -> Floats:
    """Sums over units determine every coefficient: shape (U, 5 + 2C).

    Columns: is rated, is rated twice; share of agreeing pairs; raters of paired units; agreeing pairs by n - 1; shares by category;
    counts by category of paired units.
    """
    n = counts.sum(axis=-1)
    is_paired = (n >= 2).astype(np.float64)
    agreeing = (counts * (counts - 1)).sum(axis=-1)
    by_n1 = agreeing / np.maximum(n - 1, 1) * is_paired
    single = np.stack([(n > 0).astype(np.float64), is_paired, by_n1 / np.maximum(n, 1), n * is_paired, by_n1], axis=-1)
    return np.concatenate([single, counts / np.maximum(n, 1)[..., None], counts * is_paired[..., None]], axis=-1)


def _from_totals(totals: Floats) -> Floats:
    """The four coefficients from sums of `_moments`: shape (..., M) to (..., 4)."""
    rated, paired, agreed, n, by_n1 = np.moveaxis(totals[..., :5], -1, 0)
    half = (totals.shape[-1] - 5) // 2
    shares, marginals = totals[..., 5 : 5 + half] / rated[..., None], totals[..., 5 + half :]
    percent = agreed / paired
    same = (shares**2).sum(axis=-1)
    expected_alpha = (n**2 - (marginals**2).sum(axis=-1)) / (n * (n - 1))
    alpha = 1 - _ratio(1 - by_n1 / n, expected_alpha)
    fleiss = 1 - _ratio(1 - percent, 1 - same)
    ac1 = 1 - (1 - percent) / (1 - (1 - same) / (half - 1))
    return np.stack([percent, alpha, fleiss, ac1], axis=-1)


def _ratio(observed: Floats, expected: Floats) -> Floats:
    """Observed by expected disagreement; 0 where neither can occur."""
    result: Floats = np.divide(observed, expected, out=np.zeros_like(np.asarray(expected)), where=np.asarray(expected) > 1e-12)
    return result


def item_errors(counts: Floats) -> dict[Coefficient, float]:
    """Standard errors from the choice of items, given the raters, by linearisation: Gwet 2014, ch. 5; alpha's: Gwet 2011."""
    parts = {"alpha": _alpha_parts(counts), **_paired_parts(counts)}
    return {name: float(parts[name].std() / max(len(parts[name]) - 1, 1) ** 0.5) for name in COEFFICIENTS}


def _paired_parts(counts: Floats) -> dict[Coefficient, Floats]:
    """What each unit contributes to percent agreement, kappa and AC1, linearised: shape (U,) each."""
    n, n_categories = counts.sum(axis=1), counts.shape[1]
    is_paired = n >= 2
    weight = is_paired * len(n) / is_paired.sum()
    agreeing = (counts * (counts - 1)).sum(axis=1) / np.maximum(n * (n - 1), 1)
    observed = agreeing[is_paired].mean()
    shares = (counts / n[:, None]).mean(axis=0)
    same, unit_same = (shares**2).sum(), counts @ shares / n
    chances: dict[Coefficient, tuple[float, Floats]] = {
        "fleiss": (same, unit_same),
        "ac1": ((1 - same) / (n_categories - 1), (1 - unit_same) / (n_categories - 1)),
    }
    parts: dict[Coefficient, Floats] = {"percent": (agreeing - observed) * weight}
    for name, (chance, unit_chance) in chances.items():
        left_over = max(1 - chance, 1e-12)
        slope = 2 * (1 - observed) / left_over**2
        parts[name] = weight * (agreeing - chance) / left_over - slope * (unit_chance - chance)
    return parts


def _alpha_parts(counts: Floats) -> Floats:
    """What each unit with two raters contributes to alpha, linearised around their mean number: shape (U,)."""
    counts = counts[counts.sum(axis=1) >= 2]
    n = counts.sum(axis=1)
    mean_n = n.mean()
    off = (n - mean_n) / mean_n
    shares = counts.mean(axis=0) / mean_n
    chance = (shares**2).sum()
    agreeing = (counts * (counts - 1)).sum(axis=1) / (mean_n * (n - 1))
    observed = agreeing.mean()
    left_over = max(1 - chance, 1e-12)
    unit_chance = counts @ shares / mean_n - chance * off - chance
    with_epsilon = observed + (1 - observed) / n.sum()
    parts: Floats = (agreeing - with_epsilon * off - chance) / left_over - 2 * (1 - observed) / left_over**2 * unit_chance
    return parts


def rater_errors(counts: Floats, row: Ints, category: Ints, rater: Ints) -> dict[Coefficient, float]:
    """Standard errors from the choice of raters, by leaving out one after the other: Gwet 2014, ch. 5.

    row, category, rater: shape (N,), the votes that `counts` counts, each rater once a unit. Takes O(N + U C^2), not O(R U C).
    """
    moments = _moments(counts)
    without = np.maximum(counts[:, None, :] - np.eye(counts.shape[1]), 0)
    moves = (_moments(without) - moments[:, None])[row, category]
    _, place = np.unique(rater, return_inverse=True)
    n_raters = int(place.max()) + 1
    totals = moments.sum(axis=0) + np.stack([np.bincount(place, move, n_raters) for move in moves.T], axis=1)
    totals = totals[totals[:, 1] > 0]
    if len(totals) < 2:
        return dict.fromkeys(COEFFICIENTS, 0.0)
    values = _from_totals(totals)
    errors = ((len(values) - 1) * values.var(axis=0)) ** 0.5
    return {name: float(error) for name, error in zip(COEFFICIENTS, errors, strict=True)}


@dataclass(frozen=True)
class Ratings:
    """N ratings, each rater once a unit."""

    unit: Ints
    category: Ints
    rater: Ints
    n_categories: int


def agreement(ratings: Ratings, confidence: float) -> dict[Coefficient, Agreed] | None:
    """The coefficients with intervals from items and raters together; None when no unit has two raters.

    Student's quantile with min(R, U) - 1 degrees of freedom, cut at -1 (percent: 0) and 1; no interval below three raters or units.
    """
    counts, row = count_categories(ratings.unit, ratings.category, ratings.n_categories)
    values = coefficients(counts)
    if values is None:
        return None
    by_items, by_raters = item_errors(counts), rater_errors(counts, row, ratings.category, ratings.rater)
    fewest = min(len(np.unique(ratings.rater)), int((counts.sum(axis=1) >= 2).sum()))
    found = {name: _agreed(values[name], by_items[name], by_raters[name], fewest, confidence) for name in COEFFICIENTS}
    percent = found["percent"]
    return {**found, "percent": percent.model_copy(update={"low": None if percent.low is None else max(0.0, percent.low)})}


def _agreed(value: float, by_items: float, by_raters: float, fewest: int, confidence: float) -> Agreed:
    if fewest < FEWEST:
        return Agreed(value=value, low=None, high=None, error_items=by_items, error_raters=None, reason="too few raters or units")
    error = (by_items**2 + by_raters**2) ** 0.5
    if error < 1e-12:
        return Agreed(value=value, low=None, high=None, error_items=0.0, error_raters=0.0, reason="no two units differ")
    half = -float(stdtrit(fewest - 1, (1 - confidence) / 2)) * error
    return Agreed(value=value, low=max(-1.0, value - half), high=min(1.0, value + half), error_items=by_items, error_raters=by_raters)


def krippendorff_alpha(counts: Floats, values: Floats, metric: Metric) -> float:
    """Alpha for categories with `values`, shape (C,), ascending. Krippendorff 2011: 1 - observed by expected disagreement."""
    counts = counts[counts.sum(axis=1) >= 2]
    n_c, n_u = counts.sum(axis=0), counts.sum(axis=1)
    distance = _distance(values, n_c, metric)
    observed = (np.einsum("uc,ck,uk->u", counts, distance, counts) / (n_u - 1)).sum()
    expected = n_c @ distance @ n_c / (n_c.sum() - 1)
    return float(1 - observed / expected) if expected > 0 else 1.0


def _distance(values: Floats, marginals: Floats, metric: Metric) -> Floats:
    """Squared distances between categories, shape (C, C)."""
    gap = values[:, None] - values
    if metric == "nominal":
        gap = (gap != 0).astype(np.float64)
    if metric == "ratio":
        total = values[:, None] + values
        gap = np.divide(gap, total, out=np.zeros_like(gap), where=total != 0)
    elif metric == "ordinal":
        middle = np.cumsum(marginals) - marginals / 2
        gap = middle[:, None] - middle
    squared: Floats = gap**2
    return squared


def agreeing_pairs(counts: Floats) -> tuple[float, int]:
    """Share of all pairs of ratings of one unit that agree, and how many pairs there are; counts: shape (U, C)."""
    n = counts.sum(axis=1)
    n_pairs = float((n * (n - 1)).sum())
    return (float((counts * (counts - 1)).sum() / n_pairs) if n_pairs else 0.0), round(n_pairs / 2)
