import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from unstilted.records import Estimate
from unstilted.stats.intervals import bootstrap_mean, paired_share_difference, resample_counts, wilson

Floats = NDArray[np.float64]


def paired(n_gained: int, n_lost: int, n_both: int, n_neither: int) -> tuple[Floats, Floats]:
    """(after, before) of that many items of each kind."""
    after = [1.0] * n_gained + [0.0] * n_lost + [1.0] * n_both + [0.0] * n_neither
    before = [0.0] * n_gained + [1.0] * n_lost + [1.0] * n_both + [0.0] * n_neither
    return np.array(after), np.array(before)


def covers(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


@pytest.mark.parametrize(
    ("n_hits", "n_items", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_wilson_interval_is_that_of_newcombe_1998_table_1(n_hits: int, n_items: int, low: float, high: float) -> None:
    estimate = wilson(n_hits, n_items, 0.95)
    assert (round(estimate.low, 4), round(estimate.high, 4)) == (low, high)
    assert estimate.mean == n_hits / n_items


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.01, 0.999))
def test_the_wilson_interval_holds_its_share_and_mirrors(hits_of: tuple[int, int], confidence: float) -> None:
    n_hits, n_items = hits_of
    estimate, mirrored = wilson(n_hits, n_items, confidence), wilson(n_items - n_hits, n_items, confidence)
    assert 0 <= estimate.low <= estimate.mean + 1e-12
    assert estimate.mean - 1e-12 <= estimate.high <= 1
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((estimate.low, estimate.high))


def test_the_paired_interval_is_that_of_bonetts_own_package() -> None:
    """R's statpsych, `ci.prop.ps(.05, 12, 4, 26, 6)`: 0.44, standard error 0.09448809, 0.2548067 to 0.6251933."""
    estimate = paired_share_difference(*paired(n_gained=26, n_lost=4, n_both=6, n_neither=12), confidence=0.95)
    assert (estimate.low, estimate.high) == pytest.approx((0.2548067, 0.6251933), abs=1e-7)
    assert estimate.mean == pytest.approx(22 / 48)


def test_the_paired_interval_keeps_a_width_when_nothing_changed() -> None:
    estimate = paired_share_difference(*paired(0, 0, 0, 384), confidence=0.95)
    assert estimate.mean == 0
    assert estimate.high == -estimate.low == pytest.approx(1.959964 * (2 / 386 / 386) ** 0.5)


@given(st.tuples(*[st.integers(0, 60)] * 4).filter(lambda counts: sum(counts) > 0))
def test_swapping_before_and_after_flips_the_paired_interval(counts: tuple[int, int, int, int]) -> None:
    after, before = paired(*counts)
    estimate, flipped = paired_share_difference(after, before, 0.95), paired_share_difference(before, after, 0.95)
    assert (-flipped.mean, -flipped.high, -flipped.low) == pytest.approx((estimate.mean, estimate.low, estimate.high))
    assert -1 <= estimate.low < estimate.high <= 1


def test_the_paired_interval_covers_a_rare_change_where_a_bootstrap_does_not() -> None:
    """100 prompts, 3 % gained and 1 % lost: the bootstrap has no width whenever nothing happened to change."""
    generator = np.random.default_rng(0)
    counts = resample_counts(100, 200, 0)
    n_covered = {"paired": 0, "bootstrap": 0}
    for _ in range(400):
        gained, lost, both, _ = generator.multinomial(100, [0.03, 0.01, 0.1, 0.86])
        after, before = paired(gained, lost, both, 100 - gained - lost - both)
        n_covered["paired"] += covers(paired_share_difference(after, before, 0.95), 0.02)
        n_covered["bootstrap"] += covers(bootstrap_mean(after - before, counts, 0.95), 0.02)
    assert n_covered["paired"] / 400 > 0.93
    assert n_covered["bootstrap"] < n_covered["paired"] - 8


def test_the_bootstrap_covers_a_mean_about_as_often_as_it_says() -> None:
    """Percentile intervals of 50 exponential draws cover a little under 95 % (Efron & Tibshirani 1993, ch. 13: about 93 %)."""
    generator = np.random.default_rng(1)
    counts = resample_counts(50, 400, 1)
    hits = [covers(bootstrap_mean(generator.exponential(size=50), counts, 0.95), 1.0) for _ in range(500)]
    assert 0.90 <= np.mean(hits) <= 0.97


def test_the_bootstrap_interval_of_a_normal_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(2).normal(size=200)
    estimate = bootstrap_mean(values, resample_counts(200, 4000, 0), 0.9)
    half = 1.644854 * values.std() / 200**0.5
    assert (estimate.low, estimate.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.006)


def test_each_resample_draws_as_many_items_as_there_are_and_the_seed_decides_which() -> None:
    counts = resample_counts(30, 500, 7)
    assert counts.shape == (500, 30)
    assert (counts.sum(axis=1) == 30).all()
    assert counts.mean() == pytest.approx(1)
    assert (counts == resample_counts(30, 500, 7)).all()
    assert (counts != resample_counts(30, 500, 8)).any()


def test_one_item_gives_the_value_itself_and_full_width_where_shares_allow_it() -> None:
    estimate = bootstrap_mean(np.array([0.3]), resample_counts(1, 100, 0), 0.95)
    assert (estimate.mean, estimate.low, estimate.high) == (0.3, 0.3, 0.3)  # no width: `measure` asks for two at least
    assert wilson(1, 1, 0.95).low == pytest.approx(0.2065, abs=1e-4)
    assert paired_share_difference(np.array([1.0]), np.array([1.0]), 0.95).high > 0.9


def test_a_value_that_is_not_a_number_never_becomes_an_estimate() -> None:
    with pytest.raises(ValidationError):
        bootstrap_mean(np.array([0.3, np.nan]), resample_counts(2, 100, 0), 0.95)
