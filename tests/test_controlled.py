import numpy as np
import pytest
import statsmodels.api as sm
from scipy.special import expit

from unstilted.errors import UserError
from unstilted.stats.controlled import controlled_share, fit_logit


def study(
    seed: int, gain: float = 0.8, length: float = 0.7, n_raters: int = 30
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """600 votes: the arm gains `gain` log-odds by itself and `length` per unit of a length difference that favours it by 1."""
    generator = np.random.default_rng(seed)
    rater, item = np.repeat(np.arange(n_raters), 600 // n_raters), generator.integers(0, 60, 600)
    longer = 1 + generator.standard_normal(600)
    taste = 0.5 * generator.standard_normal(n_raters)[rater]
    chosen = (generator.random(600) < expit(gain + length * longer + taste)).astype(float)
    return chosen, {"words": longer}, rater, item


def test_the_controlled_share_is_that_without_the_help_of_length() -> None:
    chosen, differences, rater, item = study(0)
    result = controlled_share(chosen, differences, rater, item, 0.95)
    assert result.low < expit(0.8) < result.high < chosen.mean()
    assert result.effects[0].low > 0
    assert result.effects[0].p_value < 0.001


def test_coefficients_and_rater_clustered_errors_are_those_of_statsmodels() -> None:
    chosen, differences, rater, item = study(1)
    design = np.column_stack([np.ones(600), differences["words"]])
    slopes, covariance = fit_logit(design, chosen, rater, item)
    oracle = sm.Logit(chosen, design).fit(disp=0, cov_type="cluster", cov_kwds={"groups": rater}, tol=1e-12)
    assert slopes == pytest.approx(oracle.params, abs=1e-7)
    # statsmodels also scales by (N - 1) / (N - P)
    assert covariance.covariances[1] == pytest.approx(oracle.cov_params() * (600 - 2) / 599, rel=1e-5)


def test_turning_the_arms_around_mirrors_the_share() -> None:
    chosen, differences, rater, item = study(2)
    there = controlled_share(chosen, differences, rater, item, 0.95)
    back = controlled_share(1 - chosen, {"words": -differences["words"]}, rater, item, 0.95)
    assert (1 - back.high, 1 - back.share) == pytest.approx((there.low, there.share))
    assert back.effects[0].log_odds == pytest.approx(there.effects[0].log_odds)


def test_it_covers_the_share_at_no_difference() -> None:
    """The target is the mean rater's log-odds, shrunk because tastes differ: expit averaged over a normal with sd 0.5."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    target = float((weights * expit(0.8 + 0.5 * nodes)).sum() / weights.sum())
    results = [controlled_share(*study(seed), confidence=0.95) for seed in range(200)]
    assert np.mean([result.low <= target <= result.high for result in results]) >= 0.91


def test_a_difference_that_never_differs_is_left_out() -> None:
    chosen, differences, rater, item = study(3)
    result = controlled_share(chosen, {**differences, "emoji": np.zeros(600)}, rater, item, 0.95)
    assert [effect.name for effect in result.effects] == ["words"]


def test_what_cannot_be_fitted_is_refused() -> None:
    chosen, differences, rater, item = study(4)
    with pytest.raises(UserError, match="say the same thing twice"):
        controlled_share(chosen, {**differences, "tokens": 2 * differences["words"]}, rater, item, 0.95)
    with pytest.raises(UserError, match="tell every vote without error"):
        controlled_share((differences["words"] > 0.3).astype(float), differences, rater, item, 0.95)
    with pytest.raises(UserError, match="too few: 1 rater;"):
        controlled_share(chosen, differences, np.zeros(600, int), item, 0.95)
