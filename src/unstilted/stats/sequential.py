"""Looking at a running vote as often as one likes: a betting e-process and an interval over raters that hold at every look."""

import numpy as np
from numpy.typing import NDArray

from unstilted.records import Record

Floats = NDArray[np.float64]

GRID = 2001
CAUTION = 0.5
"""The largest share of its capital that a bet may lose."""


class Anytime(Record):
    """The mean over raters with an interval that holds at every look, however often one looks and whenever one stops."""

    mean: float
    low: float
    high: float
    e_value: float
    """Evidence against one half after all raters; 20 is the bar for 5 %."""
    n_raters: int
    decided_after: int | None
    """After how many raters one half was left out of the interval for good."""


def anytime_interval(values: Floats, confidence: float) -> Anytime | None:
    """Hedged betting confidence sequence for the mean of R rater shares in [0, 1], in the order they came; None without raters.

    Valid when each rater's expected share, given the raters before, is the mean asked for: raters drawn alike who vote on items
    drawn alike. A bet is made once a rater, so no number of votes by one rater makes them more than one witness.
    Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting", theorem 3.
    """
    if not len(values):
        return None
    alpha = 1 - confidence
    means = np.linspace(0, 1, GRID)
    up, down = np.zeros(GRID), np.zeros(GRID)
    alive = np.ones(GRID, dtype=np.bool_)
    decided_after = None
    for t, (value, bet) in enumerate(zip(values, _bets(values, alpha), strict=True), start=1):
        with np.errstate(divide="ignore"):
            up += np.log1p(np.minimum(bet, CAUTION / means) * (value - means))
            down += np.log1p(-np.minimum(bet, CAUTION / (1 - means)) * (value - means))
        alive &= np.maximum(up, down) - np.log(2) < np.log(1 / alpha)
        if decided_after is None and not alive[GRID // 2]:
            decided_after = t
    inside = np.flatnonzero(alive)
    mean = float(values.mean())
    low, high = (means[max(inside[0] - 1, 0)], means[min(inside[-1] + 1, GRID - 1)]) if inside.size else (mean, mean)
    e_value = float(np.exp(np.minimum(np.logaddexp(up[GRID // 2], down[GRID // 2]) - np.log(2), 700.0)))
    return Anytime(mean=mean, low=float(low), high=float(high), e_value=e_value, n_raters=len(values), decided_after=decided_after)


def _bets(values: Floats, alpha: float) -> Floats:
    """Each bet's size from the values before it, shape (R,): Waudby-Smith & Ramdas 2024."""
    t = np.arange(1, len(values) + 1)
    running = (0.5 + np.cumsum(values)) / (t + 1)
    variance = (0.25 + np.cumsum((values - running) ** 2)) / (t + 1)
    before = np.concatenate([[0.25], variance[:-1]])
    bets: Floats = np.sqrt(2 * np.log(2 / alpha) / (before * t * np.log(1 + t)))
    return bets
