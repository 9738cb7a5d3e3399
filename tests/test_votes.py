import json
from pathlib import Path

import numpy as np
import pytest

from unstilted.errors import UserError
from unstilted.stats.votes import BOTH_BAD, CHUNK, LEFT, RIGHT, TIE, first_ballots, read_votes, votes_from_columns, votes_from_rows

HEADER = "rater,item,left,right,winner"


def write(folder: Path, text: str, name: str = "votes.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def row(rater: object = "r1", item: object = "i1", left: str = "base", right: str = "tuned", winner: str = "right", **more: object) -> dict:
    return {"rater": rater, "item": item, "left": left, "right": right, "winner": winner, **more}


def test_a_csv_file_becomes_columns(tmp_path: Path) -> None:
    text = f"{HEADER},order,criterion,stratum,kind,excluded,left_words,domain\n"
    text += "r1,i1,base,tuned,left,1,warm,open,human,,12,art\n\n"
    text += 'r2,"i,2",tuned,base,both_bad,,,panel,,too fast,,"a ""b"""\n'
    votes = read_votes(write(tmp_path, text))
    assert len(votes) == 2
    assert votes.winner.tolist() == [LEFT, BOTH_BAD]
    assert votes.order.tolist() == [1, 0]
    assert [votes.item.names[code] for code in votes.item.codes] == ["i1", "i,2"]
    assert votes.arms == ("base", "tuned")
    assert votes.kind.present() == ["human"]
    assert votes.excluded.is_("too fast").tolist() == [False, True]
    assert votes.numbers["left_words"][0] == 12
    assert np.isnan(votes.numbers["left_words"][1])
    assert votes.texts["domain"].present() == ['a "b"', "art"]


def test_csv_jsonl_and_rows_hold_the_same_votes(tmp_path: Path) -> None:
    rows = [row(rater=7, winner="tie", left_words=3), row(rater=8, left="tuned", right="base"), row(criterion=None, left_words=4)]
    lines = "".join(json.dumps(each) + "\n" for each in rows)
    csv_text = f"{HEADER},left_words\n7,i1,base,tuned,tie,3\n8,i1,tuned,base,right,\nr1,i1,base,tuned,right,4\n"
    for votes in (read_votes(write(tmp_path, lines, "v.jsonl")), read_votes(write(tmp_path, csv_text)), votes_from_rows(rows)):
        assert votes.winner.tolist() == [TIE, RIGHT, RIGHT]
        assert [votes.rater.names[code] for code in votes.rater.codes] == ["7", "8", "r1"]
        assert [votes.left.names[code] for code in votes.left.codes] == ["base", "tuned", "base"]
        assert votes.numbers["left_words"].tolist() == pytest.approx([3, np.nan, 4], nan_ok=True)
        assert votes.criterion.present() == [""]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ("r2,i1,base,tuned,draw", "line 3: 'winner' is 'draw'. It must be one of left, right, tie, both_bad."),
        ("r2,i1,base,tuned,", "line 3: 'winner' is ''."),
        ("r2,i1,base,tuned,Left", "line 3: 'winner' is 'Left'."),
        ("r2,i1,base,base,left", "line 3: left and right are both 'base'."),
        (" ,i1,base,tuned,left", "line 3: 'rater' is empty."),
        ("r2,,base,tuned,left", "line 3: 'item' is empty."),
        ("r2,i1,base,tuned", "line 3: this row has 4 cells and the header 5."),
        ('r2,i1,base,"tuned,left', "line 3: this is not CSV (unexpected end of data)."),
    ],
)
def test_a_wrong_row_is_refused_with_its_line(tmp_path: Path, bad: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        read_votes(write(tmp_path, f"{HEADER}\nr1,i1,base,tuned,left\n{bad}\n"))
    assert told in str(error.value)
    assert str(tmp_path / "votes.csv") in str(error.value)


def test_the_line_counts_blank_lines_and_line_breaks_in_cells_and_holds_behind_the_first_chunk(tmp_path: Path) -> None:
    good = "r1,i1,base,tuned,left\n" * (CHUNK + 10)
    with pytest.raises(UserError, match=f"line {CHUNK + 15}: 'winner' is 'x'"):
        read_votes(write(tmp_path, f'{HEADER}\n\n"r\n1",i1,base,tuned,left\n{good}r1,i1,base,tuned,x\n'))
    lines = (json.dumps(row()) + "\n") * (CHUNK + 10)
    with pytest.raises(UserError, match=f"line {CHUNK + 12}: 'winner' is 'x'"):
        read_votes(write(tmp_path, lines + "\n" + json.dumps(row(winner="x")) + "\n", "v.jsonl"))


def test_a_column_that_appears_late_is_empty_before(tmp_path: Path) -> None:
    lines = (json.dumps(row()) + "\n") * CHUNK + json.dumps(row(stratum="late", left_words=5)) + "\n" + json.dumps(row()) + "\n"
    votes = read_votes(write(tmp_path, lines, "v.jsonl"))
    assert votes.stratum.is_("late").nonzero()[0].tolist() == [CHUNK]
    assert np.isnan(votes.numbers["left_words"]).sum() == CHUNK + 1


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        ("rater,item,left,right\nr,i,a,b\n", "v.csv", "there is no column 'winner', only rater, item, left, right."),
        (f"{HEADER},rater\n", "v.csv", "the column 'rater' occurs twice."),
        (f"{HEADER}\n", "v.csv", "there are no votes."),
        ("", "v.csv", "there are no votes."),
        ("", "v.jsonl", "there are no votes."),
        ("{}\n", "v.jsonl", "'item'"),
        ("[1]\n", "v.jsonl", "line 1: this is not a JSON object."),
        ("{\n", "v.jsonl", "line 1: this is not JSON"),
        (json.dumps(row(covariates={"a": 1})) + "\n", "v.jsonl", "line 1: 'covariates' holds a list or an object."),
        (json.dumps(row(order=0)) + "\n", "v.jsonl", "line 1: 'order' is '0'."),
        (json.dumps(row(order=1.5)) + "\n", "v.jsonl", "line 1: 'order' is '1.5'."),
        (json.dumps(row(kind="robot")) + "\n", "v.jsonl", "line 1: 'kind' is 'robot'. It must be one of human, judge, simulated."),
        (json.dumps(row(rater="\ud83d")) + "\n", "v.jsonl", "half of a character"),
        ("", "v.xlsx", "'.xlsx' is no ending of a votes file."),
    ],
)
def test_a_file_that_holds_no_votes_is_refused(tmp_path: Path, text: str, name: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        read_votes(write(tmp_path, text, name))
    assert told in str(error.value)


def test_other_encodings_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    path.write_bytes(f"{HEADER}\nr\xe9,i,a,b,left\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_votes(path)
    with pytest.raises(UserError, match="no such file"):
        read_votes(tmp_path / "none.csv")


def test_rows_are_named_by_their_number() -> None:
    with pytest.raises(UserError, match="export row 2: 'rater' is empty"):
        votes_from_rows([row(), row(rater=None)], "export")


def test_columns_give_the_same_votes_as_rows() -> None:
    rows = [row(rater=k % 3, winner=winner, left_words=k) for k, winner in enumerate(("left", "tie", "right", "both_bad"))]
    votes = votes_from_columns({name: [each[name] for each in rows] for name in rows[0]})
    expected = votes_from_rows(rows)
    assert (votes.ballot() == expected.ballot()).all()
    assert (votes.winner == expected.winner).all()
    assert votes.numbers["left_words"].tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="there are no votes"):
        votes_from_columns({})
    with pytest.raises(UserError, match="frame row 2: 'winner' is 'draw'"):
        votes_from_columns({**{name: [each[name] for each in rows] for name in rows[0]}, "winner": ["left", "draw", "tie", "tie"]}, "frame")


def test_a_numeric_column_with_one_word_in_it_is_text() -> None:
    votes = votes_from_rows([row(left_words=3), row(left_words="many"), row(n="inf")])
    assert sorted(votes.texts) == ["left_words", "n"]


def test_swapping_sides_keeps_the_verdict_and_the_unit() -> None:
    votes = votes_from_rows([row(winner=winner) for winner in ("left", "right", "tie", "both_bad")])
    swapped = votes.swapped(np.array([True, True, True, False]))
    assert swapped.winner.tolist() == [RIGHT, LEFT, TIE, BOTH_BAD]
    assert (swapped.verdict() == votes.verdict()).all()
    assert (swapped.unit() == votes.unit()).all()


def test_a_rater_counts_once_on_an_item_a_pair_and_a_criterion_and_the_earliest_order_decides() -> None:
    rows = [
        row(order=9),
        row(order=2, winner="left"),
        row(order=1, criterion="warm"),
        row(order=3, right="other"),
        row(order=4, rater="r2"),
        row(order=8, left="tuned", right="base"),
        row(order=5, item="i2"),
        row(order=5, item="i2"),
    ]
    assert first_ballots(votes_from_rows(rows)).tolist() == [False, True, True, True, True, False, True, False]
