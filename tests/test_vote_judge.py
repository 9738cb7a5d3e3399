"""The automatic judge with a scripted engine, and once with each real one."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import AddedToken

from small_chat import write_small_llama
from unstilted.cli import main
from unstilted.engines import Generated, Request, Sampling
from unstilted.errors import UserError
from unstilted.lm.chat import ChatTokens
from unstilted.models.resolve import BaseModelFiles
from unstilted.tally import tally_run
from unstilted.vote.judge import ANSWERS, HALF_READ, Judge, JudgeSettings, Verdict, ask, question_text, read_verdict
from unstilted.vote.machines import JUDGE_VOTES, JUDGES, JudgeSummary, machine_votes, read_judges, study_of
from vote_fixtures import SMALL, make_run

TWO_ARMS = """
arms = [{ name = "base" }, { name = "tuned" }]
criteria = [{ name = "thoughtful" }, { name = "helpful" }]
"""


class Letters:
    """A tokenizer whose tokens are characters."""

    chat_template, added_tokens_decoder = "yes", {0: AddedToken("<|end|>", special=True)}

    def apply_chat_template(self, rows: list[dict[str, str]], **_: object) -> str:
        return "".join(row["content"] for row in rows)

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


@dataclass
class Scripted:
    """An engine that answers as told, by the question's text; it remembers what it was asked."""

    says: Callable[[str], str]
    fails_after: int = 10**9
    asked: list[Request] = field(default_factory=list)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Generated]:
        for place, request in enumerate(reversed(requests)):  # engines answer in any order
            if place == self.fails_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            yield Generated(request.key, self.says("".join(map(chr, request.tokens))), 1, "stop")


def left_and_right(question: str) -> tuple[str, str]:
    left = question.split("Reply on the left:\n")[1].split("\n\nReply on the right:\n")
    return left[0], left[1].split("\n\nWhich")[0]


def for_tuned(question: str) -> str:
    return "left" if "honestly" in left_and_right(question)[0] else "right"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", study=TWO_ARMS + SMALL)


def judge_with(run: Path, engine: Scripted, criteria: int = 1, name: str = "scripted", **settings: Any) -> list[JudgeSummary]:
    frozen = study_of(run)
    judge = Judge(name, name, False, ChatTokens(Letters(), "letters"), lambda n_context: engine)
    return ask(run, frozen, frozen.study.criteria[:criteria], judge, JudgeSettings(**settings))


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        *(("left", "left"), ("RIGHT.", "right"), (' "Tie"! ', "tie"), ("**right**", "right"), ("(left)", "left")),
        *((text, "unparsable") for text in ("", "The left one", "left or right", "leftright", "both", "ties", "l", "left\nbecause", "ﬁn")),
    ],
)
def test_an_answer_is_one_word_offered_or_unparsable(text: str, verdict: Verdict) -> None:
    assert read_verdict(text) == verdict
    assert verdict in get_args(Verdict)


def test_a_tie_that_was_not_offered_is_unparsable() -> None:
    assert read_verdict("tie", has_ties=False) == "unparsable"


def test_each_pair_is_asked_in_both_orders_with_the_same_seed_and_the_raters_question(run: Path) -> None:
    engine = Scripted(for_tuned)
    (summary,) = judge_with(run, engine)
    by_seed: dict[int, list[str]] = {}
    for request in engine.asked:
        by_seed.setdefault(request.seed, []).append("".join(map(chr, request.tokens)))
    assert len(by_seed) == 6
    for first, second in by_seed.values():
        assert left_and_right(first) == left_and_right(second)[::-1]
        assert first.endswith("Which reply sounds more like a thoughtful person?\nAnswer with exactly one word: left, right or tie.")
    assert (summary.n_units, summary.n_named, summary.n_inconsistent) == (6, 6, 0)


def test_the_question_names_no_arm_and_offers_no_tie_where_there_is_none(run: Path) -> None:
    frozen = study_of(run)
    item = next(iter(frozen.items.values()))
    text = question_text(frozen.study.criteria[0], item, "base", "tuned", has_ties=False)
    assert "tie" not in text.lower()
    assert not {"base", "tuned", "prompted"} & set(text.lower().replace(".", " ").split())


def test_votes_are_rows_of_kind_judge_that_the_tally_takes(run: Path) -> None:
    judge_with(run, Scripted(for_tuned), criteria=2)
    votes = machine_votes(run)
    assert len(votes) == 6 * 2 * 2
    assert {vote["kind"] for vote in votes} == {"judge"}
    assert all(vote["winner"] == ("left" if vote["left"] == "tuned" else "right") for vote in votes)
    result = tally_run(run)
    assert result.headline == "No human took part: these votes prove nothing about people."
    (panel,) = result.panels
    assert (panel.kind, panel.label, panel.n_inconsistent) == ("judge", "Automatic judges: no human took part", 0)
    assert [(question.criterion, question.choices[0].arm, question.choices[0].n_chosen) for question in panel.questions] == [
        ("helpful", "tuned", 6),
        ("thoughtful", "tuned", 6),
    ]


def test_a_judge_that_follows_the_side_is_inconsistent_and_is_told_to_mean_nothing(run: Path) -> None:
    (summary,) = judge_with(run, Scripted(lambda question: "left"))
    assert (summary.n_inconsistent, summary.n_always_left, summary.n_named, summary.n_unparsable) == (6, 6, 0, 0)
    assert summary.words.startswith("No human took part. scripted was asked about 6 pairs")
    assert summary.words.endswith("A coin keeps its verdict in half of the pairs; this judge does no better, so its votes mean nothing.")
    (panel,) = tally_run(run).panels
    assert (panel.questions, panel.n_inconsistent) == ([], 6)


def test_a_tie_in_one_order_is_inconsistent_and_in_both_a_tie(run: Path) -> None:
    (summary,) = judge_with(run, Scripted(lambda question: "tie" if "honestly" in left_and_right(question)[0] else "right"))
    assert (summary.n_ties, summary.n_inconsistent, summary.n_always_right) == (0, 6, 0)
    (summary,) = judge_with(run, Scripted(lambda question: "tie"), name="another")
    assert (summary.n_ties, summary.n_inconsistent) == (6, 0)


def test_an_unparsable_answer_is_no_tie_and_its_other_half_counts_for_nobody(run: Path) -> None:
    (summary,) = judge_with(run, Scripted(lambda question: "hm" if "honestly" in left_and_right(question)[0] else "right"))
    assert (summary.n_unparsable, summary.n_ties, summary.n_inconsistent, summary.n_named) == (6, 0, 0, 0)
    votes = machine_votes(run)
    assert [(vote["winner"], vote["excluded"]) for vote in votes] == [("right", HALF_READ)] * 6
    (panel,) = tally_run(run).panels
    assert panel.questions == []
    assert [(left_out.reason, left_out.n_votes) for left_out in panel.exclusions] == [(HALF_READ, 6)]


def test_a_killed_judge_goes_on_where_it_was_and_ends_as_an_uninterrupted_one(run: Path, tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", study=TWO_ARMS + SMALL)
    judge_with(whole, Scripted(for_tuned))
    with pytest.raises(KeyboardInterrupt):
        judge_with(run, Scripted(for_tuned, fails_after=5))
    assert not (run / JUDGE_VOTES).exists()
    with (run / ANSWERS).open("a") as file:
        file.write('{"key": "torn')
    engine = Scripted(for_tuned)
    judge_with(run, engine)
    assert len(engine.asked) == 12 - 5
    for name in (JUDGE_VOTES, JUDGES):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    engine = Scripted(for_tuned)
    judge_with(run, engine)
    assert engine.asked == []


def test_other_judges_and_criteria_stay_and_the_same_again_replaces(run: Path) -> None:
    judge_with(run, Scripted(for_tuned), criteria=2)
    judge_with(run, Scripted(lambda question: "left"), name="other")
    judge_with(run, Scripted(lambda question: "right"), name="scripted", temperature=0.5)
    found = {(each.judge, each.criterion): each.n_named for each in read_judges(run)}
    assert found == {("scripted", "helpful"): 6, ("other", "thoughtful"): 0, ("scripted", "thoughtful"): 0}
    assert len(machine_votes(run)) == 3 * 12


def test_a_row_that_passes_as_a_persons_is_refused(run: Path) -> None:
    judge_with(run, Scripted(for_tuned))
    rows = (run / JUDGE_VOTES).read_text().splitlines()
    (run / JUDGE_VOTES).write_text("\n".join([rows[0], rows[1].replace('"judge"', '"human"')]))
    with pytest.raises(UserError, match=r"judge\.votes\.jsonl line 2: this row is not of kind 'judge'"):
        tally_run(run)


def test_judging_freezes_nothing_and_uses_what_was_frozen(run: Path) -> None:
    judge_with(run, Scripted(for_tuned))
    assert not (run / "vote").exists()


def test_the_command_refuses_what_it_cannot_do(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vote", "judge", str(run), "--criterion", "funny"]) == 1
    assert "--criterion: the study has no criterion 'funny'. It has thoughtful, helpful." in capsys.readouterr().err
    assert main(["vote", "judge", str(tmp_path / "nothing")]) == 1
    assert "this is no run folder" in capsys.readouterr().err
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("engine", ["embedded", "transformers"])
def test_real_engines_judge_by_command(
    engine: str, tmp_path: Path, embedded_model: BaseModelFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", study="n_items = 2\nvotes_per_rater = 2\n" + TWO_ARMS + SMALL.split("votes_per_rater = 4")[1])
    model = [] if engine == "embedded" else ["--model", str(write_small_llama(tmp_path / "small", embedded_model))]
    assert main(["vote", "judge", str(run), "--criterion", "thoughtful", "--engine", engine, *model]) == 0
    (summary,) = read_judges(run)
    assert f"thoughtful: {summary.words}\n" == capsys.readouterr().out
    assert summary.judge.endswith(f"({engine})")
    assert (summary.n_units, summary.is_own_arm) == (2, engine == "embedded")
    answers = [json.loads(line) for line in (run / ANSWERS).read_text().splitlines()]
    assert len(answers) == 4
    assert all(answer["text"] for answer in answers)
