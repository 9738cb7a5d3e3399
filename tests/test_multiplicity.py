import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from unstilted.stats.multiplicity import holm


def test_holms_own_steps() -> None:
    """0.01 * 4, 0.02 * 3, then never less than the step before, never more than 1."""
    assert holm(np.array([0.02, 0.9, 0.01, 0.03])) == pytest.approx([0.06, 0.9, 0.04, 0.06])


def test_it_equals_statsmodels() -> None:
    p_values = np.random.default_rng(0).random(30) ** 3
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert holm(np.zeros(0)).shape == (0,)
