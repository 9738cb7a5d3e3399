"""Small real studies for the vote's tests, a browserless rater, and a private PostgreSQL."""

import html
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from unstilted.records import Response, write_jsonl
from unstilted.vote.app import create_app
from unstilted.vote.freezing import load_frozen, load_secrets
from unstilted.vote.serve import prepare
from unstilted.vote.settings import Settings
from unstilted.vote.site import Site

SMALL = """
n_items = 6
votes_per_item = 8
votes_per_rater = 4
background = false
[qualification]
n_training = 0
n_items = 0
min_correct = 0
[checks]
n_attention = 0
n_repeats = 0
min_median_seconds = 0
"""
WHOLE = """
n_items = 8
votes_per_item = 8
votes_per_rater = 6
[qualification]
n_training = 2
n_items = 3
min_correct = 2
[checks]
n_attention = 2
n_repeats = 2
min_median_seconds = 0
"""
VOICES = {
    "base": "It is recommended that {} be considered.",
    "prompted": "You could think about {}.",
    "tuned": "I'd just try {}, honestly.",
}


def make_run(folder: Path, *, n_prompts: int = 12, voices: Mapping[str, str] = VOICES, study: str = SMALL) -> Path:
    """A run folder with answers of all arms and a study file."""
    folder.mkdir(parents=True, exist_ok=True)
    topics = [f"thing number {number} of the list" for number in range(n_prompts)]
    rows = [
        Response(
            id=f"p{index}",
            arm=arm,  # type: ignore[arg-type]
            prompt=f"what about {topic}?",
            category=f"group {index % 2}",
            text=voice.format(topic),
            n_tokens=9,
            finish_reason="stop",
            seed=index,
        )
        for arm, voice in voices.items()
        for index, topic in enumerate(topics)
    ]
    write_jsonl(folder / "responses.jsonl", rows)
    (folder / "recipe.toml").write_text("")
    (folder / "study.toml").write_text(study)
    return folder


def make_site(run: Path, settings: Settings | None = None, **parts: Any) -> Site:
    """A prepared site; call `close` on it."""
    settings = settings or Settings()
    prepare(run, None, settings)
    return Site(run, load_frozen(run), load_secrets(run), settings, **parts)


class Rater:
    """A person without a browser: follows links and fills in forms, and can be told to misbehave."""

    def __init__(self, site: Site, agent: str = "Mozilla/5.0 Test/1.0") -> None:
        self.site = site
        self.client = TestClient(create_app(site), base_url="http://127.0.0.1:8080", raise_server_exceptions=False, follow_redirects=False)
        self.client.headers.update({"user-agent": agent, "origin": "http://127.0.0.1:8080", "sec-fetch-site": "same-origin"})

    def get(self, path: str) -> Any:
        return self.client.get(path)

    def post(self, path: str, fields: Mapping[str, str], **headers: str) -> Any:
        return self.client.post(path, data=dict(fields), headers=headers)

    def begin(self, path: str = "/") -> Any:
        fields = hidden(self.get(path).text)
        return self.post("/begin", fields | {"consent": "yes"})

    def ballot(self) -> dict[str, str]:
        """The hidden fields of the current pair."""
        return hidden(self.get("/vote").text)

    def vote(self, winner: str = "left", criterion: str = "thoughtful") -> Any:
        return self.post("/vote", self.ballot() | {f"winner-{criterion}": winner})

    @property
    def cookie(self) -> str:
        return str(self.client.cookies.get("vote"))


def hidden(page: str) -> dict[str, str]:
    """Names and values of a page's hidden fields."""
    fields = re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)">', page)
    return {name: html.unescape(value) for name, value in fields}


def said(page: str) -> list[str]:
    """The texts shown: prompt, reply A, reply B."""
    return [text.strip() for text in re.findall(r'<div class="said"[^>]*>(.*?)</div>', page, flags=re.S)]


def heading(page: str) -> str:
    found = re.search(r"<h1[^>]*>(.*?)</h1>", page, flags=re.S)
    return html.unescape(found[1].strip()) if found else ""


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def site(run: Path) -> Iterator[Site]:
    site = make_site(run)
    yield site
    site.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a PostgreSQL server of our own, without a database name; skipped where its programs are missing."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(found) for found in [shutil.which("initdb")] if found]
    if not programs:
        pytest.skip("PostgreSQL's programs (initdb, postgres) are not installed")
    folder = Path(tempfile.mkdtemp(prefix="unstilted-postgres-"))
    user: dict[str, Any] = {}
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        user = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        shutil.chown(folder, "nobody", "nogroup")
    command = [programs[-1], "-D", folder / "data", "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder, **user)
    port = free_port()
    server = subprocess.Popen(
        [programs[-1].with_name("postgres"), "-D", folder / "data", "-p", str(port), "-k", folder, "-c", "listen_addresses=127.0.0.1"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **user,
    )
    try:
        _wait_for_postgres(port, server)
        yield f"postgresql://tester@127.0.0.1:{port}"
    finally:
        server.send_signal(2)
        server.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_postgres(port: int, server: "subprocess.Popen[bytes]") -> None:
    import psycopg

    for _ in range(200):
        assert server.poll() is None, "postgres ended"
        try:
            psycopg.connect(f"postgresql://tester@127.0.0.1:{port}/postgres").close()
        except psycopg.OperationalError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("postgres did not start")


@pytest.fixture
def postgres_database(postgres: str, request: pytest.FixtureRequest) -> str:
    """URL of an empty database."""
    import psycopg

    name = f"t{abs(hash(request.node.nodeid)) % 10**12}"
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{postgres}/{name}"


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest) -> Settings:
    """Settings with either database."""
    if request.param == "sqlite":
        return Settings()
    return replace(Settings(), database=request.getfixturevalue("postgres_database"))
