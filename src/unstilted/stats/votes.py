"""Pairwise votes as columns: read from CSV, JSONL or rows, and checked so that nothing unknown is counted as something known.

Every column is text coded as integers, so a million votes are a few megabytes and every statistic is a `bincount`.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from unstilted.errors import UserError
from unstilted.records import read_json_rows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Codes = NDArray[np.int32]
Mask = NDArray[np.bool_]

WINNERS = ("left", "right", "tie", "both_bad")
LEFT, RIGHT, TIE, BOTH_BAD = range(4)
Kind = Literal["human", "judge", "simulated"]
KINDS: tuple[Kind, ...] = ("human", "judge", "simulated")
REQUIRED = ("rater", "item", "left", "right", "winner")
OPTIONAL = ("order", "criterion", "stratum", "kind", "excluded")
BLINDING = "blinding"
"""The criterion of votes that guess which side is an arm; they are no preferences."""
REPEATED = "repeat, shown for self-consistency"
"""In `excluded`: no fault; the vote tells how steady its rater is."""
TAKEN_BACK, WITHDRAWN = "taken back by the rater", "withdrawn by the rater"
"""In `excluded`: the rater's own wish; counted in no analysis, also not in the one that includes excluded votes."""
CHUNK = 1 << 15


@dataclass(frozen=True, eq=False)
class Column:
    """A text column: row n holds `names[codes[n]]`."""

    codes: Codes
    names: tuple[str, ...]

    def rows(self, chosen: Mask | Ints) -> "Column":
        return Column(self.codes[chosen], self.names)

    def is_(self, name: str) -> Mask:
        """Which rows hold `name`."""
        held: Mask = self.codes == (self.names.index(name) if name in self.names else -1)
        return held

    def present(self) -> list[str]:
        """The names that occur, sorted."""
        return sorted(self.names[code] for code in np.flatnonzero(np.bincount(self.codes, minlength=len(self.names))))


@dataclass(frozen=True, eq=False)
class Votes:
    """N votes on pairs of arms, one entry a vote in every column."""

    rater: Column
    item: Column
    left: Column
    right: Column
    """Left and right share their names: the arms."""
    winner: NDArray[np.int8]
    """LEFT, RIGHT, TIE or BOTH_BAD."""
    criterion: Column
    stratum: Column
    kind: Column
    excluded: Column
    """Why the vote is left out; empty: it counts."""
    order: Ints
    """1-based position in the rater's sitting; 0: not known."""
    numbers: Mapping[str, Floats] = field(default_factory=dict)
    """Covariates that are numbers; NaN where the cell is empty."""
    texts: Mapping[str, Column] = field(default_factory=dict)
    """Covariates that are text."""

    def __len__(self) -> int:
        return len(self.winner)

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that occur, sorted."""
        return tuple(sorted({*self.left.present(), *self.right.present()}))

    def rows(self, chosen: Mask | Ints) -> "Votes":
        """The chosen votes, with the same codes."""
        if chosen.dtype == np.bool_ and chosen.all():
            return self
        parts: dict[str, Any] = {}
        for part in fields(self):
            value = getattr(self, part.name)
            if isinstance(value, Mapping):
                parts[part.name] = {name: _rows(column, chosen) for name, column in value.items()}
            else:
                parts[part.name] = _rows(value, chosen)
        return Votes(**parts)

    def swapped(self, chosen: Mask) -> "Votes":
        """The same votes with left and right exchanged in the chosen rows."""
        winner = np.where(chosen & (self.winner < TIE), 1 - self.winner, self.winner).astype(np.int8)
        left = Column(np.where(chosen, self.right.codes, self.left.codes), self.left.names)
        right = Column(np.where(chosen, self.left.codes, self.right.codes), self.left.names)
        return replace(self, winner=winner, left=left, right=right)

    def between(self, arm: str, other: str) -> "Votes":
        """The votes that compare these two arms."""
        return self.rows((self.left.is_(arm) & self.right.is_(other)) | (self.left.is_(other) & self.right.is_(arm)))

    def gains(self, arm: str) -> Floats:
        """1 for a vote for the arm, 0 against it, 0.5 for none of both, shape (N,); every vote must be on the arm."""
        for_arm = (self.winner == LEFT) == self.left.is_(arm)
        return np.where(self.winner >= TIE, 0.5, for_arm).astype(np.float64)

    def pair(self) -> Ints:
        """One code for each unordered pair of arms, shape (N,)."""
        low, high = np.minimum(self.left.codes, self.right.codes), np.maximum(self.left.codes, self.right.codes)
        return low.astype(np.int64) * len(self.left.names) + high

    def unit(self) -> Ints:
        """One code for each item, pair of arms and criterion: what two raters can agree about; shape (N,)."""
        n_arms = len(self.left.names)
        of_item = self.item.codes.astype(np.int64) * len(self.criterion.names) + self.criterion.codes
        return of_item * n_arms**2 + self.pair()

    def ballot(self) -> Ints:
        """One code for each rater and unit: what a rater decides once; shape (N,)."""
        return self.unit() * len(self.rater.names) + self.rater.codes

    def verdict(self) -> NDArray[np.int8]:
        """The winner told by arm, not by side, shape (N,): 0 the pair's lower code, 1 the higher, TIE, BOTH_BAD."""
        flipped = (self.left.codes > self.right.codes) & (self.winner < TIE)
        return np.where(flipped, 1 - self.winner, self.winner).astype(np.int8)


def _rows(value: Any, chosen: Mask | Ints) -> Any:
    return value.rows(chosen) if isinstance(value, Column) else value[chosen]


def read_votes(path: Path) -> Votes:
    """All votes of a `.csv` or `.jsonl` file.

    Raises UserError naming file and line for a missing column or value, an unknown winner or kind, and equal arms.
    """
    if path.suffix == ".csv":
        return _assemble(_csv_chunks(path), lambda row: f"{path} line {_csv_line(path, row)}", str(path))
    if path.suffix in (".jsonl", ".ndjson"):
        return _assemble(_json_chunks(path), lambda row: f"{path} line {_json_line(path, row)}", str(path))
    raise UserError(f"'{path.suffix}' is no ending of a votes file.", where=str(path), do="Votes are read from .csv and .jsonl files.")


def votes_from_rows(rows: Iterable[Mapping[str, object]], source: str = "votes") -> Votes:
    """Votes from dictionaries with the columns of a votes file; raises UserError naming the row (the first is 1)."""
    return _assemble(_row_chunks(rows), lambda row: f"{source} row {row + 1}", source)


def votes_from_columns(columns: Mapping[str, Sequence[Hashable]], source: str = "votes") -> Votes:
    """Votes from columns of equal length, as of a data frame; raises UserError naming the row (the first is 1)."""
    return _assemble(iter([columns] if columns else []), lambda row: f"{source} row {row + 1}", source)


def first_ballots(votes: Votes) -> Mask:
    """Which votes are a rater's first on their unit, by `order` and then by place in the file; shape (N,).

    Later ones are repeats: they tell how steady the rater is and count for nothing else.
    """
    ballot = votes.ballot()
    by_ballot = np.lexsort((votes.order, ballot)) if votes.order.any() else np.argsort(ballot, kind="stable")
    starts = np.diff(ballot[by_ballot], prepend=-1) != 0
    is_first = np.zeros(len(votes), dtype=np.bool_)
    is_first[by_ballot[starts]] = True
    return is_first


Chunk = Mapping[str, Sequence[Hashable]]
Where = Callable[[int], str]


def _assemble(chunks: Iterator[Chunk], where: Where, source: str) -> Votes:
    """Encode chunk by chunk, then check whole columns; `where` finds a row's line only when there is something to tell."""
    columns, n_rows = _encode(chunks, where)
    if not n_rows:
        raise UserError("there are no votes.", where=source, do="Each row is one vote.")
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        have = ", ".join(columns)
        raise UserError(
            f"there is no column '{missing[0]}', only {have}.", where=source, do=f"Votes need the columns {', '.join(REQUIRED)}."
        )
    for name, column in columns.items():
        _refuse_half_characters(column, name, where)
    for name in ("rater", "item", "left", "right"):
        _refuse_blank(columns[name], name, where)
    left, right = _sharing_names(columns.pop("left"), columns.pop("right"))
    same = np.flatnonzero(left.codes == right.codes)
    if same.size:
        arm = left.names[left.codes[same[0]]]
        raise UserError(f"left and right are both '{arm}'.", where=where(int(same[0])), do="A vote compares two different arms.")
    winner = _one_of(columns.pop("winner"), WINNERS, "winner", where).astype(np.int8)
    constant = Column(np.zeros(n_rows, dtype=np.int32), ("",))
    kind = Column(_one_of(columns.pop("kind", constant), KINDS, "kind", where, empty="human"), KINDS)
    order = _positions(columns.pop("order", constant), where)
    named = {name: columns.pop(name, constant) for name in ("rater", "item", "criterion", "stratum", "excluded")}
    parsed = {name: _as_numbers(column) for name, column in columns.items()}
    numbers = {name: values for name, values in parsed.items() if values is not None}
    texts = {name: column for name, column in columns.items() if name not in numbers}
    return Votes(left=left, right=right, winner=winner, kind=kind, order=order, numbers=numbers, texts=texts, **named)


class _Encoder:
    """Codes of one column while it is read; a value's code is the number of values seen before it."""

    def __init__(self, n_before: int) -> None:
        self.codes: defaultdict[Hashable, int] = defaultdict()
        self.codes.default_factory = self.codes.__len__
        self.parts = [np.full(n_before, self.codes[""], dtype=np.int32)] if n_before else []

    def add(self, values: Sequence[Hashable], n_rows: int) -> None:
        self.parts.append(np.fromiter(map(self.codes.__getitem__, values), np.int32, n_rows))

    def column(self) -> Column:
        """Values that read alike (1 and "1", null and "") become one name."""
        texts = ["" if value is None else str(value) for value in self.codes]
        names: dict[str, int] = {}
        table = np.array([names.setdefault(text, len(names)) for text in texts], dtype=np.int32)
        codes = np.concatenate(self.parts)
        return Column(codes if len(names) == len(texts) else table[codes], tuple(names))


def _encode(chunks: Iterator[Chunk], where: Where) -> tuple[dict[str, Column], int]:
    encoders: dict[str, _Encoder] = {}
    n_rows = 0
    for chunk in chunks:
        n_chunk = len(next(iter(chunk.values())))
        for name in chunk:
            encoders.setdefault(name, _Encoder(n_rows))
        for name, encoder in encoders.items():
            values = chunk[name] if name in chunk else [""] * n_chunk
            try:
                encoder.add(values, n_chunk)
            except TypeError:
                row = next(row for row, value in enumerate(values) if isinstance(value, dict | list))
                what = f"'{name}' holds a list or an object."
                raise UserError(what, where=where(n_rows + row), do="Each column holds text or a number.") from None
        n_rows += n_chunk
    return {name: encoder.column() for name, encoder in encoders.items()}, n_rows


def _refuse_blank(column: Column, name: str, where: Where) -> None:
    blank = np.array([not text.strip() for text in column.names])
    if blank.any():
        row = int(np.flatnonzero(blank[column.codes])[0])
        raise UserError(f"'{name}' is empty.", where=where(row), do="A vote names its rater, its item and both arms.")


def _refuse_half_characters(column: Column, name: str, where: Where) -> None:
    """JSON can spell half of a surrogate pair, which no UTF-8 file takes."""
    try:
        "".join(column.names).encode()
    except UnicodeEncodeError:
        halves = np.array([any("\ud800" <= character <= "\udfff" for character in text) for text in column.names])
        row = int(np.flatnonzero(halves[column.codes])[0])
        raise UserError(f"'{name}' holds half of a character (a lone surrogate).", where=where(row), do="Repair the text.") from None


def _sharing_names(left: Column, right: Column) -> tuple[Column, Column]:
    names = {name: code for code, name in enumerate(dict.fromkeys((*left.names, *right.names)))}
    tables = [np.array([names[name] for name in side.names], dtype=np.int32) for side in (left, right)]
    return Column(tables[0][left.codes], tuple(names)), Column(tables[1][right.codes], tuple(names))


def _one_of(column: Column, allowed: tuple[str, ...], name: str, where: Where, empty: str = "") -> Codes:
    """The column in codes of `allowed`."""
    table = np.array([allowed.index(text or empty) if (text or empty) in allowed else -1 for text in column.names], dtype=np.int32)
    codes = table[column.codes]
    if (table < 0).any():
        row = int(np.flatnonzero(codes < 0)[0])
        text = column.names[column.codes[row]]
        raise UserError(f"'{name}' is '{text}'.", where=where(row), do=f"It must be one of {', '.join(allowed)}.")
    return codes


def _positions(column: Column, where: Where) -> Ints:
    table = np.array([int(text) if text.isascii() and text.isdigit() and int(text) > 0 else 0 if not text else -1 for text in column.names])
    order = table[column.codes]
    if (order < 0).any():
        row = int(np.flatnonzero(order < 0)[0])
        text = column.names[column.codes[row]]
        raise UserError(f"'order' is '{text}'.", where=where(row), do="It is a whole number from 1, or empty.")
    return order.astype(np.int64)


def _as_numbers(column: Column) -> Floats | None:
    """The column as numbers when every cell that isn't empty is one."""
    try:
        table = np.array([float(text) if text else np.nan for text in column.names])
    except ValueError:
        return None
    is_number = np.isfinite(table)
    texts_are_numbers = all(ok or not text for ok, text in zip(is_number, column.names, strict=True))
    return table[column.codes] if is_number.any() and texts_are_numbers else None


def _csv_chunks(path: Path) -> Iterator[Chunk]:
    with _csv_reader(path) as rows:
        header = next(rows, [])
        repeated = [name for name in header if header.count(name) > 1]
        if repeated:
            raise UserError(f"the column '{repeated[0]}' occurs twice.", where=f"{path} line 1", do="Name each column once.")
        n_before = 0
        while block := [row for row in islice(rows, CHUNK) if row]:
            if {len(header)} != set(map(len, block)):
                row = next(row for row, cells in enumerate(block) if len(cells) != len(header))
                what = f"this row has {len(block[row])} cells and the header {len(header)}."
                raise UserError(what, where=f"{path} line {_csv_line(path, n_before + row)}", do="Give each row one cell a column.")
            n_before += len(block)
            yield dict(zip(header, zip(*block, strict=True), strict=True))


class _csv_reader:
    """The rows of a CSV file; what the file can be wrong about becomes a UserError with its line."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError("there is no such file.", where=str(path), do="Check the path.")
        self.path = path

    def __enter__(self) -> "Iterator[list[str]]":
        self.file = self.path.open(encoding="utf-8-sig", newline="")
        self.reader = csv.reader(self.file, strict=True)
        return self.reader

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.file.close()
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"this is not UTF-8 text ({error.reason}).", where=str(self.path), do="Save it as UTF-8.") from None
        if isinstance(error, csv.Error):
            where = f"{self.path} line {self.reader.line_num}"
            raise UserError(f"this is not CSV ({error}).", where=where, do="Check the quotes of this line.") from None


def _csv_line(path: Path, row: int) -> int:
    """The line on which the data row with this index (0: the first below the header) starts."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        starts: list[int] = []
        while len(starts) < row + 2:
            start = reader.line_num + 1
            if next(reader):
                starts.append(start)
        return starts[-1]


def _json_line(path: Path, row: int) -> int:
    return next(islice(read_json_rows(path), row, None))[0]


def _json_chunks(path: Path) -> Iterator[Chunk]:
    """A chunk's lines are parsed as one array, which is faster; what doesn't fit is looked for line by line."""
    if not path.is_file():
        raise UserError("there is no such file.", where=str(path), do="Check the path.")
    with path.open(encoding="utf-8-sig") as file:
        try:
            while lines := list(islice(file, CHUNK)):
                full = [line for line in lines if not line.isspace()]
                rows = json.loads(f"[{','.join(full)}]")
                if len(rows) != len(full) or not all(type(row) is dict for row in rows):
                    _refuse_json(path)
                yield from _row_chunks(rows)
        except (ValueError, RecursionError):
            _refuse_json(path)
            raise


def _refuse_json(path: Path) -> None:
    """Raise UserError for the first line that is no JSON object."""
    for line, row in read_json_rows(path):
        if not isinstance(row, dict):
            raise UserError("this is not a JSON object.", where=f"{path} line {line}", do="Each line holds one vote as a JSON object.")


def _row_chunks(rows: Iterable[Mapping[str, Any]]) -> Iterator[Chunk]:
    rows = iter(rows)
    while block := list(islice(rows, CHUNK)):
        names = dict.fromkeys(name for row in block for name in row)
        yield {name: [row.get(name, "") for row in block] for name in names} or {"rater": [""] * len(block)}
