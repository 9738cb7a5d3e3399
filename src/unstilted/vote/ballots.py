"""Signed names: ballots, form tokens and invitations. A signature says that this server made it for this session until then."""

import hashlib
import hmac
import re
from dataclasses import dataclass

_BALLOT = re.compile(r"([A-Za-z0-9_-]{22})\.([0-9]{1,12})\.([0-9a-f]{64})", re.ASCII)
_FORM = re.compile(r"([0-9]{1,12})\.([0-9a-f]{64})", re.ASCII)
_INVITATION = re.compile(r"([a-z0-9][a-z0-9_-]{0,39})\.([0-9]{1,7})\.([0-9a-f]{32})", re.ASCII)


@dataclass(frozen=True)
class Signer:
    """Makes and checks signatures under one secret key."""

    key: bytes

    def sign(self, purpose: str, *parts: str) -> str:
        """HMAC-SHA256 in hex over purpose and parts, each with its length, so that no two lists of parts sign alike."""
        message = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in (purpose, *parts))
        return hmac.new(self.key, message, hashlib.sha256).hexdigest()

    def is_signed(self, signature: str, purpose: str, *parts: str) -> bool:
        return hmac.compare_digest(signature, self.sign(purpose, *parts))


@dataclass(frozen=True)
class Ballot:
    """A ballot as a form brings it back."""

    id: str
    expires: int
    """Unix time in seconds."""


def ballot_token(signer: Signer, ballot_id: str, session: str, expires: int) -> str:
    """The ballot's text in the form: random id, expiry, signature over both and the session."""
    return f"{ballot_id}.{expires}.{signer.sign('ballot', ballot_id, session, str(expires))}"


def read_ballot(signer: Signer, token: str, session: str) -> Ballot | None:
    """The ballot that this session was given, or None for a forged, foreign or mangled one. Expiry is the caller's to judge."""
    parts = _BALLOT.fullmatch(token)
    if parts is None or not signer.is_signed(parts[3], "ballot", parts[1], session, parts[2]):
        return None
    return Ballot(parts[1], int(parts[2]))


def form_token(signer: Signer, session: str, expires: int) -> str:
    """What proves that a form came from a page that this session was shown."""
    return f"{expires}.{signer.sign('form', session, str(expires))}"


def is_form_token(signer: Signer, token: str, session: str, now: float) -> bool:
    parts = _FORM.fullmatch(token)
    return parts is not None and int(parts[1]) >= now and signer.is_signed(parts[2], "form", session, parts[1])


def invitation_code(signer: Signer, stratum: str, number: int) -> str:
    """The last part of an invitation link."""
    return f"{stratum}.{number}.{signer.sign('invitation', stratum, str(number))[:32]}"


def read_invitation(signer: Signer, code: str) -> tuple[str, int] | None:
    """(stratum, number) of an invitation that this server made, or None."""
    parts = _INVITATION.fullmatch(code)
    if parts is None or not hmac.compare_digest(parts[3], signer.sign("invitation", parts[1], parts[2])[:32]):
        return None
    return parts[1], int(parts[2])
