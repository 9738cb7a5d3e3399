"""How the site is served: address, database, proxy, limits. None of this is part of the study."""

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from unstilted.errors import UserError


@dataclass(frozen=True)
class Limits:
    """Requests a minute, with a burst of the same size; each worker counts its own."""

    per_address: int = 6000
    """Many raters may share one address, as in a class room."""
    per_session: int = 120
    joins_per_address: int = 60
    logins_per_address: int = 10


@dataclass(frozen=True)
class Settings:
    """Raises UserError for an address that others could reach without `public_url`, and for a URL that is none."""

    host: str = "127.0.0.1"
    port: int = 8080
    public_url: str = ""
    """Where raters find the site, such as https://vote.example.org; empty is http on the loopback address."""
    proxy_hops: int = 0
    """Proxies of yours in front of the site whose X-Forwarded-For is believed; 0 believes nobody's."""
    database: str = ""
    workers: int = 1
    max_group: int = 128
    """Votes committed together at most; each then waits for one write to the disk instead of one of its own. 1 commits each by itself."""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.public_url and not _is_loopback(self.host):
            raise UserError(
                f"others can reach '{self.host}', so the site must know its own address.",
                where="--public-url",
                do="Give the https address that raters use. docs/running_a_vote.md shows a proxy that adds TLS.",
            )
        parts = urlsplit(self.public_url)
        if self.public_url and (parts.scheme not in ("http", "https") or not parts.netloc or parts.path.strip("/") or parts.query):
            raise UserError(f"'{self.public_url}' is no site's address.", where="--public-url", do="Write it as https://vote.example.org.")
        if self.workers < 1 or self.proxy_hops < 0 or not 0 <= self.port < 65536:
            raise UserError("a number is out of range.", where="--workers, --proxy-hops, --port", do="Change it.")

    @property
    def origins(self) -> frozenset[str]:
        """Where a form of ours can come from."""
        if self.public_url:
            return frozenset({self.public_url.rstrip("/").lower()})
        return frozenset(f"http://{host}" for host in self.hosts)

    @property
    def hosts(self) -> frozenset[str]:
        """Host headers that are ours; any other may be a foreign name pointed at this machine."""
        loopback = {f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]", self.host)}
        if self.port == 80:
            loopback |= {"127.0.0.1", "localhost", "[::1]", self.host}
        return frozenset(loopback | ({urlsplit(self.public_url).netloc.lower()} if self.public_url else set()))

    @property
    def is_https(self) -> bool:
        return self.public_url.startswith("https://")

    @property
    def url(self) -> str:
        return self.public_url.rstrip("/") or f"http://{self.host}:{self.port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
