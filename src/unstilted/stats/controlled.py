"""The share of votes an arm would get if both replies were alike in length or style: logistic regression on differences."""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.special import expit, logit

from unstilted.errors import UserError
from unstilted.records import Record
from unstilted.stats.clusters import FEWEST_CLUSTERS, Sandwich, sandwich, too_few

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]

MAX_STEPS = 100
MAX_LOGIT = 20.0


class Effect(Record):
    """What one standard deviation more of a difference does to the log-odds of being chosen."""

    name: str
    log_odds: float
    low: float
    high: float
    p_value: float


class Controlled(Record):
    """An arm's share at no difference between the replies and on neither side."""

    share: float
    low: float
    high: float
    n_votes: int
    effects: list[Effect]


def controlled_share(chosen: Floats, differences: dict[str, Floats], rater: Ints, item: Ints, confidence: float) -> Controlled:
    """The intercept of a logistic regression as a share, with two-way clustered intervals for it and for every slope.

    chosen: 1 where the arm was chosen, 0 where the other, shape (N,). differences: by name, shape (N,), 0 where both replies are
    alike; each is divided by its standard deviation around 0, so that 0 stays 0. A difference that is always 0 is left out.
    Raises UserError for too few raters or items, for differences that say the same, and for votes that they separate.
    """
    n_raters, n_items = len(np.unique(rater)), len(np.unique(item))
    if min(n_raters, n_items) < FEWEST_CLUSTERS:
        raise UserError(f"{too_few(n_raters, n_items)}.", where="controlled rate", do="Collect more votes.")
    scales = {name: float(np.sqrt((values**2).mean())) for name, values in differences.items()}
    names = [name for name, scale in scales.items() if scale > 0]
    design = np.column_stack([np.ones(len(chosen))] + [differences[name] / scales[name] for name in names])
    slopes, covariance = fit_logit(design, chosen, rater, item)
    unit = np.eye(len(slopes))
    half = covariance.quantile(confidence) * covariance.errors(unit)
    rows = np.stack([slopes, slopes - half, slopes + half, covariance.p_values(slopes, unit)], axis=1).tolist()
    effects = [
        Effect(name=name, log_odds=slope, low=low, high=high, p_value=p_value)
        for name, (slope, low, high, p_value) in zip(names, rows[1:], strict=True)
    ]
    low, high = float(expit(slopes[0] - half[0])), float(expit(slopes[0] + half[0]))
    return Controlled(share=float(expit(slopes[0])), low=low, high=high, n_votes=len(chosen), effects=effects)


def fit_logit(design: Floats, chosen: Floats, rater: Ints, item: Ints) -> tuple[Floats, Sandwich]:
    """Maximum-likelihood coefficients of a logistic regression, shape (P,), and their two-way clustered covariance.

    design: shape (N, P). Raises UserError where columns depend on each other or the votes are separated.
    """
    if np.linalg.matrix_rank(design.T @ design) < design.shape[1]:
        raise UserError("the differences say the same thing twice.", where="controlled rate", do="Leave one of them out.")
    start = np.clip(chosen.mean(), 1e-6, 1 - 1e-6)
    slopes = np.zeros(design.shape[1])
    slopes[0] = logit(start)
    for _ in range(MAX_STEPS):
        p = expit(design @ slopes)
        information = (design * (p * (1 - p))[:, None]).T @ design
        step = np.linalg.solve(information + 1e-12 * len(p) * np.eye(len(slopes)), design.T @ (chosen - p))
        slopes = slopes + step * min(1.0, 3 / np.abs(step).max())
        if np.abs(slopes).max() > MAX_LOGIT or np.abs(step).max() < 1e-10:
            break
    if np.abs(slopes).max() > MAX_LOGIT or np.abs(step).max() > 1e-6:
        raise UserError("the differences tell every vote without error.", where="controlled rate", do="Collect more votes.")
    p = expit(design @ slopes)
    information = (design * (p * (1 - p))[:, None]).T @ design
    scores = csr_array(design * (chosen - p)[:, None])
    return slopes, sandwich(scores, np.linalg.inv(information).astype(np.float64), rater, item)
