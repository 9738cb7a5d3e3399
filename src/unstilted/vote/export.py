"""The votes as rows: for the statistics, as CSV or Parquet, and as preference pairs for the next round of training.

`role` tells what a row is: `main` rows are the study; `repeat` rows measure self-consistency; `blinding` rows answer the closing
question (criterion `blinding`). Rows that must not be counted say why in `excluded`; nothing is left out in silence.
"""

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select

from unstilted.errors import UserError
from unstilted.files import whole_file
from unstilted.style import words
from unstilted.vote import schema
from unstilted.vote.assignment import COUNTED
from unstilted.vote.database import open_engine, stored_url, telling_unreachable
from unstilted.vote.flags import RaterRecord, reasons
from unstilted.vote.freezing import FrozenStudy, load_frozen
from unstilted.vote.station import is_right

Vote = dict[str, object]
COLUMNS = (
    "rater",
    "item",
    "left",
    "right",
    "winner",
    "order",
    "criterion",
    "stratum",
    "domain",
    "left_words",
    "right_words",
    "seconds",
    "excluded",
    "kind",
    "role",
)
_GOLD = ("training", "qualification", "attention")


@dataclass(frozen=True)
class RaterQuality:
    """A rater as the admin page shows them."""

    rater: str
    stratum: str
    state: str
    record: RaterRecord
    reasons: tuple[str, ...]


def run_votes(run: Path) -> list[Vote]:
    """Every vote that was ever cast on the arms of a run's study, as rows with the keys of `COLUMNS`, in the order of casting.

    Answers to gold items compare no arms and are not among them; what they led to stands in `excluded`.
    `order` counts a rater's counted pages from 1; `seconds` is empty where the clock was set meanwhile. Raises UserError when there is no
    study or its database can't be read.
    """
    frozen, url = load_frozen(run), stored_url(run)
    engine = open_engine(url, is_writer=False)
    try:
        with telling_unreachable(url), engine.connect() as connection:
            return study_votes(connection, frozen)
    finally:
        engine.dispose()


def export_file(run: Path, file: Path) -> int:
    """Write a run's votes as the file's ending says; returns the number of rows. Raises UserError for an unknown ending."""
    votes, frozen = run_votes(run), load_frozen(run)
    content: bytes
    match file.suffix:
        case ".csv":
            content, n_rows = to_csv(votes).encode(), len(votes)
        case ".parquet":
            content, n_rows = to_parquet(votes), len(votes)
        case ".jsonl":
            lines = list(to_pairs(votes, frozen))
            content, n_rows = "".join(f"{line}\n" for line in lines).encode(), len(lines)
        case _:
            raise UserError(f"'{file.suffix}' is no format of ours.", where=str(file), do="Use .csv, .parquet or .jsonl.")
    with whole_file(file) as part:
        part.write_bytes(content)
    return n_rows


def study_votes(connection: Connection, frozen: FrozenStudy) -> list[Vote]:
    """As `run_votes`, on an open connection."""
    rows = _rows(connection)
    excluded = {quality.rater: "; ".join(quality.reasons) for quality in rater_quality(connection, frozen, rows)}
    states = {row.rater: row.rater_state for row in rows}
    first = min((row.position for row in rows if row.role in COUNTED), default=0)
    return [_vote(row, frozen, excluded[row.rater], states[row.rater], first) for row in rows if row.role not in _GOLD]


def rater_quality(connection: Connection, frozen: FrozenStudy, rows: Sequence[Any] | None = None) -> list[RaterQuality]:
    """Every rater with what the rules look at and what they find."""
    by_rater: dict[str, list[Any]] = defaultdict(list)
    for row in _rows(connection) if rows is None else rows:
        if row.criterion == frozen.study.criteria[0].name and row.state == "voted":
            by_rater[row.rater].append(row)
    found = []
    for rater in connection.execute(select(schema.raters).order_by(schema.raters.c.joined_at, schema.raters.c.id)):
        record = rater_record(by_rater[rater.id], frozen)
        found.append(RaterQuality(rater.id, rater.stratum, rater.state, record, tuple(reasons(record, frozen.study.checks))))
    return found


def rater_record(rows: Iterable[Any], frozen: FrozenStudy) -> RaterRecord:
    """What the rules look at, from one rater's votes on the primary criterion."""
    rows = list(rows)
    main = [row for row in rows if row.role == "main"]
    first = {row.item: row for row in main}
    return RaterRecord(
        attention=tuple(is_right(frozen.gold[row.item], row.left_arm, row.winner) for row in rows if row.role == "attention"),
        seconds=tuple(row.seconds for row in main if row.seconds >= 0),
        winners=tuple(row.winner for row in main),
        repeats=tuple(_winning_arm(row) == _winning_arm(first[row.item]) for row in rows if row.role == "repeat" and row.item in first),
    )


def _rows(connection: Connection) -> Sequence[Any]:
    ballots, votes, raters = schema.ballots.c, schema.votes.c, schema.raters.c
    return connection.execute(
        select(
            schema.ballots,
            votes.criterion,
            votes.winner,
            votes.seconds,
            raters.stratum,
            raters.state.label("rater_state"),
        )
        .join(schema.votes, votes.ballot == ballots.id)
        .join(schema.raters, raters.id == ballots.rater)
        .order_by(votes.id)
    ).all()


def _vote(row: Any, frozen: FrozenStudy, rater_reasons: str, rater_state: str, first: int) -> Vote:
    item = frozen.items[row.item]
    excluded = rater_reasons
    if rater_state == "withdrawn":
        excluded = "withdrawn by the rater"
    if row.role == "repeat":
        excluded = "repeat, shown for self-consistency"
    if row.state == "undone":
        excluded = "taken back by the rater"
    return {
        "rater": row.rater,
        "item": row.item,
        "left": row.left_arm,
        "right": row.right_arm,
        "winner": row.winner,
        "order": row.position - first + 1,
        "criterion": row.criterion,
        "stratum": row.stratum,
        "domain": item.domain,
        "left_words": len(words(item.replies[row.left_arm])),
        "right_words": len(words(item.replies[row.right_arm])),
        "seconds": row.seconds if row.seconds >= 0 else "",
        "excluded": excluded,
        "kind": "human",
        "role": row.role,
    }


def _winning_arm(row: Any) -> str:
    return str({"left": row.left_arm, "right": row.right_arm}.get(row.winner, row.winner))


def to_csv(votes: Iterable[Vote]) -> str:
    """RFC 4180 with a header; values that a spreadsheet would run as a formula can't occur but in ids, which are ours."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(votes)
    return out.getvalue()


def to_parquet(votes: Sequence[Vote]) -> bytes:
    """The same columns, typed; an unknown time is null. Needs pyarrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole, real = {"order", "left_words", "right_words"}, {"seconds"}
    arrays = {
        name: pa.array(
            [None if name in real and vote[name] == "" else vote[name] for vote in votes],
            type=pa.int32() if name in whole else pa.float64() if name in real else pa.string(),
        )
        for name in COLUMNS
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(arrays), sink)
    return sink.getvalue()


def to_pairs(votes: Iterable[Vote], frozen: FrozenStudy) -> Iterator[str]:
    """Lines of JSON in TRL's conversational preference format: for each prompt and pair of arms that one arm won by majority.

    Only counted votes on the primary criterion; a pair without a majority gives no line.
    """
    counts: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    for vote in votes:
        if vote["role"] == "main" and not vote["excluded"] and vote["criterion"] == frozen.study.criteria[0].name:
            first, second = sorted((str(vote["left"]), str(vote["right"])))
            counts[str(vote["item"]), first, second][str(vote.get(str(vote["winner"]), ""))] += 1
    for (item, first, second), won in counts.items():
        if won[first] != won[second]:
            chosen, rejected = (first, second) if won[first] > won[second] else (second, first)
            yield json.dumps(_pair(frozen, item, chosen, rejected, won), ensure_ascii=False)


def _pair(frozen: FrozenStudy, item: str, chosen: str, rejected: str, won: Mapping[str, int]) -> dict[str, object]:
    shown = frozen.items[item]
    total = sum(won.values())
    return {
        "id": f"{item}-{chosen}-{rejected}",
        "prompt": [{"role": "user", "content": shown.prompt}],
        "category": shown.domain,
        "chosen": [{"role": "assistant", "content": shown.replies[chosen]}],
        "rejected": [{"role": "assistant", "content": shown.replies[rejected]}],
        "source": f"human votes: {won[chosen]} of {total} for {chosen}, {won[rejected]} for {rejected}",
    }
