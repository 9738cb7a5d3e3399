"""The tables. Nothing is ever deleted; votes and the audit log are never changed, which triggers of the database enforce."""

from sqlalchemy import Column, Double, ForeignKey, Index, Integer, MetaData, String, Table, Text, UniqueConstraint

metadata = MetaData()

STATES = ("open", "voted", "undone", "lapsed")
"""Of a ballot. open: shown or waiting; voted; undone: voted and taken back; lapsed: left open too long, its slot given away."""
LIVE = ("open", "voted")

study = Table(
    "study",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("registration", String(64), nullable=False),  # hash of the first version: which study this database holds
    Column("closed_at", Double),
)

items = Table(
    "items",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("shuffle", Integer, nullable=False),
    Column("n_taken", Integer, nullable=False),  # live ballots of role main
    Index("items_by_need", "n_taken", "shuffle"),
)

raters = Table(
    "raters",
    metadata,
    Column("id", String(22), primary_key=True),
    Column("session", String(64), nullable=False, unique=True),  # sha256 of the cookie
    Column("browser", String(64), nullable=False),  # HMAC of the browser's name without versions
    Column("stratum", String(40), nullable=False),
    Column("invitation", Integer),
    Column("language", String(8), nullable=False),
    Column("background", Text, nullable=False),  # JSON
    Column("state", String(16), nullable=False),  # active, done, failed, stopped, withdrawn
    Column("position", Integer, nullable=False),  # pages of the plan already answered
    Column("joined_at", Double, nullable=False),
    UniqueConstraint("stratum", "invitation", name="one_rater_an_invitation"),
)

ballots = Table(
    "ballots",
    metadata,
    Column("id", String(22), primary_key=True),
    Column("rater", String(22), ForeignKey("raters.id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("role", String(16), nullable=False),
    Column("item", String(200), nullable=False),
    Column("slot", Integer),  # of the item's plan; only for role main
    Column("left_arm", String(40), nullable=False),
    Column("right_arm", String(40), nullable=False),
    Column("state", String(8), nullable=False),
    Column("replaces", String(22)),
    Column("issued_at", Double, nullable=False),
)
_IS_LIVE = ballots.c.state.in_(LIVE)
_IS_LIVE_MAIN = _IS_LIVE & (ballots.c.role == "main")
Index("one_live_ballot_a_page", ballots.c.rater, ballots.c.position, unique=True, sqlite_where=_IS_LIVE, postgresql_where=_IS_LIVE)
Index("one_live_ballot_a_slot", ballots.c.item, ballots.c.slot, unique=True, sqlite_where=_IS_LIVE_MAIN, postgresql_where=_IS_LIVE_MAIN)
Index("no_item_twice_a_rater", ballots.c.rater, ballots.c.item, unique=True, sqlite_where=_IS_LIVE_MAIN, postgresql_where=_IS_LIVE_MAIN)
Index("open_ballots_by_age", ballots.c.state, ballots.c.issued_at)

votes = Table(
    "votes",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("ballot", String(22), ForeignKey("ballots.id"), nullable=False),
    Column("criterion", String(40), nullable=False),
    Column("winner", String(8), nullable=False),
    Column("seconds", Double, nullable=False),  # -1: not known, the clock was set in between
    Column("cast_at", Double, nullable=False),
    UniqueConstraint("ballot", "criterion", name="one_vote_a_ballot_and_criterion"),
)

audit = Table(
    "audit",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("event", String(40), nullable=False),
    Column("body", Text, nullable=False),  # canonical JSON
    Column("hash", String(64), nullable=False),
)
