"""Reference log-probabilities, computed once per pair and base model and kept on disk for every later run."""

import hashlib
import sqlite3
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from unstilted.lm.chat import TokenPair
from unstilted.progress import say

FILE = "references.sqlite"
TABLE = "CREATE TABLE IF NOT EXISTS reference (key TEXT PRIMARY KEY, logps BLOB NOT NULL, sha256 TEXT NOT NULL)"
PATIENCE_S = 60
"""How long to wait while another process writes."""
AT_ONCE = 500
"""Rows asked for in one query; SQLite took 999 at most for years."""


class References:
    """Token log-probabilities of pairs under the base model, by content.

    The key holds what the numbers depend on: the model's fingerprint (weights, tokenizer, template), its precision and the token ids.
    No setting of a training is in it, so another rank, seed, beta or learning rate finds them again. A damaged row counts as missing, a
    damaged file is replaced, and where nothing can be written the numbers stay in memory.
    """

    def __init__(self, path: Path | None, fingerprint: str, precision: str) -> None:
        """path: the database, made when it isn't there; None keeps the numbers in memory only."""
        self.path = path
        self._base = hashlib.sha256(f"{fingerprint}\0{precision}".encode())
        self.known: dict[str, tuple[Tensor, Tensor]] = {}
        """Token log-probabilities of chosen (T,) and rejected (T,) by the pair's key."""
        self._unsaved: dict[str, bytes] = {}

    def key(self, pair: TokenPair) -> str:
        digest = self._base.copy()
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            digest.update(array("q", [len(ids), *ids]))
        return digest.hexdigest()

    def load(self, pairs: Iterable[TokenPair]) -> int:
        """Take what the disk has of these pairs into memory; returns how many of them are known now."""
        pairs_by_key = {self.key(pair): pair for pair in pairs}
        missing = list(pairs_by_key.keys() - self.known.keys())

        def read(database: sqlite3.Connection) -> None:
            for some in (missing[start : start + AT_ONCE] for start in range(0, len(missing), AT_ONCE)):
                asked = ", ".join("?" * len(some))
                for row in database.execute(f"SELECT key, logps, sha256 FROM reference WHERE key IN ({asked})", some):
                    self._take(pairs_by_key[row[0]], *row)

        if self.path is not None and self.path.exists():
            self._use(self.path, read)
        return len(pairs_by_key.keys() & self.known.keys())

    def __contains__(self, pair: TokenPair) -> bool:
        return self.key(pair) in self.known

    def __getitem__(self, pair: TokenPair) -> tuple[Tensor, Tensor]:
        """Token log-probabilities of chosen (T,) and rejected (T,) in float64, on the CPU."""
        return self.known[self.key(pair)]

    def add(self, pairs: Sequence[TokenPair], scores: Sequence[Sequence[Tensor]]) -> None:
        """Keep freshly computed token log-probabilities (chosen, rejected) of some pairs; they reach the disk with the next `flush`."""
        for pair, (chosen, rejected) in zip(pairs, scores, strict=True):
            both = torch.cat((chosen, rejected)).detach().double().cpu()
            key = self.key(pair)
            self.known[key] = (both[: len(pair.chosen)], both[len(pair.chosen) :])
            if bool(both.isfinite().all()):  # what a fault of the machine made must not come back in every later run
                self._unsaved[key] = both.numpy().tobytes()

    def flush(self) -> None:
        """Write what was added, all of it or, when killed, none."""
        rows = [(key, logps, _seal(key, logps)) for key, logps in self._unsaved.items()]

        def write(database: sqlite3.Connection) -> None:
            with database:
                database.executemany("INSERT OR REPLACE INTO reference VALUES (?, ?, ?)", rows)
            self._unsaved.clear()

        if self.path is not None and rows:
            self._use(self.path, write)

    def _use(self, path: Path, work: Callable[[sqlite3.Connection], None]) -> None:
        """Do something with the database. What goes wrong with it is said, and the training goes on without."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(path, timeout=PATIENCE_S)) as database:
                database.text_factory = lambda text: text.decode(errors="replace")  # a damaged text is a row's error, not the file's
                database.execute(TABLE)
                work(database)
        except (sqlite3.OperationalError, OSError) as error:  # locked, read-only, no space: the file itself may be good
            say(f"{path} can't be used ({error}); reference log-probabilities are kept in memory only.")
            self.path = None
        except sqlite3.DatabaseError as error:
            say(f"{path} is damaged ({error}) and made anew; its reference log-probabilities are computed again.")
            for suffix in ("", "-journal", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)

    def _take(self, pair: TokenPair, key: str, logps: object, seal: str) -> None:
        """Keep a row, unless it isn't what was once written for this pair."""
        if not isinstance(logps, bytes) or _seal(key, logps) != seal or len(logps) != 8 * (len(pair.chosen) + len(pair.rejected)):
            return
        both = torch.frombuffer(bytearray(logps), dtype=torch.float64)
        self.known[key] = (both[: len(pair.chosen)], both[len(pair.chosen) :])


def _seal(key: str, logps: bytes) -> str:
    return hashlib.sha256(key.encode() + logps).hexdigest()
