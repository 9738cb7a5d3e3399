"""`tally`: what the votes say, how sure that is, and how far the raters agree. Reads votes, writes `tally.json`.

Only people make the headline. Judges and simulated raters are counted apart and are always labelled.
"""

from pathlib import Path

import numpy as np

from unstilted.errors import UserError
from unstilted.files import write_text
from unstilted.stats.votes import KINDS, REPEATED, TAKEN_BACK, WITHDRAWN, Kind, Votes, first_ballots, read_votes, votes_from_rows
from unstilted.tally import words
from unstilted.tally.calibration import calibrations
from unstilted.tally.count import (
    MAX_ARMS_IN_PAIRS,
    consistent_judgements,
    guessing,
    question,
    steadiness,
    texts_auc,
)
from unstilted.tally.records import Exclusion, Guessing, Panel, Question, Tally, TallySettings

__all__ = ["Tally", "TallySettings", "tally", "tally_file", "tally_run"]


def tally_file(votes: Path, json: Path | None = None, settings: TallySettings | None = None) -> Tally:
    """Tally the votes of a CSV or JSONL file and write the result as JSON.

    Raises UserError as `read_votes` does, and for an arm that nobody voted on.
    """
    return _written(tally(read_votes(votes), settings, str(votes)), json)


def tally_run(run: Path, json: Path | None = None, settings: TallySettings | None = None) -> Tally:
    """Tally the votes of a run folder, machines' too, into its `tally.json`, or into another file."""
    from unstilted.vote.export import run_votes
    from unstilted.vote.freezing import load_frozen
    from unstilted.vote.machines import machine_votes

    machines = machine_votes(run)
    if (run / "vote" / "preregistration.json").exists():
        settings = (settings or TallySettings()).model_copy(update={"stopping": load_frozen(run).study.stopping})
    people = run_votes(run) if (run / "vote" / "database_url").exists() or not machines else []
    return _written(tally(votes_from_rows([*people, *machines], str(run)), settings, str(run)), json or run / "tally.json")


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
    return Tally(headline=headline, source=source, settings=settings, panels=panels, calibration=calibrations(votes, settings))


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
