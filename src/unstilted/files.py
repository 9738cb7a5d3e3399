"""Files that are whole or absent, and their hashes."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unstilted.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, fsync, rename: a reader sees the old file or the new one, never a half."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it becomes `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _telling_full_disks(path):
            yield part
        _fsync(part)
        part.replace(path)
        _fsync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Like `whole_file` for a folder; an existing one is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        with _telling_full_disks(path):
            yield part
        for file in (*part.rglob("*"), part):
            _fsync(file)
        if path.exists():
            shutil.rmtree(path)
        part.chmod(0o755)
        part.rename(path)
        _fsync(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hex sha256 of a file, or of a folder's relative names and contents."""
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def require_free_space(folder: Path, n_bytes: int, purpose: str) -> None:
    """Raise UserError when the disk that holds `folder` has less than `n_bytes` left."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise UserError(
            f"{purpose} needs {n_bytes / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB left.",
            where=str(folder),
            do="Free some space and run the same command again; finished work is kept.",
        )


def is_disk_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _telling_full_disks(path: Path) -> Iterator[None]:
    """torch and safetensors report a full disk as errors of their own kinds; make it the OSError that it is."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if shutil.disk_usage(path.parent).free < 1_000_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
