import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.special import expit
from scipy.stats import t as student

from unstilted.stats.clusters import Floats, Ints, Share, clustered_share, sandwich
from unstilted.stats.intervals import wilson


def crossed(n_raters: int, n_items: int) -> tuple[Ints, Ints]:
    """Every rater votes on every item once."""
    return np.repeat(np.arange(n_raters), n_items), np.tile(np.arange(n_items), n_raters)


def share_of(values: list[float] | Floats, rater: Ints, item: Ints) -> Share:
    share = clustered_share(np.asarray(values, dtype=np.float64), rater, item, 0.95)
    assert share is not None
    return share


def test_a_small_interval_is_the_one_worked_out_by_hand() -> None:
    """3 raters x 3 items; rows 1 1 1 / 1 1 0 / 1 0 0: share 6/9, and both ways' sums of residuals are 1, 0, -1.

    Leaving out a cluster moves the mean by its sum over 6: each way 2/3 * (1/36 + 1/36) = 1/27; cells 8/9 * (6/9 + 12/9) / 64 = 1/36.
    """
    share = share_of([1, 1, 1, 1, 1, 0, 1, 0, 0], *crossed(3, 3))
    error = (2 / 27 - 1 / 36) ** 0.5 / (2 / 3 * 1 / 3)
    half = student.ppf(0.975, 2) * error
    assert (share.low, share.high) == pytest.approx((expit(np.log(2) - half), expit(np.log(2) + half)))
    assert share.p_value == pytest.approx(2 * student.cdf(-np.log(2) / error, 2))
    assert (share.share, share.n_votes, share.n_raters, share.n_items) == (pytest.approx(2 / 3), 9, 3, 3)


def test_with_one_vote_a_rater_and_an_item_it_is_close_to_the_usual_interval() -> None:
    values = np.random.default_rng(0).random(400) < 0.7
    alone = np.arange(400)
    share = share_of(values.astype(np.float64), alone, alone)
    usual = wilson(int(values.sum()), 400, 0.95)
    assert (share.low, share.high) == pytest.approx((usual.low, usual.high), abs=0.003)


def test_twenty_copies_of_a_vote_by_the_same_rater_add_nothing() -> None:
    votes = (np.random.default_rng(1).random(50) < 0.6).astype(np.float64)
    once = share_of(votes, np.arange(50), np.arange(50))
    copied = share_of(np.repeat(votes, 20), np.repeat(np.arange(50), 20), np.arange(1000))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=1e-12)


@pytest.mark.parametrize(("value", "low", "high"), [(1.0, 0.025 ** (1 / 8), 1.0), (0.0, 0.0, 1 - 0.025 ** (1 / 8))])
def test_a_unanimous_vote_is_as_sure_as_its_raters_are_many(value: float, low: float, high: float) -> None:
    share = share_of([value] * 8 * 30, *crossed(8, 30))
    assert (share.low, share.high) == pytest.approx((low, high))
    assert share.p_value == pytest.approx(2 / 2**8)


@pytest.mark.parametrize(
    ("n_raters", "n_items", "reason"),
    [
        (1, 50, "too few: 1 rater; an interval needs 3 of each at least"),
        (50, 1, "too few: 1 item; an interval needs 3 of each at least"),
        (2, 2, "too few: 2 raters and 2 items; an interval needs 3 of each at least"),
    ],
)
def test_too_few_raters_or_items_give_no_interval(n_raters: int, n_items: int, reason: str) -> None:
    rater, item = crossed(n_raters, n_items)
    share = share_of(np.arange(len(rater)) % 3 == 0, rater, item)
    assert (share.low, share.high, share.p_value, share.reason) == (None, None, None, reason)


def test_clusters_that_balance_exactly_leave_the_variance_of_independent_votes() -> None:
    share = share_of([1, 0, 0, 1] * 4, np.repeat(np.arange(4), 4), (np.arange(16) + np.repeat(np.arange(4), 4)) % 4)
    assert share.low is not None
    assert share.low < 0.3


def test_votes_without_any_difference_give_no_interval_and_no_votes_nothing() -> None:
    assert share_of([0.5] * 16, *crossed(4, 4)).reason == "all votes are the same"
    assert clustered_share(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64), 0.95) is None


voting = st.integers(0, 10_000).map(np.random.default_rng)


@settings(deadline=None)
@given(voting)
def test_the_interval_mirrors_and_ignores_names_and_the_order_of_votes(generator: np.random.Generator) -> None:
    rater, item = generator.integers(0, 9, 120), generator.integers(0, 7, 120)
    values = generator.integers(0, 3, 120) / 2
    share, mirrored = share_of(values, rater, item), share_of(1 - values, rater, item)
    assert share.low is not None
    assert mirrored.low is not None
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((share.low, share.high))
    order = generator.permutation(120)
    renamed = share_of(values[order], generator.permutation(1000)[rater][order], -3 - item[order])
    assert (renamed.low, renamed.high, renamed.p_value) == pytest.approx((share.low, share.high, share.p_value))
    assert share_of(values, item, rater).low == pytest.approx(share.low)
    assert 0 <= share.low <= share.share <= (share.high or 0) <= 1


def simulated_vote(generator: np.random.Generator, n_raters: int, n_items: int, n_each: int, spread: tuple[float, float]) -> Share:
    """Share under a mean logit of 1.2 and normal rater and item effects; every rater votes on `n_each` random items."""
    rater = np.repeat(np.arange(n_raters), n_each)
    item = np.concatenate([generator.permutation(n_items)[:n_each] for _ in range(n_raters)])
    effects = spread[0] * generator.standard_normal(n_raters)[rater] + spread[1] * generator.standard_normal(n_items)[item]
    return share_of(generator.random(len(rater)) < expit(1.2 + effects), rater, item)


def truth_of(spread: tuple[float, float]) -> float:
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return float((weights * expit(1.2 + np.hypot(*spread) * nodes)).sum() / weights.sum())


@pytest.mark.parametrize(
    ("n_raters", "n_items", "n_each", "spread", "wilson_covers"),
    [(40, 50, 20, (0.8, 0.6), (0.66, 0.78)), (12, 60, 30, (0.8, 0.5), (0.58, 0.74)), (40, 50, 20, (0.0, 0.0), (0.92, 0.98))],
)
def test_the_interval_covers_the_truth_as_often_as_it_says_and_wilsons_does_not(
    n_raters: int, n_items: int, n_each: int, spread: tuple[float, float], wilson_covers: tuple[float, float]
) -> None:
    generator, truth, n_runs = np.random.default_rng(3), truth_of(spread), 1000
    ours = wilsons = 0
    for _ in range(n_runs):
        share = simulated_vote(generator, n_raters, n_items, n_each, spread)
        ours += (share.low or 0) <= truth <= (share.high or 1)
        naive = wilson(round(share.share * share.n_votes), share.n_votes, 0.95)
        wilsons += naive.low <= truth <= naive.high
    assert 0.93 <= ours / n_runs <= 0.975
    assert wilson_covers[0] <= wilsons / n_runs <= wilson_covers[1]


def test_the_sandwich_of_a_mean_is_the_two_way_variance() -> None:
    generator = np.random.default_rng(4)
    rater, item = generator.integers(0, 9, 300), generator.integers(0, 11, 300)
    residuals = generator.standard_normal(300)
    residuals -= residuals.mean()
    covariances = sandwich(csr_array(residuals[:, None]), np.array([[1 / 300]]), rater, item).covariances[:, 0, 0]
    by_rater, by_item, by_cell = (
        (np.bincount(code, residuals) ** 2).sum() / 300**2 * n / (n - 1)
        for code, n in ((rater, 9), (item, 11), (rater * 11 + item, len(np.unique(rater * 11 + item))))
        for code in [np.unique(code, return_inverse=True)[1]]
    )
    assert covariances == pytest.approx([by_rater + by_item - by_cell, by_rater, by_item])
