"""The `pairs` stage: rows in TRL's preference format, from any source, checked one by one and split into training and held-out pairs."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from unstilted.errors import UserError
from unstilted.files import sha256
from unstilted.pairs.formats import Unusable, parse_pair
from unstilted.pairs.source import SourceRow, hub_revision, locate, read_rows
from unstilted.pairs.split import Split, split_pairs
from unstilted.recipe import Recipe
from unstilted.records import Pair, Record, write_jsonl
from unstilted.rundir import RunDir

N_LISTED = 10
"""Bad rows that an error spells out."""


class Dropped(Record):
    """A row of `dropped.jsonl`: one that is no usable pair, and why."""

    source: str
    line: int
    """Line of a JSONL file, or row of a Parquet file or dataset; the first is 1."""
    reason: str
    row: str
    """The line as it was, or the row as JSON."""


@dataclass(frozen=True)
class _BadRow:
    row: SourceRow
    reason: str
    """The same words for the same fault, so that rows can be counted by it."""
    hint: str = ""
    """Which other format this looks like, and how to convert it."""


def sources(recipe: Recipe) -> dict[str, str]:
    """The outside input with its fingerprint: sha256 of files, revision of a hub dataset.

    A hub dataset whose revision can't be asked (offline) goes by id and split alone. Raises UserError when there is no such source.
    """
    table = recipe.pairs
    location = locate(table.source)
    fingerprint = hub_revision(table) if location.kind == "hub" else sha256(location.path)
    return {f"pairs: {table.source}": fingerprint}


def check(recipe: Recipe) -> Split:
    """Read, check and split the whole source, and write nothing; raises UserError for all that `run` would refuse."""
    return _prepare(recipe)[0]


def run(recipe: Recipe, run_dir: RunDir) -> dict[str, Any]:
    """Write `pairs.jsonl`, `held_out.jsonl` and `dropped.jsonl` (rows that are no usable pair; usually empty).

    Raises UserError for a source that can't be read, bad rows under `bad_rows = "refuse"`, and too few pairs.
    """
    split, bad = _prepare(recipe)
    dropped = [Dropped(source=item.row.source, line=item.row.number, reason=item.reason, row=item.row.text) for item in bad]
    write_jsonl(run_dir.file("pairs.jsonl"), split.training)
    write_jsonl(run_dir.file("held_out.jsonl"), split.held_out)
    write_jsonl(run_dir.file("dropped.jsonl"), dropped)
    return {
        "n_pairs": len(split.training),
        "n_held_out": len(split.held_out),
        "source": recipe.pairs.source,
        "dropped": [{"line": item.line, "reason": item.reason} for item in dropped],
    }


def _prepare(recipe: Recipe) -> tuple[Split, list[_BadRow]]:
    table = recipe.pairs
    rows = list(read_rows(table))
    if not rows:
        raise UserError("there are no rows in it.", where=table.source, do="Choose another source of pairs.")
    pairs, bad = _read_pairs(rows)
    if bad and table.bad_rows == "refuse":
        do = "Mend these rows, or leave them out with `--pairs.bad-rows drop`."
        raise UserError(_summary(bad, len(rows)), where=table.source, do=do)
    try:
        return split_pairs(pairs, table.n_pairs, table.n_held_out, recipe.seed), bad
    except UserError as error:
        what = f"{error.what}\n{_summary(bad, len(rows))}" if bad else error.what
        raise UserError(what, where=table.source, do=error.do) from None


def _read_pairs(rows: list[SourceRow]) -> tuple[list[Pair], list[_BadRow]]:
    pairs: list[Pair] = []
    bad: list[_BadRow] = []
    seen_ids: set[str] = set()
    seen_contents: set[tuple[object, ...]] = set()
    for row in rows:
        try:
            pair = parse_pair(row)
            content = (pair.prompt, pair.chosen, pair.rejected)
            if content in seen_contents:
                raise Unusable("prompt, chosen and rejected are those of an earlier row")
            if pair.id in seen_ids:
                raise Unusable("the id is that of an earlier row")
        except Unusable as error:
            bad.append(_BadRow(row, error.reason, error.hint))
            continue
        seen_contents.add(content)
        seen_ids.add(pair.id)
        pairs.append(pair)
    return pairs, bad


def _summary(bad: list[_BadRow], n_rows: int) -> str:
    counts = [f"  {n:>5,} x {reason}" for reason, n in Counter(item.reason for item in bad).most_common()]
    hints = [f"This looks like {hint}." for hint in dict.fromkeys(item.hint for item in bad if item.hint)]
    listed = [f"  {item.row.source}: {item.reason}" for item in bad[:N_LISTED]]
    first = f"The first {N_LISTED}:" if len(bad) > N_LISTED else "They are:"
    return "\n".join([f"{len(bad):,} of {n_rows:,} rows are no usable pair.", *counts, *hints, first, *listed])
