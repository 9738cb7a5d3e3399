"""How many votes a second the site takes, and how long its pages take under 200 raters. Loopback only.

    python benchmarks/vote_load.py --json vote_load.json
    python benchmarks/vote_load.py --postgres postgresql://me@localhost/empty_database

Everything runs on this machine: the server's workers and the load share its cores. A vote counts when the server has answered 303, that is
after the commit is on the disk, and with the rater's next pair issued in the same transaction.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

from unstilted.content import stopwords
from unstilted.records import Response, write_jsonl
from unstilted.rundir import machine
from unstilted.vote.ballots import ballot_token, form_token
from unstilted.vote.checking import verify
from unstilted.vote.database import Transaction, Writer, database_url, open_engine
from unstilted.vote.freezing import load_frozen, load_secrets
from unstilted.vote.serve import prepare
from unstilted.vote.settings import Limits, Settings
from unstilted.vote.site import Site, random_id
from unstilted.vote.station import BALLOT_LIFE_S, Joining, Station

N_ITEMS = 200
N_CONNECTIONS = 200
STUDY = f"""
n_items = {N_ITEMS}
votes_per_item = 4000
votes_per_rater = 100
background = false
[qualification]
n_training = 0
n_items = 0
min_correct = 0
"""
AGENT = "benchmark"


def make_run(folder: Path) -> Path:
    """A run with invented replies of about 90 words."""
    random = Random(0)
    words = sorted(stopwords())
    rows = [
        Response(
            id=f"p{index}",
            arm=arm,  # type: ignore[arg-type]
            prompt=" ".join(random.choices(words, k=12)),
            text=" ".join(random.choices(words, k=90)),
            n_tokens=120,
            finish_reason="stop",
            seed=index,
        )
        for arm in ("base", "prompted", "tuned")
        for index in range(N_ITEMS)
    ]
    folder.mkdir()
    write_jsonl(folder / "responses.jsonl", rows)
    (folder / "study.toml").write_text(STUDY)
    return folder


def enter_raters(run: Path, settings: Settings, n_raters: int) -> list[tuple[str, str]]:
    """Raters with an open ballot each, entered without the site: (cookie, body of their first vote)."""
    frozen, signer = load_frozen(run), load_secrets(run).signer
    station = Station(frozen, random_id)
    writer = Writer(open_engine(database_url(run, settings.database), is_writer=True))
    browser = signer.sign("browser", AGENT)
    cookies = [random_id() * 2 for _ in range(n_raters)]
    sessions = [Site.session_of(cookie) for cookie in cookies]

    def enter(transaction: Transaction) -> list[str]:
        for session in sessions:
            station.join(transaction, Joining(session, browser, "en", "open"))
        visits = [station.visit(transaction.connection, session) for session in sessions]
        return [str(visit.ballot.id) for visit in visits if visit is not None and visit.ballot is not None]

    found = writer.submit(enter).result()
    writer.close()
    expires = int(time.time()) + BALLOT_LIFE_S
    return [
        (cookie, vote_body(ballot_token(signer, ballot, session, expires), form_token(signer, session, expires)))
        for cookie, session, ballot in zip(cookies, sessions, found, strict=True)
    ]


def vote_body(ballot: str, form: str) -> str:
    return f"form={quote(form)}&ballot={quote(ballot)}&winner-thoughtful=left"


class Client:
    """One kept-alive connection, as thin as it can be, because it shares the cores with the server."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def connect(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, method: str, path: str, cookie: str, body: str = "") -> tuple[int, bytes]:
        head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\ncookie: vote={cookie}\r\nuser-agent: {AGENT}\r\n"
        if method == "POST":
            head += f"origin: http://127.0.0.1:{self.port}\r\ncontent-length: {len(body)}\r\n"
            head += "content-type: application/x-www-form-urlencoded\r\n"
        self.writer.write(f"{head}\r\n{body}".encode())
        answer = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", answer)
        content = await self.reader.readexactly(int(length[1])) if length else b""
        return int(answer[9:12]), content


async def votes_a_second(port: int, ready: list[tuple[str, str]]) -> float:
    """Send one vote for each rater over `N_CONNECTIONS` connections."""
    waiting = iter(ready)
    clients = [Client(port) for _ in range(N_CONNECTIONS)]
    await asyncio.gather(*(client.connect() for client in clients))

    async def work(client: Client) -> None:
        for cookie, body in waiting:
            status, content = await client.ask("POST", "/vote", cookie, body)
            assert status == 303, (status, content[-600:])

    start = time.perf_counter()
    await asyncio.gather(*map(work, clients))
    return len(ready) / (time.perf_counter() - start)


async def page_seconds(port: int, raters: list[tuple[str, str]], seconds: float) -> list[float]:
    """Time of each pair's page while every rater reads for 1 to 3 seconds, votes, and gets the next."""
    until, took, random = time.perf_counter() + seconds, [], Random(1)

    async def rate(cookie: str) -> None:
        client = Client(port)
        await client.connect()
        await asyncio.sleep(random.uniform(0, 2))
        while time.perf_counter() < until:
            start = time.perf_counter()
            status, page = await client.ask("GET", "/vote", cookie)
            took.append(time.perf_counter() - start)
            assert status == 200, status
            fields = dict(re.findall(rb'name="(form|ballot)" value="([^"]*)"', page))
            await asyncio.sleep(random.uniform(1, 3))
            status, _ = await client.ask("POST", "/vote", cookie, vote_body(fields[b"ballot"].decode(), fields[b"form"].decode()))
            assert status == 303, status

    await asyncio.gather(*(rate(cookie) for cookie, _ in raters))
    return sorted(took)


def start_server(run: Path, settings: Settings) -> "subprocess.Popen[bytes]":
    told = {**asdict(settings)}
    limits = told.pop("limits")
    program = (
        "from pathlib import Path; from unstilted.vote.serve import serve; from unstilted.vote.settings import Limits, Settings; "
        f"serve(Path({str(run)!r}), None, Settings(**{told!r}, limits=Limits(**{limits!r})))"
    )
    return subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL, start_new_session=True)


async def until_up(port: int) -> None:
    for _ in range(300):
        try:
            client = Client(port)
            await client.connect()
            if (await client.ask("GET", "/healthz", ""))[0] == 200:
                return
        except (OSError, asyncio.IncompleteReadError):
            pass
        await asyncio.sleep(0.1)
    raise SystemExit("the server did not start")


def measure(name: str, folder: Path, settings: Settings, n_votes: int, seconds: float) -> dict[str, Any]:
    """One database and one way to commit."""
    run = make_run(folder / name.replace(" ", "-"))
    prepare(run, None, settings)
    ready, raters = enter_raters(run, settings, n_votes), enter_raters(run, settings, N_CONNECTIONS)
    server = start_server(run, settings)
    try:
        asyncio.run(until_up(settings.port))
        rate = asyncio.run(votes_a_second(settings.port, ready))
        pages = asyncio.run(page_seconds(settings.port, raters, seconds)) if seconds else []
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)
    verdict = verify(run)
    assert verdict.problems == (), verdict.problems[:3]
    row: dict[str, Any] = {"name": name, "workers": settings.workers, "votes_per_s": round(rate), "n_votes": verdict.n_votes}
    if pages:
        row |= {
            "page_p50_ms": round(1e3 * pages[len(pages) // 2], 1),
            "page_p99_ms": round(1e3 * pages[int(len(pages) * 0.99)], 1),
            "n_pages": len(pages),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=int, default=2000, help="votes sent for the rate")
    parser.add_argument("--seconds", type=float, default=5, help="how long 200 raters read and vote for the page times")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--port", type=int, default=8471)
    parser.add_argument("--postgres", default="", help="URL of an empty PostgreSQL database")
    parser.add_argument("--only", default="", help="measure only what has this in its name")
    parser.add_argument("--json", default="", help="where to write the results")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended too
    limits = Limits(10**8, 10**8, 10**8, 10**8)
    ways = {
        "SQLite group commit": Settings(port=asked.port, workers=asked.workers, limits=limits),
        "SQLite plain": Settings(port=asked.port, workers=asked.workers, limits=limits, max_group=1),
    }
    if asked.postgres:
        ways["PostgreSQL"] = Settings(port=asked.port, workers=asked.workers, limits=limits, database=asked.postgres)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in ways.items():
            if asked.only.lower() in name.lower():
                results.append(measure(name, Path(folder), settings, asked.votes, asked.seconds))
                print(json.dumps(results[-1]))
    if asked.json:
        Path(asked.json).write_text(json.dumps({"machine": machine(), "connections": N_CONNECTIONS, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
