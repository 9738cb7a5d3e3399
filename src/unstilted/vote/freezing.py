"""The study folder `vote/` of a run: frozen study, items and gold, and the pre-registration that names their hashes."""

import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from unstilted.errors import UserError
from unstilted.files import sha256, write_text
from unstilted.records import Record, parse_json, parse_row, read_jsonl, write_jsonl
from unstilted.vote.ballots import Signer
from unstilted.vote.items import GoldItem, Item, read_gold, take_items
from unstilted.vote.study import Study, load_study, study_from


class Registration(Record):
    """One version of the pre-registration; `hash` covers everything else in it, and `previous` chains the versions."""

    version: int
    frozen: str
    """UTC time."""
    study: dict[str, Any]
    items_sha256: str
    gold_sha256: str
    n_items: int
    n_identical: int
    n_incomplete: int
    changed: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Settings that differ from the version before."""
    previous: str = ""
    hash: str = ""

    def hashed(self) -> "Registration":
        return self.model_copy(update={"hash": _hash(self)})


@dataclass(frozen=True)
class FrozenStudy:
    """What the server, the export and the checks read."""

    folder: Path
    study: Study
    items: dict[str, Item]
    gold: dict[str, GoldItem]
    registration: Registration

    def gold_of(self, role: str) -> list[GoldItem]:
        return [item for item in self.gold.values() if item.role == role]


@dataclass(frozen=True)
class Secrets:
    """What nobody else may know."""

    signer: Signer
    admin_token: str


def freeze(run: Path, study_file: Path | None) -> FrozenStudy:
    """Freeze the study of a run, or load the one frozen before; a changed study file makes a new version.

    Raises UserError for a study that can't be done with this run's replies, and for one that would change frozen items.
    """
    folder = run / "vote"
    if not (folder / "preregistration.json").exists():
        study = load_study(study_file) if study_file else _study_beside(run)
        base = study_file.parent if study_file else run
        folder.mkdir(mode=0o700, exist_ok=True)
        frozen, gold = take_items(study, run, base), read_gold(study, base)
        write_jsonl(folder / "items.jsonl", frozen.items)
        write_jsonl(folder / "gold.jsonl", gold)
        _write_registrations(folder, [_register(folder, study, len(frozen.items), frozen.n_identical, frozen.n_incomplete)])
    elif study_file:
        _new_version(folder, load_study(study_file))
    return load_frozen(run)


def load_frozen(run: Path) -> FrozenStudy:
    """The frozen study of a run; raises UserError when there is none or its files are no longer what was registered."""
    folder = run / "vote"
    registration = registrations(run)[-1]
    for name, wanted in (("items.jsonl", registration.items_sha256), ("gold.jsonl", registration.gold_sha256)):
        if not (folder / name).is_file() or sha256(folder / name) != wanted:
            raise UserError("this file is not the one that was frozen.", where=str(folder / name), do="Restore it from a backup.")
    return FrozenStudy(
        folder=folder,
        study=study_from(registration.study, str(folder / "preregistration.json")),
        items={item.id: item for item in read_jsonl(folder / "items.jsonl", Item)},
        gold={item.id: item for item in read_jsonl(folder / "gold.jsonl", GoldItem)},
        registration=registration,
    )


def registrations(run: Path) -> list[Registration]:
    """All versions of the pre-registration, oldest first; raises UserError when there is none or a hash doesn't hold."""
    file = run / "vote" / "preregistration.json"
    if not file.is_file():
        raise UserError("there is no frozen study.", where=str(run), do=f"`unstilted vote {run}` freezes one.")
    rows = parse_json(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(rows, list) or not rows:
        raise UserError("this is no pre-registration.", where=str(file), do="Restore it from a backup.")
    found = [parse_row(row, Registration, f"{file} version {number}") for number, row in enumerate(rows, start=1)]
    for number, entry in enumerate(found):
        if entry.hash != _hash(entry) or entry.previous != (found[number - 1].hash if number else ""):
            raise UserError(f"version {entry.version} was changed after it was frozen.", where=str(file), do="Restore it from a backup.")
    return found


def load_secrets(run: Path) -> Secrets:
    """The study's keys, made at the first call, readable by their owner alone."""
    key, token = (_secret(run / "vote" / name) for name in ("secret_key", "admin_token"))
    return Secrets(Signer(key.encode()), token)


def _secret(file: Path) -> str:
    """The file's content; the first caller writes it, and a second one at the same moment reads that."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(handle, secrets.token_urlsafe(32).encode())
            os.fsync(handle)
        finally:
            os.close(handle)
        try:
            os.link(part, file)
        except FileExistsError:
            pass
        finally:
            part.unlink()
    if os.name == "posix" and file.stat().st_mode & 0o077:
        raise UserError("others can read this secret.", where=str(file), do=f"chmod 600 {file}")
    return file.read_text(encoding="ascii").strip()


def _study_beside(run: Path) -> Study:
    file = run / "study.toml"
    return load_study(file) if file.is_file() else Study()


def _register(folder: Path, study: Study, n_items: int, n_identical: int, n_incomplete: int) -> Registration:
    return Registration(
        version=1,
        frozen=_now(),
        study=json.loads(study.model_dump_json()),
        items_sha256=sha256(folder / "items.jsonl"),
        gold_sha256=sha256(folder / "gold.jsonl"),
        n_items=n_items,
        n_identical=n_identical,
        n_incomplete=n_incomplete,
    ).hashed()


FIXED = (
    "seed",
    "arms",
    "against",
    "criteria",
    "n_items",
    "votes_per_item",
    "votes_per_rater",
    "scrub",
    "normalise",
    "gold",
    "qualification",
    "checks",
)
"""What a running study can't change: items, slots, plans and the rules by which raters are judged."""


def _new_version(folder: Path, study: Study) -> None:
    known = registrations(folder.parent)
    values = json.loads(study.model_dump_json())
    changed = tuple(name for name, value in values.items() if known[-1].study.get(name) != value)
    if not changed:
        return
    if fixed := [name for name in changed if name in FIXED]:
        raise UserError(
            f"'{fixed[0]}' was frozen with the study and can't change any more.",
            where="study",
            do=f"Undo that change, or make a new study in another run folder; the frozen one is in {folder}.",
        )
    newer = known[-1].model_copy(
        update={
            "version": known[-1].version + 1,
            "frozen": _now(),
            "study": values,
            "changed": changed,
            "previous": known[-1].hash,
            "hash": "",
        }
    )
    _write_registrations(folder, [*known, newer.hashed()])


def _write_registrations(folder: Path, entries: list[Registration]) -> None:
    write_text(folder / "preregistration.json", json.dumps([json.loads(entry.model_dump_json()) for entry in entries], indent=1) + "\n")


def _hash(entry: Registration) -> str:
    body = entry.model_dump(mode="json", exclude={"hash"})
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
