import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from unstilted.errors import UserError
from unstilted.records import HeldOut, Measure, Measures, Message, Pair, TrainPoint, parse_row, read_json_rows, read_jsonl, write_jsonl

ROW = {
    "id": "a",
    "prompt": [{"role": "user", "content": "hi"}],
    "chosen": [{"role": "assistant", "content": "hey"}],
    "rejected": [{"role": "assistant", "content": "Greetings."}],
}


def refusal(tmp_path: Path, *lines: str | bytes) -> str:
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    with pytest.raises(UserError) as caught:
        read_jsonl(file, Pair)
    return str(caught.value).removeprefix(str(tmp_path) + "/")


def test_pairs_are_read_as_messages_with_their_texts_at_hand(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(ROW) + "\n")
    (pair,) = read_jsonl(file, Pair)
    assert (pair.text, pair.chosen_text, pair.rejected_text) == ("hi", "hey", "Greetings.")


def test_text_that_is_no_json_is_refused_with_file_line_and_excerpt(tmp_path: Path) -> None:
    assert refusal(tmp_path, json.dumps(ROW), "", "{'id': 'a'}") == (
        "pairs.jsonl line 3: this is not JSON (Expecting property name enclosed in double quotes): {'id': 'a'} "
        "Each line must hold one JSON object."
    )


def test_json_that_python_itself_refuses_is_named_by_line_too(tmp_path: Path) -> None:
    assert refusal(tmp_path, "1" * 5000).startswith("pairs.jsonl line 1: this is not JSON (Exceeds the limit (4300 digits)")
    assert refusal(tmp_path, "[" * 100_000).startswith("pairs.jsonl line 1: this is not JSON (maximum recursion depth exceeded")


def test_a_missing_field_is_named_with_file_and_line(tmp_path: Path) -> None:
    row = {name: value for name, value in ROW.items() if name != "rejected"}
    assert refusal(tmp_path, json.dumps(ROW), json.dumps(row)) == (
        "pairs.jsonl line 2: 'rejected': field required. A Pair needs: id, prompt, chosen, rejected."
    )


def test_an_unknown_field_is_refused_and_not_lost(tmp_path: Path) -> None:
    assert refusal(tmp_path, json.dumps(ROW | {"catgory": "work"})) == (
        "pairs.jsonl line 1: 'catgory': extra inputs are not permitted. A Pair needs: id, prompt, chosen, rejected."
    )


def test_a_number_is_not_taken_for_text(tmp_path: Path) -> None:
    assert refusal(tmp_path, json.dumps(ROW | {"id": 7})) == (
        "pairs.jsonl line 1: 'id': input should be a valid string. A Pair needs: id, prompt, chosen, rejected."
    )


def test_text_is_not_taken_for_a_number() -> None:
    with pytest.raises(UserError, match=r"^line 1: 'loss': input should be a valid number\. A HeldOut needs: loss, margin, accuracy, "):
        parse_row(dict.fromkeys(HeldOut.model_fields, 0.0) | {"loss": "0.5"}, HeldOut, "line 1")


def test_an_unknown_role_is_named_by_its_place_in_the_row(tmp_path: Path) -> None:
    assert refusal(tmp_path, json.dumps(ROW | {"prompt": [{"role": "human", "content": "hi"}]})) == (
        "pairs.jsonl line 1: 'prompt.0.role': input should be 'system', 'user' or 'assistant'. A Pair needs: id, prompt, chosen, rejected."
    )


def test_a_line_that_holds_no_object_is_called_that(tmp_path: Path) -> None:
    assert refusal(tmp_path, "[1]") == "pairs.jsonl line 1: this is not a JSON object. A Pair needs: id, prompt, chosen, rejected."


def test_half_of_a_cut_emoji_is_refused_when_read_and_not_when_written_much_later() -> None:
    row = ROW | {"chosen": [{"role": "assistant", "content": "nice \ud83d"}]}
    with pytest.raises(UserError, match=r"line 9: 'chosen\.0\.content': value error, the text holds half of a character"):
        parse_row(row, Pair, "line 9")


def test_bytes_that_are_no_utf8_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, b'{"id": "\xff"}') == "pairs.jsonl: this is not UTF-8 text (invalid start byte). Save it as UTF-8."


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.jsonl: there is no such file\. Check the path\.$"):
        read_jsonl(tmp_path / "nothing.jsonl", Pair)


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n')
    assert list(read_json_rows(file)) == [(1, {"a": 1}), (3, {"a": 2})]


def test_a_number_that_was_not_measured_cannot_be_recorded() -> None:
    with pytest.raises(ValidationError, match="finite number"):
        HeldOut(loss=float("nan"), margin=0.0, accuracy=0.0, chosen_logp_change=0.0, rejected_logp_change=0.0)


def test_nothing_is_written_for_what_a_step_did_not_measure(tmp_path: Path) -> None:
    point = TrainPoint(step=1, n_steps=2, n_pairs=8, loss=0.5, margin=0.0, learning_rate=1e-4, gradient_norm=1.0)
    write_jsonl(tmp_path / "train.jsonl", [point])
    assert "null" not in (tmp_path / "train.jsonl").read_text()
    assert read_jsonl(tmp_path / "train.jsonl", TrainPoint) == [point]


def test_a_failing_row_leaves_the_old_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "messages.jsonl"
    write_jsonl(file, [Message(role="user", content="old")])
    with pytest.raises(ZeroDivisionError):
        write_jsonl(file, (Message(role="user", content=str(1 // n)) for n in (1, 0)))
    assert read_jsonl(file, Message) == [Message(role="user", content="old")]


def test_a_measure_is_found_by_its_name() -> None:
    first, second = (Measure(name=name, title="", explanation="", unit="", arms={}, change={}) for name in ("length", "emoji"))
    measures = Measures.model_construct(measures=[first, second])
    assert measures.by_name("emoji") is second


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(texts, texts, texts, texts)
def test_any_text_survives_writing_and_reading(
    tmp_path_factory: pytest.TempPathFactory, id: str, prompt: str, chosen: str, topic: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    pair = Pair(
        id=id,
        prompt=(Message(role="system", content=topic), Message(role="user", content=prompt)),
        topic=topic,
        chosen=(Message(role="assistant", content=chosen),),
        rejected=(Message(role="assistant", content=prompt),),
    )
    write_jsonl(file, [pair, pair])
    assert read_jsonl(file, Pair) == [pair, pair]
