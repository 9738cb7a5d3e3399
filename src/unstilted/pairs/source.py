"""Where rows come from: the shipped starter set, files, folders and hub datasets."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from unstilted.errors import UserError
from unstilted.recipe import PairsTable

JSONL_SUFFIXES = (".jsonl", ".json-lines")
SUFFIXES = (*JSONL_SUFFIXES, ".parquet")
SPLIT_NAMES = {"train", "test", "validation", "valid", "val", "dev", "eval"}


@dataclass(frozen=True)
class Location:
    kind: Literal["starter", "file", "folder", "hub"]
    path: Path


@dataclass(frozen=True)
class SourceRow:
    """One row of the source, not yet looked at."""

    name: str
    """The file's or dataset's name."""
    stem: str
    """What generated ids start with."""
    number: int
    value: object
    """Parsed JSON, or the line's bytes."""
    is_line: bool = False

    @property
    def source(self) -> str:
        return f"{self.name} {'line' if self.is_line else 'row'} {self.number}"

    @property
    def text(self) -> str:
        if isinstance(self.value, bytes):
            return self.value.decode(errors="backslashreplace").rstrip("\r\n")
        return json.dumps(self.value, default=str)


def locate(source: str) -> Location:
    if source == "starter":
        return Location("starter", Path(str(files("unstilted") / "data" / "starter" / "pairs.jsonl")))
    path = Path(source).expanduser()
    if source and path.is_dir():
        return Location("folder", path)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"files of type '{path.suffix}' can't be read.", where=source, do=f"Save it as {' or '.join(SUFFIXES)}.")
        return Location("file", path)
    if path.suffix not in SUFFIXES and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and source[0] not in ".~":
        return Location("hub", path)
    raise UserError(
        "there is no such file.",
        where=source or "pairs.source",
        do="Give 'starter', a .jsonl or .parquet file, a folder, or a hub id 'owner/name'.",
    )


def read_rows(table: PairsTable) -> Iterator[SourceRow]:
    location = locate(table.source)
    path = location.path
    match location.kind:
        case "starter":
            return _file_rows(path, "starter", "starter")
        case "file":
            return _file_rows(path, path.name, path.stem)
        case "folder":
            is_saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
            return _saved_rows(path, table) if is_saved else _folder_rows(path, table)
        case "hub":
            return _hub_rows(table)


def _file_rows(path: Path, name: str, stem: str) -> Iterator[SourceRow]:
    return _jsonl_rows(path, name, stem) if path.suffix in JSONL_SUFFIXES else _parquet_rows(path, name, stem)


def _jsonl_rows(path: Path, name: str, stem: str) -> Iterator[SourceRow]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield SourceRow(name, stem, number, line, is_line=True)


def _parquet_rows(path: Path, name: str, stem: str) -> Iterator[SourceRow]:
    _require_libraries()
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"this Parquet file can't be read ({error}).", where=str(path), do="Write it again.") from None
    for number, row in enumerate(rows, start=1):
        yield SourceRow(name, stem, number, row)


def _folder_rows(folder: Path, table: PairsTable) -> Iterator[SourceRow]:
    """Rows of the folder's files of this split; files whose names tell no split count when none does."""
    names = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix in SUFFIXES]
    splits = {name: _splits_named_by(name) for name in names}
    chosen = [name for name in names if table.split in splits[name] or not any(splits.values())]
    if not chosen:
        found = ", ".join(name.as_posix() for name in names) or "none"
        raise UserError(
            f"no {' or '.join(SUFFIXES)} file of split '{table.split}' is in this folder (found: {found}).",
            where=table.source,
            do="Name another with `--pairs.split`, or give the file itself.",
        )
    for name in chosen:
        yield from _file_rows(folder / name, f"{folder.name}/{name.as_posix()}", name.with_suffix("").as_posix())


def _splits_named_by(name: Path) -> set[str]:
    """Splits in a file's name: 'train_prefs' for data/train_prefs-00000-of-00001.parquet, 'test' for my-test.jsonl, often none."""
    shard = re.fullmatch(r"(.+)-\d{5}-of-\d{5}", name.stem)
    words = set(re.split(r"[^a-z0-9]+", (shard[1] if shard else name.with_suffix("").as_posix()).lower()))
    named = words & SPLIT_NAMES
    return {shard[1]} if shard and named else named


def _saved_rows(folder: Path, table: PairsTable) -> Iterator[SourceRow]:
    """Rows of what `datasets.save_to_disk` left."""
    _require_libraries()
    import datasets

    try:
        saved: Any = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises whatever its parts raise
        raise UserError(f"this saved dataset can't be read ({_first_line(error)}).", where=table.source, do="Save it again.") from None
    if isinstance(saved, datasets.DatasetDict):
        if table.split not in saved:
            raise UserError(
                f"there is no split '{table.split}'.", where=table.source, do=f"Set `--pairs.split` to one of: {', '.join(saved)}."
            )
        saved = saved[table.split]
    for number, row in enumerate(saved, start=1):
        yield SourceRow(folder.name, folder.name, number, row)


def _hub_rows(table: PairsTable) -> Iterator[SourceRow]:
    _require_libraries()
    import datasets

    try:
        dataset: Any = datasets.load_dataset(table.source, split=table.split)
    except Exception as error:  # offline, gated, unknown, no such split, no such configuration: each comes as another class
        raise UserError(
            f"there is no such file or folder here, and the hub didn't give a dataset of this name ({_first_line(error)}).",
            where=table.source,
            do=f"Check the name and `--pairs.split {table.split}`; offline, download it elsewhere and give the .parquet or .jsonl file.",
        ) from None
    for number, row in enumerate(dataset, start=1):
        yield SourceRow(table.source, table.source.split("/")[1], number, row)


def hub_revision(table: PairsTable) -> str:
    _require_libraries()
    from huggingface_hub import HfApi

    try:
        return f"{HfApi().dataset_info(table.source, timeout=5).sha}@{table.split}"
    except Exception:  # the exception classes depend on the client's version, and what is really wrong shows when it is loaded
        return f"hub:{table.source}@{table.split}"


def _require_libraries() -> None:
    if find_spec("datasets") is None:
        raise UserError("reading this source needs the library 'datasets'.", do="Install it: `pip install 'unstilted[run]'`.")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
