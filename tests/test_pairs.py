import datetime
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unstilted import pairs
from unstilted.errors import UserError
from unstilted.pairs import Dropped
from unstilted.pairs.split import split_pairs
from unstilted.recipe import Recipe, recipe_from
from unstilted.records import Message, Pair, read_jsonl
from unstilted.rundir import RunDir, open_run

GOOD: dict[str, Any] = {"prompt": "where's my tea", "chosen": "Right behind you.", "rejected": "The tea is located behind you."}


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def numbered(n: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "chosen": f"sure, {i}", "rejected": f"Certainly: {i}."} | fields for i in range(n)]


def write_lines(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def recipe_for(source: Path | str, **settings: Any) -> Recipe:
    seed = settings.pop("seed", 0)
    return recipe_from({"seed": seed, "pairs": {"source": str(source), "n_held_out": 1} | settings})


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDir]:
    with open_run(tmp_path / "run") as opened:
        yield opened


def written(run_dir: RunDir) -> list[Pair]:
    """All pairs of a run in no particular order of the two files."""
    return read_jsonl(run_dir.file("pairs.jsonl"), Pair) + read_jsonl(run_dir.file("held_out.jsonl"), Pair)


def read_row(tmp_path: Path, row: Any) -> tuple[list[tuple[str, str]], str, str]:
    """(role, content) of the prompt's messages, and both answers, of one row beside a good one."""
    source = write_lines(tmp_path / "pairs.jsonl", [row, GOOD])
    with open_run(tmp_path / "run") as run_dir:
        pairs.run(recipe_for(source), run_dir)
        pair = next(pair for pair in written(run_dir) if pair.source == "pairs.jsonl line 1")
    return [(message.role, message.content) for message in pair.prompt], pair.chosen_text, pair.rejected_text


def reason(tmp_path: Path, row: Any) -> str:
    """Why a row is no pair, as the error says it."""
    source = write_lines(tmp_path / "pairs.jsonl", [GOOD, row])
    with pytest.raises(UserError) as caught:
        pairs.check(recipe_for(source))
    lines = str(caught.value).splitlines()
    assert lines[-2].startswith("  pairs.jsonl line 2: "), lines
    return lines[-2].removeprefix("  pairs.jsonl line 2: ")


# --- Formats ---


def test_text_is_read_as_one_user_message_and_one_answer_each(tmp_path: Path) -> None:
    row = {"prompt": " the sky is\n", "chosen": " blue.", "rejected": " green.\n", "score": 3}
    assert read_row(tmp_path, row) == ([("user", "the sky is")], "blue.", "green.")


def test_messages_are_read_as_they_are(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": ""}, user("hi"), assistant("hey"), user("what colour is it? ")]
    row = {"prompt": prompt, "chosen": [assistant("blue ") | {"name": None}], "rejected": [assistant("green")]}
    expected = [("system", ""), ("user", "hi"), ("assistant", "hey"), ("user", "what colour is it? ")]
    assert read_row(tmp_path, row) == (expected, "blue ", "green")


def test_without_a_prompt_the_messages_that_both_sides_begin_with_are_the_prompt(tmp_path: Path) -> None:
    shared = [user("What color is the sky?")]  # the example of TRL's `extract_prompt`
    row = {"chosen": [*shared, assistant("It is blue.")], "rejected": [*shared, assistant("It is green.")]}
    assert read_row(tmp_path, row) == ([("user", "What color is the sky?")], "It is blue.", "It is green.")


def test_a_prompt_given_as_text_gives_way_to_shared_messages_as_in_trl(tmp_path: Path) -> None:
    shared = [{"role": "system", "content": "be kind"}, user("hi")]
    row = {"prompt": "hi", "chosen": [*shared, assistant("hey")], "rejected": [*shared, assistant("Greetings.")]}
    assert read_row(tmp_path, row) == ([("system", "be kind"), ("user", "hi")], "hey", "Greetings.")


def test_a_prompt_given_as_text_is_taken_when_the_answers_hold_no_shared_messages(tmp_path: Path) -> None:
    row = {"prompt": "hi", "chosen": [assistant("hey")], "rejected": [assistant("Greetings.")]}
    assert read_row(tmp_path, row) == ([("user", "hi")], "hey", "Greetings.")


def test_a_prompt_in_messages_may_be_repeated_in_front_of_the_answers(tmp_path: Path) -> None:
    shared = [user("hi")]
    row = {"prompt": shared, "chosen": [*shared, assistant("hey")], "rejected": [*shared, assistant("Greetings.")]}
    assert read_row(tmp_path, row) == ([("user", "hi")], "hey", "Greetings.")


def test_answers_in_text_may_follow_a_prompt_in_messages(tmp_path: Path) -> None:
    row = {"prompt": [user("hi"), assistant("yes?"), user("tea")], "chosen": "hot", "rejected": "It is hot."}
    assert read_row(tmp_path, row) == ([("user", "hi"), ("assistant", "yes?"), ("user", "tea")], "hot", "It is hot.")


def test_without_a_prompt_the_words_that_both_sides_begin_with_are_the_prompt(tmp_path: Path) -> None:
    row = {"prompt": None, "chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert read_row(tmp_path, row) == ([("user", "The sky is")], "blue.", "green.")


def test_a_prompt_found_in_text_never_ends_inside_a_word(tmp_path: Path) -> None:
    row = {"chosen": "The sky is blue.", "rejected": "The sky is bright."}
    assert read_row(tmp_path, row) == ([("user", "The sky is")], "blue.", "bright.")


def test_a_side_that_is_the_beginning_of_the_other_still_has_an_answer(tmp_path: Path) -> None:
    row = {"chosen": "The sky is blue", "rejected": "The sky is blue today"}
    assert read_row(tmp_path, row) == ([("user", "The sky is")], "blue", "blue today")


def test_hh_dialogues_become_messages(tmp_path: Path) -> None:
    shared = "\n\nHuman: hi\n\nAssistant: Hello:\n\nHow are you?\n\nHuman: fine\n\nand you?\n\nAssistant:"
    row = {"chosen": shared + " good", "rejected": shared + " I am functioning."}
    expected = [("user", "hi"), ("assistant", "Hello:\n\nHow are you?"), ("user", "fine\n\nand you?")]
    assert read_row(tmp_path, row) == (expected, "good", "I am functioning.")


def test_an_hh_prompt_that_waits_for_the_answer_becomes_messages(tmp_path: Path) -> None:
    row = {"prompt": "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: tea\n\nAssistant: ", "chosen": " hot", "rejected": " It is hot."}
    assert read_row(tmp_path, row) == ([("user", "hi"), ("assistant", "yes?"), ("user", "tea")], "hot", "It is hot.")


@pytest.mark.parametrize("prompt", ["Human: is that how I greet you?", "what comes after\n\nAssistant: in this file"])
def test_text_that_only_mentions_the_marks_of_hh_stays_as_it_is(tmp_path: Path, prompt: str) -> None:
    assert read_row(tmp_path, GOOD | {"prompt": prompt})[0] == [("user", prompt)]


@given(st.lists(st.text(min_size=1), min_size=1, max_size=3), st.text(min_size=1), st.text(min_size=1))
def test_given_and_found_prompts_in_messages_are_the_same(turns: list[str], chosen: str, rejected: str) -> None:
    from unstilted.pairs.formats import Unusable, parse_pair
    from unstilted.pairs.source import SourceRow

    prompt = [user(text) if i % 2 == 0 else assistant(text) for i, text in enumerate(turns)]
    sides = {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    rows = ({"prompt": prompt} | sides, {side: prompt + answer for side, answer in sides.items()})

    def outcome(row: object) -> object:
        try:
            return parse_pair(SourceRow("a", "a", 1, row))
        except Unusable as error:
            return error.reason

    given_prompt, found_prompt = (outcome(row) for row in rows)
    assert given_prompt == found_prompt
    assert isinstance(given_prompt, Pair) == (
        len(turns) % 2 == 1 and bool(turns[-1].strip() and chosen.strip() and rejected.strip()) and chosen.strip() != rejected.strip()
    )


# --- Bad rows ---


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ('{"prompt": ', "this is not JSON"),
        ("9" * 5000, "this is not JSON"),
        ("[1, 2]", "this is not a JSON object"),
        ("{}", "'chosen' is missing (found: nothing)"),
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing (found: 'prompt', 'chosen')"),
        ({"chosen": "b", "rejected": "c"}, "'prompt' is missing (found: 'chosen', 'rejected')"),
        (GOOD | {"prompt": 3}, "'prompt' is a number, neither text nor a list of messages"),
        (GOOD | {"chosen": {"a": 1}}, "'chosen' is an object, neither text nor a list of messages"),
        (GOOD | {"rejected": True}, "'rejected' is true or false, neither text nor a list of messages"),
        (GOOD | {"chosen": ["b"]}, "'chosen' holds something else than messages with 'role' and 'content'"),
        (GOOD | {"chosen": [assistant("b") | {"content": ["b"]}]}, "'chosen' has a message whose content is a list, not text"),
        (GOOD | {"prompt": " \n"}, "'prompt' is empty"),
        (GOOD | {"prompt": []}, "'prompt' is empty"),
        (GOOD | {"prompt": [user(" ")]}, "'prompt' is empty"),
        (GOOD | {"chosen": " \t"}, "'chosen' is empty"),
        (GOOD | {"chosen": None}, "'chosen' is empty"),
        (GOOD | {"rejected": []}, "'rejected' is empty"),
        (GOOD | {"rejected": [assistant(" ")]}, "'rejected' is empty"),
        (GOOD | {"rejected": GOOD["chosen"] + "\n"}, "'chosen' and 'rejected' are the same"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]}, "'chosen' and 'rejected' are the same"),
        (
            GOOD | {"prompt": [{"role": "human", "content": "a"}]},
            "'prompt' has a message of role 'human'; only system, user and assistant are known",
        ),
        (GOOD | {"chosen": [assistant("a"), assistant("b")]}, "'chosen' holds 2 messages after the prompt, not one"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c"), user("d"), assistant("e")]},
            "'rejected' holds 3 messages after the prompt, not one",
        ),
        (GOOD | {"rejected": [user("a")]}, "'rejected' is a user message, not the assistant's"),
        (GOOD | {"prompt": [user("a"), assistant("b")]}, "the prompt's last message isn't the user's"),
        (GOOD | {"prompt": [{"role": "system", "content": "a"}]}, "the prompt's last message isn't the user's"),
        (GOOD | {"chosen": "cut \ud83d"}, "the text holds half of a character (a lone surrogate)"),
        (GOOD | {"prompt": "b", "id": ["b"]}, "'id' is a list, not text"),
        (GOOD | {"prompt": "b", "id": True}, "'id' is true or false, not text"),
        (GOOD | {"chosen": [assistant("b")], "rejected": [assistant("b ")]}, "'chosen' and 'rejected' are the same"),
        (
            {"prompt": [user("a")], "chosen": [user("a"), assistant("b")], "rejected": [assistant("c")]},
            "'chosen' holds 2 messages after the prompt, not one",
        ),
        (GOOD | {"prompt": "b", "topic": 1.5}, "'topic' is a number, not text"),
        (GOOD, "prompt, chosen and rejected are those of an earlier row"),
        (GOOD | {"id": "b"}, "prompt, chosen and rejected are those of an earlier row"),
        (GOOD | {"prompt": "b", "id": "pairs-1"}, "the id is that of an earlier row"),
    ],
)
def test_a_row_that_is_no_pair_is_named_by_line_and_reason(tmp_path: Path, row: Any, expected: str) -> None:
    assert reason(tmp_path, row) == expected


def test_a_line_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"pairs\.jsonl line 2: this is not UTF-8 text"):
        pairs.check(recipe_for(source))


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (
            {"prompt": "a", "completion": "b", "label": True},
            "TRL's unpaired (KTO) format: join a liked and a disliked completion of one prompt",
        ),
        ({"conversations": [{"from": "human", "value": "a"}]}, "ShareGPT: write [{'role': ..., 'content': ...}] for 'from' and 'value'"),
        (GOOD | {"chosen": {"from": "gpt", "value": "a"}}, "ShareGPT: write"),
        (
            {"question": "a", "chosen": "The b", "rejected": "The c"},
            "a preference file with another name for the prompt: rename 'question'",
        ),
        (
            {"instruction": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]},
            "a preference file with another name for the prompt: rename 'instruction'",
        ),
        ({"prompt": "a", "response_0": "b", "response_1": "c"}, "two ranked responses: put the better one in 'chosen'"),
        ({"question": "a", "response_j": "b", "response_k": "c"}, "two ranked responses: put response_j in 'chosen'"),
        ({"question": "a", "response": "b"}, "questions with one response each: add a second response"),
        ({"instruction": "a", "input": "", "output": "b"}, "Alpaca, with one output each"),
        ({"prompt": "a", "completion": "b"}, "prompts with one completion each"),
        ({"messages": [user("a"), assistant("b")]}, "conversations with one answer each"),
    ],
)
def test_other_known_formats_are_recognised_and_how_to_convert_them_is_said_once(tmp_path: Path, row: Any, hint: str) -> None:
    source = write_lines(tmp_path / "pairs.jsonl", [GOOD, row, row | {"n": 2}])
    with pytest.raises(UserError) as caught:
        pairs.check(recipe_for(source))
    assert str(caught.value).count(f"This looks like {hint}") == 1


def test_bad_rows_are_refused_with_counts_the_first_lines_and_how_to_go_on(tmp_path: Path) -> None:
    rows = [*numbered(2), "", *[GOOD | {"chosen": ""}] * 9, "{", *[GOOD | {"prompt": ""}] * 2]
    source = write_lines(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(UserError) as caught:
        pairs.check(recipe_for(source))
    assert str(caught.value) == "\n".join(
        [
            f"{source}: 12 of 14 rows are no usable pair.",
            "      9 x 'chosen' is empty",
            "      2 x 'prompt' is empty",
            "      1 x this is not JSON",
            "The first 10:",
            *[f"  pairs.jsonl line {line}: 'chosen' is empty" for line in range(4, 13)],
            "  pairs.jsonl line 13: this is not JSON",
            "Mend these rows, or leave them out with `--pairs.bad-rows drop`.",
        ]
    )


def test_dropped_rows_are_listed_in_the_facts_and_kept_in_full(tmp_path: Path, run_dir: RunDir) -> None:
    bad = GOOD | {"chosen": "cut \ud83d", "note": None}
    source = write_lines(tmp_path / "mine.jsonl", [*numbered(3), bad, '{"half"'])
    facts = pairs.run(recipe_for(source, bad_rows="drop"), run_dir)
    half = "the text holds half of a character (a lone surrogate)"
    assert facts == {
        "n_pairs": 2,
        "n_held_out": 1,
        "source": str(source),
        "dropped": [{"line": 4, "reason": half}, {"line": 5, "reason": "this is not JSON"}],
    }
    assert read_jsonl(run_dir.file("dropped.jsonl"), Dropped) == [
        Dropped(source="mine.jsonl line 4", line=4, reason=half, row=json.dumps(bad)),
        Dropped(source="mine.jsonl line 5", line=5, reason="this is not JSON", row='{"half"'),
    ]
    assert {pair.id for pair in written(run_dir)} == {"mine-1", "mine-2", "mine-3"}


def test_when_too_few_are_left_the_dropped_rows_are_told(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "pairs.jsonl", [GOOD, GOOD | {"chosen": ""}])
    with pytest.raises(UserError) as caught:
        pairs.check(recipe_for(source, bad_rows="drop"))
    assert str(caught.value) == (
        f"{source}: the number of usable pairs is 1, but n_held_out is 1 and at least one must be left to train on.\n"
        "1 of 2 rows are no usable pair.\n      1 x 'chosen' is empty\nThey are:\n  pairs.jsonl line 2: 'chosen' is empty\n"
        "Bring more pairs or lower `--pairs.n-held-out`."
    )


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "pairs.jsonl", ["", "  "])
    with pytest.raises(UserError) as caught:
        pairs.check(recipe_for(source))
    assert str(caught.value) == f"{source}: there are no rows in it. Choose another source of pairs."


def test_a_refused_source_writes_nothing(tmp_path: Path, run_dir: RunDir) -> None:
    source = write_lines(tmp_path / "pairs.jsonl", [*numbered(3), "{"])
    with pytest.raises(UserError):
        pairs.run(recipe_for(source), run_dir)
    assert not list(run_dir.path.glob("*.jsonl"))


# --- Sources ---


def test_the_starter_set_is_taken_whole_without_a_bad_row(run_dir: RunDir) -> None:
    facts = pairs.run(recipe_from({"pairs": {"n_pairs": 0}}), run_dir)
    assert facts == {"n_pairs": 488, "n_held_out": 24, "source": "starter", "dropped": []}
    assert run_dir.file("dropped.jsonl").read_bytes() == b""
    rows = [json.loads(line) for line in (files("unstilted") / "data/starter/pairs.jsonl").read_text().splitlines()]
    by_id = {pair.id: pair for pair in written(run_dir)}
    assert len(by_id) == 512
    for line, row in enumerate(rows, start=1):
        pair = by_id[row["id"]]
        assert (pair.text, pair.chosen_text, pair.rejected_text) == (row["prompt"], row["chosen"], row["rejected"])
        assert (pair.category, pair.topic, pair.source) == (row["category"], row["topic"], f"starter line {line}")


def test_what_is_written_is_read_again_as_the_same_pairs(tmp_path: Path, run_dir: RunDir) -> None:
    source = write_lines(tmp_path / "pairs.jsonl", numbered(9, category="work", topic=None))
    pairs.run(recipe_for(source), run_dir)
    first = read_jsonl(run_dir.file("pairs.jsonl"), Pair)
    with open_run(tmp_path / "again") as again:
        pairs.run(recipe_for(run_dir.file("pairs.jsonl")), again)
        second = {pair.id: pair.model_copy(update={"source": ""}) for pair in written(again)}
    assert second == {pair.id: pair.model_copy(update={"source": ""}) for pair in first}


def test_ids_may_be_numbers_and_are_made_from_file_and_line_where_missing(tmp_path: Path, run_dir: RunDir) -> None:
    first, second, third = numbered(3)
    source = write_lines(tmp_path / "mine.json-lines", [first | {"id": 7}, second | {"id": None}, "", third])
    pairs.run(recipe_for(source), run_dir)
    assert {(pair.id, pair.source) for pair in written(run_dir)} == {
        ("7", "mine.json-lines line 1"),
        ("mine-2", "mine.json-lines line 2"),
        ("mine-4", "mine.json-lines line 4"),
    }


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in numbered(2)))
    pairs.check(recipe_for(source))


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file


def test_parquet_rows_are_named_by_row(tmp_path: Path, run_dir: RunDir) -> None:
    rows = [{"chosen": [user(f"q{i}"), assistant("b")], "rejected": [user(f"q{i}"), assistant("c")]} for i in range(2)]
    bad = {"chosen": None, "rejected": rows[0]["rejected"], "day": datetime.date(2025, 1, 9)}
    source = write_parquet(tmp_path / "mine.parquet", [row | {"day": None} for row in rows] + [bad])
    with pytest.raises(UserError, match=r"\n  mine\.parquet row 3: 'chosen' is empty\n"):
        pairs.check(recipe_for(source))
    pairs.run(recipe_for(source, bad_rows="drop"), run_dir)
    assert {(pair.id, pair.text, pair.source) for pair in written(run_dir)} == {
        ("mine-1", "q0", "mine.parquet row 1"),
        ("mine-2", "q1", "mine.parquet row 2"),
    }
    (dropped,) = read_jsonl(run_dir.file("dropped.jsonl"), Dropped)
    assert json.loads(dropped.row) == bad | {"day": "2025-01-09"}


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "mine.parquet"
    source.write_text("no")
    with pytest.raises(UserError, match=r"mine\.parquet: this Parquet file can't be read \(.*\)\. Write it again\.$"):
        pairs.check(recipe_for(source))


def test_a_folder_gives_the_files_of_its_split_only(tmp_path: Path, run_dir: RunDir) -> None:
    folder = tmp_path / "mine"
    write_parquet(folder / "data" / "train-00000-of-00002.parquet", numbered(2))
    write_lines(folder / "data" / "train-00001-of-00002.jsonl", [row | {"prompt": "other " + row["prompt"]} for row in numbered(2)])
    write_lines(folder / "data" / "test-00000-of-00001.jsonl", ["not even JSON"])
    pairs.run(recipe_for(folder), run_dir)
    assert {(pair.id, pair.source) for pair in written(run_dir)} == {
        ("data/train-00000-of-00002-1", "mine/data/train-00000-of-00002.parquet row 1"),
        ("data/train-00000-of-00002-2", "mine/data/train-00000-of-00002.parquet row 2"),
        ("data/train-00001-of-00002-1", "mine/data/train-00001-of-00002.jsonl line 1"),
        ("data/train-00001-of-00002-2", "mine/data/train-00001-of-00002.jsonl line 2"),
    }


def test_a_folder_whose_files_name_no_split_gives_all_of_them(tmp_path: Path) -> None:
    write_lines(tmp_path / "mine" / "a.jsonl", numbered(1))
    write_lines(tmp_path / "mine" / "b.jsonl", [GOOD])
    pairs.check(recipe_for(tmp_path / "mine"))


def test_a_folder_without_a_file_of_the_split_is_refused_with_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write_lines(folder / "test.jsonl", numbered(3))
    write_lines(folder / "train_sft-00000-of-00001.jsonl", numbered(3))
    with pytest.raises(UserError) as caught:
        pairs.check(recipe_for(folder))
    assert str(caught.value) == (
        f"{folder}: no .jsonl or .json-lines or .parquet file of split 'train' is in this folder "
        "(found: test.jsonl, train_sft-00000-of-00001.jsonl). Name another with `--pairs.split`, or give the file itself."
    )
    pairs.check(recipe_for(folder, split="train_sft"))


def test_a_dataset_saved_to_disk_is_read_with_its_splits(tmp_path: Path, run_dir: RunDir) -> None:
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_list(numbered(3))
    datasets.DatasetDict({"train_prefs": train}).save_to_disk(str(tmp_path / "many"))
    with pytest.raises(UserError, match=r"many: there is no split 'train'\. Set `--pairs\.split` to one of: train_prefs\.$"):
        pairs.check(recipe_for(tmp_path / "many"))
    pairs.check(recipe_for(tmp_path / "many", split="train_prefs"))
    train.save_to_disk(str(tmp_path / "one"))
    pairs.run(recipe_for(tmp_path / "one"), run_dir)
    assert {(pair.id, pair.source) for pair in written(run_dir)} == {(f"one-{i}", f"one row {i}") for i in (1, 2, 3)}


def test_a_damaged_dataset_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write_lines(tmp_path / "saved" / "state.json", ["{}"])
    with pytest.raises(UserError, match=r"saved: this saved dataset can't be read \(\w+: .*\)\. Save it again\.$"):
        pairs.check(recipe_for(tmp_path / "saved"))


@pytest.mark.parametrize("ask", [pairs.sources, pairs.check])
@pytest.mark.parametrize("source", ["nothing.jsonl", "data/nothing.parquet", "./nothing", "/nothing/here", "startr"])
def test_a_missing_file_is_refused_the_same_way_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Any, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        ask(recipe_for(source))
    assert str(caught.value) == (
        f"{source}: there is no such file. Give 'starter', a .jsonl or .parquet file, a folder, or a hub id 'owner/name'."
    )


def test_an_empty_source_is_not_taken_for_the_current_folder() -> None:
    with pytest.raises(UserError, match=r"^pairs\.source: there is no such file\."):
        pairs.sources(recipe_for(""))


def test_a_file_of_another_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(
        UserError, match=r"pairs\.csv: files of type '\.csv' can't be read\. Save it as \.jsonl or \.json-lines or \.parquet\.$"
    ):
        pairs.sources(recipe_for(tmp_path / "pairs.csv"))


def test_an_offline_hub_dataset_is_refused_with_what_to_do_and_known_by_its_name() -> None:
    pytest.importorskip("datasets")
    script = """if True:
        from unstilted import pairs
        from unstilted.errors import UserError
        from unstilted.recipe import recipe_from
        recipe = recipe_from({"pairs": {"source": "nobody/nothing", "split": "train"}})
        print(pairs.sources(recipe))
        try:
            pairs.check(recipe)
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True
    )
    fingerprint, refusal = done.stdout.splitlines()
    assert fingerprint == "{'pairs: nobody/nothing': 'hub:nobody/nothing@train'}"
    assert refusal.startswith("nobody/nothing: there is no such file or folder here, and the hub didn't give a dataset of this name (")
    assert refusal.endswith(
        "Check the name and `--pairs.split train`; offline, download it elsewhere and give the .parquet or .jsonl file."
    )


def test_the_fingerprint_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "pairs.jsonl", numbered(3))
    assert pairs.sources(recipe_for(source)) == {f"pairs: {source}": hashlib.sha256(source.read_bytes()).hexdigest()}
    shipped = (files("unstilted") / "data/starter/pairs.jsonl").read_bytes()
    assert pairs.sources(Recipe()) == {"pairs: starter": hashlib.sha256(shipped).hexdigest()}


def test_the_fingerprint_of_a_folder_changes_with_any_file_in_it(tmp_path: Path) -> None:
    write_lines(tmp_path / "mine" / "a.jsonl", numbered(3))
    before = pairs.sources(recipe_for(tmp_path / "mine"))
    write_lines(tmp_path / "mine" / "b.jsonl", numbered(3))
    assert pairs.sources(recipe_for(tmp_path / "mine")) != before


def test_neither_torch_nor_datasets_is_loaded_for_a_jsonl_file(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "pairs.jsonl", numbered(3))
    script = f"""if True:
        import sys
        from unstilted import pairs
        from unstilted.recipe import recipe_from
        pairs.check(recipe_from({{"pairs": {{"source": {str(source)!r}, "n_held_out": 1}}}}))
        print([name for name in ("torch", "datasets", "pyarrow", "huggingface_hub") if name in sys.modules])
    """
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- Splitting ---


def pair(i: int, prompt: str) -> Pair:
    message = (Message(role="assistant", content=str(i)),)
    return Pair(id=str(i), prompt=(Message(role="user", content=prompt),), chosen=message, rejected=message)


def ids(some: list[Pair]) -> list[int]:
    return [int(pair.id) for pair in some]


def test_the_split_of_seed_0_is_the_same_on_every_machine() -> None:
    split = split_pairs([pair(i, f"question {i}") for i in range(12)], n_pairs=4, n_held_out=3, seed=0)
    assert (ids(split.held_out), ids(split.training)) == ([1, 8, 9], [4, 5, 6, 7])


@given(
    groups=st.lists(st.integers(1, 4), min_size=2, max_size=12),
    n_held_out=st.integers(1, 12),
    n_pairs=st.integers(0, 20),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_split_keeps_prompts_together_and_counts_and_order(groups: list[int], n_held_out: int, n_pairs: int, seed: int) -> None:
    prompts = [f"question {group}" for group, size in enumerate(groups) for _ in range(size)]
    some = [pair(i, prompt) for i, prompt in enumerate(prompts)]
    try:
        split = split_pairs(some, n_pairs, n_held_out, seed)
    except UserError:
        assert max(groups) > 1 or n_held_out + 1 > len(some)
        return
    assert len(split.held_out) == n_held_out
    assert len(split.training) == min(n_pairs or len(some), len(some) - n_held_out)
    assert not {pair.text for pair in split.held_out} & {pair.text for pair in split.training}
    assert ids(split.training) == sorted(set(ids(split.training)))
    assert ids(split.held_out) == sorted(set(ids(split.held_out)))


def test_the_held_out_pairs_do_not_change_with_the_amount_of_training_pairs_and_more_holds_fewer() -> None:
    some = [pair(i, f"question {i}") for i in range(40)]
    small, large, whole = (split_pairs(some, n_pairs, 8, seed=3) for n_pairs in (5, 20, 0))
    assert small.held_out == large.held_out == whole.held_out
    assert set(ids(small.training)) < set(ids(large.training)) < set(ids(whole.training))


def test_another_seed_holds_out_other_pairs() -> None:
    some = [pair(i, f"question {i}") for i in range(40)]
    assert split_pairs(some, 0, 8, seed=0) != split_pairs(some, 0, 8, seed=1)


def test_prompts_that_differ_in_case_and_spaces_alone_are_the_same_prompt() -> None:
    some = [pair(0, "Hi  there"), pair(1, "hi there\n"), pair(2, "other"), pair(3, "third")]
    for seed in range(20):
        assert len({0, 1} & set(ids(split_pairs(some, 0, 2, seed).held_out))) in (0, 2)


@given(st.lists(st.integers(2, 5), min_size=2, max_size=8), st.integers(1, 12), st.integers(0, 99))
def test_a_number_of_held_out_pairs_that_cannot_be_had_is_answered_with_one_that_can(groups: list[int], n_held_out: int, seed: int) -> None:
    some = [pair(i, prompt) for i, prompt in enumerate(f"question {group}" for group, size in enumerate(groups) for _ in range(size))]
    if len(some) <= n_held_out:
        return
    try:
        split_pairs(some, 0, n_held_out, seed)
    except UserError as error:
        possible = int(error.do.split("`")[1].split()[-1])
        assert len(split_pairs(some, 0, possible, seed).held_out) == possible


def test_the_number_offered_instead_is_the_nearest_that_fits_below() -> None:
    some = [pair(i, f"question {i // 2}") for i in range(8)]
    with pytest.raises(UserError) as caught:
        split_pairs(some, 0, 5, seed=0)
    assert str(caught.value) == (
        "n_held_out is 5, but pairs with the same prompt stay together and don't add up to that. "
        "Set `--pairs.n-held-out 4` or another seed."
    )


def test_pairs_of_a_single_prompt_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"^all pairs share one prompt, so none can be held out\. Bring pairs with different prompts\.$"):
        split_pairs([pair(i, "hi") for i in range(9)], 0, 3, seed=0)


def test_asking_for_more_pairs_than_there_are_takes_all() -> None:
    some = [pair(i, f"question {i}") for i in range(9)]
    assert split_pairs(some, 7, 3, seed=0) == split_pairs(some, 0, 3, seed=0)


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    written_bytes = []
    for name in ("one", "two"):
        with open_run(tmp_path / name) as run_dir:
            pairs.run(recipe_from({"seed": 5, "pairs": {"n_pairs": 30}}), run_dir)
            written_bytes.append([run_dir.file(file).read_bytes() for file in ("pairs.jsonl", "held_out.jsonl", "dropped.jsonl")])
    assert written_bytes[0] == written_bytes[1]
    assert len(written_bytes[0][0].splitlines()) == 30
