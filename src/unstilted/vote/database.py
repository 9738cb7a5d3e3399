"""The database: opening, migrating, and all writing of one process through one thread that commits in groups."""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from sqlalchemy import ClauseElement, Connection, CursorResult, Engine, create_engine, event, insert, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError

from unstilted.errors import UserError
from unstilted.files import whole_file
from unstilted.vote import schema
from unstilted.vote.audit import Entry, entry_after

T = TypeVar("T")
LOCK_WAIT_S = 5.0
"""How long a write waits for other processes before the rater is asked to try again."""
ADVISORY_LOCK = 0x756E7374696C7465
"""One writer at a time holds this in PostgreSQL, because every entry of the audit log follows from the one before."""


def database_url(run: Path, url: str) -> URL:
    """Where the votes are: `url`, or SQLite in the run's `vote/` folder. Raises UserError for anything but SQLite and PostgreSQL."""
    if not url:
        return URL.create("sqlite+pysqlite", database=str((run / "vote" / "votes.sqlite").absolute()))
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise UserError("this is no database URL.", where="--database", do="Write postgresql://user@host/name.") from None
    if parsed.get_backend_name() == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        return parsed
    raise UserError(
        f"'{parsed.drivername}' is not supported.", where="--database", do="Use postgresql://user@host/name, or leave it out for SQLite."
    )


def store_url(run: Path, url: URL) -> None:
    """Remember where the votes of a run are; the file is its owner's alone, because a URL may hold a password."""
    file = run / "vote" / "database_url"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)
    file.chmod(0o600)
    file.write_text(url.render_as_string(hide_password=False), encoding="utf-8")


def stored_url(run: Path) -> URL:
    """Where the votes of a run are; raises UserError when none were ever taken."""
    file = run / "vote" / "database_url"
    if not file.is_file():
        raise UserError("no votes were taken here.", where=str(run), do=f"`unstilted vote {run}` serves the study.")
    return database_url(run, file.read_text(encoding="utf-8").strip())


def open_engine(url: URL, *, is_writer: bool) -> Engine:
    """An engine whose transactions are durable when committed; a writer's begin by taking the one write lock."""
    if url.get_backend_name() == "postgresql":
        engine = create_engine(url, pool_size=1 if is_writer else 8, max_overflow=0 if is_writer else 32, pool_pre_ping=True)
        if is_writer:
            event.listen(engine, "begin", _take_advisory_lock)
        else:
            engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        return engine
    engine = create_engine(
        url, connect_args={"timeout": LOCK_WAIT_S, "check_same_thread": False}, pool_size=1 if is_writer else 8, max_overflow=32
    )
    event.listen(engine, "connect", _set_sqlite_up)
    event.listen(engine, "begin", _begin_immediate if is_writer else _begin_deferred)
    return engine


def _set_sqlite_up(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # Python's sqlite3 would otherwise begin transactions at moments of its own
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "wal_autocheckpoint=4000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin_deferred(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _take_advisory_lock(connection: Connection) -> None:
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_WAIT_S * 1000:.0f}ms'")
    connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({ADVISORY_LOCK})")


def back_up(run: Path, file: Path) -> None:
    """Copy a SQLite database as it is at one moment, also while it is served. Raises UserError for PostgreSQL."""
    url = stored_url(run)
    if url.get_backend_name() != "sqlite":
        raise UserError("these votes are in PostgreSQL.", where=str(run), do="Use pg_dump, which also works while the site is served.")
    source = sqlite3.connect(f"file:{url.database}?mode=ro", uri=True)
    with whole_file(file) as part, closing(source), closing(sqlite3.connect(part)) as copy:
        source.backup(copy)


@contextmanager
def telling_unreachable(url: URL) -> Iterator[None]:
    """Turn a failure to open the database into a UserError."""
    try:
        yield
    except DBAPIError as error:
        reason = str(error.orig).strip().splitlines()[0]
        raise UserError(
            f"the database can't be used ({reason}).",
            where=url.render_as_string(hide_password=True),
            do="Check that it is there and yours.",
        ) from None


def migrate(url: URL) -> None:
    """Bring the tables to this version's form; does nothing when they have it. Raises UserError when the database can't be used."""
    from alembic import command
    from alembic.config import Config

    if url.get_backend_name() == "sqlite" and url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    config = Config()
    config.set_main_option("script_location", "unstilted.vote:migrations")
    with telling_unreachable(url):
        engine = open_engine(url, is_writer=True)
        try:
            with engine.connect() as connection:
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        finally:
            engine.dispose()


class Prepared:
    """A statement of ours compiled once a dialect: on the way of every vote SQLAlchemy's compiling takes longer than SQLite's work."""

    def __init__(self, statement: ClauseElement) -> None:
        self._statement = statement
        self._compiled: dict[str, tuple[str, dict[str, Any]]] = {}

    def __call__(self, connection: Connection, parameters: dict[str, Any] | list[dict[str, Any]]) -> CursorResult[Any]:
        """Run it, once or for each row of parameters."""
        words, constants = self._compiled.get(connection.dialect.name) or self._compile(connection.dialect.name)
        if isinstance(parameters, dict):
            return connection.exec_driver_sql(words, constants | parameters)
        return connection.exec_driver_sql(words, [constants | row for row in parameters])

    def _compile(self, name: str) -> tuple[str, dict[str, Any]]:
        dialect: Any = sqlite.dialect(paramstyle="named") if name == "sqlite" else postgresql.psycopg.dialect()  # type: ignore[no-untyped-call]
        compiled = self._statement.compile(dialect=dialect)
        self._compiled[name] = str(compiled), dict(compiled.params)
        return self._compiled[name]


@dataclass
class Transaction:
    """What a write operation gets: the connection, the time, and a way to enter events in the audit log."""

    connection: Connection
    now: float
    events: list[tuple[str, Mapping[str, object]]] = field(default_factory=list)

    def record(self, name: str, body: Mapping[str, object]) -> None:
        """Enter an event; it is in the log if and only if the transaction is committed."""
        self.events.append((name, body))


class Unavailable(Exception):
    """The database is locked, full or gone. Nothing was saved."""


class Writer:
    """Runs write operations in one thread, as many as are waiting in one transaction.

    A future is done only after the commit is on the disk, so what a rater was told is never lost. An operation answers a refusal by its
    result; if it raises, the group is rolled back and every operation of it is done again by itself.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time, max_group: int = 128) -> None:
        self._engine, self._clock, self._max_group = engine, clock, max_group
        self._queue: SimpleQueue[tuple[Callable[[Transaction], Any], Future[Any]] | None] = SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="unstilted-vote-writer", daemon=True)
        self._thread.start()

    def submit(self, operation: Callable[[Transaction], T]) -> "Future[T]":
        """Queue an operation. The future raises Unavailable when the database can't save it."""
        future: Future[T] = Future()
        if self._is_closed:
            future.set_exception(Unavailable("the site is shutting down"))
        else:
            self._queue.put((operation, future))
        return future

    def close(self) -> None:
        """Finish what is queued, then end the thread and its connection."""
        self._is_closed = True
        self._queue.put(None)
        self._thread.join()
        self._engine.dispose()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            group, is_last = [first], False
            while len(group) < self._max_group:
                try:
                    another = self._queue.get_nowait()
                except Empty:
                    break
                if another is None:
                    is_last = True
                    break
                group.append(another)
            self._commit(group)
            if is_last:
                return

    def _commit(self, group: list[tuple[Callable[[Transaction], Any], Future[Any]]]) -> None:
        try:
            results = self._in_one_transaction([operation for operation, _ in group])
        except (OperationalError, Unavailable) as error:
            for _, future in group:
                future.set_exception(Unavailable(str(error)))
        except Exception as error:
            if len(group) == 1:
                group[0][1].set_exception(Unavailable(str(error)) if _is_about_the_database(error) else error)
                return
            for one in group:
                self._commit([one])
        else:
            for (_, future), result in zip(group, results, strict=True):
                future.set_result(result)

    def _in_one_transaction(self, operations: list[Callable[[Transaction], Any]]) -> list[Any]:
        with self._engine.begin() as connection:
            transaction = Transaction(connection, self._clock())
            results = [operation(transaction) for operation in operations]
            append(connection, transaction)
        return results


_LAST_ENTRY = select(schema.audit).order_by(schema.audit.c.seq.desc()).limit(1)


def append(connection: Connection, transaction: Transaction) -> None:
    """Write a transaction's events behind the last entry of the audit log."""
    if not transaction.events:
        return
    last = connection.execute(_LAST_ENTRY).one_or_none()
    previous = Entry(*last) if last else None
    rows = []
    for name, body in transaction.events:
        previous = entry_after(previous, transaction.now, name, body)
        rows.append(vars(previous))
    connection.execute(insert(schema.audit), rows)


def is_alive(engine: Engine) -> bool:
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    except DBAPIError:
        return False
    return True


def _is_about_the_database(error: Exception) -> bool:
    return isinstance(error, DBAPIError) and not isinstance(error, IntegrityError)
