import numpy as np
import pytest

from unstilted.stats.sequential import _bets, anytime_interval


def rater_shares(generator: np.random.Generator, mean: float, n_raters: int = 150, n_votes: int = 10) -> np.ndarray:
    """Shares of raters whose own rates differ by a beta distribution with this mean (standard deviation about 0.29 at one half)."""
    rates = generator.beta(2 * mean, 2 * (1 - mean), n_raters)
    return generator.binomial(n_votes, rates) / n_votes


def test_the_first_bet_is_the_one_worked_out_by_hand() -> None:
    """sqrt(2 ln 40 / (0.25 * 1 * ln 2)) is over the cap, so against one half each side bets 1 = 0.5 / 0.5: capital 1.5 and 0.5."""
    after = anytime_interval(np.array([1.0]), 0.95)
    assert after is not None
    assert after.e_value == pytest.approx((1.5 + 0.5) / 2)
    assert (after.low, after.high) == (0, 1)
    twice = anytime_interval(np.array([1.0, 1.0]), 0.95)
    assert twice is not None
    assert twice.e_value == pytest.approx((1.5**2 + 0.5**2) / 2)


def test_a_bet_knows_only_the_raters_before_it() -> None:
    values = rater_shares(np.random.default_rng(3), 0.6)
    changed = np.concatenate([values[:50], np.zeros(100)])
    assert _bets(changed, 0.05)[:51] == pytest.approx(_bets(values, 0.05)[:51])
    assert _bets(changed, 0.05)[51] != pytest.approx(_bets(values, 0.05)[51])


def test_what_was_once_ruled_out_stays_so() -> None:
    values = np.concatenate([np.full(25, 0.9), np.full(25, 0.4)])
    early, late = anytime_interval(values[:25], 0.95), anytime_interval(values, 0.95)
    assert early is not None
    assert late is not None
    assert 0.5 < early.low <= late.low
    assert late.decided_after == early.decided_after


def test_looking_after_every_rater_is_wrong_in_at_most_five_percent() -> None:
    """At one half with large rater effects, over 150 looks; a test of votes at each look would be wrong most of the time."""
    generator = np.random.default_rng(0)
    runs = [anytime_interval(rater_shares(generator, 0.5), 0.95) for _ in range(400)]
    assert np.mean([run is not None and run.decided_after is not None for run in runs]) <= 0.05
    away = [anytime_interval(rater_shares(generator, 0.9), 0.95) for _ in range(400)]
    assert np.mean([run is not None and not run.low <= 0.9 <= run.high for run in away]) <= 0.05


def test_a_clear_preference_is_found_with_a_few_raters() -> None:
    generator = np.random.default_rng(1)
    runs = [anytime_interval(rater_shares(generator, 0.85), 0.95) for _ in range(100)]
    assert np.median([(run.decided_after if run else None) or 999 for run in runs]) <= 25


def test_the_interval_narrows_and_mirrors() -> None:
    values = rater_shares(np.random.default_rng(2), 0.7)
    few, many, mirrored = (anytime_interval(each, 0.95) for each in (values[:20], values, 1 - values))
    assert few is not None
    assert many is not None
    assert mirrored is not None
    assert few.low <= many.low < many.mean < many.high <= few.high
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((many.low, many.high))


def test_no_raters_give_nothing() -> None:
    assert anytime_interval(np.zeros(0), 0.95) is None
