"""The polling station: everything that changes a study, each as one operation inside a write transaction."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, Literal

from sqlalchemy import Row, and_, bindparam, func, insert, select, text, update

from unstilted.errors import UserError
from unstilted.vote import schema
from unstilted.vote.assignment import COUNTED, Cell, Need, Step, cells, choose, plan
from unstilted.vote.database import Prepared, Transaction
from unstilted.vote.freezing import FrozenStudy
from unstilted.vote.items import GoldItem, Winner

BALLOT_LIFE_S = 2 * 3600
"""A ballot left open for longer is void, and its slot goes to somebody else."""
RECLAIM_EVERY_S = 60.0
N_CANDIDATES = 12
"""Neediest items looked at for each ballot; among these the rater's sides and arms are balanced."""
GOLD_CELL = Cell("left", "right")

BLINDING = "blinding"
"""The criterion of the closing question."""

Outcome = Literal["saved", "repeated", "taken_back", "lapsed", "unknown", "elsewhere", "closed", "browser", "invalid"]
"""repeated: this ballot was cast before; elsewhere: the rater's page is another by now; invalid: a question has no answer."""
_OUTCOME_OF_STATE: dict[str, Outcome] = {"voted": "repeated", "undone": "taken_back", "lapsed": "lapsed"}

ballots, items, raters, votes, study_row = schema.ballots.c, schema.items.c, schema.raters.c, schema.votes.c, schema.study.c

_BALLOT_OF_SESSION = Prepared(
    select(
        schema.ballots,
        raters.state.label("rater_state"),
        raters.position.label("rater_position"),
        raters.browser,
        select(study_row.closed_at).scalar_subquery().label("closed_at"),
    )
    .join(schema.raters, raters.id == ballots.rater)
    .where(ballots.id == bindparam("ballot"), raters.session == bindparam("session"))
)
_RATER_OF_SESSION = Prepared(
    select(schema.raters, select(study_row.closed_at).scalar_subquery().label("closed_at")).where(raters.session == bindparam("session"))
)
_IS_LIVE, _IS_LIVE_MAIN = text("ballots.state IN ('open', 'voted')"), text("ballots.state IN ('open', 'voted') AND ballots.role = 'main'")
"""Word for word as the partial indexes say it, without parameters, or SQLite could not use them."""
_PAGE = select(schema.ballots).where(ballots.rater == bindparam("of_rater"), ballots.position == bindparam("at_position"), _IS_LIVE)
_OPEN_BALLOT, _VOTED_BALLOT = Prepared(_PAGE.where(text("ballots.state = 'open'"))), Prepared(_PAGE.where(text("ballots.state = 'voted'")))
_SET_STATE = Prepared(
    update(schema.ballots).where(ballots.id == bindparam("ballot"), ballots.state == bindparam("before")).values(state=bindparam("after"))
)
_SEEN = Prepared(select(ballots.left_arm, ballots.right_arm).where(ballots.rater == bindparam("of_rater"), _IS_LIVE_MAIN))
_MOVE = Prepared(update(schema.raters).where(raters.id == bindparam("of_rater")).values(position=bindparam("to"), state=bindparam("into")))
_TAKE = Prepared(update(schema.items).where(items.id == bindparam("of_item")).values(n_taken=items.n_taken + bindparam("change")))
_ADD_BALLOT = Prepared(insert(schema.ballots))
_ADD_VOTE = Prepared(
    insert(schema.votes).values({name: bindparam(name) for name in ("ballot", "criterion", "winner", "seconds", "cast_at")})
)


@dataclass(frozen=True)
class Visit:
    """What a session's next page depends on."""

    rater: str
    state: str
    position: int
    browser: str
    is_closed: bool
    ballot: Row[Any] | None
    """The open ballot at the rater's position, if one was issued."""
    can_undo: bool


@dataclass(frozen=True)
class Joining:
    """A person who agreed to take part."""

    session: str
    browser: str
    language: str
    stratum: str
    invitation: int | None = None


@dataclass(frozen=True)
class Slip:
    """A ballot as it is handed in."""

    session: str
    browser: str
    ballot: str
    winners: Mapping[str, Winner]
    """By criterion."""
    shown_at: float


@dataclass(frozen=True)
class Cast:
    """What became of a slip; `role` is the ballot's, empty for an unknown one."""

    outcome: Outcome
    role: str = ""


class Station:
    """Operations on one frozen study. `new_id` gives 22 random characters."""

    def __init__(self, frozen: FrozenStudy, new_id: Callable[[], str]) -> None:
        self.frozen, self.study, self.new_id = frozen, frozen.study, new_id
        self._cells = cells(self.study)
        self._attention = frozen.gold_of("attention")
        self._criteria = tuple(criterion.name for criterion in self.study.criteria)
        self._reclaimed_at = 0.0
        self._needs = _needs(self.study.votes_per_item)
        self.plan = lru_cache(maxsize=4096)(self._plan)

    def _plan(self, rater: str) -> tuple[Step, ...]:
        return plan(self.study, rater, len(self._attention))

    def n_counted(self, rater: str) -> int:
        return sum(step.role in COUNTED for step in self.plan(rater))

    # Reading

    def visit(self, connection: Any, session: str) -> Visit | None:
        """Where a session stands, or None for an unknown one."""
        rater = _RATER_OF_SESSION(connection, {"session": session}).one_or_none()
        if rater is None:
            return None
        ballot = _OPEN_BALLOT(connection, {"of_rater": rater.id, "at_position": rater.position}).one_or_none()
        is_closed = rater.closed_at is not None
        can_undo = not is_closed and self._undoable(connection, rater, ballot) is not None
        return Visit(rater.id, rater.state, rater.position, rater.browser, is_closed, ballot, can_undo)

    def is_closed(self, connection: Any) -> bool:
        return connection.execute(select(study_row.closed_at).where(study_row.id == 1)).scalar_one() is not None

    def last_ballot(self, connection: Any, rater: str, position: int) -> Row[Any] | None:
        """The voted ballot of one page with the primary criterion's winner."""
        primary = self.study.criteria[0].name
        found: Row[Any] | None = connection.execute(
            select(schema.ballots, votes.winner)
            .join(schema.votes, (votes.ballot == ballots.id) & (votes.criterion == primary))
            .where(ballots.rater == rater, ballots.position == position, _IS_LIVE, ballots.state == "voted")
        ).one_or_none()
        return found

    # Writing

    def open_study(self, transaction: Transaction) -> None:
        """Enter the study and its items into an empty database; raises UserError when the database holds another study."""
        connection, registration = transaction.connection, self.frozen.registration
        row = connection.execute(select(schema.study)).one_or_none()
        if row is None:
            random = Random(f"{self.study.seed}/shuffle")
            connection.execute(insert(schema.study), {"id": 1, "registration": registration.items_sha256, "closed_at": None})
            connection.execute(
                insert(schema.items), [{"id": item, "shuffle": random.randrange(2**31), "n_taken": 0} for item in self.frozen.items]
            )
            transaction.record("study opened", {"registration": registration.hash, "items": registration.items_sha256})
        elif row.registration != registration.items_sha256:
            raise UserError("this database holds the votes of another study.", where="--database", do="Use a database of its own.")

    def note_registration(self, transaction: Transaction) -> None:
        """Enter a changed pre-registration in the log."""
        registration = self.frozen.registration
        if not _is_noted(transaction, registration.hash):
            transaction.record(
                "study changed", {"registration": registration.hash, "version": registration.version, "changed": list(registration.changed)}
            )

    def join(self, transaction: Transaction, person: Joining) -> str:
        """Enter a rater and give them their first ballot; an invitation used before moves its rater to this session. Returns the id."""
        connection = transaction.connection
        if person.invitation is not None:
            known = connection.execute(
                select(raters.id).where(raters.stratum == person.stratum, raters.invitation == person.invitation)
            ).scalar_one_or_none()
            if known is not None:
                connection.execute(update(schema.raters).where(raters.id == known).values(session=person.session, browser=person.browser))
                transaction.record("rater moved", {"rater": known})
                return str(known)
        rater = self.new_id()
        connection.execute(
            insert(schema.raters),
            {
                "id": rater,
                "session": person.session,
                "browser": person.browser,
                "stratum": person.stratum,
                "invitation": person.invitation,
                "language": person.language,
                "background": "{}",
                "state": "active",
                "position": 0,
                "joined_at": transaction.now,
            },
        )
        transaction.record("rater joined", {"rater": rater, "stratum": person.stratum, "language": person.language})
        self._next_ballot(transaction, rater, 0)
        return rater

    def describe(self, transaction: Transaction, session: str, background: Mapping[str, str]) -> None:
        """Keep what a rater says of themselves."""
        transaction.connection.execute(
            update(schema.raters).where(raters.session == session).values(background=json.dumps(background, sort_keys=True))
        )

    def continue_visit(self, transaction: Transaction, session: str) -> None:
        """Issue a ballot to a rater who has none, because the last one lapsed."""
        rater = _RATER_OF_SESSION(transaction.connection, {"session": session}).one_or_none()
        if rater is not None and rater.state == "active" and rater.closed_at is None:
            self._next_ballot(transaction, rater.id, rater.position)

    def cast(self, transaction: Transaction, slip: Slip) -> Cast:
        """Cast a ballot, and issue the rater's next one.

        Changes nothing unless the ballot is this session's and browser's, open, and the rater's current page, and every question of its
        role is answered.
        """
        connection = transaction.connection
        row = _BALLOT_OF_SESSION(connection, {"ballot": slip.ballot, "session": slip.session}).one_or_none()
        if row is None:
            return Cast("unknown")
        refusal = self._refusal(row, slip)
        if refusal is not None:
            return Cast(refusal, row.role)
        if not _SET_STATE(connection, {"ballot": slip.ballot, "before": "open", "after": "voted"}).rowcount:
            return Cast("repeated", row.role)
        seconds = _seconds(transaction.now - slip.shown_at)
        _ADD_VOTE(
            connection,
            [
                {"ballot": slip.ballot, "criterion": criterion, "winner": winner, "seconds": seconds, "cast_at": transaction.now}
                for criterion, winner in slip.winners.items()
            ],
        )
        transaction.record("vote", vote_body(row, slip.winners, seconds))
        self._advance(transaction, row)
        return Cast("saved", row.role)

    def _refusal(self, row: Any, slip: Slip) -> Outcome | None:
        if row.browser != slip.browser:
            return "browser"
        if row.closed_at is not None or row.rater_state != "active":
            return "repeated" if row.state == "voted" else "closed"
        if row.state != "open":
            return _OUTCOME_OF_STATE[row.state]
        if row.position != row.rater_position:
            return "elsewhere"
        return None if set(slip.winners) == set(self.criteria_of(row.role)) else "invalid"

    def criteria_of(self, role: str) -> tuple[str, ...]:
        """The names of the questions that a ballot of this role asks."""
        return (BLINDING,) if role == "blinding" else self._criteria

    def undo(self, transaction: Transaction, session: str) -> bool:
        """Take the rater's last vote back and put its pair before them again; False when there is none to take back.

        One step only, and not in training, qualification or the closing question. The vote stays in the table, marked by its ballot.
        """
        connection = transaction.connection
        rater = _RATER_OF_SESSION(connection, {"session": session}).one_or_none()
        if rater is None or rater.closed_at is not None:
            return False
        current = _OPEN_BALLOT(connection, {"of_rater": rater.id, "at_position": rater.position}).one_or_none()
        last = self._undoable(connection, rater, current)
        if last is None or not _SET_STATE(connection, {"ballot": last.id, "before": "voted", "after": "undone"}).rowcount:
            return False
        again = {column: getattr(last, column) for column in ("rater", "position", "role", "item", "slot", "left_arm", "right_arm")}
        _ADD_BALLOT(
            connection,
            again | {"id": self.new_id(), "state": "open", "replaces": last.id, "issued_at": transaction.now},
        )
        _MOVE(connection, {"of_rater": rater.id, "to": last.position, "into": "active"})
        transaction.record("vote taken back", {"ballot": last.id})
        return True

    def _undoable(self, connection: Any, rater: Any, current: Row[Any] | None) -> Row[Any] | None:
        """The ballot that undo would take back, of a rater whose open ballot is `current`."""
        if rater.state not in ("active", "done") or rater.position == 0 or (current is not None and current.replaces is not None):
            return None
        if self.plan(rater.id)[rater.position - 1].role not in COUNTED:
            return None
        found: Row[Any] | None = _VOTED_BALLOT(connection, {"of_rater": rater.id, "at_position": rater.position - 1}).one_or_none()
        return found

    def leave(self, transaction: Transaction, session: str, *, keep_votes: bool) -> None:
        """End a rater's part early; votes that they don't leave with the study stay as rows and are excluded."""
        rater = _RATER_OF_SESSION(transaction.connection, {"session": session}).one_or_none()
        if rater is None or rater.closed_at is not None or rater.state == "withdrawn":
            return
        state = "stopped" if keep_votes else "withdrawn"
        _MOVE(transaction.connection, {"of_rater": rater.id, "to": rater.position, "into": state})
        self._lapse(transaction, ballots.rater == rater.id)
        transaction.record("rater left", {"rater": rater.id, "keeps": keep_votes})

    def close(self, transaction: Transaction) -> bool:
        """End the study; False when it was closed before."""
        done = transaction.connection.execute(
            update(schema.study).where(study_row.id == 1, study_row.closed_at.is_(None)).values(closed_at=transaction.now)
        ).rowcount
        if done:
            transaction.record("study closed", {})
        return bool(done)

    # Steps of these

    def _advance(self, transaction: Transaction, answered: Any) -> None:
        """Move a rater behind the page they answered and issue the next ballot, or end their part."""
        rater, following, steps = answered.rater, answered.position + 1, self.plan(answered.rater)
        is_last_of_qualification = answered.role == "qualification" and steps[following].role != "qualification"
        if is_last_of_qualification and not self._qualifies(transaction.connection, rater):
            _MOVE(transaction.connection, {"of_rater": rater, "to": following, "into": "failed"})
            transaction.record("rater not qualified", {"rater": rater})
            return
        _MOVE(transaction.connection, {"of_rater": rater, "to": following, "into": "active"})
        self._next_ballot(transaction, rater, following, may_be_there=answered.replaces is not None)

    def _qualifies(self, connection: Any, rater: str) -> bool:
        rows = connection.execute(
            select(ballots.item, ballots.left_arm, votes.winner)
            .join(schema.votes, votes.ballot == ballots.id)
            .where(
                ballots.rater == rater,
                ballots.role == "qualification",
                ballots.state == "voted",
                votes.criterion == self.study.criteria[0].name,
            )
        ).all()
        n_right = sum(is_right(self.frozen.gold[row.item], row.left_arm, row.winner) for row in rows)
        return n_right >= self.study.qualification.min_correct

    def _next_ballot(self, transaction: Transaction, rater: str, position: int, *, may_be_there: bool = True) -> None:
        """Issue the ballot of a page unless it is there; a rater with no page left, or with no item left to show, is done."""
        connection, steps = transaction.connection, self.plan(rater)
        row = None
        if position < len(steps):
            if may_be_there and _OPEN_BALLOT(connection, {"of_rater": rater, "at_position": position}).one_or_none():
                return
            row = self._row(transaction, rater, steps, position)
        if row is None:
            _MOVE(connection, {"of_rater": rater, "to": position, "into": "done"})
            transaction.record("rater done", {"rater": rater})
            return
        fixed = {"id": self.new_id(), "rater": rater, "position": position, "state": "open", "replaces": None}
        _ADD_BALLOT(connection, fixed | row | {"issued_at": transaction.now})

    def _row(self, transaction: Transaction, rater: str, steps: Sequence[Step], position: int) -> dict[str, Any] | None:
        """Role, item, slot and sides of a page; None when no item is left."""
        step = steps[position]
        random = Random(f"{self.study.seed}/{rater}/{position}/{transaction.now if step.role == 'main' else ''}")
        match step.role:
            case "main":
                return self._main_row(transaction, rater, random)
            case "repeat" | "blinding":
                first = self.last_ballot(transaction.connection, rater, steps.index(Step("main", step.index)))
                if first is None:
                    return None
                cell = Cell(first.left_arm, first.right_arm)
                return _ballot_row(step.role, first.item, cell.exchanged() if step.role == "repeat" else cell)
            case "attention":
                gold = self._attention[step.index]
            case _:
                gold = self.frozen.gold_of(step.role)[step.index]
        return _ballot_row(step.role, gold.id, random.choice((GOLD_CELL, GOLD_CELL.exchanged())))

    def _main_row(self, transaction: Transaction, rater: str, random: Random) -> dict[str, Any] | None:
        connection = transaction.connection
        if not 0 <= transaction.now - self._reclaimed_at < RECLAIM_EVERY_S:
            self._reclaimed_at = transaction.now
            if connection.dialect.name == "postgresql":  # its own statistics come too late for a table that grows from nothing in minutes
                connection.exec_driver_sql("ANALYZE ballots")
            self._lapse(transaction, (ballots.role == "main") & (ballots.issued_at < transaction.now - BALLOT_LIFE_S))
        seen = [Cell(row.left_arm, row.right_arm) for row in _SEEN(connection, {"of_rater": rater})]
        taken: dict[str, set[int]] = {}
        for row in self._needs(connection, {"of_rater": rater, "pivot": random.randrange(2**31)}):
            taken.setdefault(row.id, set()).update(() if row.slot is None else (row.slot,))
        needs = [Need(item, frozenset(slots)) for item, slots in taken.items()]
        choice = choose(needs, seen, self.study, random)
        if choice is None:
            return None
        _TAKE(connection, {"of_item": choice.item, "change": 1})
        return _ballot_row("main", choice.item, choice.cell, choice.slot)

    def _lapse(self, transaction: Transaction, which: Any) -> None:
        """Void open ballots and give their slots back."""
        rows = transaction.connection.execute(
            update(schema.ballots).where(ballots.state == "open", which).values(state="lapsed").returning(ballots.item, ballots.role)
        ).all()
        freed = [{"of_item": row.item, "change": -1} for row in rows if row.role == "main"]
        if freed:
            _TAKE(transaction.connection, freed)


def _needs(n_slots: int) -> Prepared:
    """The neediest items that a rater has not seen, each with the slots in use: rows (item, slot or None)."""
    has_seen = select(ballots.id).where(ballots.rater == bindparam("of_rater"), ballots.item == items.id, _IS_LIVE_MAIN).exists()
    near = (
        select(items.id)
        .where(items.n_taken < n_slots, ~has_seen)
        .order_by(items.n_taken, items.shuffle < bindparam("pivot"), items.shuffle)
        .limit(N_CANDIDATES)
        .subquery()
    )
    return Prepared(
        select(near.c.id, ballots.slot).select_from(near.outerjoin(schema.ballots, and_(ballots.item == near.c.id, _IS_LIVE_MAIN)))
    )


def vote_body(row: Any, winners: Mapping[str, str], seconds: float) -> dict[str, object]:
    """What the audit log says of a vote."""
    return {
        "ballot": row.id,
        "rater": row.rater,
        "role": row.role,
        "item": row.item,
        "left": row.left_arm,
        "right": row.right_arm,
        "position": row.position,
        "winners": dict(winners),
        "seconds": seconds,
    }


def is_right(gold: GoldItem, left: str, winner: str) -> bool:
    """Whether an answer to a gold item is right; `left` says which of its replies stood on the left."""
    exchanged = {"left": "right", "right": "left"}
    return (winner if left == "left" else exchanged.get(winner, winner)) in gold.accept


def _is_noted(transaction: Transaction, registration: str) -> bool:
    found = transaction.connection.execute(
        select(func.count()).select_from(schema.audit).where(schema.audit.c.body.contains(registration))
    ).scalar_one()
    return bool(found)


def _ballot_row(role: str, item: str, cell: Cell, slot: int | None = None) -> dict[str, Any]:
    return {"role": role, "item": item, "slot": slot, "left_arm": cell.left, "right_arm": cell.right}


def _seconds(passed: float) -> float:
    """Time on a page in seconds; -1 when the clock was set in between, so that it isn't known."""
    return round(passed, 2) if 0 <= passed <= BALLOT_LIFE_S else -1.0
