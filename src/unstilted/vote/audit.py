"""The audit log: each entry's hash covers the entry before it, so that no past entry can be changed, taken out or slipped in."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

GENESIS = "0" * 64


@dataclass(frozen=True)
class Entry:
    """One event; `at` is Unix time in seconds."""

    seq: int
    at: float
    event: str
    body: str
    hash: str


def canonical(body: Mapping[str, object]) -> str:
    return json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def entry_after(previous: Entry | None, at: float, event: str, body: Mapping[str, object]) -> Entry:
    """The next entry of a log that ends with `previous`."""
    seq, text = (previous.seq + 1 if previous else 1), canonical(body)
    return Entry(seq, at, event, text, _hash(previous.hash if previous else GENESIS, seq, at, event, text))


def broken_at(entries: Iterable[Entry]) -> int | None:
    """Sequence number of the first entry that doesn't follow from the one before it; None for a whole chain."""
    expected, before = 1, GENESIS
    for entry in entries:
        if entry.seq != expected or entry.hash != _hash(before, entry.seq, entry.at, entry.event, entry.body):
            return expected
        expected, before = expected + 1, entry.hash
    return None


def _hash(before: str, seq: int, at: float, event: str, body: str) -> str:
    return hashlib.sha256(f"{before}\n{seq}\n{at!r}\n{event}\n{body}".encode()).hexdigest()
