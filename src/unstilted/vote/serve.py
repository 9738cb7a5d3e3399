"""`unstilted vote`: freeze the study, bring the database up, and serve the site."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from unstilted.errors import UserError
from unstilted.progress import say
from unstilted.vote.app import ENVIRONMENT
from unstilted.vote.checking import note_head
from unstilted.vote.database import Writer, database_url, migrate, open_engine, store_url
from unstilted.vote.freezing import FrozenStudy, freeze, load_secrets
from unstilted.vote.settings import Settings
from unstilted.vote.site import random_id
from unstilted.vote.station import Station

MAX_CONNECTIONS = 2000


def prepare(run: Path, study_file: Path | None, settings: Settings) -> FrozenStudy:
    """Freeze the study if it isn't yet, make the secrets, migrate the database and enter the study in it.

    Raises UserError for a study that can't be done and a database that can't be used or holds another study.
    """
    if not run.is_dir():
        raise UserError("there is no such run folder.", where=str(run), do="`unstilted run --out FOLDER` makes one.")
    frozen, url = freeze(run, study_file), database_url(run, settings.database)
    load_secrets(run)
    migrate(url)
    engine = open_engine(url, is_writer=True)
    writer = Writer(engine)
    try:
        station = Station(frozen, random_id)
        writer.submit(station.open_study).result()
        writer.submit(station.note_registration).result()
        with engine.begin() as connection:
            note_head(connection, frozen.folder)
    finally:
        writer.close()
    store_url(run, url)
    return frozen


def serve(run: Path, study_file: Path | None, settings: Settings) -> None:
    """Serve the study until interrupted."""
    import uvicorn

    frozen = prepare(run, study_file, settings)
    say(f"{frozen.study.title}\n  {len(frozen.items)} prompts, pre-registered as {frozen.registration.hash[:16]}")
    say(f"  raters:  {settings.url}/\n  admin:   {settings.url}/admin   (token in {frozen.folder / 'admin_token'})")
    if not settings.public_url:
        say("  Only this machine can reach it. docs/running_a_vote.md shows how to put it behind TLS for others.")
    os.environ[ENVIRONMENT] = json.dumps({"run": str(run.absolute()), "settings": asdict(settings)})
    uvicorn.run(
        "unstilted.vote.app:from_environment",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        proxy_headers=False,
        server_header=False,
        date_header=True,
        access_log=False,
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=15,
        h11_max_incomplete_event_size=16_384,
    )
