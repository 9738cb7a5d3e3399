"""The first form of the tables, and triggers that keep votes and audit log from being changed or deleted."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

LIVE = "state IN ('open', 'voted')"


def upgrade() -> None:
    op.create_table(
        "study",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("registration", sa.String(64), nullable=False),
        sa.Column("closed_at", sa.Double),
    )
    op.create_table(
        "items",
        sa.Column("id", sa.String(200), primary_key=True),
        sa.Column("shuffle", sa.Integer, nullable=False),
        sa.Column("n_taken", sa.Integer, nullable=False),
    )
    op.create_index("items_by_need", "items", ["n_taken", "shuffle"])
    op.create_table(
        "raters",
        sa.Column("id", sa.String(22), primary_key=True),
        sa.Column("session", sa.String(64), nullable=False, unique=True),
        sa.Column("browser", sa.String(64), nullable=False),
        sa.Column("stratum", sa.String(40), nullable=False),
        sa.Column("invitation", sa.Integer),
        sa.Column("language", sa.String(8), nullable=False),
        sa.Column("background", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("joined_at", sa.Double, nullable=False),
        sa.UniqueConstraint("stratum", "invitation", name="one_rater_an_invitation"),
    )
    op.create_table(
        "ballots",
        sa.Column("id", sa.String(22), primary_key=True),
        sa.Column("rater", sa.String(22), sa.ForeignKey("raters.id"), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("item", sa.String(200), nullable=False),
        sa.Column("slot", sa.Integer),
        sa.Column("left_arm", sa.String(40), nullable=False),
        sa.Column("right_arm", sa.String(40), nullable=False),
        sa.Column("state", sa.String(8), nullable=False),
        sa.Column("replaces", sa.String(22)),
        sa.Column("issued_at", sa.Double, nullable=False),
    )
    _unique_where("one_live_ballot_a_page", ["rater", "position"], LIVE)
    _unique_where("one_live_ballot_a_slot", ["item", "slot"], f"{LIVE} AND role = 'main'")
    _unique_where("no_item_twice_a_rater", ["rater", "item"], f"{LIVE} AND role = 'main'")
    op.create_index("open_ballots_by_age", "ballots", ["state", "issued_at"])
    op.create_table(
        "votes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("ballot", sa.String(22), sa.ForeignKey("ballots.id"), nullable=False),
        sa.Column("criterion", sa.String(40), nullable=False),
        sa.Column("winner", sa.String(8), nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("cast_at", sa.Double, nullable=False),
        sa.UniqueConstraint("ballot", "criterion", name="one_vote_a_ballot_and_criterion"),
    )
    op.create_table(
        "audit",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("event", sa.String(40), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
    )
    for table in ("votes", "audit"):
        _keep(table)


def _unique_where(name: str, columns: list[str], where: str) -> None:
    op.create_index(name, "ballots", columns, unique=True, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def _keep(table: str) -> None:
    """Refuse UPDATE and DELETE on a table."""
    if op.get_bind().dialect.name == "sqlite":
        for change in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{change.lower()} BEFORE {change} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )
        return
    op.execute(
        f"CREATE FUNCTION {table}_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{table} is append-only'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_is_append_only()"
    )
