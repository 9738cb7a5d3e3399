"""The simulated panel: through the real station, marked everywhere, and never in a headline."""

import json
from pathlib import Path

import pytest

from unstilted.cli import main
from unstilted.errors import UserError
from unstilted.tally import tally_run
from unstilted.vote.export import COLUMNS
from unstilted.vote.machines import SIMULATED_VOTES, machine_votes, study_of
from unstilted.vote.simulate import PanelSettings, simulate, simulate_run
from vote_fixtures import WHOLE, make_run

STUDY = """
n_items = 30
votes_per_item = 40
votes_per_rater = 20
background = false
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", n_prompts=30, study=STUDY)


def test_simulated_votes_are_the_real_rows_with_their_kind_in_every_one(run: Path) -> None:
    votes = simulate_run(run, PanelSettings(n_raters=12))
    assert machine_votes(run) == votes
    assert {vote["kind"] for vote in votes} == {"simulated"}
    assert {tuple(vote) for vote in votes} == {COLUMNS}
    assert {str(vote["rater"])[:10] for vote in votes} == {"simulated-"}
    assert {vote["stratum"] for vote in votes} == {"simulated"}
    assert {vote["role"] for vote in votes} == {"main", "repeat"}


def test_the_stations_rules_hold_for_simulated_raters(run: Path) -> None:
    votes = [vote for vote in simulate(study_of(run), PanelSettings(n_raters=40, careless=0.3, arm="tuned")) if vote["role"] == "main"]
    seen = [(vote["rater"], vote["item"]) for vote in votes]
    assert len(set(seen)) == len(seen) == 40 * 20
    for vote in votes:
        assert {vote["left"], vote["right"]} in ({"base", "tuned"}, {"prompted", "tuned"})
    left = sum(vote["left"] == "tuned" for vote in votes) / len(votes)
    assert abs(left - 0.5) < 0.02
    flagged = {vote["rater"] for vote in votes if "speed" in str(vote["excluded"])}
    assert 4 <= len(flagged) <= 20


def test_the_same_seed_gives_the_same_votes_and_another_seed_others(run: Path) -> None:
    frozen = study_of(run)
    first = simulate(frozen, PanelSettings(n_raters=5, arm="tuned"))
    assert simulate(frozen, PanelSettings(n_raters=5, arm="tuned")) == first
    assert simulate(frozen, PanelSettings(n_raters=5, arm="tuned", seed=1)) != first


def test_the_tally_recovers_share_sides_and_ties_of_the_panel(run: Path) -> None:
    simulate_run(run, PanelSettings(n_raters=60, share=0.8, left_bias=0.6, ties=0.2, careless=0, rater_sd=0.3, item_sd=0.3))
    (panel,) = tally_run(run).panels
    (question,) = panel.questions
    assert panel.kind == "simulated"
    for choice in question.choices[:2]:
        assert choice.arm == "tuned"
        assert choice.share is not None
        assert choice.share.share == pytest.approx(0.79, abs=0.06)
        assert choice.n_tie / (choice.n_tie + choice.n_chosen + choice.n_other) == pytest.approx(0.2, abs=0.05)
        assert choice.shown_left is not None
        assert choice.shown_right is not None
        assert choice.shown_left > choice.shown_right + 0.05
    assert question.left_share is not None
    assert question.left_share.low is not None
    assert question.left_share.low > 0.5


def test_a_simulated_landslide_makes_no_headline(run: Path) -> None:
    simulate_run(run, PanelSettings(n_raters=20, share=0.99))
    result = tally_run(run)
    assert result.headline == "No human took part: these votes prove nothing about people."
    assert [panel.kind for panel in result.panels] == ["simulated"]
    assert all(text.startswith("(Simulated raters: no human took part") for text in result.panels[0].questions[0].words.values())


def test_a_simulated_row_that_passes_as_a_persons_is_refused(run: Path) -> None:
    simulate_run(run, PanelSettings(n_raters=2))
    file = run / SIMULATED_VOTES
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for forged in ("human", "", None, "judge"):
        file.write_text(json.dumps(rows[0] | {"kind": forged}) + "\n")
        with pytest.raises(UserError, match=r"simulated\.votes\.jsonl line 1: this row is not of kind 'simulated'"):
            tally_run(run)


def test_qualification_and_the_blinding_question_are_answered_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", study=WHOLE + "n_blinding = 2\n")
    votes = simulate_run(run, PanelSettings(n_raters=6))
    assert {vote["role"] for vote in votes} == {"main", "repeat", "blinding"}
    assert not (run / "vote").exists()


def test_the_command_says_that_no_human_took_part_and_refuses_what_it_cannot_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vote", "simulate", str(run), "--raters", "3"]) == 0
    assert "No human took part: they stand apart everywhere and enter no headline." in capsys.readouterr().out
    assert main(["vote", "simulate", str(run), "--share", "1.5"]) == 1
    assert "command line: --share is 1.5: input should be less than 1. Change it." in capsys.readouterr().err
    assert main(["vote", "simulate", str(run), "--arm", "other"]) == 1
    assert "--arm: the study doesn't compare 'other'. It compares base, prompted, tuned." in capsys.readouterr().err
