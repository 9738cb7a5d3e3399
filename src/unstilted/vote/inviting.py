"""Invitation links: signed codes, numbered in the audit log so that none is given out twice."""

import json
from pathlib import Path

from sqlalchemy import select

from unstilted.errors import UserError
from unstilted.vote import schema
from unstilted.vote.ballots import invitation_code
from unstilted.vote.database import Transaction, Unavailable, Writer, open_engine, stored_url
from unstilted.vote.freezing import load_frozen, load_secrets


def note_invitations(transaction: Transaction, stratum: str, number: int) -> int:
    """Enter new invitations in the log; returns the first one's number."""
    query = select(schema.audit.c.body).where(schema.audit.c.event == "invited")
    given = [json.loads(body) for body in transaction.connection.execute(query).scalars()]
    given += [body for name, body in transaction.events if name == "invited"]
    first = 1 + max((body["first"] + body["number"] - 1 for body in given if body["stratum"] == stratum), default=0)
    transaction.record("invited", {"stratum": stratum, "first": first, "number": number})
    return first


def invitation_links(run: Path, number: int, stratum: str, url: str) -> list[str]:
    """New links for a study that was served before.

    Raises UserError for a stratum that the study doesn't have, an open study, and a database that can't be written.
    """
    study = load_frozen(run).study
    if study.access == "open":
        raise UserError("the study is open to everybody.", where="study.access", do='Set it to "panel" or "both" and serve it again.')
    if stratum not in study.strata:
        raise UserError(f"'{stratum}' is no stratum of the study.", where="--stratum", do=f"Known here: {', '.join(study.strata)}.")
    if number < 1:
        raise UserError(f"{number} invitations can't be made.", where="command line", do="Ask for at least one.")
    signer, writer = load_secrets(run).signer, Writer(open_engine(stored_url(run), is_writer=True))
    try:
        first = writer.submit(lambda transaction: note_invitations(transaction, stratum, number)).result()
    except Unavailable as error:
        raise UserError(f"the database can't be used ({error}).", where=str(run), do="Try again in a moment.") from None
    finally:
        writer.close()
    return [f"{url}/join/{invitation_code(signer, stratum, first + index)}" for index in range(number)]
