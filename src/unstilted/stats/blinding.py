"""Could raters tell the arms apart by something other than quality? Bang's index from guesses, and a classifier on the words."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unstilted.records import Record
from unstilted.stats.clusters import clustered_share

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]


class Blinding(Record):
    """Bang's index: -1 all guesses wrong, 0 as by chance, 1 all right; `don't know` counts as chance."""

    index: float
    low: float | None
    high: float | None
    n_guesses: int
    n_right: int
    n_wrong: int
    n_unsure: int
    reason: str = ""


def bang_index(guesses: Floats, rater: Ints, item: Ints, confidence: float) -> Blinding | None:
    """Bang's blinding index with a two-way cluster interval; None without guesses.

    guesses: 1 right, 0 wrong, 0.5 don't know; shape (N,). The index is (right - wrong) / all. Bang, Ni & Davis 2004.
    """
    share = clustered_share(guesses, rater, item, confidence)
    if share is None:
        return None
    return Blinding(
        index=2 * share.share - 1,
        low=None if share.low is None else 2 * share.low - 1,
        high=None if share.high is None else 2 * share.high - 1,
        n_guesses=len(guesses),
        n_right=int((guesses == 1).sum()),
        n_wrong=int((guesses == 0).sum()),
        n_unsure=int((guesses == 0.5).sum()),
        reason=share.reason,
    )


def words_auc(first: Sequence[str], second: Sequence[str], n_folds: int = 5, seed: int = 0) -> float:
    """How well a bag of words tells two arms' replies apart: area under the ROC curve, 0.5 as by chance, 1 without error.

    first, second: the arms' replies to the same I >= 2 items, in the same order. Cross-validated with both replies of an item in
    the same fold, so that an item's topic tells nothing.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline

    texts = np.array([*first, *second], dtype=object)
    arm = np.repeat([0, 1], len(first))
    item = np.tile(np.arange(len(first)), 2)
    scores = np.zeros(len(texts))
    folds = GroupKFold(min(n_folds, len(first)), shuffle=True, random_state=seed)
    for train, test in folds.split(texts, arm, item):
        model = make_pipeline(
            TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10)
        )
        model.fit(texts[train], arm[train])
        scores[test] = model.decision_function(texts[test])
    return float(roc_auc_score(arm, scores))
