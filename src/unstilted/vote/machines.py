"""Votes that no person cast: where they are kept, apart from people's, and that none of them passes as a person's."""

import hashlib
import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from unstilted.errors import UserError
from unstilted.records import Record, read_json_rows
from unstilted.vote.freezing import FrozenStudy, Registration, load_frozen
from unstilted.vote.items import read_gold, take_items
from unstilted.vote.study import Study, load_study

JUDGE_VOTES, SIMULATED_VOTES = "judge.votes.jsonl", "simulated.votes.jsonl"
KIND_OF = {JUDGE_VOTES: "judge", SIMULATED_VOTES: "simulated"}
JUDGES = "judges.json"
"""In the run folder: how each judge did, question by question."""


class JudgeSummary(Record):
    """One judge on one criterion. A unit is an item and a pair of arms, asked with the sides both ways."""

    judge: str
    criterion: str
    n_units: int
    n_named: int
    """Units on which it named the same arm both ways."""
    n_ties: int
    """Units that it called a tie both ways."""
    n_inconsistent: int
    """Units whose verdict changed with the sides."""
    n_always_left: int
    """Of these, units on which it said `left` both ways."""
    n_always_right: int
    n_unparsable: int
    """Units with an answer, in at least one order, that is no verdict; never counted as a tie."""
    is_own_arm: bool
    """The judge is the model whose replies it judges."""
    words: str


def machine_votes(run: Path) -> list[dict[str, object]]:
    """All votes of judges and simulated raters of a run; raises UserError for a row that claims another kind than its file's."""
    votes: list[dict[str, object]] = []
    for name, kind in KIND_OF.items():
        for line, row in read_json_rows(run / name) if (run / name).exists() else ():
            if not isinstance(row, dict) or row.get("kind") != kind:
                raise UserError(f"this row is not of kind '{kind}'.", where=f"{run / name} line {line}", do="Make the file anew.")
            votes.append(row)
    return votes


def read_judges(run: Path) -> list[JudgeSummary]:
    """How each judge did; empty where none was asked."""
    file = run / JUDGES
    if not file.exists():
        return []
    try:
        return TypeAdapter(list[JudgeSummary]).validate_json(file.read_bytes())
    except ValidationError as error:
        raise UserError(f"this can't be read ({error.errors()[0]['msg'].lower()}).", where=str(file), do="Ask the judge again.") from None


def study_of(run: Path) -> FrozenStudy:
    """The frozen study of a run, or the one that would be frozen now; freezes nothing.

    Raises UserError for a study that can't be done with this run's replies.
    """
    if (run / "vote" / "preregistration.json").exists():
        return load_frozen(run)
    file = run / "study.toml"
    study = load_study(file) if file.is_file() else Study()
    taken, gold = take_items(study, run, run), read_gold(study, run)
    registration = Registration(
        version=0,
        frozen="",
        study=json.loads(study.model_dump_json()),
        items_sha256=hashlib.sha256("\n".join(item.model_dump_json() for item in taken.items).encode()).hexdigest(),
        gold_sha256="",
        n_items=len(taken.items),
        n_identical=taken.n_identical,
        n_incomplete=taken.n_incomplete,
    ).hashed()
    items = {item.id: item for item in taken.items}
    return FrozenStudy(run / "vote", study, items, {item.id: item for item in gold}, registration)
