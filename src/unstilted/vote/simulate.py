"""A simulated panel, for demonstrations and tests: raters that are random numbers vote through the real station.

They get the real ballots in the real order, fail checks, leave a real database of their own behind for as long as they vote, and come out
as rows of kind `simulated` in a file of their own. They say nothing about people and can't enter a headline.
"""

import json
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import Field
from sqlalchemy import event
from sqlalchemy.engine import URL

from unstilted.errors import UserError
from unstilted.files import write_text
from unstilted.records import Record
from unstilted.stats.effects import mean_logit
from unstilted.vote.database import Writer, migrate, open_engine
from unstilted.vote.export import study_votes
from unstilted.vote.freezing import FrozenStudy
from unstilted.vote.items import Winner
from unstilted.vote.machines import SIMULATED_VOTES, study_of
from unstilted.vote.station import BLINDING, Joining, Slip, Station

START = 1_700_000_000.0
"""When simulated studies begin, in Unix time, so that the same seed gives the same rows."""
ID_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


class PanelSettings(Record):
    """What the simulated raters are like; the names are those of `unstilted plan`."""

    n_raters: int = Field(30, ge=1, le=2000)
    arm: str = ""
    """Whom they favour; empty: `tuned` where it is compared, otherwise the last arm."""
    share: float = Field(0.7, gt=0, lt=1)
    """Share of their votes with a winner that go to that arm, before the pull of the left side."""
    rater_sd: float = Field(0.8, ge=0, le=5)
    """How much they differ: standard deviation of their log-odds."""
    item_sd: float = Field(0.6, ge=0, le=5)
    """How much items differ, likewise."""
    left_bias: float = Field(0.2, ge=-5, le=5)
    """What the left side gains by being left, in log-odds."""
    ties: float = Field(0.1, ge=0, lt=1)
    """Share of votes without a winner, where the study allows ties."""
    careless: float = Field(0.1, ge=0, le=1)
    """Share of raters who, once qualified, answer fast and by chance."""
    seed: int = 0


@dataclass
class Clock:
    """Time that the panel sets."""

    now: float = START

    def __call__(self) -> float:
        return self.now


@dataclass
class Rater:
    """One simulated rater with a chance of their own."""

    name: str
    session: str
    taste: float
    is_careless: bool
    random: Random
    id: str = ""
    is_done: bool = False
    seconds: float = field(default=0.0)


def simulate_run(run: Path, settings: PanelSettings) -> list[dict[str, object]]:
    """Let a simulated panel vote on a run's study, and write its votes into `simulated.votes.jsonl`, instead of earlier ones.

    Neither freezes the study nor touches the votes of people. Raises UserError for an arm that the study doesn't compare.
    """
    frozen = study_of(run)
    arms = [arm.name for arm in frozen.study.arms]
    arm = settings.arm or ("tuned" if "tuned" in arms else arms[-1])
    if arm not in arms:
        raise UserError(f"the study doesn't compare '{arm}'.", where="--arm", do=f"It compares {', '.join(arms)}.")
    votes = simulate(frozen, settings.model_copy(update={"arm": arm}))
    write_text(run / SIMULATED_VOTES, "".join(json.dumps(vote, ensure_ascii=False) + "\n" for vote in votes))
    return votes


def simulate(frozen: FrozenStudy, settings: PanelSettings) -> list[dict[str, object]]:
    """The votes of a whole simulated study, cast in a database that is gone afterwards. The same seed gives the same rows."""
    with TemporaryDirectory(prefix="unstilted-simulated-") as folder:
        url = URL.create("sqlite+pysqlite", database=str(Path(folder) / "simulated.sqlite"))
        migrate(url)
        clock, ids = Clock(), Random(f"{settings.seed}/ids")
        engine = open_engine(url, is_writer=True)
        event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))  # nothing to keep safe
        writer = Writer(engine, clock)
        try:
            panel = Panel(frozen, settings, Station(frozen, lambda: "".join(ids.choices(ID_ALPHABET, k=22))), writer, clock)
            panel.vote()
            with engine.connect() as connection:
                rows = study_votes(connection, frozen)
        finally:
            writer.close()
    names = {rater.id: rater.name for rater in panel.raters}
    return [row | {"rater": names[str(row["rater"])], "kind": "simulated"} for row in rows]


class Panel:
    """The raters of one simulated study, all at work at the same time."""

    def __init__(self, frozen: FrozenStudy, settings: PanelSettings, station: Station, writer: Writer, clock: Clock) -> None:
        self.frozen, self.settings, self.station, self.writer, self.clock = frozen, settings, station, writer, clock
        self.mean = mean_logit(settings.share, math.hypot(settings.rater_sd, settings.item_sd))
        random = Random(f"{settings.seed}/items")
        self.leans = {item: settings.item_sd * random.gauss(0, 1) for item in frozen.items}
        self.raters = [self._rater(number) for number in range(1, settings.n_raters + 1)]

    def _rater(self, number: int) -> Rater:
        random = Random(f"{self.settings.seed}/rater/{number}")
        taste, is_careless = self.settings.rater_sd * random.gauss(0, 1), random.random() < self.settings.careless
        return Rater(f"simulated-{number:03}", f"{number:064x}", taste, is_careless, random)

    def vote(self) -> None:
        """Everybody joins, then everybody answers a page a round, until nobody has one."""
        self.writer.submit(self.station.open_study).result()
        for rater in self.raters:
            person = Joining(rater.session, rater.session, "en", "simulated")
            rater.id = self.writer.submit(partial(self.station.join, person=person)).result()
        while waiting := [rater for rater in self.raters if not rater.is_done]:
            shown_at = self.clock.now
            for rater in waiting:
                rater.seconds = (0.5 if rater.is_careless else 9.0) * rater.random.lognormvariate(0, 0.4)
            for rater in sorted(waiting, key=lambda rater: rater.seconds):  # as on the site, whoever is faster is served first
                self.clock.now = shown_at + rater.seconds
                self._answer(rater, shown_at)
        self.writer.submit(self.station.close).result()

    def _answer(self, rater: Rater, shown_at: float) -> None:
        visit = self.writer.submit(lambda transaction: self.station.visit(transaction.connection, rater.session)).result()
        assert visit is not None
        if visit.state != "active" or visit.ballot is None:
            rater.is_done = True
            return
        winners = {name: self._winner(rater, visit.ballot, name) for name in self.station.criteria_of(visit.ballot.role)}
        slip = Slip(rater.session, rater.session, visit.ballot.id, winners, shown_at)
        cast = self.writer.submit(partial(self.station.cast, slip=slip)).result()
        assert cast.outcome == "saved", cast

    def _winner(self, rater: Rater, ballot: Any, criterion: str) -> Winner:
        sides: tuple[Winner, Winner] = ("left", "right")
        if ballot.role in ("training", "qualification") or (ballot.role == "attention" and not rater.is_careless):
            right = self.frozen.gold[ballot.item].accept[0]
            return right if ballot.left_arm == "left" or right not in sides else sides[right == "left"]
        if rater.is_careless or criterion == BLINDING:
            return rater.random.choice(sides)
        if self.frozen.study.ties and rater.random.random() < self.settings.ties:
            return "tie"
        favour = self.mean + rater.taste + self.leans[ballot.item]
        for_left = {ballot.left_arm: favour, ballot.right_arm: -favour}.get(self.settings.arm, 0.0) + self.settings.left_bias
        return sides[rater.random.random() >= 1 / (1 + math.exp(-for_left))]
