"""The voice axis: how human-like a text is written, from formal (0) to human-like (1), learnt from pairs of the same content."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from unstilted.style import STYLE_RATES, style_rates

Floats = NDArray[np.float64]
REGULARISATION = 0.1
"""Inverse strength of the classifier's L2 penalty: strong, so that many weak signs count together and no single one decides."""


@dataclass(frozen=True)
class VoiceAxis:
    """A linear score of standardised style rates, scaled so that the mean formal text is 0 and the mean human-like text 1."""

    centre: Floats
    spread: Floats
    weights: Floats
    """Of shape (number of style rates,), in axis units."""
    offset: float

    def score(self, texts: Sequence[str]) -> Floats:
        """Positions of shape (N,). Under 0 or over 1 is more formal or more casual than the pairs it was fitted on."""
        rates = (_rates(texts) - self.centre) / self.spread
        # One freak rate in a short text must not carry its score away.
        return np.asarray(np.clip(rates, -4, 4) @ self.weights + self.offset)


def fit_voice_axis(human_like: Sequence[str], formal: Sequence[str]) -> VoiceAxis:
    """Fit a regularised logistic classifier on the two sides of pairs and scale its linear score to 0 and 1."""
    from sklearn.linear_model import LogisticRegression

    rates = _rates([*human_like, *formal])
    labels = np.array([1] * len(human_like) + [0] * len(formal))
    centre, spread = rates.mean(axis=0), rates.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    standardised = np.clip((rates - centre) / spread, -4, 4)
    model = LogisticRegression(C=REGULARISATION, max_iter=1000).fit(standardised, labels)
    raw = standardised @ model.coef_[0]
    high, low = float(raw[labels == 1].mean()), float(raw[labels == 0].mean())
    return VoiceAxis(centre, spread, model.coef_[0] / (high - low), -low / (high - low))


def _rates(texts: Sequence[str]) -> Floats:
    """Style rates of shape (N, number of rates)."""
    return np.array([list(style_rates(text).values()) for text in texts]).reshape(len(texts), len(STYLE_RATES))
