import io
import time

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from unstilted.cli import main
from unstilted.errors import UserError
from unstilted.plan import Design, PlanSettings, expect, make_plan, print_plan, simulated_votes, with_pilot
from unstilted.stats.votes import Votes, votes_from_columns


def settings(**changes: object) -> PlanSettings:
    return PlanSettings(**{"n_simulations": 60, "items": (30,), **changes})  # type: ignore[arg-type]


def test_a_plan_is_the_smallest_number_of_raters_that_is_enough() -> None:
    wanted = settings(half_width_points=8.0)
    (row,) = make_plan(wanted).rows
    assert row.is_enough
    design = row.expected.design
    assert row.expected.half_width_points <= 8.0
    fewer = Design(n_raters=round(design.n_raters * 0.85), n_items=30, votes_per_rater=20)
    assert expect(fewer, wanted).half_width_points > 8.0
    assert f"Ask {design.n_raters} raters for 20 votes each on 30 items: {design.n_votes} votes." in make_plan(wanted).advice


def test_without_differences_it_is_the_textbook_number_of_votes() -> None:
    """1.96^2 * 0.7 * 0.3 / 0.06^2 = 224 votes; the interval's caution about clusters adds some."""
    wanted = settings(half_width_points=6.0, rater_sd=0.0, item_sd=0.0, ties=0.0, votes_per_rater=5, n_simulations=200)
    (row,) = make_plan(wanted).rows
    assert 224 <= row.expected.design.n_votes <= 224 * 1.35


def test_a_narrower_interval_and_a_smaller_effect_take_more_raters() -> None:
    def n_raters(**changes: object) -> int:
        return make_plan(settings(**changes)).rows[0].expected.design.n_raters

    assert n_raters(half_width_points=7.0) > n_raters(half_width_points=10.0)
    assert n_raters(half_width_points=49.0, power=0.8, share=0.6) > n_raters(half_width_points=49.0, power=0.8, share=0.7)
    assert n_raters(rater_sd=1.5, half_width_points=9.0) > n_raters(rater_sd=0.5, half_width_points=9.0)


def test_the_power_of_a_plan_holds_in_other_simulations() -> None:
    wanted = settings(half_width_points=49.0, power=0.8, share=0.62, n_simulations=200)
    (row,) = make_plan(wanted).rows
    again = expect(row.expected.design, wanted.model_copy(update={"seed": 99}))
    assert 0.7 <= again.power <= 0.92
    assert 0.9 <= again.coverage <= 0.99


def test_items_that_differ_too_much_are_told() -> None:
    plan = make_plan(settings(items=(5,), half_width_points=2.0, votes_per_rater=60, n_simulations=50))
    assert not plan.rows[0].is_enough
    assert plan.rows[0].expected.design.votes_per_rater == 5
    assert plan.advice.startswith("Not even 2,000 raters are enough with 5 items")


def test_a_simulated_vote_has_the_share_and_the_balance_that_were_asked_for() -> None:
    design = Design(n_raters=300, n_items=30, votes_per_rater=10)
    votes = [simulated_votes(design, settings(ties=0.0, share=0.8), run) for run in range(40)]
    assert np.mean([vote.gains.mean() for vote in votes]) == pytest.approx(0.8, abs=0.015)
    assert (np.bincount(votes[0].item) == 100).all()
    assert len(np.unique(votes[0].rater * 30 + votes[0].item)) == 3000


def test_the_same_seed_gives_the_same_plan_and_another_one_another() -> None:
    assert make_plan(settings(half_width_points=10.0)) == make_plan(settings(half_width_points=10.0))
    design = Design(n_raters=10, n_items=30, votes_per_rater=10)
    assert expect(design, settings()) != expect(design, settings(seed=1))


def pilot(rater_sd: float, item_sd: float, share: float = 0.7) -> Votes:
    known = settings(rater_sd=rater_sd, item_sd=item_sd, share=share, ties=0.0)
    votes = simulated_votes(Design(n_raters=150, n_items=100, votes_per_rater=25), known, 0)
    winner = np.where(votes.gains == 1, "left", "right")
    winner[::5] = "tie"
    n = len(winner)
    return votes_from_columns(
        {"rater": votes.rater, "item": votes.item, "left": ["tuned"] * n, "right": ["base"] * n, "winner": winner.tolist()}
    )


def test_a_pilot_tells_what_to_expect() -> None:
    known = with_pilot(settings(), pilot(1.2, 0.4), "")
    assert (known.share, known.rater_sd, known.item_sd) == pytest.approx((0.7, 1.2, 0.4), abs=0.2)
    assert known.ties == 0.2
    other = with_pilot(settings(), pilot(1.2, 0.4), "base")
    assert (other.share, other.rater_sd) == pytest.approx((1 - known.share, known.rater_sd), abs=2e-3)


def test_a_pilot_that_tells_nothing_is_refused() -> None:
    votes = pilot(1.0, 1.0)
    with pytest.raises(UserError, match="nobody voted on 'tunde'"):
        with_pilot(settings(), votes, "tunde")
    with pytest.raises(UserError, match="all its votes say the same"):
        with_pilot(settings(), votes.rows(votes.winner == 0), "")
    three = votes_from_columns({"rater": "ab", "item": "ab", "left": "ab", "right": "bc", "winner": ["left", "left"]})
    with pytest.raises(UserError, match="it has 3 arms and 1 criteria"):
        with_pilot(settings(), three, "")


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"items": (2,)}, "3 items at least"), ({"share": 0.5, "power": 0.8}, "nothing to find"), ({"items": ()}, "at least 1")],
)
def test_plans_that_make_no_sense_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        settings(**changes)


def test_the_command_prints_a_plan_in_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.process_time()
    assert main(["plan", "--half-width-points", "8", "--items", "20", "40"]) == 0
    assert time.process_time() - start < 10
    text = " ".join(capsys.readouterr().out.split())
    assert "Wanted: ±8 points (95 % interval), expecting 70 %" in text
    assert "raters for 20 votes each on" in text
    assert main(["plan", "--share", "2"]) == 1
    assert "--share is 2.0: input should be less than 1. Change the value." in capsys.readouterr().err


def test_the_printed_plan_fits_eighty_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_plan(make_plan(settings(half_width_points=12.0)), console)
    assert max(map(len, console.file.getvalue().splitlines())) <= 80  # type: ignore[attr-defined]
