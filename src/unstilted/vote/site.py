"""What pages share: rendering, language, sessions, forms, and reading and writing without blocking the event loop."""

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Scope

from unstilted.vote.ballots import form_token, is_form_token
from unstilted.vote.database import Transaction, Unavailable, Writer, database_url, open_engine
from unstilted.vote.freezing import FrozenStudy, Secrets
from unstilted.vote.languages import Language, accepted, best, languages
from unstilted.vote.settings import Settings
from unstilted.vote.shield import Buckets
from unstilted.vote.station import Station, Visit

T = TypeVar("T")
FORM_LIFE_S = 12 * 3600
SESSION_DAYS = 30


def random_id() -> str:
    """22 characters, 128 random bits."""
    return secrets.token_urlsafe(16)


class Refusal(Exception):
    """A plain page instead of the one asked for: HTTP status and the key of its text."""

    def __init__(self, status: int, key: str, link: str = "/vote") -> None:
        super().__init__(key)
        self.status, self.key, self.link = status, key, link


@dataclass
class Site:
    """One worker's site."""

    run: Path
    frozen: FrozenStudy
    secrets: Secrets
    settings: Settings
    clock: Callable[[], float] = time.time
    new_id: Callable[[], str] = random_id
    station: Station = field(init=False)
    writer: Writer = field(init=False)

    def __post_init__(self) -> None:
        url = database_url(self.run, self.settings.database)
        self.station = Station(self.frozen, self.new_id)
        self.writer = Writer(open_engine(url, is_writer=True), self.clock, self.settings.max_group)
        self.reader = open_engine(url, is_writer=False)
        self.sessions = Buckets(self.settings.limits.per_session)
        self.joins = Buckets(self.settings.limits.joins_per_address)
        self.logins = Buckets(self.settings.limits.logins_per_address)
        self.templates = Environment(
            loader=PackageLoader("unstilted.vote"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self.assets = asset_versions()

    def close(self) -> None:
        self.writer.close()
        self.reader.dispose()

    # Database

    async def write(self, operation: Callable[[Transaction], T]) -> T:
        """Run a write operation; raises Refusal when it can't be saved."""
        try:
            return await asyncio.wrap_future(self.writer.submit(operation))
        except Unavailable:
            raise Refusal(503, "busy") from None

    async def read(self, question: Callable[[Connection], T]) -> T:
        """Read in a thread; raises Refusal when the database can't be read."""

        def ask() -> T:
            with self.reader.connect() as connection:
                return question(connection)

        try:
            return await run_in_threadpool(ask)
        except DBAPIError:
            raise Refusal(503, "busy") from None

    # Sessions and forms

    @property
    def cookie(self) -> str:
        return "__Host-vote" if self.settings.is_https else "vote"

    def session(self, request: Request) -> str:
        """What the database knows a session by: the hash of its cookie, so that a stolen database opens no session."""
        cookie = request.cookies.get(self.cookie, "")
        return self.session_of(cookie) if cookie else ""

    @staticmethod
    def session_of(token: str) -> str:
        return hashlib.sha256(token.encode()).hexdigest()

    def browser(self, request: Request) -> str:
        """A browser's fingerprint that survives its updates, under our key."""
        name = re.sub(r"[\d._]+", "", request.headers.get("user-agent", ""))[:500]
        return self.secrets.signer.sign("browser", name)

    async def visit(self, request: Request) -> Visit:
        """The rater of a request; raises Refusal for an unknown session, another browser's cookie, or a flood."""
        session = self.session(request)
        if not session:
            raise Refusal(403, "session", "/")
        self.require_calm(session)
        visit = await self.read(lambda connection: self.station.visit(connection, session))
        if visit is None:
            raise Refusal(403, "session", "/")
        if visit.browser != self.browser(request):
            raise Refusal(403, "browser", "/")
        return visit

    def require_calm(self, session: str) -> None:
        if not self.sessions.take(session):
            raise Refusal(429, "slow")

    def form_token(self, session: str) -> str:
        return form_token(self.secrets.signer, session, int(self.clock()) + FORM_LIFE_S)

    def require_form(self, token: object, session: str) -> None:
        if not isinstance(token, str) or not is_form_token(self.secrets.signer, token, session, self.clock()):
            raise Refusal(403, "form", "/vote" if session else "/")

    def set_session(self, response: Response, token: str) -> None:
        response.set_cookie(
            self.cookie, token, max_age=SESSION_DAYS * 86_400, path="/", httponly=True, samesite="lax", secure=self.settings.is_https
        )

    # Pages

    def language(self, scope: Scope) -> Language:
        request = Request(scope)
        header = accepted(request.headers.get("accept-language", ""))
        return best([request.query_params.get("lang", ""), request.cookies.get("language", ""), *header])

    def page(self, request: Request, template: str, *, status: int = 200, **context: Any) -> HTMLResponse:
        """A page in the rater's language; a language chosen by `?lang=` is kept in a cookie."""
        language = self.language(request.scope)
        html = self.templates.get_template(template).render(
            t=language,
            languages=list(languages().values()),
            title=self.frozen.study.title,
            assets=self.assets,
            **context,
        )
        response = HTMLResponse(html, status_code=status)
        if request.query_params.get("lang", "") == language.code:
            response.set_cookie(
                "language", language.code, max_age=365 * 86_400, path="/", httponly=True, samesite="lax", secure=self.settings.is_https
            )
        return response

    def refusal(self, scope: Scope, status: int, key: str, link: str = "/") -> Response:
        """The plain page of a refusal."""
        response = self.page(
            Request(scope), "notice.html", status=status, key=key, link=link, label="try_again" if link != "/" else "to_start"
        )
        if status in (429, 503):
            response.headers["retry-after"] = "10"
        return response


def form_of(*fields: str) -> dict[str, Any]:
    """What OpenAPI is told of a form's fields."""
    schema = {"type": "object", "properties": {field: {"type": "string"} for field in fields}}
    return {"requestBody": {"content": {"application/x-www-form-urlencoded": {"schema": schema}}}}


def to(path: str) -> RedirectResponse:
    """Answer a form by sending the browser on with GET, so that reloading sends nothing again."""
    return RedirectResponse(path, status_code=303)


def asset_versions() -> dict[str, str]:
    """Name of each static file with its content's hash, so that browsers may keep it for good."""
    folder = Path(__file__).parent / "static"
    return {file.name: f"/static/{file.name}?{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}" for file in folder.iterdir()}
