"""What every request passes before a page is made, and every answer on its way out."""

import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unstilted.vote.settings import Settings

MAX_BODY_BYTES = 16_384
SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "x-robots-tag": "noindex, nofollow",
}


class Buckets:
    """Token buckets by name: `rate_per_minute` requests a minute on average, as many at once at most.

    Memory is bounded: of more than `max_names` the one longest unused is forgotten.
    """

    def __init__(self, rate_per_minute: int, clock: Callable[[], float] = time.monotonic, max_names: int = 50_000) -> None:
        self._rate, self._clock, self._max_names = rate_per_minute, clock, max_names
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str) -> bool:
        """Whether one more request is within the limit."""
        now = self._clock()
        level, at = self._levels.pop(name, (float(self._rate), now))
        level = min(self._rate, level + (now - at) * self._rate / 60)
        self._levels[name] = (level - 1 if level >= 1 else level, now)
        if len(self._levels) > self._max_names:
            self._levels.popitem(last=False)
        return level >= 1


class Shield:
    """ASGI middleware: foreign hosts, foreign forms, large bodies and floods are refused; security headers are added.

    refuse: makes the plain page of a refusal from its HTTP status and the key of its text.
    """

    def __init__(self, app: ASGIApp, settings: Settings, refuse: Callable[[Scope, int, str], Response]) -> None:
        self.app, self.settings, self.refuse = app, settings, refuse
        self.addresses = Buckets(settings.limits.per_address)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope["unstilted_address"] = client_address(scope, headers, self.settings.proxy_hops)
        is_static = scope["path"].startswith("/static/")

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add_headers(MutableHeaders(scope=message), is_static)
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await self.refuse(scope, *refusal)(scope, receive, send_guarded)
            return
        body = await _whole_body(receive) if scope["method"] not in ("GET", "HEAD") else b""
        if body is None:
            await self.refuse(scope, 413, "invalid")(scope, receive, send_guarded)
            return
        await self.app(scope, _replay(body, receive), send_guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        if headers.get("host", "").lower() not in self.settings.hosts:
            return 400, "invalid"
        if not self.addresses.take(scope["unstilted_address"]):
            return 429, "slow"
        if scope["method"] in ("GET", "HEAD"):
            return None
        if scope["method"] != "POST":
            return 405, "invalid"
        if not is_own_form(headers, self.settings):
            return 403, "form"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return 413, "invalid"
        return None

    def _add_headers(self, headers: MutableHeaders, is_static: bool) -> None:
        for name, value in SECURITY_HEADERS.items():
            headers[name] = value
        if not is_static:
            headers["cache-control"] = "no-store"
        if self.settings.is_https:
            headers["strict-transport-security"] = "max-age=31536000"


def is_own_form(headers: Headers, settings: Settings) -> bool:
    """Whether a POST says, by Origin and Fetch Metadata, that it comes from a page of this site; saying nothing is a no."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site not in (None, "same-origin") or (origin is not None and origin.lower() not in settings.origins):
        return False
    if site is None and origin is None:
        referrer = urlsplit(headers.get("referer", ""))
        return f"{referrer.scheme}://{referrer.netloc}".lower() in settings.origins
    return True


def client_address(scope: Scope, headers: Headers, proxy_hops: int) -> str:
    """The address of the connection, or what the outermost of our own proxies wrote into X-Forwarded-For."""
    connected = scope["client"][0] if scope.get("client") else ""
    if not proxy_hops:
        return str(connected)
    forwarded = [part.strip() for part in ",".join(headers.getlist("x-forwarded-for")).split(",") if part.strip()]
    return forwarded[-proxy_hops] if len(forwarded) >= proxy_hops else str(connected)


async def _whole_body(receive: Receive) -> bytes | None:
    """The request's body, or None as soon as it is too large, whatever its headers say."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    is_sent = False

    async def again() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
