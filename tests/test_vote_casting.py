"""One ballot, one vote: races, replays, double clicks, forgeries and expiry, on real SQLite and a real PostgreSQL."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from unstilted.errors import UserError
from unstilted.vote import schema
from unstilted.vote.audit import Entry, broken_at
from unstilted.vote.checking import verify
from unstilted.vote.database import Transaction
from unstilted.vote.export import run_votes
from unstilted.vote.serve import prepare
from unstilted.vote.settings import Limits, Settings
from unstilted.vote.site import Site
from unstilted.vote.station import BALLOT_LIFE_S, Joining, Slip
from vote_fixtures import SMALL, Clock, make_run, make_site


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def both(run: Path, settings: Settings, clock: Clock) -> Iterator[Site]:
    """A site on either database, with a clock of the test's."""
    site = make_site(run, settings, clock=clock)
    yield site
    site.close()


def do(site: Site, operation: Callable[[Transaction], Any]) -> Any:
    return site.writer.submit(operation).result(60)


def join(site: Site, session: str) -> str:
    person = Joining(session, "browser", "en", "open")
    return str(do(site, lambda transaction: site.station.join(transaction, person)))


def ballot_of(site: Site, session: str) -> Any:
    with site.reader.connect() as connection:
        visit = site.station.visit(connection, session)
    assert visit is not None
    return visit.ballot


def cast(site: Site, session: str, ballot: str, winner: str = "left") -> str:
    return str(do(site, lambda transaction: site.station.cast(transaction, slip(session, ballot, winner, site.clock()))).outcome)


def slip(session: str, ballot: str, winner: str = "left", shown_at: float = 0.0) -> Slip:
    return Slip(session, "browser", ballot, {"thoughtful": winner}, shown_at)  # type: ignore[dict-item]


def count(site: Site, table: Any, *where: Any) -> int:
    with site.reader.connect() as connection:
        return int(connection.execute(select(func.count()).select_from(table).where(*where)).scalar_one())


def test_a_ballot_is_counted_once_however_often_it_is_cast(both: Site) -> None:
    join(both, "s")
    ballot = ballot_of(both, "s").id
    assert [cast(both, "s", ballot), cast(both, "s", ballot, "right"), cast(both, "s", ballot)] == ["saved", "repeated", "repeated"]
    with both.reader.connect() as connection:
        assert connection.execute(select(schema.votes.c.winner)).scalars().all() == ["left"]


def test_forty_threads_that_cast_one_ballot_at_once_give_one_vote(both: Site) -> None:
    join(both, "s")
    ballot, start = ballot_of(both, "s").id, threading.Barrier(40)

    def attack(number: int) -> str:
        start.wait()
        return cast(both, "s", ballot, ("left", "right")[number % 2])

    with ThreadPoolExecutor(40) as pool:
        outcomes = list(pool.map(attack, range(40)))
    assert sorted(outcomes) == ["repeated"] * 39 + ["saved"]
    assert count(both, schema.votes) == 1
    assert count(both, schema.ballots) == 2  # the one cast and the next one, not forty next ones


def test_another_session_cannot_cast_a_ballot(both: Site) -> None:
    join(both, "victim")
    join(both, "thief")
    assert cast(both, "thief", ballot_of(both, "victim").id) == "unknown"
    assert cast(both, "nobody", ballot_of(both, "victim").id) == "unknown"
    assert cast(both, "victim", "A" * 22) == "unknown"
    assert count(both, schema.votes) == 0


def test_a_ballot_left_open_too_long_is_void_and_its_slot_goes_to_somebody_else(both: Site, clock: Clock) -> None:
    join(both, "late")
    ballot = ballot_of(both, "late")
    clock.now += BALLOT_LIFE_S + 61
    join(both, "other")
    assert cast(both, "late", ballot.id) == "lapsed"
    assert count(both, schema.ballots, schema.ballots.c.state == "lapsed") == 1
    with both.reader.connect() as connection:
        assert connection.execute(select(func.sum(schema.items.c.n_taken))).scalar_one() == 1
    do(both, lambda transaction: both.station.continue_visit(transaction, "late"))
    assert cast(both, "late", ballot_of(both, "late").id) == "saved"


@pytest.mark.parametrize("jump", [-90_000.0, 90_000.0])
def test_a_clock_that_jumps_loses_no_vote_and_invents_no_time(both: Site, clock: Clock, jump: float) -> None:
    join(both, "s")
    shown_at = clock.now
    clock.now += jump
    ballot = ballot_of(both, "s").id
    assert do(both, lambda transaction: both.station.cast(transaction, slip("s", ballot, shown_at=shown_at))).outcome == "saved"
    [vote] = run_votes(both.run)
    assert vote["seconds"] == ""
    for _ in range(3):
        do(both, lambda transaction: both.station.continue_visit(transaction, "s"))
        assert cast(both, "s", ballot_of(both, "s").id) == "saved"
    assert verify(both.run).problems == ()


def test_undo_puts_the_same_pair_back_and_keeps_the_first_vote_as_a_row(both: Site) -> None:
    join(both, "s")
    first = ballot_of(both, "s")
    cast(both, "s", first.id, "left")
    assert do(both, lambda transaction: both.station.undo(transaction, "s"))
    again = ballot_of(both, "s")
    assert (again.item, again.slot, again.left_arm, again.right_arm) == (first.item, first.slot, first.left_arm, first.right_arm)
    assert again.id != first.id
    assert not do(both, lambda transaction: both.station.undo(transaction, "s"))  # one step only
    assert cast(both, "s", first.id) == "taken_back"
    assert cast(both, "s", again.id, "right") == "saved"
    rows = run_votes(both.run)
    assert [(row["winner"], row["excluded"]) for row in rows] == [("left", "taken back by the rater"), ("right", "")]
    assert verify(both.run).problems == ()


def test_undo_can_go_back_from_the_thanks_page_and_the_study_stays_balanced(both: Site) -> None:
    rater = join(both, "s")
    for _ in range(4):
        cast(both, "s", ballot_of(both, "s").id)
    with both.reader.connect() as connection:
        visit = both.station.visit(connection, "s")
    assert visit is not None
    assert (visit.state, visit.position) == ("done", 4)
    assert do(both, lambda transaction: both.station.undo(transaction, "s"))
    assert cast(both, "s", ballot_of(both, "s").id, "tie") == "saved"
    counted = [row for row in run_votes(both.run) if not row["excluded"]]
    assert [row["winner"] for row in counted] == ["left", "left", "left", "tie"]
    assert {row["rater"] for row in counted} == {rater}
    with both.reader.connect() as connection:
        assert connection.execute(select(func.sum(schema.items.c.n_taken))).scalar_one() == 4


def test_a_closed_study_takes_no_vote_and_no_undo(both: Site) -> None:
    join(both, "s")
    cast(both, "s", ballot_of(both, "s").id)
    ballot = ballot_of(both, "s").id
    assert do(both, both.station.close)
    assert not do(both, both.station.close)
    assert cast(both, "s", ballot) == "closed"
    assert not do(both, lambda transaction: both.station.undo(transaction, "s"))
    assert count(both, schema.votes) == 1


def test_a_rater_who_withdraws_keeps_their_rows_but_not_their_say(both: Site) -> None:
    join(both, "s")
    cast(both, "s", ballot_of(both, "s").id)
    do(both, lambda transaction: both.station.leave(transaction, "s", keep_votes=False))
    assert [row["excluded"] for row in run_votes(both.run)] == ["withdrawn by the rater"]
    with both.reader.connect() as connection:
        assert connection.execute(select(func.sum(schema.items.c.n_taken))).scalar_one() == 1  # the open one was given back


def test_votes_and_log_can_neither_be_changed_nor_deleted_in_the_database(both: Site) -> None:
    join(both, "s")
    cast(both, "s", ballot_of(both, "s").id)
    for change in ("UPDATE votes SET winner = 'right'", "DELETE FROM votes", "UPDATE audit SET body = '{}'", "DELETE FROM audit"):
        with pytest.raises(Exception, match="append-only"):
            do(both, lambda transaction, change=change: transaction.connection.exec_driver_sql(change))
    assert verify(both.run).problems == ()


def test_a_group_with_one_broken_operation_saves_all_the_others(both: Site) -> None:
    sessions = [f"s{number}" for number in range(6)]
    for session in sessions:
        join(both, session)
    ready = [(session, ballot_of(both, session).id) for session in sessions]

    def broken(transaction: Transaction) -> None:
        transaction.connection.exec_driver_sql("INSERT INTO study (id, registration) VALUES (1, 'again')")

    gate = threading.Event()
    blocked = both.writer.submit(lambda transaction: gate.wait(20))
    futures = [
        both.writer.submit(lambda transaction, s=session, b=ballot: both.station.cast(transaction, slip(s, b)).outcome)
        for session, ballot in ready[:3]
    ]
    failing = both.writer.submit(broken)
    futures += [
        both.writer.submit(lambda transaction, s=session, b=ballot: both.station.cast(transaction, slip(s, b)).outcome)
        for session, ballot in ready[3:]
    ]
    gate.set()
    blocked.result(20)
    assert [future.result(20) for future in futures] == ["saved"] * 6
    with pytest.raises(Exception, match=r"(?i)unique"):
        failing.result(20)
    assert verify(both.run).problems == ()


def _whole_rater(run: str, settings: dict[str, Any], name: str, start: Any, n_votes: int) -> None:
    """A process of its own: its own site, one rater after another, every ballot cast twice."""
    from unstilted.vote.freezing import load_frozen, load_secrets

    limits = Limits(**settings.pop("limits"))
    site = Site(Path(run), load_frozen(Path(run)), load_secrets(Path(run)), Settings(**settings, limits=limits))
    start.wait(60)
    for number in range(3):
        session = f"{name}-{number}"
        join(site, session)
        for _ in range(n_votes):
            ballot = ballot_of(site, session)
            outcomes = [cast(site, session, ballot.id), cast(site, session, ballot.id)]
            assert outcomes == ["saved", "repeated"], outcomes
    site.close()


def test_four_processes_share_one_study_without_a_lost_or_a_double_vote(tmp_path: Path, settings: Settings) -> None:
    study = SMALL.replace("n_items = 6\n", "n_items = 12\n")  # twice the slots that are needed, so that nobody ends early
    run = make_run(tmp_path / "run", study=study)
    prepare(run, None, settings)
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4)
    processes = [context.Process(target=_whole_rater, args=(str(run), asdict(settings), f"r{n}", start, 4)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    rows = run_votes(run)
    assert len(rows) == 4 * 3 * 4
    assert len({(row["rater"], row["item"]) for row in rows}) == len(rows)  # nobody saw an item twice
    per_item: dict[object, list[tuple[object, object]]] = {}
    for row in rows:
        per_item.setdefault(row["item"], []).append((row["left"], row["right"]))
    for sides in per_item.values():  # a block holds each pair on each side once
        counts = [sides.count(cell) for cell in (("base", "tuned"), ("tuned", "base"), ("prompted", "tuned"), ("tuned", "prompted"))]
        assert max(counts) - min(counts) <= 1
    assert verify(run).problems == ()


def test_a_database_of_another_study_is_refused(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", n_prompts=10)
    prepare(one, None, Settings())
    url = f"sqlite:///{one / 'vote' / 'votes.sqlite'}"
    with pytest.raises(UserError, match="holds the votes of another study"):
        prepare(other, None, Settings(database=url))


def test_the_tables_of_the_migrations_are_those_of_the_schema(both: Site) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with both.reader.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []


def test_a_chain_breaks_where_it_was_touched(both: Site) -> None:
    join(both, "s")
    cast(both, "s", ballot_of(both, "s").id)
    with both.reader.connect() as connection:
        entries = [Entry(*row) for row in connection.execute(select(schema.audit).order_by(schema.audit.c.seq))]
    assert broken_at(entries) is None
    for index, entry in enumerate(entries):
        changed = Entry(entry.seq, entry.at, entry.event, entry.body.replace("}", " }"), entry.hash)
        assert broken_at([*entries[:index], changed, *entries[index + 1 :]]) == entry.seq
        if index < len(entries) - 1:
            assert broken_at([*entries[:index], *entries[index + 1 :]]) == entry.seq
