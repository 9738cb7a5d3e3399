"""A judge beside people: worked out by hand, and the interval's coverage by simulation."""

import numpy as np
import pytest
from scipy.special import expit

from unstilted.stats.votes import Votes, votes_from_rows
from unstilted.tally import tally
from unstilted.tally.calibration import calibrations
from unstilted.tally.records import TallySettings

Rows = list[dict[str, object]]


def vote(rater: str, item: str, winner: str, kind: str = "human", stratum: str = "", left: str = "a") -> dict[str, object]:
    right = "b" if left == "a" else "a"
    return {"rater": rater, "item": item, "left": left, "right": right, "winner": winner, "kind": kind, "stratum": stratum}


def judged(item: str, arm: str) -> Rows:
    """A judge that names the arm in both orders."""
    return [vote("judge", item, "left" if arm == left else "right", "judge", left=left) for left in ("a", "b")]


def people(item: str, *winners: str, stratum: str = "") -> Rows:
    return [vote(f"{stratum}r{place}", item, winner, stratum=stratum) for place, winner in enumerate(winners)]


def test_majorities_are_counted_and_ties_on_either_side_are_left_out() -> None:
    rows = people("1", "left", "left", "right") + judged("1", "a")
    rows += people("2", "right", "right", "tie") + judged("2", "a")
    rows += people("3", "left", "right", "tie") + judged("3", "a")  # no majority
    rows += people("4", "tie", "tie", "left") + judged("4", "a")  # the majority is a tie
    rows += people("5", "left", "left", "left") + [vote("judge", "5", "tie", "judge", left=left) for left in ("a", "b")]
    rows += people("6", "left", "left", "left") + [vote("judge", "6", "left", "judge", left=left) for left in ("a", "b")]  # inconsistent
    rows += people("7", "right", "right", "right") + judged("7", "b")
    rows += judged("8", "a")  # no people
    (found,) = tally(votes_from_rows(rows)).calibration
    assert (found.judge, found.stratum, found.n_units) == ("judge", "", 3)
    assert found.agrees == pytest.approx(2 / 3)
    assert found.words.startswith("Where it and most people named a winner, it named the same in 66.7 % of 3 units (95 % interval")
    assert "These votes cannot tell that it is better than a coin" in found.words
    assert found.words.count("No human took part in its votes.") == 1


def test_strata_are_told_apart() -> None:
    rows: Rows = []
    for item in map(str, range(6)):
        rows += people(item, "left", "left", "left", stratum="panel") + people(item, "right", "right", stratum="open") + judged(item, "a")
    found = tally(votes_from_rows(rows)).calibration
    assert [(each.stratum, each.agrees, each.low, each.high) for each in found[1:]] == [
        ("open", 0.0, None, None),
        ("panel", 1.0, pytest.approx(0.025 ** (1 / 3)), 1.0),
    ]
    assert (found[0].stratum, found[0].agrees) == ("", 1.0)
    assert "(no interval: too few: 2 raters; an interval needs 3 of each at least)" in found[1].words


def test_pairs_on_one_item_count_as_related() -> None:
    """Twice the same unit, on one item, tells no more than once."""
    rows: Rows = []
    for item in range(20):
        rows += people(str(item), "left", "left", "left") + judged(str(item), "a" if item % 4 else "b")
    (once,) = calibrations(votes_from_rows(rows), TallySettings())
    doubled = rows + [row | {"left": f"{row['left']}2", "right": f"{row['right']}2"} for row in rows]
    (twice,) = calibrations(votes_from_rows(doubled), TallySettings())
    assert (once.n_units, twice.n_units) == (20, 40)
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high))


def test_people_or_judges_alone_give_none() -> None:
    assert tally(votes_from_rows(people("1", "left", "left"))).calibration == []
    assert tally(votes_from_rows(judged("1", "a"))).calibration == []
    assert tally(votes_from_rows(people("1", "left", "left") + judged("2", "a"))).calibration == []


def simulated_study(generator: np.random.Generator, n_raters: int, n_items: int, n_each: int) -> Votes:
    taste, lean = generator.normal(0, 0.8, n_raters), generator.normal(0, 1.2, n_items)
    rows: Rows = []
    for item in range(n_items):
        for rater in generator.choice(n_raters, n_each, replace=False):
            is_left = generator.random() < expit(0.8 + taste[rater] + lean[item])
            rows.append(vote(f"r{rater}", str(item), "left" if is_left else "right"))
        better = "a" if lean[item] > -0.8 else "b"
        rows += judged(str(item), better if generator.random() < 0.8 else "ba"["ab".index(better)])
    return votes_from_rows(rows)


def test_the_interval_covers_as_promised_over_other_people_and_items() -> None:
    """Within 93 to 99 % of 300 studies at nominal 95 %; the truth is the mean over the studies."""
    generator = np.random.default_rng(1)
    found = [calibrations(simulated_study(generator, 12, 60, 5), TallySettings())[0] for _ in range(300)]
    truth = float(np.mean([each.agrees for each in found]))
    covered = np.mean([each.low <= truth <= each.high for each in found if each.low is not None and each.high is not None])
    assert 0.93 <= covered <= 0.99
