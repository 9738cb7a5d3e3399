"""The commands under `unstilted vote`. They import the site when they run, so that `--help` stays instant."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from unstilted.errors import UserError

File = Annotated[str, arg(metavar="PATH")]
NAMES = ("serve", "verify", "invite", "export", "backup", "judge", "simulate")


def vote_app() -> SubcommandApp:
    """All commands under `unstilted vote`."""
    app = SubcommandApp()
    for command in (serve, verify, invite, export, backup, judge, simulate):
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


def judge(
    run: Positional[Path],
    /,
    criterion: tuple[str, ...] = (),
    model: str = "",
    engine: Literal["auto", "embedded", "transformers"] = "auto",
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Ask a model what raters are asked, each pair with the sides both ways. Its votes are kept apart from people's.

    Args:
        run: The run folder.
        criterion: Which questions; left out, all of the study.
        model: "embedded", a folder with Hugging Face weights, or a hub id; left out, the run's own base model.
        engine: "embedded" is llama.cpp in process, "transformers" runs any model; "auto" takes the first that can.
        temperature: Randomness of its answers; 0 takes the likeliest.
        seed: Of that randomness; both orders of a pair get the same.
    """
    from unstilted.pipeline import settle_libraries
    from unstilted.recipe import load_recipe
    from unstilted.vote.judge import JudgeSettings, judge_run

    if not (run / "recipe.toml").is_file():
        raise UserError("this is no run folder.", where=str(run), do="`unstilted run --out FOLDER` makes one.")
    settle_libraries()
    settings = JudgeSettings(criterion, model, engine, temperature, seed)
    for summary in judge_run(run, settings, load_recipe(run / "recipe.toml")):
        print(f"{summary.criterion}: {summary.words}")


def simulate(
    run: Positional[Path],
    /,
    raters: int = 30,
    arm: str = "",
    share: float = 0.7,
    rater_sd: float = 0.8,
    item_sd: float = 0.6,
    left_bias: float = 0.2,
    ties: float = 0.1,
    careless: float = 0.1,
    seed: int = 0,
) -> None:
    """Let simulated raters vote, to see how a study would go. Their votes are kept apart, marked, and prove nothing about people.

    Args:
        run: The run folder.
        raters: How many.
        arm: Whom they favour; left out, tuned.
        share: Of their votes with a winner, those for that arm, before the pull of the left side.
        rater_sd: How much raters differ, as in `unstilted plan`.
        item_sd: How much items differ, likewise.
        left_bias: What the left side gains by being left, in log-odds.
        ties: Share of votes without a winner.
        careless: Share of raters who answer fast and by chance.
        seed: Same seed, same votes.
    """
    from pydantic import ValidationError

    from unstilted.vote.simulate import PanelSettings, simulate_run

    given = {"share": share, "rater_sd": rater_sd, "item_sd": item_sd, "left_bias": left_bias, "ties": ties, "careless": careless}
    try:
        settings = PanelSettings(n_raters=raters, arm=arm, seed=seed, **given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).removeprefix("n_").replace("_", "-")
        raise UserError(f"--{name} is {first['input']!r}: {first['msg'].lower()}.", where="command line", do="Change it.") from None
    votes = simulate_run(run, settings)
    print(f"{len(votes):,} simulated votes. No human took part: they stand apart everywhere and enter no headline.")
