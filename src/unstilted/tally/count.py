"""From votes to the results of one question; every function takes votes of one kind of rater."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from unstilted.errors import UserError
from unstilted.stats.agreement import Ratings, agreeing_pairs, agreement, count_categories, krippendorff_alpha
from unstilted.stats.blinding import bang_index, words_auc
from unstilted.stats.bradley_terry import Battles, Strengths, clustered_covariance, fit_bradley_terry, rank_intervals
from unstilted.stats.clusters import FEWEST_CLUSTERS, Share, clustered_share
from unstilted.stats.controlled import controlled_share
from unstilted.stats.multiplicity import holm
from unstilted.stats.sequential import anytime_interval
from unstilted.stats.votes import BOTH_BAD, LEFT, TIE, Column, Votes, first_ballots
from unstilted.tally.records import (
    Agreement,
    AnytimeChoice,
    Breakdown,
    Choice,
    ControlledChoice,
    Guessing,
    Question,
    Ranked,
    Ranking,
    TallySettings,
)

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

SIDES = ("left_", "right_")
"""Columns about one reply; they can't group votes."""
MAX_LEVELS = 20
"""A text column with more values is a name or a remark, not a group."""
MAX_ARMS_IN_PAIRS = 6
"""With more arms, pairs are told only for an arm that was asked for: 15 pairs are a table, 1,711 are none."""
WEAK_PRIOR = 0.1
"""Precision of the prior that keeps strengths finite: a standard deviation of 3.2 logits."""


def question(votes: Votes, counted: Votes, all_votes: Votes, settings: TallySettings) -> Question:
    """The results of one criterion.

    votes: a rater's first on each unit, exclusions left out; counted: with the excluded; all_votes: repeats too, for the sides.
    """
    pairs = _pairs(votes, settings)
    columns = {"stratum": votes.stratum, **{name: column for name, column in votes.texts.items() if not name.startswith(SIDES)}}
    groups = {name: column for name, column in columns.items() if 2 <= len(column.present()) <= MAX_LEVELS}
    return Question(
        criterion=votes.criterion.present()[0],
        n_votes=len(votes),
        n_raters=len(votes.rater.present()),
        n_items=len(votes.item.present()),
        choices=_adjusted([choice(votes, arm, other, settings.confidence) for arm, other in pairs]),
        with_excluded=[choice(counted, arm, other, settings.confidence) for arm, other in pairs] if len(counted) > len(votes) else [],
        breakdowns=[_breakdown(votes, name, column, pairs, settings.confidence) for name, column in groups.items()],
        skipped_columns=sorted(name for name, column in columns.items() if len(column.present()) > MAX_LEVELS),
        left_share=_left_share(all_votes, settings.confidence),
        controlled=list(_controlled(votes, pairs, settings.confidence)),
        anytime=list(_anytime(votes, pairs, settings.confidence)),
        ranking=ranking(votes, settings.confidence) if len(votes.arms) > 2 else None,
        agreement=agreed(votes, settings),
    )


def _pairs(votes: Votes, settings: TallySettings) -> list[tuple[str, str]]:
    """The pairs of arms that met, the arm asked for first."""
    arms = sorted(votes.arms, key=lambda name: (name != settings.arm, name))
    met = {(votes.left.names[code // len(votes.left.names)], votes.left.names[code % len(votes.left.names)]) for code in set(votes.pair())}
    shown = combinations(arms, 2) if len(arms) <= MAX_ARMS_IN_PAIRS else ((settings.arm, other) for other in arms if settings.arm)
    return [(arm, other) for arm, other in shown if (arm, other) in met or (other, arm) in met]


def choice(votes: Votes, arm: str, other: str, confidence: float, group: str = "") -> Choice:
    """One arm against another in votes of one criterion."""
    votes = votes.between(arm, other)
    gains, is_decisive, is_usable = votes.gains(arm), votes.winner < TIE, votes.winner != BOTH_BAD
    on_left = votes.left.is_(arm)
    return Choice(
        arm=arm,
        other=other,
        group=group,
        n_chosen=int((gains == 1).sum()),
        n_other=int((gains == 0).sum()),
        n_tie=int((votes.winner == TIE).sum()),
        n_both_bad=int((votes.winner == BOTH_BAD).sum()),
        share=_share(votes, gains, is_decisive, confidence),
        share_ties_half=_share(votes, gains, is_usable, confidence),
        shown_left=_mean(gains[is_decisive & on_left]),
        shown_right=_mean(gains[is_decisive & ~on_left]),
    )


def _share(votes: Votes, values: Floats, chosen: Mask, confidence: float) -> Share | None:
    return clustered_share(values[chosen], votes.rater.codes[chosen], votes.item.codes[chosen], confidence)


def _mean(values: Floats) -> float | None:
    return float(values.mean()) if len(values) else None


def _adjusted(choices: Sequence[Choice]) -> list[Choice]:
    """With Holm's correction over these choices."""
    tested = [k for k, each in enumerate(choices) if each.share and each.share.p_value is not None]
    p_values = np.array([share.p_value for k in tested if (share := choices[k].share)], dtype=np.float64)
    by_place = dict(zip(tested, holm(p_values).tolist(), strict=True))
    return [each.model_copy(update={"p_adjusted": by_place.get(k)}) for k, each in enumerate(choices)]


def _breakdown(votes: Votes, name: str, column: Column, pairs: list[tuple[str, str]], confidence: float) -> Breakdown:
    groups = {level or "(empty)": votes.rows(column.is_(level)) for level in column.present()}
    choices = [choice(rows, arm, other, confidence, level) for arm, other in pairs for level, rows in groups.items()]
    return Breakdown(column=name, choices=_adjusted([each for each in choices if each.share or each.share_ties_half]))


def _left_share(votes: Votes, confidence: float) -> Share | None:
    return _share(votes, (votes.winner == LEFT).astype(np.float64), votes.winner < TIE, confidence)


def style_columns(votes: Votes) -> list[str]:
    """The names X for which there are numbers `left_X` and `right_X`."""
    return sorted(name.removeprefix("left_") for name in votes.numbers if name.startswith("left_") and "right_" + name[5:] in votes.numbers)


def _controlled(votes: Votes, pairs: list[tuple[str, str]], confidence: float) -> Iterator[ControlledChoice]:
    names = style_columns(votes)
    for arm, other in pairs if names else []:
        rows = votes.between(arm, other)
        rows = rows.rows(rows.winner < TIE)
        differences = {name: _difference(rows, name, arm) for name in names}
        complete = np.all([np.isfinite(values) for values in differences.values()], axis=0)
        rows = rows.rows(complete)
        kept = {name: values[complete] for name, values in differences.items()}
        side = np.where(rows.left.is_(arm), 0.5, -0.5)
        if side.min(initial=1) < side.max(initial=-1):
            kept["shown left"] = side
        try:
            result = controlled_share(rows.gains(arm), kept, rows.rater.codes, rows.item.codes, confidence)
            yield ControlledChoice(arm=arm, other=other, result=result)
        except UserError as error:
            yield ControlledChoice(arm=arm, other=other, result=None, reason=error.what)


def _difference(votes: Votes, name: str, arm: str) -> Floats:
    """The arm's number minus the other's, shape (N,); numbers that are never negative are taken relative to their sum."""
    left, right = votes.numbers[f"left_{name}"], votes.numbers[f"right_{name}"]
    gap = np.where(votes.left.is_(arm), left - right, right - left)
    if (left < 0).any() or (right < 0).any():
        return gap
    total = left + right
    return np.where(total > 0, gap / np.where(total > 0, total, 1), np.where(np.isfinite(total), 0.0, np.nan))


def _anytime(votes: Votes, pairs: list[tuple[str, str]], confidence: float) -> Iterator[AnytimeChoice]:
    """One bet a rater, in the order in which raters first appear."""
    for arm, other in pairs:
        rows = votes.between(arm, other)
        rows = rows.rows(rows.winner < TIE)
        raters, first, place = np.unique(rows.rater.codes, return_index=True, return_inverse=True)
        if len(raters) < FEWEST_CLUSTERS:
            continue
        means = np.bincount(place, rows.gains(arm), len(raters)) / np.maximum(np.bincount(place, minlength=len(raters)), 1)
        result = anytime_interval(means[np.argsort(first)], confidence)
        if result:
            yield AnytimeChoice(arm=arm, other=other, result=result)


def ranking(votes: Votes, confidence: float) -> Ranking:
    """Bradley-Terry with Davidson's ties and an order effect over all arms of these votes; `both bad` counts as a tie."""
    names = votes.arms
    place = np.array([names.index(name) if name in names else -1 for name in votes.left.names])
    battles = Battles(place[votes.left.codes], place[votes.right.codes], np.minimum(votes.winner, TIE), names)
    try:
        fit, note = _fit(battles)
    except UserError as error:
        return Ranking(arms=[], note=f"{error.what} {error.do}")
    is_testable = min(len(votes.rater.present()), len(votes.item.present())) >= FEWEST_CLUSTERS
    if not is_testable:
        note = f"{note} Too few raters or items for intervals.".strip()
    return Ranking(
        arms=_ranked(fit, battles, votes, confidence if is_testable else None),
        ties={"half": "half", "davidson": "Davidson 1970", "rao_kupper": "Rao and Kupper 1967"}[fit.ties],
        tie_parameter=fit.tie_parameter,
        left_log_odds=fit.order_effect,
        ridge=fit.ridge,
        note=note,
    )


def _fit(battles: Battles) -> tuple[Strengths, str]:
    """The fullest model that has a finite fit, and what had to be done for it; raises UserError where not even a prior helps."""
    counts, reason = battles.counts(), ""
    for ridge in (0.0, WEAK_PRIOR):
        for order in (True, False):
            try:
                fit = fit_bradley_terry(counts, battles.names, "davidson", order=order, ridge=ridge)
            except UserError as error:
                reason, failed = reason or error.what, error
                continue
            notes = [f"{reason[:1].upper()}{reason[1:]}", "" if order else "The order effect is left out."]
            notes.append("A weak prior (standard deviation 3 logits) keeps strengths finite." if ridge else "")
            return fit, " ".join(note for note in notes if note)
    raise failed


def _ranked(fit: Strengths, battles: Battles, votes: Votes, confidence: float | None) -> list[Ranked]:
    k = len(fit.names)
    order = np.argsort(-fit.strengths, kind="stable")
    blank: list[None] = [None] * k
    low: list[float] | list[None] = blank
    high, best, worst = low, low, low
    if confidence is not None:
        covariance = clustered_covariance(fit, battles, votes.rater.codes, votes.item.codes)
        contrasts = np.eye(k, len(fit.parameters))
        half = covariance.quantile(confidence) * covariance.errors(contrasts)
        low, high = (fit.strengths - half).tolist(), (fit.strengths + half).tolist()
        best, worst = (ranks.tolist() for ranks in rank_intervals(fit.strengths, covariance, confidence))
    return [
        Ranked(
            arm=fit.names[at],
            strength=float(fit.strengths[at]),
            low=low[at],
            high=high[at],
            best_rank=best[at],
            worst_rank=worst[at],
            share=float(fit.shares[at]),
        )
        for at in order
    ]


def agreed(votes: Votes, settings: TallySettings) -> Agreement | None:
    """Agreement about units; None where no unit has two raters."""
    verdict, names = oriented(votes, settings)
    n_categories = 4 if (votes.winner == BOTH_BAD).any() else 3 if (votes.winner == TIE).any() else 2
    unit = votes.unit()
    result = agreement(Ratings(unit, verdict, votes.rater.codes, n_categories), settings.confidence)
    if result is None:
        return None
    counts, _ = count_categories(unit, verdict, n_categories)
    pair_agreement, n_pairs = agreeing_pairs(counts)
    shares = np.bincount(verdict, minlength=n_categories) / len(votes)
    halfway = np.stack([counts[:, 0], counts[:, 2:].sum(axis=1), counts[:, 1]], axis=1)
    return Agreement(
        **result,
        alpha_ordinal=krippendorff_alpha(halfway, np.arange(3.0), "ordinal"),
        n_units=int((counts.sum(axis=1) >= 2).sum()),
        categories=dict(zip(names, shares.tolist(), strict=False)),
        pair_agreement=pair_agreement,
        n_pairs=n_pairs,
    )


def oriented(votes: Votes, settings: TallySettings) -> tuple[NDArray[np.int8], tuple[str, ...]]:
    """Verdicts, shape (N,), and what they mean.

    The arm asked for first, if all votes are on it; otherwise by side, if each unit was always shown the same way around; otherwise by
    name.
    """
    if (votes.left.is_(settings.arm) | votes.right.is_(settings.arm)).all():
        others = [name for name in votes.arms if name != settings.arm]
        verdict = np.where(votes.winner >= TIE, votes.winner, 1 - votes.gains(settings.arm)).astype(np.int8)
        return verdict, (settings.arm, others[0] if len(others) == 1 else "another arm", "tie", "both bad")
    _, first, unit = np.unique(votes.unit(), return_index=True, return_inverse=True)
    if (votes.left.codes[first][unit] == votes.left.codes).all():
        return votes.winner, ("left", "right", "tie", "both bad")
    names = np.array(votes.left.names)
    flipped = (names[votes.left.codes] > names[votes.right.codes]) & (votes.winner < TIE)
    return np.where(flipped, 1 - votes.winner, votes.winner).astype(np.int8), ("the first by name", "the second by name", "tie", "both bad")


def steadiness(votes: Votes, is_first: Mask, confidence: float) -> tuple[int, Share | None]:
    """How many votes repeat a rater's earlier one, and the share of them with the same verdict; is_first: from `first_ballots`."""
    earlier, later = votes.rows(is_first), votes.rows(~is_first)
    if not len(later):
        return 0, None
    order = np.argsort(earlier.ballot())
    match = order[np.searchsorted(earlier.ballot()[order], later.ballot())]
    same = (earlier.verdict()[match] == later.verdict()).astype(np.float64)
    is_new = (later.order == 0) | (later.order != earlier.order[match])
    return int(is_new.sum()), _share(later, same, is_new, confidence)


def consistent_judgements(votes: Votes) -> tuple[Votes, int]:
    """One vote for each unit that a judge decided the same way in every order of the sides, and how many units it did not."""
    ballots, place = np.unique(votes.ballot(), return_inverse=True)
    verdict = votes.verdict().astype(np.int64)
    lowest, highest = np.full(len(ballots), 9), np.full(len(ballots), -1)
    np.minimum.at(lowest, place, verdict)
    np.maximum.at(highest, place, verdict)
    steady = lowest == highest
    return votes.rows(first_ballots(votes) & steady[place]), int((~steady).sum())


def guessing(votes: Votes, arm: str, other: str, confidence: float) -> Guessing:
    """The blinding check from votes that are guesses of which side is `arm`."""
    rows = votes.between(arm, other)
    guesses = bang_index(rows.gains(arm), rows.rater.codes, rows.item.codes, confidence)
    return Guessing(arm=arm, other=other, guesses=guesses, words_auc=None)


def texts_auc(votes: Votes, arm: str, other: str) -> float | None:
    """`words_auc` from the columns `left_text` and `right_text`; None without them, without scikit-learn or below ten items."""
    rows = votes.between(arm, other)
    if not {"left_text", "right_text"} <= set(rows.texts) or find_spec("sklearn") is None:
        return None
    _, first = np.unique(rows.item.codes, return_index=True)
    rows = rows.rows(first)
    left, right = ([column.names[code] for code in column.codes] for column in (rows.texts["left_text"], rows.texts["right_text"]))
    on_left = rows.left.is_(arm)
    if len(first) < 10:
        return None
    ours = [pair[0] if is_left else pair[1] for *pair, is_left in zip(left, right, on_left, strict=True)]
    theirs = [pair[1] if is_left else pair[0] for *pair, is_left in zip(left, right, on_left, strict=True)]
    return words_auc(ours, theirs)
