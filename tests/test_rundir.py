import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from unstilted.errors import UserError
from unstilted.files import write_text
from unstilted.rundir import RunDir, StageWork, machine, open_run

HOLD_THE_LOCK = """
import sys, time
from pathlib import Path
from unstilted.rundir import open_run
with open_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

TWO_STAGES_THE_SECOND_STUCK = """
import sys, time
from pathlib import Path
from unstilted.files import whole_file, write_text
from unstilted.rundir import StageWork, open_run

def first():
    write_text(run_dir.file("a.txt"), "a")
    return {}

def second():
    with whole_file(run_dir.file("b.txt")) as part:
        part.write_text("half of b")
        print("held", flush=True)
        time.sleep(60)

with open_run(Path(sys.argv[1])) as run_dir:
    run_dir.do(StageWork("first", {}, (), ("a.txt",), {}, first))
    run_dir.do(StageWork("second", {}, ("a.txt",), ("b.txt",), {}, second))
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDir]:
    with open_run(tmp_path / "run") as opened:
        yield opened


def copying(run_dir: RunDir, **changes: Any) -> StageWork:
    """A stage that writes its input in capitals."""

    def work() -> dict[str, Any]:
        write_text(run_dir.file("out.txt"), run_dir.file("in.txt").read_text().upper())
        return {"n_letters": 3}

    stage = StageWork("copy", {"size": 1, "layers": ("q", "v")}, ("in.txt",), ("out.txt",), {"hub": "abc"}, work)
    return replace(stage, **changes)


@pytest.fixture
def done(run_dir: RunDir) -> StageWork:
    write_text(run_dir.file("in.txt"), "abc")
    stage = copying(run_dir)
    run_dir.do(stage)
    return stage


@contextmanager
def process_that_holds(folder: Path, script: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_finished_stage_is_done(run_dir: RunDir, done: StageWork) -> None:
    assert run_dir.is_done(done)
    assert run_dir.file("out.txt").read_text() == "ABC"


def test_a_stage_that_never_ran_is_not_done(run_dir: RunDir) -> None:
    assert not run_dir.is_done(copying(run_dir))


@pytest.mark.usefixtures("done")
@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"size": 2, "layers": ("q", "v")}},
        {"settings": {"size": 1, "layers": ("q",)}},
        {"settings": {"size": 1, "layers": ("q", "v"), "new": 0}},
        {"sources": {"hub": "abd"}},
        {"sources": {}},
    ],
)
def test_a_changed_setting_or_source_makes_a_stage_undone(run_dir: RunDir, change: dict[str, Any]) -> None:
    assert not run_dir.is_done(copying(run_dir, **change))


@pytest.mark.parametrize(
    "damage",
    [
        lambda run_dir: write_text(run_dir.file("in.txt"), "abd"),
        lambda run_dir: run_dir.file("in.txt").unlink(),
        lambda run_dir: write_text(run_dir.file("out.txt"), "ABD"),
        lambda run_dir: run_dir.file("out.txt").unlink(),
    ],
    ids=["input changed", "input deleted", "output changed", "output deleted"],
)
def test_a_changed_or_deleted_file_makes_a_stage_undone(run_dir: RunDir, done: StageWork, damage: Callable[[RunDir], None]) -> None:
    damage(run_dir)
    assert not run_dir.is_done(done)


def test_another_version_of_the_package_makes_a_stage_undone(run_dir: RunDir, done: StageWork) -> None:
    manifest = json.loads(run_dir.file("manifest.json").read_text())
    manifest["stages"]["copy"]["versions"]["unstilted"] = "0.0.0"
    write_text(run_dir.file("manifest.json"), json.dumps(manifest))
    assert not run_dir.is_done(done)


def test_a_folder_is_an_output_of_which_every_file_counts(run_dir: RunDir) -> None:
    def work() -> dict[str, Any]:
        write_text(run_dir.file("adapter/deep/weights"), "1")
        return {}

    stage = StageWork("train", {}, (), ("adapter",), {}, work)
    run_dir.do(stage)
    assert run_dir.is_done(stage)
    write_text(run_dir.file("adapter/deep/weights"), "2")
    assert not run_dir.is_done(stage)


@pytest.mark.usefixtures("done")
def test_the_manifest_says_what_went_in_and_came_out(run_dir: RunDir) -> None:
    entry = run_dir.manifest()["copy"]
    assert entry.settings == {"size": 1, "layers": ["q", "v"]}
    assert entry.inputs == {"in.txt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "hub": "abc"}
    assert entry.outputs == {"out.txt": "b5d4045c3f466fa91fe2cc6abe79232a1a57cdf104f7a26e716e0a1e2789df78"}
    assert entry.facts == {"n_letters": 3}
    assert entry.machine == machine()
    assert {"unstilted", "numpy"} <= set(entry.versions)


def test_a_crash_in_the_middle_of_a_redo_leaves_the_stage_undone_and_the_others_done(run_dir: RunDir, done: StageWork) -> None:
    other = replace(done, name="other")
    run_dir.do(other)

    def crash() -> dict[str, Any]:
        assert list(run_dir.manifest()) == ["other"]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_dir.do(replace(done, work=crash))
    assert not run_dir.is_done(done)
    assert run_dir.is_done(other)


def test_a_stage_that_leaves_out_a_file_it_promised_is_not_entered(run_dir: RunDir, done: StageWork) -> None:
    with pytest.raises(FileNotFoundError):
        run_dir.do(replace(done, name="lazy", writes=("promised.txt",)))
    assert list(run_dir.manifest()) == ["copy"]


def test_a_stage_without_its_input_is_refused_before_its_old_entry_is_lost(run_dir: RunDir, done: StageWork) -> None:
    run_dir.file("in.txt").unlink()
    with pytest.raises(UserError) as caught:
        run_dir.do(done)
    assert str(caught.value) == f"{run_dir.path}: stage 'copy' needs 'in.txt'. Run the stage before it."
    assert list(run_dir.manifest()) == ["copy"]


def test_a_required_file_is_given_or_the_stage_that_makes_it_named(run_dir: RunDir) -> None:
    with pytest.raises(UserError) as caught:
        run_dir.require("pairs.jsonl", "pairs")
    assert str(caught.value) == f"{run_dir.path}: 'pairs.jsonl' is missing. Run `unstilted pairs {run_dir.path}` first."
    write_text(run_dir.file("pairs.jsonl"), "")
    assert run_dir.require("pairs.jsonl", "pairs") == run_dir.path / "pairs.jsonl"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"stages": []}', '{"stages": {"train": {}}}', '{"stages": {"train": 3}}'])
def test_a_manifest_that_cannot_be_read_is_refused_and_left_as_it_is(run_dir: RunDir, content: str) -> None:
    write_text(run_dir.file("manifest.json"), content)
    with pytest.raises(
        UserError, match=r"manifest\.json: the manifest can't be read \(\w+\)\. Move it away; the stages are then done again"
    ):
        run_dir.is_done(copying(run_dir))
    assert run_dir.file("manifest.json").read_text() == content


def test_a_manifest_that_is_not_utf8_is_refused_too(run_dir: RunDir) -> None:
    run_dir.file("manifest.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"the manifest can't be read \(UnicodeDecodeError\)"):
        run_dir.manifest()


def test_a_second_process_is_refused_while_the_first_holds_the_folder(tmp_path: Path) -> None:
    with process_that_holds(tmp_path / "run", HOLD_THE_LOCK):
        with pytest.raises(UserError) as caught, open_run(tmp_path / "run"):
            pass
        assert str(caught.value) == (
            f"{tmp_path / 'run'}: another unstilted process is using this run folder. Wait for it, or choose another with --out."
        )
        with open_run(tmp_path / "other"):
            pass
    with open_run(tmp_path / "run"):
        pass


def test_a_killed_process_leaves_the_stages_before_done_and_the_folder_free(tmp_path: Path) -> None:
    with process_that_holds(tmp_path / "run", TWO_STAGES_THE_SECOND_STUCK) as process:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    with open_run(tmp_path / "run") as run_dir:
        assert list(run_dir.manifest()) == ["first"]
        assert run_dir.is_done(StageWork("first", {}, (), ("a.txt",), {}, dict))
        assert not run_dir.is_done(StageWork("second", {}, ("a.txt",), ("b.txt",), {}, dict))
        assert not run_dir.file("b.txt").exists()


def test_a_lock_that_times_out_inside_is_not_mistaken_for_the_run_folders_own(tmp_path: Path) -> None:
    with FileLock(tmp_path / "cache.lock"), pytest.raises(Timeout), open_run(tmp_path / "run"):
        FileLock(tmp_path / "cache.lock", timeout=0).acquire()


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught, open_run(tmp_path / "file"):
        pass
    assert str(caught.value) == f"{tmp_path / 'file'}: this is a file, not a folder. Choose another folder."


def test_a_folder_that_cannot_be_made_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught, open_run(tmp_path / "file" / "run"):
        pass
    assert str(caught.value) == f"{tmp_path / 'file' / 'run'}: this folder can't be used (Not a directory). Choose another folder."


def test_the_machine_is_told_in_one_line_with_its_cores() -> None:
    assert "\n" not in machine()
    assert f", {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores, Python 3." in machine()


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "pairs.jsonl"
    mine.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="this folder holds other files, which a run could overwrite"), open_run(tmp_path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]
