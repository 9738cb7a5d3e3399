"""The run folder: where stages meet, which of them are done, and a lock so that two processes never share one."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import Field, ValidationError

from unstilted.errors import UserError
from unstilted.files import sha256, write_text
from unstilted.records import Record

LIBRARIES = ("unstilted", "torch", "transformers", "peft", "accelerate", "xllamacpp", "gguf", "numpy", "scikit-learn")


OWN_FILES = (".lock", "recipe.toml", "manifest.json")
"""What tells a run folder from any other; every run writes the first of them before anything else."""


class StageEntry(Record):
    """What the manifest says of a finished stage; its presence means that the stage's files are whole."""

    settings: dict[str, Any]
    """Resolved settings of the recipe's tables that the stage reads, and the seed."""
    inputs: dict[str, str]
    """What it read: file name in the run folder or outside source -> sha256 or fingerprint."""
    outputs: dict[str, str]
    """What it wrote: name in the run folder -> sha256."""
    facts: dict[str, Any] = Field(default_factory=dict)
    """Results worth a line in the report, such as the licence of the weights."""
    versions: dict[str, str]
    git_revision: str = ""
    machine: str
    finished: str
    duration_s: float


@dataclass(frozen=True)
class StageWork:
    """A stage as the run folder sees it."""

    name: str
    settings: dict[str, Any]
    reads: tuple[str, ...]
    """Names in the run folder."""
    writes: tuple[str, ...]
    sources: dict[str, str]
    """Inputs from outside the run folder with their fingerprints."""
    work: Callable[[], dict[str, Any]]
    """Does it, and returns the entry's facts."""


class RunDir:
    """An opened run folder. Use `open_run`; only one process at a time holds one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, name: str) -> Path:
        return self.path / name

    def require(self, name: str, stage: str) -> Path:
        """A file that an earlier stage must have written; raises UserError naming that stage otherwise."""
        if not self.file(name).exists():
            raise UserError(f"'{name}' is missing.", where=str(self.path), do=f"Run `unstilted {stage} {self.path}` first.")
        return self.file(name)

    def manifest(self) -> dict[str, StageEntry]:
        """Finished stages by name, in the order in which they ended."""
        file = self.file("manifest.json")
        if not file.exists():
            return {}
        try:
            stages = json.loads(file.read_text(encoding="utf-8"))["stages"]
            return {name: StageEntry.model_validate(entry) for name, entry in stages.items()}
        except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
            raise UserError(
                f"the manifest can't be read ({type(error).__name__}).",
                where=str(file),
                do="Move it away; the stages are then done again, from what their own checkpoints keep.",
            ) from None

    def is_done(self, stage: StageWork) -> bool:
        """Whether settings, inputs, library version and outputs are those of the last finished run of this stage."""
        entry = self.manifest().get(stage.name)
        return (
            entry is not None
            and entry.settings == json.loads(json.dumps(stage.settings))  # tuples come back from the manifest as lists
            and entry.inputs == self._input_hashes(stage)
            and entry.versions.get("unstilted") == _versions().get("unstilted")
            and entry.outputs == {name: sha256(self.file(name)) for name in stage.writes if self.file(name).exists()}
        )

    def do(self, stage: StageWork) -> StageEntry:
        """Do a stage and enter it in the manifest, last; an older entry of it is taken out first."""
        for name in stage.reads:
            if not self.file(name).exists():
                raise UserError(f"stage '{stage.name}' needs '{name}'.", where=str(self.path), do="Run the stage before it.")
        inputs = self._input_hashes(stage)
        self._write_manifest({name: entry for name, entry in self.manifest().items() if name != stage.name})
        start = time.monotonic()
        facts = stage.work()
        entry = StageEntry(
            settings=stage.settings,
            inputs=inputs,
            outputs={name: sha256(self.file(name)) for name in stage.writes},
            facts=facts,
            versions=_versions(),
            git_revision=_git_revision(),
            machine=machine(),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            duration_s=round(time.monotonic() - start, 2),
        )
        self._write_manifest(self.manifest() | {stage.name: entry})
        return entry

    def _input_hashes(self, stage: StageWork) -> dict[str, str]:
        return {name: sha256(self.file(name)) for name in stage.reads if self.file(name).exists()} | stage.sources

    def _write_manifest(self, entries: dict[str, StageEntry]) -> None:
        stages = {name: entry.model_dump() for name, entry in entries.items()}
        write_text(self.file("manifest.json"), json.dumps({"stages": stages}, indent=1) + "\n")


@contextmanager
def open_run(path: Path) -> Iterator[RunDir]:
    """Open (or make) a run folder for this process alone.

    Raises UserError when another process holds it or `path` is a file.
    """
    if path.exists() and not path.is_dir():
        raise UserError("this is a file, not a folder.", where=str(path), do="Choose another folder.")
    if path.is_dir() and any(path.iterdir()) and not any((path / name).exists() for name in OWN_FILES):
        raise UserError("this folder holds other files, which a run could overwrite.", where=str(path), do="Choose a new folder.")
    lock = FileLock(path / ".lock", timeout=0)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(
            "another unstilted process is using this run folder.", where=str(path), do="Wait for it, or choose another with --out."
        ) from None
    except OSError as error:
        raise UserError(f"this folder can't be used ({error.strerror}).", where=str(path), do="Choose another folder.") from None
    try:
        yield RunDir(path)
    finally:
        lock.release()


def machine() -> str:
    """Operating system, processor kind and number of usable cores, in one line."""
    return f"{platform.system()} {platform.machine()}, {usable_cores()} cores, Python {platform.python_version()}"


def usable_cores() -> int:
    """Cores that this process may run on; macOS tells only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git_revision() -> str:
    """Commit of the checkout this package runs from, with '+' when it has changes; empty for an installed package."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):
            return ""
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except FileNotFoundError:
        return ""
