"""`plan`: how many raters, items and votes a wanted interval or power takes, by simulating votes with rater and item effects.

The simulated votes go through the same interval as real ones, so what it promises is what `tally` will compute.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationInfo, field_validator, model_validator
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy.special import expit

from unstilted.errors import UserError
from unstilted.records import Record
from unstilted.stats.clusters import FEWEST_CLUSTERS, Share, clustered_share
from unstilted.stats.effects import estimate_effects, mean_logit
from unstilted.stats.votes import BLINDING, TIE, Votes, first_ballots

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_RATERS = 2000
MAX_VOTES = 60_000
"""A simulated study has no more votes than this, so that planning takes seconds."""


class PlanSettings(Record):
    """What the vote shall show, and what is expected of it."""

    half_width_points: float = Field(5.0, gt=0, lt=50)
    """Wanted half-width of the interval in percentage points; the mean over simulated votes must not exceed it."""
    power: float = Field(0.0, ge=0, lt=1)
    """Wanted chance that the interval leaves out 50 %; 0: not asked for."""
    share: float = Field(0.7, gt=0, lt=1)
    """Expected share of votes with a winner for the arm; nearer to 0.5 takes more raters."""
    items: tuple[int, ...] = Field((25, 50, 100), min_length=1, strict=False)
    """Numbers of items to compare."""
    votes_per_rater: int = Field(20, ge=1)
    """How many items each rater votes on; never more than there are."""
    ties: float = Field(0.1, ge=0, lt=1)
    """Expected share of votes without a winner."""
    rater_sd: float = Field(0.8, ge=0, le=5)
    """How much raters differ: standard deviation of their log-odds. 0.8: at 70 %, two in three raters lie between 54 and 86 %."""
    item_sd: float = Field(0.6, ge=0, le=5)
    """How much items differ, likewise."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Of the interval."""
    n_simulations: int = Field(300, ge=50, le=10_000)
    """Simulated votes behind each figure."""
    seed: int = 0
    """Same seed, same plan."""

    @field_validator("items")
    @classmethod
    def _enough_items(cls, items: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if min(items) < FEWEST_CLUSTERS:
            raise ValueError(f"{FEWEST_CLUSTERS} items at least are needed for an interval")
        return tuple(sorted(set(items)))

    @model_validator(mode="after")
    def _share_differs(self) -> Self:
        if self.power and self.share == 0.5:
            raise ValueError("at a share of 0.5 there is nothing to find, so no power can be asked for")
        return self


class Design(Record):
    """A vote's size."""

    n_raters: int
    n_items: int
    votes_per_rater: int

    @property
    def n_votes(self) -> int:
        return self.n_raters * self.votes_per_rater


class Expected(Record):
    """What a design gives, on average over simulated votes."""

    design: Design
    half_width_points: float
    power: float
    """Chance that the interval leaves out 50 %."""
    coverage: float
    """How often the interval holds the true share; the confidence asked for, if all is well."""


class PlanRow(Record):
    """The smallest number of raters for one number of items, or what the largest gives."""

    expected: Expected
    is_enough: bool


class Plan(Record):
    """The content of a plan."""

    settings: PlanSettings
    rows: list[PlanRow]
    advice: str


def make_plan(settings: PlanSettings) -> Plan:
    """The smallest number of raters for each number of items."""
    rows = [_smallest(settings, n_items) for n_items in settings.items]
    return Plan(settings=settings, rows=rows, advice=_advice(rows, settings))


def _smallest(settings: PlanSettings, n_items: int) -> PlanRow:
    """Double until it is enough, then halve the gap."""
    votes_per_rater = min(settings.votes_per_rater, n_items)
    most = min(MAX_RATERS, MAX_VOTES // votes_per_rater)
    tried: dict[int, Expected] = {}

    def is_enough(n_raters: int) -> bool:
        if n_raters not in tried:
            design = Design(n_raters=n_raters, n_items=n_items, votes_per_rater=votes_per_rater)
            tried[n_raters] = expect(design, settings)
        expected = tried[n_raters]
        return expected.half_width_points <= settings.half_width_points and expected.power >= settings.power

    low, high = FEWEST_CLUSTERS, 2 * FEWEST_CLUSTERS
    while not is_enough(high) and high < most:
        low, high = high, min(2 * high, most)
    if not is_enough(high):
        return PlanRow(expected=tried[high], is_enough=False)
    while high - low > max(1, high // 25):
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return PlanRow(expected=tried[high], is_enough=True)


def expect(design: Design, settings: PlanSettings) -> Expected:
    """What a design gives, over `settings.n_simulations` simulated votes."""
    shares = [share for share in simulate(design, settings) if share is not None]
    low = np.array([0.0 if share.low is None else share.low for share in shares])
    high = np.array([1.0 if share.high is None else share.high for share in shares])
    return Expected(
        design=design,
        half_width_points=float(50 * (high - low).mean()),
        power=float(((low > 0.5) | (high < 0.5)).mean()),
        coverage=float(((low <= settings.share) & (settings.share <= high)).mean()),
    )


@dataclass(frozen=True)
class SimulatedVotes:
    """Votes with a winner: shape (N,) each."""

    gains: Floats
    rater: Ints
    item: Ints


def simulate(design: Design, settings: PlanSettings) -> list[Share | None]:
    """The share of each of `settings.n_simulations` simulated votes."""
    votes = (simulated_votes(design, settings, run) for run in range(settings.n_simulations))
    return [clustered_share(each.gains, each.rater, each.item, settings.confidence) for each in votes]


def simulated_votes(design: Design, settings: PlanSettings, run: int) -> SimulatedVotes:
    """One simulated vote: a logit with normal rater and item effects around a mean that makes the population's share `share`."""
    generator = np.random.default_rng((settings.seed, design.n_raters, design.n_items, run))
    rater, item = _assignment(design, generator)
    mean = mean_logit(settings.share, float(np.hypot(settings.rater_sd, settings.item_sd)))
    taste = settings.rater_sd * generator.standard_normal(design.n_raters)
    lean = settings.item_sd * generator.standard_normal(design.n_items)
    gains = (generator.random(len(rater)) < expit(mean + taste[rater] + lean[item])).astype(np.float64)
    has_winner = generator.random(len(rater)) >= settings.ties
    return SimulatedVotes(gains[has_winner], rater[has_winner], item[has_winner])


def _assignment(design: Design, generator: np.random.Generator) -> tuple[Ints, Ints]:
    """Rater and item of each vote: shuffled rounds in which no item comes twice, so no rater meets one twice."""
    in_round = design.n_items // design.votes_per_rater
    n_rounds = -(-design.n_raters // in_round)
    rounds = generator.permuted(np.tile(np.arange(design.n_items), (n_rounds, 1)), axis=1)
    item = rounds[:, : in_round * design.votes_per_rater].ravel()[: design.n_votes]
    return np.repeat(np.arange(design.n_raters), design.votes_per_rater), item


def with_pilot(settings: PlanSettings, votes: Votes, arm: str) -> PlanSettings:
    """The settings with share, ties and differences as a pilot vote on two arms shows them.

    Raises UserError for other than two arms, an arm that nobody voted on, and votes that all say the same.
    """
    votes = votes.rows(votes.kind.is_("human") & votes.excluded.is_("") & ~votes.criterion.is_(BLINDING))
    votes = votes.rows(first_ballots(votes))
    if len(votes.arms) != 2 or len(votes.criterion.present()) != 1:
        what = f"it has {len(votes.arms)} arms and {len(votes.criterion.present())} criteria."
        raise UserError(what, where="--pilot", do="Leave the people's votes on one pair of arms and one criterion in the file.")
    arm = arm or ("tuned" if "tuned" in votes.arms else votes.arms[0])
    if arm not in votes.arms:
        raise UserError(f"nobody voted on '{arm}'.", where="--arm", do=f"The arms are {', '.join(votes.arms)}.")
    decisive = votes.rows(votes.winner < TIE)
    gains = decisive.gains(arm)
    if len(set(gains.tolist())) < 2:
        raise UserError("all its votes say the same.", where="--pilot", do="Give --share, --rater-sd and --item-sd instead.")
    effects = estimate_effects(gains, decisive.rater.codes, decisive.item.codes)
    found = {"share": effects.share, "rater_sd": effects.rater_sd, "item_sd": effects.item_sd, "ties": 1 - len(decisive) / len(votes)}
    return PlanSettings.model_validate({**settings.model_dump(), **{name: round(value, 3) for name, value in found.items()}})


def _advice(rows: list[PlanRow], settings: PlanSettings) -> str:
    enough = [row.expected for row in rows if row.is_enough]
    if not enough:
        most = rows[-1].expected.design
        return (
            f"Not even {most.n_raters:,} raters are enough with {most.n_items} items: items differ too much. Take more items"
            " (--items), or a wider interval."
        )
    best = min(enough, key=lambda expected: (expected.design.n_votes, expected.design.n_items))
    design = best.design
    return (
        f"Ask {design.n_raters:,} raters for {design.votes_per_rater} votes each on {design.n_items} items: {design.n_votes:,} votes."
        f" A true share of {100 * settings.share:g} % then comes with an interval of about ±{best.half_width_points:.1f} points,"
        f" which leaves out 50 % in {100 * best.power:.0f} of 100 such studies."
    )


def print_plan(plan: Plan, console: Console) -> None:
    """Print a plan; pass a console on stdout."""
    settings = plan.settings
    wanted = f"±{settings.half_width_points:g} points" + (f" and a power of {100 * settings.power:g} %" if settings.power else "")
    console.print(Text(f"\nWanted: {wanted} ({100 * settings.confidence:g} % interval), expecting {100 * settings.share:g} %\n", "bold"))
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style="dim")
    for column in ("items", "raters", "votes each", "votes", "interval", "power", "covers"):
        table.add_column(column, justify="right")
    for row in plan.rows:
        expected, design = row.expected, row.expected.design
        raters = f"{design.n_raters:,}" if row.is_enough else f"over {design.n_raters:,}"
        sizes = (str(design.n_items), raters, str(design.votes_per_rater), f"{design.n_votes:,}" if row.is_enough else "")
        table.add_row(*sizes, f"±{expected.half_width_points:.1f}", f"{100 * expected.power:.0f} %", f"{100 * expected.coverage:.0f} %")
    console.print(table)
    console.print(Text(f"\n{plan.advice}"))
    assumed = f"Assumed: raters differ by {settings.rater_sd:g} and items by {settings.item_sd:g} (standard deviations of log-odds),"
    assumed += f" {100 * settings.ties:g} % ties; {settings.n_simulations} simulated votes a figure. `--pilot FILE` takes these from votes."
    console.print(Text(assumed, style="dim"))
