import numpy as np
import pytest

from unstilted.stats.blinding import bang_index, words_auc


def test_bangs_index_is_right_minus_wrong_by_all() -> None:
    """Bang, Ni & Davis 2004: (2 * right / sure - 1) * sure / all; here 38 right, 12 wrong, 30 unsure."""
    guesses = np.repeat([1.0, 0.0, 0.5], [38, 12, 30])
    alone = np.arange(80)
    result = bang_index(guesses, alone, alone, 0.95)
    assert result is not None
    assert result.index == pytest.approx((2 * 38 / 50 - 1) * 50 / 80)
    assert (result.n_right, result.n_wrong, result.n_unsure) == (38, 12, 30)
    p = np.array([38, 12]) / 80
    error = ((p * (1 - p)).sum() + 2 * p.prod()) ** 0.5 / 80**0.5  # the paper's variance, for independent guesses
    assert result.low == pytest.approx(result.index - 1.96 * error, abs=0.02)


def test_no_guesses_give_no_index_and_one_rater_no_interval() -> None:
    nobody = np.zeros(0, int)
    assert bang_index(np.zeros(0), nobody, nobody, 0.95) is None
    one = bang_index(np.array([1.0, 0.0, 1.0]), np.zeros(3, int), np.arange(3), 0.95)
    assert one is not None
    assert (one.low, one.reason[:16]) == (None, "too few: 1 rater")


def test_words_tell_arms_apart_by_style_and_not_by_topic() -> None:
    topics = [f"word{k} thing{k} place{k}" for k in range(40)]
    formal = [f"Certainly, I can assist with {topic}." for topic in topics]
    casual = [f"oh yeah {topic}!" for topic in topics]
    assert words_auc(formal, casual) == 1
    assert words_auc(topics, topics) == 0.5  # below it if an item's replies stood in different folds
