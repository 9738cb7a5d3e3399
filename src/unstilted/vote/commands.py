"""The commands under `unstilted vote`. They import the site when they run, so that `--help` stays instant."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from unstilted.errors import UserError

File = Annotated[str, arg(metavar="PATH")]
NAMES = ("serve", "verify", "invite", "export", "backup")


def vote_app() -> SubcommandApp:
    """All commands under `unstilted vote`."""
    app = SubcommandApp()
    for command in (serve, verify, invite, export, backup):
        app.command(command)
    return app


def with_serve(words: Sequence[str]) -> list[str]:
    """`vote RUN` is short for `vote serve RUN`."""
    if len(words) > 1 and words[0] == "vote" and words[1] not in NAMES and not words[1].startswith("-"):
        return ["vote", "serve", *words[1:]]
    return list(words)


def serve(
    run: Positional[Path],
    /,
    study: File = "",
    host: str = "127.0.0.1",
    port: int = 8080,
    public_url: str = "",
    proxy_hops: int = 0,
    database: str = "",
    workers: int = 1,
) -> None:
    """Serve the voting site of a run folder; `unstilted vote RUN` is short for it. The first start freezes the study.

    Args:
        run: The run folder whose answers are voted on.
        study: The study file (TOML); left out, study.toml in the run folder, or a default study.
        host: Address to listen on; only this machine can reach the default.
        port: Port to listen on.
        public_url: Where raters find the site, such as https://vote.example.org, when it is behind a proxy of yours.
        proxy_hops: How many proxies of yours add to X-Forwarded-For; with 0 the header is ignored.
        database: postgresql://user@host/name; left out, the votes go into SQLite in the run folder.
        workers: Processes that serve the site.
    """
    from unstilted.vote.serve import serve as serve_site
    from unstilted.vote.settings import Settings

    settings = Settings(host, port, public_url, proxy_hops, database, workers)
    serve_site(run, Path(study) if study else None, settings)


def verify(run: Positional[Path], /) -> None:
    """Check that no vote was changed, added or taken out since it was cast.

    Args:
        run: The run folder.
    """
    from unstilted.vote.checking import verify as verify_run

    verdict = verify_run(run)
    if verdict.problems:
        shown = "\n  ".join(verdict.problems[:20])
        more = f"\n  and {len(verdict.problems) - 20} more" if len(verdict.problems) > 20 else ""
        raise UserError(f"the votes are not as they were cast:\n  {shown}{more}", where=str(run), do="Compare with a backup.")
    print(f"{verdict.n_votes} votes and {verdict.n_entries} log entries agree; nothing was changed. The log ends with {verdict.head}.")


def invite(run: Positional[Path], number: Positional[int], /, stratum: str = "panel", public_url: str = "http://127.0.0.1:8080") -> None:
    """Make invitation links, one for each person, and print them.

    Args:
        run: The run folder of a study with access "panel" or "both", served at least once.
        number: How many.
        stratum: Which of the study's strata the people belong to.
        public_url: Where raters find the site.
    """
    from unstilted.vote.inviting import invitation_links

    for link in invitation_links(run, number, stratum, public_url.rstrip("/")):
        print(link)


def export(run: Positional[Path], file: Positional[Path], /) -> None:
    """Write all votes to a .csv, .parquet, or (as preference pairs for the next round of training) .jsonl file.

    Args:
        run: The run folder.
        file: Where to write; its ending says what.
    """
    from unstilted.vote.export import export_file

    print(f"{export_file(run, file)} rows in {file}")


def backup(run: Positional[Path], file: Positional[Path], /) -> None:
    """Copy the SQLite database of a study while it is being served.

    Args:
        run: The run folder.
        file: Where to write the copy.
    """
    from unstilted.vote.database import back_up

    back_up(run, file)
    print(f"The votes are copied to {file}")
