"""An automatic judge beside the people who voted on the same: how often it says what most of them say, and how sure that is."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, stdtrit

from unstilted.stats.agreement import agreeing_pairs, count_categories
from unstilted.stats.clusters import FEWEST_CLUSTERS, too_few
from unstilted.stats.votes import TIE, Votes, first_ballots
from unstilted.tally.count import consistent_judgements
from unstilted.tally.records import Calibration, TallySettings
from unstilted.tally.words import count, percent, span


def calibrations(votes: Votes, settings: TallySettings) -> list[Calibration]:
    """Each judge against the majority of people, by criterion, over all people and by their strata."""
    votes = votes.rows(votes.excluded.is_("") & ~votes.criterion.is_(settings.blinding_criterion))
    people, judges = votes.rows(votes.kind.is_("human")), votes.rows(votes.kind.is_("judge"))
    if not len(people) or not len(judges):
        return []
    people = people.rows(first_ballots(people))
    judges, _ = consistent_judgements(judges)
    return [
        found
        for criterion in people.criterion.present()
        for judge in judges.rater.present()
        for found in _by_stratum(
            judges.rows(judges.criterion.is_(criterion) & judges.rater.is_(judge)),
            people.rows(people.criterion.is_(criterion)),
            settings.confidence,
        )
    ]


def _by_stratum(judge: Votes, people: Votes, confidence: float) -> Iterator[Calibration]:
    strata = people.stratum.present()
    for stratum in ["", *(strata if len(strata) > 1 else ())]:
        found = calibrate(judge, people.rows(people.stratum.is_(stratum)) if stratum else people, confidence)
        if found:
            about = {"judge": judge.rater.present()[0], "criterion": people.criterion.present()[0], "stratum": stratum}
            yield found.model_copy(update=about)


def calibrate(judge: Votes, people: Votes, confidence: float) -> Calibration | None:
    """One judge against people on one criterion; None where they never named winners on the same unit.

    People's verdict on a unit is what more of them said than anything else; ties in that, and ties as that, are left out.
    """
    judge = judge.rows(judge.winner < TIE)
    if not len(judge) or not len(people):
        return None
    units, place = np.unique(people.unit(), return_inverse=True)
    counts = np.bincount(place * 4 + people.verdict(), minlength=4 * len(units)).reshape(-1, 4)
    top, runner_up = -np.partition(-counts, 1, axis=1)[:, :2].T
    verdict = np.where(top > runner_up, counts.argmax(axis=1), TIE)
    at = np.minimum(np.searchsorted(units, judge.unit()), len(units) - 1)
    is_shared = (units[at] == judge.unit()) & (verdict[at] < TIE)
    if not is_shared.any():
        return None
    same = (verdict[at] == judge.verdict())[is_shared]
    agrees, n_raters = float(same.mean()), len(people.rater.present())
    low, high, reason = _interval(same, judge.item.codes[is_shared], n_raters, confidence)
    people = people.rows(people.winner < TIE)
    by_unit, _ = count_categories(people.unit(), people.verdict(), 2)
    people_agree, n_pairs = agreeing_pairs(by_unit)
    sure = f"no interval: {reason}" if low is None or high is None else f"{100 * confidence:g} % interval {span(low, high)}"
    told = f"Where it and most people named a winner, it named the same in {percent(agrees)} of {count(len(same), 'unit')} ({sure});"
    told += f" two people agree in {percent(people_agree)}, a coin would in half. No human took part in its votes."
    if low is not None and low <= 0.5:
        told += " These votes cannot tell that it is better than a coin: don't let it stand for people."
    return Calibration(
        judge="", criterion="", n_units=len(same), agrees=agrees, low=low, high=high, people_agree=people_agree, n_pairs=n_pairs, words=told
    )


def _interval(same: NDArray[np.bool_], item: NDArray[np.int32], n_raters: int, confidence: float) -> tuple[float | None, float | None, str]:
    """On the logit scale, for other items: the delete-one-item jackknife with Student's quantile at min(raters, items) - 1.

    That other people would make another majority is not in the variance, yet in simulations with 5 to 40 raters it covers 95.5 to 98 %
    also over people; adding a jackknife over them covers 99.5 % and more.
    """
    names, item_of = np.unique(item, return_inverse=True)
    agrees, n_items = float(same.mean()), len(names)
    fewest, tail = min(n_raters, n_items), (1 - confidence) / 2
    if fewest < FEWEST_CLUSTERS:
        return None, None, too_few(n_raters, n_items)
    if agrees in (0.0, 1.0):
        bound = float(tail ** (1 / fewest))
        return (bound, 1.0, "") if agrees else (0.0, 1 - bound, "")
    moves = np.bincount(item_of, same - agrees) / (len(same) - np.bincount(item_of))
    error = ((n_items - 1) / n_items * float((moves**2).sum())) ** 0.5 / (agrees * (1 - agrees))
    half = -float(stdtrit(fewest - 1, tail)) * error
    return float(expit(logit(agrees) - half)), float(expit(logit(agrees) + half)), ""
