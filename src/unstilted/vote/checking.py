"""`unstilted vote verify`: whether the log is whole and says the same as the tables."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select

from unstilted.vote import schema
from unstilted.vote.audit import Entry, broken_at
from unstilted.vote.database import open_engine, stored_url, telling_unreachable
from unstilted.vote.freezing import FrozenStudy, load_frozen, registrations
from unstilted.vote.station import vote_body

HEADS = "audit_heads.txt"
"""In the study folder: (sequence number, hash) of the log's end at every start, close and export, against a cut-off end."""


@dataclass(frozen=True)
class Verdict:
    """What was found. No `problems` means that nothing was tampered with after it was logged."""

    n_entries: int
    n_votes: int
    head: str
    problems: tuple[str, ...]


def verify(run: Path) -> Verdict:
    """Check the audit log of a run, its votes, its frozen files and its pre-registration against each other.

    Raises UserError when there is no study or its frozen files were changed.
    """
    frozen, url = load_frozen(run), stored_url(run)
    engine = open_engine(url, is_writer=False)
    try:
        with telling_unreachable(url), engine.connect() as connection:
            return check(connection, frozen, [entry.hash for entry in registrations(run)], read_heads(frozen.folder))
    finally:
        engine.dispose()


def check(connection: Connection, frozen: FrozenStudy, known: Sequence[str], heads: Sequence[tuple[int, str]]) -> Verdict:
    """As `verify`, on an open connection."""
    entries = [Entry(*row) for row in connection.execute(select(schema.audit).order_by(schema.audit.c.seq))]
    rows = connection.execute(
        select(schema.ballots, schema.votes.c.criterion, schema.votes.c.winner, schema.votes.c.seconds)
        .join(schema.votes, schema.votes.c.ballot == schema.ballots.c.id)
        .order_by(schema.votes.c.id)
    ).all()
    problems = [*_chain_problems(entries, heads), *_study_problems(entries, frozen, known), *_vote_problems(entries, rows)]
    return Verdict(len(entries), len(rows), entries[-1].hash if entries else "", tuple(problems))


def _chain_problems(entries: Sequence[Entry], heads: Sequence[tuple[int, str]]) -> Iterator[str]:
    broken = broken_at(entries)
    if broken is not None:
        yield f"the audit log is broken at entry {broken}: it, or the one before, was changed, taken out or slipped in"
    for seq, head in heads:
        if seq > len(entries) or (seq and entries[seq - 1].hash != head):
            yield f"the audit log's entry {seq} is not the one noted in {HEADS}: the log was cut off or made anew"
            return


def _study_problems(entries: Sequence[Entry], frozen: FrozenStudy, known: Sequence[str]) -> Iterator[str]:
    for entry in entries:
        if entry.event in ("study opened", "study changed") and json.loads(entry.body)["registration"] not in known:
            yield f"entry {entry.seq} names a pre-registration that is not in preregistration.json"
        if entry.event == "study opened" and json.loads(entry.body)["items"] != frozen.registration.items_sha256:
            yield "the log was opened for other items"


def _vote_problems(entries: Sequence[Entry], rows: Sequence[Any]) -> Iterator[str]:
    logged, undone = {}, set()
    for entry in entries:
        body = json.loads(entry.body)
        if entry.event == "vote":
            if body["ballot"] in logged:
                yield f"ballot {body['ballot']} is in the log twice"
            logged[body["ballot"]] = body
        elif entry.event == "vote taken back":
            undone.add(body["ballot"])
    kept: dict[str, tuple[Any, dict[str, str]]] = {}
    for row in rows:
        kept.setdefault(row.id, (row, {}))[1][row.criterion] = row.winner
    for ballot, (row, winners) in kept.items():
        if ballot not in logged:
            yield f"ballot {ballot} has votes that the log doesn't know"
        elif vote_body(row, winners, row.seconds) != logged[ballot]:
            yield f"ballot {ballot} differs from what was logged"
        if (row.state == "undone") != (ballot in undone) or row.state not in ("voted", "undone"):
            yield f"ballot {ballot} is '{row.state}', but the log says otherwise"
    for ballot in logged.keys() - kept.keys():
        yield f"the votes of ballot {ballot} are missing"


def note_head(connection: Connection, folder: Path) -> tuple[int, str]:
    """Write the log's present end into the study folder; returns it."""
    last = connection.execute(select(schema.audit.c.seq, schema.audit.c.hash).order_by(schema.audit.c.seq.desc()).limit(1)).one_or_none()
    head = (int(last.seq), str(last.hash)) if last else (0, "")
    with (folder / HEADS).open("a", encoding="ascii") as file:
        file.write(f"{head[0]} {head[1]}\n")
    return head


def read_heads(folder: Path) -> list[tuple[int, str]]:
    file = folder / HEADS
    if not file.is_file():
        return []
    parts = [line.split() for line in file.read_text(encoding="ascii").splitlines()]
    return [(int(part[0]), part[1]) for part in parts if len(part) == 2]
