import pickle

from unstilted.errors import UserError


def test_an_error_says_where_what_and_what_to_do_in_one_line() -> None:
    error = UserError("'rejected' is empty.", where="pairs.jsonl line 31", do="Every pair needs both.")
    assert str(error) == "pairs.jsonl line 31: 'rejected' is empty. Every pair needs both."


def test_an_error_leaves_out_the_parts_it_was_not_given() -> None:
    assert str(UserError("the disk is full.")) == "the disk is full."
    assert str(UserError("the disk is full.", do="Free some space.")) == "the disk is full. Free some space."
    assert str(UserError("the disk is full.", where="/runs")) == "/runs: the disk is full."


def test_what_to_do_gets_its_own_line_below_a_list() -> None:
    assert str(UserError("2 bad rows.\n  line 3\n  line 5", do="Mend them.")) == "2 bad rows.\n  line 3\n  line 5\nMend them."


def test_an_error_keeps_its_parts_on_the_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(UserError("what.", where="where", do="Do.")))
    assert (error.what, error.where, error.do) == ("what.", "where", "Do.")
