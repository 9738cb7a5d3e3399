"""`tally`: what the votes say, how sure that is, and how far the raters agree. Reads votes, writes `tally.json`.

Only people make the headline. Judges and simulated raters are counted apart and are always labelled.
"""

from pathlib import Path

import numpy as np

from unstilted.errors import UserError
from unstilted.files import write_text
from unstilted.stats.agreement import agreeing_pairs, count_categories
from unstilted.stats.votes import KINDS, REPEATED, TAKEN_BACK, TIE, WITHDRAWN, Kind, Votes, first_ballots, read_votes, votes_from_rows
from unstilted.tally import words
from unstilted.tally.count import (
    MAX_ARMS_IN_PAIRS,
    consistent_judgements,
    guessing,
    question,
    steadiness,
    texts_auc,
)
from unstilted.tally.records import Calibration, Exclusion, Guessing, Panel, Question, Tally, TallySettings

__all__ = ["Tally", "TallySettings", "tally", "tally_file", "tally_run"]


def tally_file(votes: Path, json: Path | None = None, settings: TallySettings | None = None) -> Tally:
    """Tally the votes of a CSV or JSONL file and write the result as JSON.

    Raises UserError as `read_votes` does, and for an arm that nobody voted on.
    """
    return _written(tally(read_votes(votes), settings, str(votes)), json)


def tally_run(run: Path, json: Path | None = None, settings: TallySettings | None = None) -> Tally:
    """Tally the votes of a run folder into its `tally.json`, or into another file."""
    from unstilted.vote.export import run_votes

    return _written(tally(votes_from_rows(run_votes(run), str(run)), settings, str(run)), json or run / "tally.json")


def _written(result: Tally, json: Path | None) -> Tally:
    if json:
        write_text(json, result.model_dump_json(indent=2) + "\n")
    return result


def tally(votes: Votes, settings: TallySettings | None = None, source: str = "votes") -> Tally:
    """Everything the votes say; raises UserError for an arm that nobody voted on."""
    settings = _with_arm(settings or TallySettings(), votes.arms)
    panels = [_panel(votes.rows(votes.kind.is_(kind)), kind, settings) for kind in KINDS if votes.kind.is_(kind).any()]
    people = [panel for panel in panels if panel.kind == "human"]
    headline = words.headline(people[0].questions, settings) if people else "No human took part: these votes prove nothing about people."
    return Tally(headline=headline, source=source, settings=settings, panels=panels, calibration=_calibrations(votes, settings))


def _with_arm(settings: TallySettings, arms: tuple[str, ...]) -> TallySettings:
    if settings.arm and settings.arm not in arms:
        few = ", ".join(arms[:MAX_ARMS_IN_PAIRS])
        raise UserError(
            f"nobody voted on '{settings.arm}'.", where="--arm", do=f"The arms are {few}{', ...' if few != ', '.join(arms) else ''}."
        )
    default = "tuned" if "tuned" in arms else arms[0] if len(arms) <= MAX_ARMS_IN_PAIRS else ""
    return settings.model_copy(update={"arm": settings.arm or default})


def _panel(votes: Votes, kind: Kind, settings: TallySettings) -> Panel:
    n_votes, n_raters, exclusions = len(votes), len(votes.rater.present()), _exclusions(votes)
    votes = votes.rows(~(votes.excluded.is_(TAKEN_BACK) | votes.excluded.is_(WITHDRAWN)))
    counts_in = votes.excluded.is_("")
    repeated = votes.excluded.is_(REPEATED)
    if repeated.any():  # a repeat of a vote that counts; alone it is none
        counts_in |= repeated & np.isin(votes.ballot(), votes.ballot()[counts_in])
    is_guess = votes.criterion.is_(settings.blinding_criterion)
    preferences = votes.rows(~is_guess)
    kept = preferences.rows(counts_in[~is_guess])
    n_repeats, steady, n_inconsistent = 0, None, 0
    if kind == "judge":
        counted, _ = consistent_judgements(preferences)
        once, n_inconsistent = consistent_judgements(kept)
    else:
        is_first = first_ballots(kept)
        once = kept.rows(is_first)
        counted = once if kept is preferences else preferences.rows(first_ballots(preferences))
        n_repeats, steady = steadiness(kept, is_first, settings.confidence)
    guesses = votes.rows(is_guess & counts_in)
    blinding = _blinding(kept, guesses.rows(first_ballots(guesses)), settings)
    panel_words = {"steadiness": words.steadiness_words(n_repeats, steady)} if kind != "judge" else {}
    return Panel(
        kind=kind,
        label=words.LABELS[kind],
        n_votes=n_votes,
        n_raters=n_raters,
        questions=[_question(name, once, counted, kept, settings) for name in once.criterion.present()] if len(once) else [],
        exclusions=exclusions,
        n_repeats=n_repeats,
        steadiness=steady,
        n_inconsistent=n_inconsistent,
        blinding=blinding,
        words=panel_words,
    )


def _question(name: str, once: Votes, counted: Votes, all_votes: Votes, settings: TallySettings) -> Question:
    kind = once.kind.present()[0]
    once, counted, all_votes = (votes.rows(votes.criterion.is_(name)) for votes in (once, counted, all_votes))
    result = question(once, counted, all_votes, settings)
    return result.model_copy(update={"words": words.of_question(result, kind, settings)})


def _exclusions(votes: Votes) -> list[Exclusion]:
    return [
        Exclusion(reason=reason, n_votes=int(rows.sum()), n_raters=len(votes.rows(rows).rater.present()))
        for reason in votes.excluded.present()
        if reason not in ("", REPEATED)
        for rows in [votes.excluded.is_(reason)]
    ]


def _blinding(kept: Votes, guesses: Votes, settings: TallySettings) -> list[Guessing]:
    results = []
    for other in kept.arms:
        if other == settings.arm or len(kept.arms) > MAX_ARMS_IN_PAIRS:
            continue
        guessed = guessing(guesses, settings.arm, other, settings.confidence)
        found = guessed.model_copy(update={"words_auc": texts_auc(kept, settings.arm, other)})
        if found.guesses or found.words_auc is not None:
            results.append(found.model_copy(update={"words": words.guessing_words(found)}))
    return results


def _calibrations(votes: Votes, settings: TallySettings) -> list[Calibration]:
    """Each judge against the majority of people, by criterion, where both named winners on the same units."""
    votes = votes.rows(votes.excluded.is_("") & ~votes.criterion.is_(settings.blinding_criterion))
    people, judges = votes.rows(votes.kind.is_("human")), votes.rows(votes.kind.is_("judge"))
    if not len(people) or not len(judges):
        return []
    people = people.rows(first_ballots(people))
    judges, _ = consistent_judgements(judges)
    results = []
    for criterion in people.criterion.present():
        of_people = people.rows(people.criterion.is_(criterion))
        for judge in judges.rater.present():
            of_judge = judges.rows(judges.criterion.is_(criterion) & judges.rater.is_(judge))
            found = calibrate(of_judge, of_people)
            if found:
                results.append(found.model_copy(update={"judge": judge, "criterion": criterion}))
    return results


def calibrate(judge: Votes, people: Votes) -> Calibration | None:
    """One judge against people on one criterion; None where they never named winners on the same unit.

    People's verdict on a unit is what more of them said than anything else; ties in that, and ties as that, are left out.
    """
    judge = judge.rows(judge.winner < TIE)
    units, place = np.unique(people.unit(), return_inverse=True)
    counts = np.bincount(place * 4 + people.verdict(), minlength=4 * len(units)).reshape(-1, 4)
    top, runner_up = -np.partition(-counts, 1, axis=1)[:, :2].T
    verdict = np.where(top > runner_up, counts.argmax(axis=1), TIE)
    at = np.minimum(np.searchsorted(units, judge.unit()), len(units) - 1)
    is_shared = (units[at] == judge.unit()) & (verdict[at] < TIE)
    if not is_shared.any():
        return None
    same = (verdict[at] == judge.verdict())[is_shared]
    people = people.rows(people.winner < TIE)
    by_unit, _ = count_categories(people.unit(), people.verdict(), 2)
    people_agree, n_pairs = agreeing_pairs(by_unit)
    agrees = float(same.mean())
    told = f"Where it and most people named a winner, it named the same in {words.percent(agrees)} of {words.count(len(same), 'unit')};"
    told += f" two people agree in {words.percent(people_agree)}. No human took part in its votes."
    return Calibration(judge="", criterion="", n_units=len(same), agrees=agrees, people_agree=people_agree, n_pairs=n_pairs, words=told)
