"""The content of `tally.json`."""

from typing import Literal

from pydantic import Field

from unstilted.records import Record
from unstilted.stats.agreement import Agreed
from unstilted.stats.blinding import Blinding
from unstilted.stats.clusters import Share
from unstilted.stats.controlled import Controlled
from unstilted.stats.sequential import Anytime
from unstilted.stats.votes import BLINDING, Kind


class TallySettings(Record):
    """What the analysis is asked to do."""

    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Of all intervals: 0.95 misses the truth once in twenty."""
    arm: str = ""
    """Whose share is told; empty: `tuned` where it exists, otherwise the first by name of up to six."""
    blinding_criterion: str = BLINDING
    """The criterion whose votes are guesses of which side is that arm, not preferences."""
    stopping: Literal["votes", "sequential"] = "votes"
    """`sequential`: the vote may have been closed because of what it said, so the headline has the interval that holds at every look."""


class Choice(Record):
    """One arm against another."""

    arm: str
    other: str
    group: str = ""
    """Empty for all votes, otherwise the value of the stratum or covariate."""
    n_chosen: int
    n_other: int
    n_tie: int
    n_both_bad: int
    share: Share | None
    """Of the votes with a winner, those for `arm`; None without any."""
    share_ties_half: Share | None
    """Of all votes but `both bad`, with a tie as half a vote each."""
    p_adjusted: float | None = None
    """The share's p-value against one half after Holm's correction over the table it stands in."""
    shown_left: float | None = None
    """The share among the votes that showed `arm` on the left."""
    shown_right: float | None = None


class Breakdown(Record):
    """Choices by the values of one column."""

    column: str
    choices: list[Choice]


class ControlledChoice(Record):
    """The share at equal length and style, or why there is none."""

    arm: str
    other: str
    result: Controlled | None
    reason: str = ""


class AnytimeChoice(Record):
    """The interval that holds at every look, for one pair of arms."""

    arm: str
    other: str
    result: Anytime


class Ranked(Record):
    """An arm's place among all."""

    arm: str
    strength: float
    """Log-odds against the average arm."""
    low: float | None
    high: float | None
    best_rank: int | None
    worst_rank: int | None
    share: float
    """Strengths as shares of 1."""


class Ranking(Record):
    """Bradley-Terry over all arms."""

    arms: list[Ranked]
    """Best first; empty where `note` says why."""
    ties: str = ""
    """How ties were modelled."""
    tie_parameter: float | None = None
    left_log_odds: float | None = None
    """What the left side gains by being left, in log-odds."""
    ridge: float = 0.0
    note: str = ""


class Agreement(Record):
    """How far raters agree about the same item and pair of arms."""

    percent: Agreed
    alpha: Agreed
    alpha_ordinal: float
    """Krippendorff's alpha with a tie halfway between the arms."""
    fleiss: Agreed
    ac1: Agreed
    n_units: int
    """Items and pairs that two raters or more voted on."""
    categories: dict[str, float]
    """How often each verdict was given: the prevalence that alpha and kappa depend on."""
    pair_agreement: float
    """Of all pairs of raters on a unit, those who agree."""
    n_pairs: int


class Question(Record):
    """All results of one criterion."""

    criterion: str
    n_votes: int
    n_raters: int
    n_items: int
    choices: list[Choice]
    with_excluded: list[Choice]
    """The same with the excluded votes counted; empty where none is excluded."""
    breakdowns: list[Breakdown]
    skipped_columns: list[str]
    """Text columns with too many values to break down by."""
    left_share: Share | None
    """Of the votes with a winner, those for the left side."""
    controlled: list[ControlledChoice]
    anytime: list[AnytimeChoice]
    ranking: Ranking | None
    agreement: Agreement | None
    words: dict[str, str] = Field(default_factory=dict)
    """Each number's meaning in a sentence."""


class Exclusion(Record):
    """Votes left out for one reason."""

    reason: str
    n_votes: int
    n_raters: int


class Guessing(Record):
    """The blinding check of one pair of arms."""

    arm: str
    other: str
    guesses: Blinding | None
    words_auc: float | None
    """How well the words alone tell the arms apart; 0.5: not at all."""
    words: str = ""


class Panel(Record):
    """Everything that one kind of rater said."""

    kind: Kind
    label: str
    n_votes: int
    n_raters: int
    questions: list[Question]
    exclusions: list[Exclusion]
    n_repeats: int
    """Votes on something the rater had already decided: counted only for steadiness."""
    steadiness: Share | None
    """Of the repeats, those with the same verdict as before."""
    n_inconsistent: int
    """Only judges: pairs whose verdict changed with the sides; they count for no arm."""
    blinding: list[Guessing]
    words: dict[str, str] = Field(default_factory=dict)


class Calibration(Record):
    """An automatic judge beside the people who voted on the same."""

    judge: str
    criterion: str
    stratum: str = ""
    """Of the people; empty: all of them."""
    n_units: int
    """Items and pairs on which both the judge and most people named a winner."""
    agrees: float
    low: float | None
    high: float | None
    people_agree: float
    """Of pairs of people who both named a winner on a unit, those who named the same."""
    n_pairs: int
    words: str


class Tally(Record):
    """The result of a vote. Only people make the headline."""

    headline: str
    source: str
    settings: TallySettings
    panels: list[Panel]
    calibration: list[Calibration]
