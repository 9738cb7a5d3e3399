"""Study files, freezing, items, balanced assignment, rules for raters, and the exports."""

import json
import tomllib
from collections import Counter
from contextlib import closing
from pathlib import Path
from random import Random
from sqlite3 import connect

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from unstilted.cli import main
from unstilted.errors import UserError
from unstilted.records import Response, read_jsonl, write_jsonl
from unstilted.vote.assignment import COUNTED, MIN_GAP, Cell, Need, Step, cell_of, cells, choose, open_slots, plan
from unstilted.vote.ballots import Signer, ballot_token, form_token, invitation_code, is_form_token, read_ballot, read_invitation
from unstilted.vote.export import COLUMNS, run_votes, study_votes, to_csv, to_pairs
from unstilted.vote.flags import RaterRecord, reasons
from unstilted.vote.freezing import freeze, load_frozen, registrations
from unstilted.vote.items import clean, read_gold, scrub, take_items, without_markdown
from unstilted.vote.serve import prepare
from unstilted.vote.settings import Settings
from unstilted.vote.study import Checks, Study, load_study, study_from
from vote_fixtures import SMALL, Rater, hidden, make_run, make_site

# The study file


def test_the_default_study_is_one_that_can_be_done() -> None:
    study = Study()
    assert study.pairs == (("base", "tuned"), ("prompted", "tuned"))
    assert len(read_gold(study, Path())) >= 17


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n_itms = 3", "'n_itms' is not a setting"),
        ("votes_per_item = 6", "votes_per_item is 6, no multiple of 4 (2 sides x 2 pairs of arms), so sides could not balance"),
        ("votes_per_rater = 60", "votes_per_rater is 60 with 50 items, but nobody sees an item twice"),
        ('against = "nobody"', "'against' is 'nobody', which is no arm"),
        ('criteria = [{name = "odd"}]', "criterion 'odd' has no question"),
        ('criteria = [{name = "blinding", question = "?"}]', "'blinding' is the name of the closing question"),
        ('[[arms]]\nname = "a"\n[[arms]]\nname = "a"', "two arms have the same name"),
        ("[qualification]\nmin_correct = 9", "qualification.min_correct is more than qualification.n_items"),
        ("[checks]\nmax_one_side = 0.4", "'checks.max_one_side' is 0.4: input should be greater than 0.5"),
        ("ties = 1", "'ties' is 1: input should be a valid boolean"),
        ("a = ", "this is not TOML"),
    ],
)
def test_a_study_that_cannot_be_done_is_refused_with_its_reason(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "study.toml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        load_study(file)
    assert said in str(error.value)
    assert str(error.value).startswith(str(file))


def test_the_study_file_in_the_docs_is_the_default_study() -> None:
    text = (Path(__file__).parents[1] / "docs" / "running_a_vote.md").read_text(encoding="utf-8")
    assert study_from(tomllib.loads(text.split("```toml\n")[1].split("```")[0])) == Study()


# Freezing


def test_freezing_twice_changes_nothing(run: Path) -> None:
    first = freeze(run, None)
    assert freeze(run, None).registration == first.registration
    assert len(registrations(run)) == 1


def test_a_changed_study_file_makes_a_chained_version_that_names_the_change(run: Path) -> None:
    first = freeze(run, None).registration
    (run / "study.toml").write_text('title = "Which one?"\n' + SMALL)
    second = freeze(run, run / "study.toml").registration
    assert (second.version, second.changed, second.previous) == (2, ("title",), first.hash)
    assert load_frozen(run).study.title == "Which one?"
    assert [entry.version for entry in registrations(run)] == [1, 2]


@pytest.mark.parametrize("change", ["seed = 7", "against = 'base'", "[checks]\nn_attention = 1"])
def test_what_the_plans_and_the_rules_depend_on_cannot_change(run: Path, tmp_path: Path, change: str) -> None:
    freeze(run, None)
    file = tmp_path / "changed.toml"
    file.write_text(change + "\n" + SMALL.split("[checks]")[0] if "[checks]" not in change else SMALL.split("[checks]")[0] + change)
    with pytest.raises(UserError, match="was frozen with the study and can't change any more"):
        freeze(run, file)


def test_a_change_is_in_the_log_once_however_often_the_site_starts(run: Path) -> None:
    prepare(run, None, Settings())
    (run / "study.toml").write_text('title = "Which one?"\n' + SMALL)
    for _ in range(3):
        prepare(run, run / "study.toml", Settings())
    site = make_site(run)
    site.close()
    with closing(connect(run / "vote" / "votes.sqlite")) as connection:
        assert [row[0] for row in connection.execute("SELECT event FROM audit ORDER BY seq")] == ["study opened", "study changed"]


def test_the_same_seed_takes_the_same_items_and_another_takes_others(run: Path) -> None:
    taken = [{item.id for item in take_items(study_from({**STUDY, "seed": seed}), run, run).items} for seed in (0, 0, 1)]
    assert taken[0] == taken[1] != taken[2]


STUDY = {"n_items": 6, "votes_per_item": 8, "votes_per_rater": 4, "checks": {"n_repeats": 0}}


# Items


def test_prompts_with_identical_or_missing_replies_are_left_out_and_counted(run: Path) -> None:
    rows = read_jsonl(run / "responses.jsonl", Response)
    rows = [row.model_copy(update={"text": "Same."}) if row.id == "p3" else row for row in rows]
    write_jsonl(run / "responses.jsonl", [row for row in rows if not (row.id == "p4" and row.arm == "tuned")])
    frozen = take_items(study_from({**STUDY, "n_items": 0}), run, run)
    assert (len(frozen.items), frozen.n_identical, frozen.n_incomplete) == (10, 1, 1)
    with pytest.raises(UserError, match="only 10 prompts have a different reply from every arm, but n_items is 12"):
        take_items(study_from({**STUDY, "n_items": 12}), run, run)


def test_people_and_another_run_can_be_arms(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", voices={"tuned": "Other run: {}."})
    by_id = [{"id": f"p{number}", "text": f"A person on {number}."} for number in range(6)]
    by_prompt = [{"prompt": f"what about thing number {number} of the list?", "text": f"A person on {number}."} for number in range(6, 12)]
    (tmp_path / "people.jsonl").write_text("\n".join(json.dumps(row) for row in by_id + by_prompt))
    arms = [{"name": "tuned"}, {"name": "second", "run": str(other), "arm": "tuned"}, {"name": "people", "file": "people.jsonl"}]
    frozen = take_items(study_from({**STUDY, "arms": arms, "against": "people"}), run, tmp_path)
    assert frozen.items[0].replies.keys() == {"tuned", "second", "people"}
    number = frozen.items[0].id[1:]
    assert frozen.items[0].replies["people"] == f"A person on {number}."
    assert frozen.items[0].replies["second"].startswith("Other run")


def test_model_names_go_and_disclaimers_stay() -> None:
    text = "I'm SmolLM2-135M-Instruct, an AI by Hugging Face. ChatGPT-4 and gpt-4o differ; a smollmish word stays. I am an AI."
    assert scrub(text, Study().scrub) == "I'm [name], an AI by [name]. [name] and [name] differ; a smollmish word stays. I am an AI."
    assert scrub(text, ()) == text


def test_normalisation_takes_signs_and_leaves_words() -> None:
    study = study_from({"normalise": ["emoji", "markdown"]})
    text = "# Sure 😀\n\n- **one** and `two`\n* _three_ 2*3*4 snake_case_name\n> said\n---\n```py\ncode\n```\n1. first ❤️"
    assert clean(text, study) == "Sure \n\none and two\nthree 2*3*4 snake_case_name\nsaid\ncode\n1. first"
    assert clean(text, Study()) == text


@given(st.text(alphabet="ab *_`#>-\n", max_size=60))
def test_taking_markdown_out_keeps_every_letter(text: str) -> None:
    letters = Counter(character for character in text if character.isalpha())
    kept = Counter(character for character in without_markdown(text) if character.isalpha())
    fences = any(line.strip().startswith("```") for line in text.splitlines())
    assert kept == letters or fences


# Assignment


def three_arms(**changes: object) -> Study:
    return study_from({"against": "", "n_items": 30, "votes_per_item": 12, "votes_per_rater": 18, **changes})


def test_every_block_of_an_item_holds_every_pair_on_both_sides_once() -> None:
    block = cells(three_arms())
    assert len(set(block)) == 6
    for item in ("a", "b"):
        slots = [cell_of(slot, item, block, 3) for slot in range(12)]
        assert sorted(map(str, slots[:6])) == sorted(map(str, slots[6:])) == sorted(map(str, block))
    assert [cell_of(slot, "a", block, 3) for slot in range(12)] != [cell_of(slot, "b", block, 3) for slot in range(12)]


def test_a_block_is_filled_before_the_next_begins() -> None:
    assert open_slots(frozenset({0, 2}), 4, 8) == [1, 3]
    assert open_slots(frozenset(range(4)), 4, 8) == [4, 5, 6, 7]
    assert open_slots(frozenset({0, 1, 2, 5}), 4, 8) == [3]
    assert open_slots(frozenset(range(8)), 4, 8) == []


def test_an_item_that_is_a_block_ahead_never_comes_before_one_behind() -> None:
    study = three_arms()
    needs = [Need("ahead", frozenset(range(6))), Need("behind", frozenset(range(5)))]
    last = cell_of(next(iter(open_slots(needs[1].taken, 6, 12))), "behind", cells(study), study.seed)
    for seed in range(50):
        choice = choose(needs, [last], study, Random(seed))
        assert choice is not None
        assert choice.item == "behind"


def simulate(study: Study, n_raters: int, seed: int) -> tuple[Counter[tuple[str, Cell]], list[Counter[Cell]], list[list[str]]]:
    """Raters one after another in random order of turns, with the pure logic alone."""
    random, taken = Random(seed), {f"i{number}": set[int]() for number in range(study.n_items)}
    seen: list[list[tuple[str, Cell]]] = [[] for _ in range(n_raters)]
    turns = [rater for rater in range(n_raters) for _ in range(study.votes_per_rater)]
    random.shuffle(turns)
    for rater in turns:
        known = {item for item, _ in seen[rater]}
        near = sorted((item for item in taken if item not in known), key=lambda item: (len(taken[item]), random.random()))[:12]
        choice = choose([Need(item, frozenset(taken[item])) for item in near], [cell for _, cell in seen[rater]], study, random)
        if choice is not None:
            taken[choice.item].add(choice.slot)
            seen[rater].append((choice.item, choice.cell))
    pairs = Counter((item, cell) for rows in seen for item, cell in rows)
    return pairs, [Counter(cell for _, cell in rows) for rows in seen], [[item for item, _ in rows] for rows in seen]


@pytest.mark.parametrize("seed", range(5))
def test_a_full_study_is_balanced_per_item_and_nearly_per_rater(seed: int) -> None:
    study = three_arms()
    pairs, raters, items = simulate(study, 20, seed)
    assert set(pairs.values()) <= {1, 2}
    assert pairs.total() >= 357  # of 30 items x 6 cells x 2 = 360; the last raters may have seen what is left
    assert all(len(rows) == len(set(rows)) for rows in items)
    spread = [max(cells_seen.values()) - min(cells_seen[cell] for cell in cells(study)) for cells_seen in raters]
    assert sum(spread) / len(spread) < 1.5  # 18 pages hold each of 6 cells 3 times at best; at random the spread is 4.5


@pytest.mark.parametrize("n_raters", [1, 7, 13])
def test_a_study_broken_off_anywhere_is_within_one_of_balance(n_raters: int) -> None:
    study = three_arms()
    pairs, _, _ = simulate(study, n_raters, 1)
    for item in {item for item, _ in pairs}:
        counts = [pairs[item, cell] for cell in cells(study)]
        assert max(counts) - min(counts) <= 1


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    rater=st.text(alphabet="abcdef", min_size=1, max_size=8),
    n_main=st.integers(1, 40),
    n_attention=st.integers(0, 5),
    n_repeats=st.integers(0, 6),
    n_blinding=st.integers(0, 6),
)
def test_a_plan_holds_every_page_once_and_a_repeat_only_behind_its_pair(
    rater: str, n_main: int, n_attention: int, n_repeats: int, n_blinding: int
) -> None:
    if n_repeats + n_blinding > n_main:
        return
    checks = {"n_attention": n_attention, "n_repeats": n_repeats, "n_blinding": n_blinding}
    study = study_from({"votes_per_rater": n_main, "checks": checks})
    steps = plan(study, rater, 8)
    assert steps == plan(study, rater, 8)
    assert len(steps) == len(set(steps)) == 3 + 4 + n_main + n_attention + n_repeats + n_blinding
    assert [step.role for step in steps[:7]] == ["training"] * 3 + ["qualification"] * 4
    assert [step.index for step in steps if step.role == "main"] == list(range(n_main))
    row = [step for step in steps if step.role in COUNTED]
    for step in row:
        if step.role == "repeat":
            gap = row.index(step) - row.index(Step("main", step.index))
            assert gap > 0
            assert gap > MIN_GAP - n_repeats or row.index(step) >= len(row) - 1 - n_repeats


# Signatures


def test_a_signature_holds_for_exactly_what_was_signed() -> None:
    signer, ballot = Signer(b"key"), "b" * 22
    token = ballot_token(signer, ballot, "session", 100)
    read = read_ballot(signer, token, "session")
    assert read is not None
    assert (read.id, read.expires) == (ballot, 100)
    assert read_ballot(signer, token, "another") is None
    assert read_ballot(Signer(b"other"), token, "session") is None
    assert signer.sign("a", "bc") != signer.sign("ab", "c") != signer.sign("a", "b", "c")
    form = form_token(signer, "session", 100)
    assert [is_form_token(signer, form, "session", now) for now in (99, 100, 101)] == [True, True, False]
    code = invitation_code(signer, "panel", 7)
    assert read_invitation(signer, code) == ("panel", 7)
    assert read_invitation(signer, code.replace("7", "8", 1)) is None


@given(st.text(max_size=120))
def test_no_text_is_taken_for_a_ballot_or_an_invitation(text: str) -> None:
    signer = Signer(b"key")
    assert read_ballot(signer, text, "s") is None
    assert read_invitation(signer, text) is None
    assert not is_form_token(signer, text, "s", 0)


# Rules for raters

CLEAN = RaterRecord(attention=(True, True), seconds=(9.0,) * 20, winners=("left", "right") * 10, repeats=(True, True, False))


def test_a_careful_rater_is_never_flagged() -> None:
    assert reasons(CLEAN, Checks(min_consistency=0.6)) == []
    assert reasons(RaterRecord((), (), (), ()), Checks(min_consistency=1)) == []


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (RaterRecord((True, False), CLEAN.seconds, CLEAN.winners, CLEAN.repeats), "attention: 1 wrong, at most 0"),
        (RaterRecord(CLEAN.attention, (1.5,) * 3, CLEAN.winners, CLEAN.repeats), "speed: median 1.5 s, at least 2 s"),
        (RaterRecord(CLEAN.attention, CLEAN.seconds, ("right",) * 20, CLEAN.repeats), "side: 1.00 on one side, at most 0.95"),
        (RaterRecord(CLEAN.attention, CLEAN.seconds, CLEAN.winners, (False,) * 3), "consistency: 0.00, at least 0.6"),
    ],
)
def test_each_rule_names_its_value_and_its_bound(record: RaterRecord, said: str) -> None:
    assert reasons(record, Checks(min_consistency=0.6)) == [said]


def test_preferring_one_arm_always_is_no_reason(run: Path) -> None:
    """A rater who takes the tuned model's reply every time, wherever it stands."""
    site = make_site(make_run(run.parent / "long", n_prompts=20, study=SMALL.replace("= 6\n", "= 20\n").replace("rater = 4", "rater = 20")))
    try:
        rater = Rater(site)
        rater.begin()
        while (page := rater.get("/vote")).status_code == 200:
            left_is_tuned = "honestly" in page.text.split("reply-b")[0]
            rater.post("/vote", hidden(page.text) | {"winner-thoughtful": "left" if left_is_tuned else "right"})
        rows = run_votes(site.run)
        assert len(rows) == 20
        assert {row[str(row["winner"])] for row in rows} == {"tuned"}
        assert {row["excluded"] for row in rows} == {""}
    finally:
        site.close()


# Exports


@pytest.fixture
def voted(run: Path) -> Path:
    site = make_site(run)
    for _ in range(8):
        rater = Rater(site)
        rater.begin()
        while (page := rater.get("/vote")).status_code == 200:
            left_is_tuned = "honestly" in page.text.split("reply-b")[0]
            rater.post("/vote", hidden(page.text) | {"winner-thoughtful": "left" if left_is_tuned else "right"})
    site.close()
    return run


def test_csv_and_parquet_hold_the_same_rows(voted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("votes.csv", "votes.parquet", "pairs.jsonl"):
        assert main(["vote", "export", str(voted), str(tmp_path / name)]) == 0
    rows = run_votes(voted)
    assert (tmp_path / "votes.csv").read_bytes().decode() == to_csv(rows)
    table = pq.read_table(tmp_path / "votes.parquet")
    assert tuple(table.column_names) == COLUMNS
    assert table.to_pylist() == rows
    assert main(["vote", "export", str(voted), str(tmp_path / "votes.xls")]) == 1
    assert "'.xls' is no format of ours" in capsys.readouterr().err


def test_pairs_for_training_hold_what_the_majority_chose(voted: Path) -> None:
    frozen, rows = load_frozen(voted), run_votes(voted)
    lines = [json.loads(line) for line in to_pairs(rows, frozen)]
    assert lines
    for line in lines:
        assert line["chosen"][0]["content"] == frozen.items[line["id"].split("-")[0]].replies["tuned"]
        assert "for tuned" in line["source"]
    tied = [row | {"winner": "tie"} for row in rows]
    assert list(to_pairs(tied, frozen)) == []
    excluded = [row | {"excluded": "speed"} for row in rows]
    assert list(to_pairs(excluded, frozen)) == []


def test_pairs_for_training_are_read_by_the_pairs_stage(voted: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    main(["vote", "export", str(voted), str(file)])
    (tmp_path / "next").mkdir()
    (tmp_path / "next" / "recipe.toml").write_text(f"[pairs]\nsource = {json.dumps(str(file))}\nn_pairs = 0\nn_held_out = 2\n")
    assert main(["pairs", str(tmp_path / "next")]) == 0
    n_lines = len(file.read_text().splitlines())
    assert len((tmp_path / "next" / "pairs.jsonl").read_text().splitlines()) == n_lines - 2


def test_the_closing_question_is_a_criterion_of_its_own(tmp_path: Path) -> None:
    site = make_site(make_run(tmp_path / "run", study=SMALL + "n_blinding = 2\n"))
    try:
        rater = Rater(site)
        rater.begin()
        for _ in range(4):
            rater.vote("left")
        page = rater.get("/vote").text
        assert "I can&#39;t tell" in page
        assert "Both bad" not in page
        assert rater.vote("both_bad", "blinding").status_code == 422
        assert rater.vote("tie", "blinding").status_code == 303
        assert rater.vote("left", "blinding").status_code == 303
        with site.reader.connect() as connection:
            rows = study_votes(connection, site.frozen)
        assert [row["criterion"] for row in rows] == ["thoughtful"] * 4 + ["blinding"] * 2
        shown = {row["item"]: (row["left"], row["right"]) for row in rows[:4]}
        assert all(shown[row["item"]] == (row["left"], row["right"]) for row in rows[4:])
    finally:
        site.close()
