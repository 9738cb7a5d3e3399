import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from unstilted.errors import UserError
from unstilted.files import is_disk_full, require_free_space, sha256, whole_file, whole_folder, write_text


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a full disk is tried on a tiny tmpfs, and there is no `mount` here")
    if mounted.returncode:
        pytest.skip(f"a full disk is tried on a tiny tmpfs, and mounting isn't permitted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_written_text_is_read_back_byte_for_byte_and_its_folder_is_made(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "grüße\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "grüße\n".encode()


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(file) as part:  # noqa: PT012
        part.write_text("new, half")
        raise ZeroDivisionError
    assert file.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_the_old_file_is_seen_until_the_block_ends(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with file.open() as reader:
        with whole_file(file) as part:
            part.write_text("new")
            assert file.read_text() == "old"
        assert reader.read() == "old"
    assert file.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_a_whole_folder_replaces_the_old_one_with_all_that_was_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "stale.txt").write_text("old")
    with whole_folder(folder) as part:
        (part / "deep").mkdir()
        (part / "deep" / "a.txt").write_text("new")
        assert names(folder) == ["stale.txt"]
    assert names(folder) == ["deep"]
    assert (folder / "deep" / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["adapter"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_a_folder_block_that_raises_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_folder(folder) as part:  # noqa: PT012
        (part / "a.txt").write_text("new, half")
        raise ZeroDivisionError
    assert (folder / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["adapter"]


def test_a_full_disk_leaves_the_old_file_and_no_part(tiny_disk: Path) -> None:
    file = tiny_disk / "a.txt"
    write_text(file, "old")
    with pytest.raises(OSError) as caught:  # noqa: PT011 (the number is checked below)
        write_text(file, "x" * 200_000)
    assert caught.value.errno == errno.ENOSPC
    assert is_disk_full(caught.value)
    assert file.read_text() == "old"
    assert names(tiny_disk) == ["a.txt"]


def test_a_full_disk_leaves_the_old_folder_and_no_part(tiny_disk: Path) -> None:
    folder = tiny_disk / "adapter"
    with whole_folder(folder) as part:
        (part / "a.txt").write_text("old")
    with pytest.raises(OSError, match="No space left"), whole_folder(folder) as part:
        (part / "a.txt").write_text("x" * 200_000)
    assert (folder / "a.txt").read_text() == "old"
    assert names(tiny_disk) == ["adapter"]


def test_other_failures_are_not_taken_for_a_full_disk() -> None:
    assert not is_disk_full(PermissionError(errno.EACCES, "Permission denied"))


def test_the_hash_of_a_file_is_the_published_sha256_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(tmp_path / "a.txt") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_hash_of_a_folder_depends_on_names_and_contents_and_not_on_its_place(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> str:
        for path, text in files.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return sha256(tmp_path / name)

    first = folder("one", {"a": "1", "deep/b": "2"})
    assert folder("two", {"deep/b": "2", "a": "1"}) == first
    assert folder("three", {"a": "1", "deep/c": "2"}) != first
    assert folder("four", {"a": "1", "b": "2"}) != first
    assert folder("five", {"a": "2", "deep/b": "1"}) != first
    assert folder("six", {"a": "1", "deep/b": "2", "empty": ""}) != first


def test_too_little_space_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        require_free_space(tmp_path / "new" / "run", 10**18, "a checkpoint")
    assert caught.value.what.startswith("a checkpoint needs 1,000,000,000,000 MB and the disk has ")
    assert str(caught.value).endswith("Free some space and run the same command again; finished work is kept.")
    assert not (tmp_path / "new").exists()


def test_enough_space_is_let_through_for_relative_folders_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    require_free_space(Path("new"), 1, "a checkpoint")
    assert os.listdir(tmp_path) == []  # noqa: PTH208
