import numpy as np
import pytest
from scipy.special import expit

from unstilted.stats.effects import Effects, estimate_effects, likeness, mean_logit


def test_the_mean_logit_gives_the_share_over_all_raters_and_items() -> None:
    draws = mean_logit(0.7, 1.5) + 1.5 * np.random.default_rng(0).standard_normal(400_000)
    assert expit(draws).mean() == pytest.approx(0.7, abs=0.003)
    assert mean_logit(0.7, 0.0) == pytest.approx(np.log(7 / 3))


def test_two_votes_by_one_rater_are_as_alike_as_simulated_ones() -> None:
    generator = np.random.default_rng(1)
    taste, first, second = generator.standard_normal((3, 400_000))
    mean = mean_logit(0.6, float(np.hypot(1.1, 0.7)))
    one, other = (expit(mean + 1.1 * taste + 0.7 * item) for item in (first, second))
    assert likeness(0.6, 1.1, 0.7) == pytest.approx((one * other).mean() - one.mean() * other.mean(), abs=1e-3)
    assert likeness(0.6, 0.0, 0.7) == pytest.approx(0, abs=1e-12)


def study(truth: Effects, seed: int) -> Effects:
    generator = np.random.default_rng(seed)
    rater, item = np.repeat(np.arange(80), 40), np.tile(np.arange(40), 80)
    mean = mean_logit(truth.share, float(np.hypot(truth.rater_sd, truth.item_sd)))
    effects = truth.rater_sd * generator.standard_normal(80)[rater] + truth.item_sd * generator.standard_normal(40)[item]
    return estimate_effects((generator.random(3200) < expit(mean + effects)).astype(float), rater, item)


@pytest.mark.parametrize("truth", [Effects(0.7, 0.8, 0.6), Effects(0.55, 0.3, 1.2), Effects(0.85, 1.5, 0.0)])
def test_simulated_effects_are_found_again(truth: Effects) -> None:
    found = [study(truth, seed) for seed in range(30)]
    assert np.mean([each.share for each in found]) == pytest.approx(truth.share, abs=0.03)
    assert np.mean([each.rater_sd for each in found]) == pytest.approx(truth.rater_sd, abs=0.1)
    assert np.mean([each.item_sd for each in found]) == pytest.approx(truth.item_sd, abs=0.1)


def test_votes_that_all_say_the_same_or_differ_evenly_show_no_effects() -> None:
    rater, item = np.repeat(np.arange(4), 4), np.tile(np.arange(4), 4)
    assert estimate_effects(np.ones(16), rater, item) == Effects(1.0, 0.0, 0.0)
    checkered = ((rater + item) % 2).astype(float)
    assert estimate_effects(checkered, rater, item) == Effects(0.5, 0.0, 0.0)
