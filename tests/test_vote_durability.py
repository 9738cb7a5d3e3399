"""What the raters were told is saved stays saved: kill -9, a full disk, a locked and a vanished database, a tampered one."""

import contextlib
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlencode

import pytest

from unstilted.cli import main
from unstilted.errors import UserError
from unstilted.vote import database
from unstilted.vote.checking import verify
from unstilted.vote.database import back_up
from unstilted.vote.export import run_votes
from unstilted.vote.settings import Settings
from unstilted.vote.site import Site
from vote_fixtures import SMALL, Rater, free_port, heading, hidden, make_run, make_site


class Served:
    """The site in a process of its own, spoken to by bare HTTP."""

    def __init__(self, run: Path, *options: str) -> None:
        self.port = free_port()
        program = "import sys; from unstilted.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", program, "vote", str(run), "--port", str(self.port), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        for _ in range(400):
            with contextlib.suppress(OSError):
                if self.ask("GET", "/healthz")[0] == 200:
                    return
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.1)
        raise AssertionError("the server did not start")

    def ask(self, method: str, path: str, cookie: str = "", fields: dict[str, str] | None = None) -> tuple[int, str, dict[str, str]]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {"origin": f"http://127.0.0.1:{self.port}", "content-type": "application/x-www-form-urlencoded"}
        if cookie:
            headers["cookie"] = cookie
        try:
            connection.request(method, path, urlencode(fields) if fields else None, headers)
            response = connection.getresponse()
            return response.status, response.read().decode(), {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()

    def begin(self) -> str:
        """A new rater's cookie."""
        _, _, headers = self.ask("POST", "/begin", fields=hidden(self.ask("GET", "/")[1]) | {"consent": "yes"})
        return headers["set-cookie"].partition(";")[0]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)


@pytest.mark.parametrize("options", [(), ("--workers", "2")], ids=["one worker", "two workers"])
def test_kill_9_loses_no_acknowledged_vote_and_the_next_start_goes_on(tmp_path: Path, options: tuple[str, ...]) -> None:
    study = SMALL.replace("n_items = 6\n", "n_items = 40\n").replace("votes_per_rater = 4", "votes_per_rater = 40")
    run = make_run(tmp_path / "run", n_prompts=40, study=study)
    acknowledged: list[str] = []

    def vote_on(server: Served) -> None:
        cookie = server.begin()
        with contextlib.suppress(OSError, HTTPException):  # the server is killed under it
            while True:
                page = server.ask("GET", "/vote", cookie)[1]
                fields = hidden(page)
                if "ballot" not in fields:
                    return
                if server.ask("POST", "/vote", cookie, fields | {"winner-thoughtful": "left"})[0] == 303:
                    acknowledged.append(fields["ballot"].partition(".")[0])

    for _ in range(2):
        server = Served(run, *options)
        raters = [threading.Thread(target=vote_on, args=(server,)) for _ in range(6)]
        for rater in raters:
            rater.start()
        wanted = len(acknowledged) + 40
        for _ in range(300):
            time.sleep(0.05)
            if len(acknowledged) >= wanted:
                break
        server.kill()
        for rater in raters:
            rater.join(30)
        assert len(acknowledged) >= wanted
        with contextlib.closing(sqlite3.connect(run / "vote" / "votes.sqlite")) as connection:
            kept = {row[0] for row in connection.execute("SELECT ballot FROM votes")}
        assert set(acknowledged) <= kept
        assert verify(run).problems == ()


@pytest.fixture
def quick_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "LOCK_WAIT_S", 0.3)


def test_a_locked_database_gives_a_plain_page_and_the_same_ballot_counts_later(run: Path, quick_lock: None) -> None:
    site = make_site(run)
    try:
        rater = Rater(site)
        rater.begin()
        fields = rater.ballot() | {"winner-thoughtful": "left"}
        with contextlib.closing(sqlite3.connect(run / "vote" / "votes.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            response = rater.post("/vote", fields)
            assert (response.status_code, heading(response.text)) == (503, "One moment, please")
            assert response.headers["retry-after"] == "10"
            assert rater.get("/vote").status_code == 200  # reading goes on
            other.execute("ROLLBACK")
        assert rater.post("/vote", fields).status_code == 303
        assert len(run_votes(run)) == 1
    finally:
        site.close()


def test_a_locked_postgres_gives_a_plain_page_and_the_same_ballot_counts_later(run: Path, postgres_database: str, quick_lock: None) -> None:
    import psycopg

    site = make_site(run, Settings(database=postgres_database))
    try:
        rater = Rater(site)
        rater.begin()
        fields = rater.ballot() | {"winner-thoughtful": "left"}
        with psycopg.connect(postgres_database) as other:
            other.execute(f"SELECT pg_advisory_xact_lock({database.ADVISORY_LOCK})")
            assert rater.post("/vote", fields).status_code == 503
        assert rater.post("/vote", fields).status_code == 303
        with psycopg.connect(postgres_database, autocommit=True) as other:  # the server drops all connections
            others = "datname = current_database() AND pid <> pg_backend_pid()"
            other.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        statuses = [rater.vote().status_code for _ in range(2)]
        assert statuses[-1] == 303
        assert len(run_votes(run)) == 1 + statuses.count(303)
        assert verify(run).problems == ()
    finally:
        site.close()


def test_a_vanished_database_gives_plain_pages_and_no_vote_is_acknowledged(run: Path) -> None:
    site = make_site(run)
    try:
        rater = Rater(site)
        rater.begin()
        fields = rater.ballot() | {"winner-thoughtful": "left"}
        site.writer._engine.dispose()
        site.reader.dispose()
        away = run / "vote" / "away"
        away.mkdir()
        for file in (run / "vote").glob("votes.sqlite*"):
            file.rename(away / file.name)
        (run / "vote" / "votes.sqlite").mkdir()
        for response in (rater.post("/vote", fields), rater.get("/vote"), rater.get("/thanks")):
            assert (response.status_code, heading(response.text)) == (503, "One moment, please")
        assert rater.get("/healthz").status_code == 503
        (run / "vote" / "votes.sqlite").rmdir()
        for file in away.iterdir():
            file.rename(run / "vote" / file.name)
        assert rater.post("/vote", fields).status_code == 303
        assert len(run_votes(run)) == 1
    finally:
        site.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB that can really be full; skipped where none can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be mounted here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_gives_a_plain_page_and_no_acknowledged_vote_is_lost(small_disk: Path) -> None:
    study = SMALL.replace("n_items = 6\n", "n_items = 12\n").replace("votes_per_rater = 4", "votes_per_rater = 12")
    run = make_run(small_disk / "run", study=study)
    site = make_site(run)
    try:
        rater = Rater(site)
        rater.begin()
        assert rater.vote().status_code == 303
        ballast, part = small_disk / "ballast", b"x" * 4096
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(part)
        n_saved, status = 1, 303
        for _ in range(11):
            page = rater.get("/vote")
            if page.status_code != 200:
                break
            fields = hidden(page.text) | {"winner-thoughtful": "left"}
            status = rater.post("/vote", fields).status_code
            if status != 303:
                break
            n_saved += 1
        assert status == 503, "the disk never got full"
        ballast.unlink()
        assert rater.post("/vote", fields).status_code == 303
        assert len(run_votes(run)) == n_saved + 1
        assert verify(run).problems == ()
    finally:
        site.close()


# Tampering


@pytest.fixture
def voted(run: Path) -> Path:
    """A run with four votes."""
    site = make_site(run)
    rater = Rater(site)
    rater.begin()
    for winner in ("left", "right", "tie", "both_bad"):
        rater.vote(winner)
    site.close()
    return run


def tamper(run: Path, *changes: str) -> None:
    """Change the database as somebody who may do anything with it."""
    with contextlib.closing(sqlite3.connect(run / "vote" / "votes.sqlite")) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        for change in changes:
            connection.execute(change)
        connection.commit()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("UPDATE votes SET winner = 'left' WHERE winner = 'right'", "differs from what was logged"),
        ("UPDATE votes SET seconds = 99 WHERE id = 1", "differs from what was logged"),
        ("DELETE FROM votes WHERE winner = 'tie'", "are missing"),
        ("UPDATE ballots SET left_arm = right_arm, right_arm = left_arm WHERE position = 0", "differs from what was logged"),
        ("UPDATE ballots SET state = 'undone' WHERE position = 1", "is 'undone', but the log says otherwise"),
        ("UPDATE audit SET body = replace(body, 'tie', 'left') WHERE body LIKE '%tie%'", "the audit log is broken at entry 5"),
        ("UPDATE audit SET at = at + 1 WHERE seq = 3", "the audit log is broken at entry 3"),
        ("DELETE FROM audit WHERE seq = 4", "the audit log is broken at entry 4"),
        ("DELETE FROM audit WHERE seq >= 1", "the log was cut off"),
    ],
)
def test_verify_finds_every_tampering(voted: Path, capsys: pytest.CaptureFixture[str], change: str, said: str) -> None:
    assert main(["vote", "verify", str(voted)]) == 0
    assert "4 votes and 7 log entries agree; nothing was changed." in capsys.readouterr().out
    tamper(voted, change)
    assert main(["vote", "verify", str(voted)]) == 1
    assert said in capsys.readouterr().err


def test_verify_finds_a_vote_that_was_slipped_in(voted: Path) -> None:
    tamper(
        voted,
        "INSERT INTO ballots SELECT 'x', rater, 99, 'repeat', item, NULL, left_arm, right_arm, state, NULL, issued_at FROM ballots LIMIT 1",
        "INSERT INTO votes (ballot, criterion, winner, seconds, cast_at) VALUES ('x', 'thoughtful', 'left', 1, 1)",
    )
    assert verify(voted).problems == ("ballot x has votes that the log doesn't know",)


def test_verify_finds_a_log_that_was_made_anew_after_a_noted_end(voted: Path) -> None:
    """Whoever rewrites votes, ballots and the whole chain still fails against the ends noted at start and export."""
    heads = voted / "vote" / "audit_heads.txt"
    with contextlib.closing(sqlite3.connect(voted / "vote" / "votes.sqlite")) as connection:
        [(seq, digest)] = connection.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchall()
    heads.write_text(heads.read_text() + f"{seq} {digest}\n")
    assert verify(voted).problems == ()
    heads.write_text(heads.read_text() + f"{seq} {'0' * 64}\n")
    assert "the log was cut off or made anew" in verify(voted).problems[0]


@pytest.mark.parametrize("name", ["items.jsonl", "gold.jsonl"])
def test_changed_items_are_refused(voted: Path, name: str) -> None:
    file = voted / "vote" / name
    file.write_text(file.read_text().replace("thing", "thong").replace("glasses", "grasses"))
    with pytest.raises(UserError, match="this file is not the one that was frozen"):
        verify(voted)


def test_a_changed_preregistration_is_refused(voted: Path) -> None:
    file = voted / "vote" / "preregistration.json"
    file.write_text(re.sub(r'"votes_per_item": 8', '"votes_per_item": 80', file.read_text()))
    with pytest.raises(UserError, match="version 1 was changed after it was frozen"):
        verify(voted)


def test_a_backup_while_votes_are_cast_is_whole(run: Path, tmp_path: Path) -> None:
    site = make_site(run)
    try:
        rater = Rater(site)
        rater.begin()
        rater.vote()
        while_voting = threading.Thread(target=lambda: [rater.vote() for _ in range(3)])
        while_voting.start()
        back_up(run, tmp_path / "copy.sqlite")
        while_voting.join()
        with contextlib.closing(sqlite3.connect(tmp_path / "copy.sqlite")) as copy:
            assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            [(n_votes, n_logged)] = copy.execute("SELECT (SELECT count(*) FROM votes), (SELECT count(*) FROM audit WHERE event = 'vote')")
        assert 1 <= n_votes == n_logged
    finally:
        site.close()


def test_every_commit_waits_for_the_disk(site: Site) -> None:
    """Only a power cut could show it, so ask SQLite itself: synchronous is 2 (FULL), and a reader never blocks a writer (WAL)."""
    with site.reader.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
    assert site.writer.submit(lambda transaction: transaction.connection.exec_driver_sql("PRAGMA synchronous").scalar_one()).result(20) == 2
