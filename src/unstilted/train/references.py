"""Reference log-probabilities, computed once per pair and base model and kept on disk for every later run."""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from unstilted.lm.chat import TokenPair
from unstilted.progress import say

FILE = "references.sqlite"


class References:
    """Token log-probabilities of pairs under the base model, by content.

    The key holds what the numbers depend on: the model's fingerprint (weights, tokenizer, template), its precision and the token ids.
    No setting of a training is in it, so another rank, seed, beta or learning rate finds them again. A damaged row counts as missing.
    """

    def __init__(self, path: Path | None, fingerprint: str, precision: str) -> None:
        """path: the database, made when it isn't there; None keeps the numbers in memory only."""
        self.path, self.fingerprint, self.precision = path, fingerprint, precision
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        self._unsaved: dict[str, bytes] = {}

    def key(self, pair: TokenPair) -> str:
        content = [self.fingerprint, self.precision, pair.prompt, pair.chosen, pair.rejected]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def load(self, pairs: Iterable[TokenPair]) -> int:
        """Take what the disk has of these pairs into memory; returns how many of them are known now."""
        pairs = list(pairs)
        if self.path is not None and self.path.exists():
            try:
                with closing(sqlite3.connect(self.path, timeout=60)) as database:
                    for pair in pairs:
                        self._take(
                            pair, database.execute("SELECT logps, sha256 FROM reference WHERE key = ?", (self.key(pair),)).fetchone()
                        )
            except sqlite3.DatabaseError as error:
                say(f"{self.path} can't be read ({error}); its reference log-probabilities are computed again.")
                self.path.unlink(missing_ok=True)
        return sum(pair in self for pair in pairs)

    def __contains__(self, pair: TokenPair) -> bool:
        return self.key(pair) in self._known

    def __getitem__(self, pair: TokenPair) -> tuple[Tensor, Tensor]:
        """Token log-probabilities of chosen (T,) and rejected (T,) in float64, on the CPU."""
        return self._known[self.key(pair)]

    def add(self, pairs: Sequence[TokenPair], scores: Sequence[Sequence[Tensor]]) -> None:
        """Keep freshly computed token log-probabilities (chosen, rejected) of some pairs; they reach the disk with the next `flush`."""
        for pair, (chosen, rejected) in zip(pairs, scores, strict=True):
            both = torch.cat((chosen, rejected)).detach().double().cpu()
            self._known[self.key(pair)] = (both[: len(pair.chosen)], both[len(pair.chosen) :])
            self._unsaved[self.key(pair)] = both.numpy().tobytes()

    def flush(self) -> None:
        """Write what was added, all of it or, when killed, none."""
        rows = [(key, blob, hashlib.sha256(blob).hexdigest()) for key, blob in self._unsaved.items()]
        self._unsaved.clear()
        if self.path is None or not rows:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=60)) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS reference (key TEXT PRIMARY KEY, logps BLOB NOT NULL, sha256 TEXT NOT NULL)")
            database.executemany("INSERT OR REPLACE INTO reference VALUES (?, ?, ?)", rows)

    def _take(self, pair: TokenPair, row: tuple[bytes, str] | None) -> None:
        if row is None or hashlib.sha256(row[0]).hexdigest() != row[1] or len(row[0]) != 8 * (len(pair.chosen) + len(pair.rejected)):
            return
        both = torch.frombuffer(bytearray(row[0]), dtype=torch.float64)
        self._known[self.key(pair)] = (both[: len(pair.chosen)], both[len(pair.chosen) :])
