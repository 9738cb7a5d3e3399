"""The command line. Commands are the stages' names and `run`; options are the recipe's settings under their own names."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import ValidationError
from tyro.conf import Positional, arg

from unstilted.errors import UserError
from unstilted.files import is_disk_full
from unstilted.processes import is_follower, n_processes, rank
from unstilted.recipe import Recipe, find_recipe, load_recipe, recipe_toml, shipped_recipes

Settings = Annotated[Recipe, arg(name="")]
File = Annotated[str, arg(metavar="PATH")]
STAGE_COMMANDS = ("pairs", "train", "respond", "measure", "report")
DEFAULT_RUN = Path("runs/default")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `unstilted`; returns the exit code: 0 done, 1 something the user can fix, 130 interrupted.

    A command line that can't be parsed leaves by SystemExit with code 2.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if n_processes() == 1:
            command(words)
        else:
            _command_together(words)
    except UserError as error:
        return _refuse(str(error))
    except ValidationError as error:
        if error.title not in (Recipe.__name__, "PlanSettings"):  # of a setting in no table; tyro reports the others itself
            raise
        first = error.errors()[0]
        setting = f"--{first['loc'][0]} is {first['input']!r}: " if first["loc"] else ""
        return _refuse(f"{setting.replace('_', '-')}{first['msg'].lower().removeprefix('value error, ')}. Change the value.")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "unstilted":
            raise
        return _refuse(f"this needs the package '{error.name}'. Install the extra that holds it: pip install 'unstilted[run]'.")
    except OSError as error:
        if not is_disk_full(error):
            raise
        where = f" {error.filename}:" if error.filename else ""
        return _refuse(f"{where} the disk is full. Free some space and run the same command again; finished work is kept.".strip())
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again to go on from here.", file=sys.stderr)
        return 130
    return 0


def command(words: list[str]) -> None:
    """Parse a command line and do what it says."""
    from tyro.extras import SubcommandApp

    from unstilted.vote.commands import vote_app, with_serve

    app = SubcommandApp()
    base = _base_recipe(words)

    def run(
        recipe: Positional[str] = "",
        /,
        out: Path = DEFAULT_RUN,
        redo: str = "",
        dry_run: bool = False,
        settings: Settings = base,
    ) -> None:
        """Do the whole way, from pairs to the report; what is already done and unchanged is skipped.

        Args:
            recipe: A recipe file (TOML) or the name of a shipped one (`unstilted recipe --list`); left out, every setting has its default.
            out: The run folder.
            redo: Do this stage and all behind it again although nothing changed.
            dry_run: Only print what training would do and how much memory it needs; nothing is written and no weights are fetched.
            settings: The recipe's settings.
        """
        from unstilted.pipeline import plan, run_pipeline

        _require_first(recipe, words)
        if dry_run:
            return print(plan(settings))
        run_pipeline(settings, out, redo)
        return _print_result(out)

    def recipe(name: Positional[str] = "", /, names: Annotated[bool, arg(name="list")] = False) -> None:
        """Print a recipe as TOML with every setting explained.

        Args:
            name: A shipped recipe or a file; left out, the default recipe.
            names: Print the names of the shipped recipes.
        """
        if names:
            return print("\n".join(shipped_recipes()))
        return print(recipe_toml(load_recipe(find_recipe(name)) if name else Recipe()), end="")

    app.command(run)
    for name in STAGE_COMMANDS:
        app.command(name=name)(_stage_command(name, base, words))
    app.command(recipe)
    app.command(tally)
    app.command(name="plan")(_plan_command(words[:1] == ["plan"]))
    app.command(vote_app(), name="vote", help="Serve a blind vote on a run's answers, and look after it.")
    app.cli(prog="unstilted", description=DESCRIPTION, args=with_serve(words))


def _command_together(words: list[str]) -> None:
    """`command` by the main one of a launcher's processes; the others help it with training."""
    from unstilted.pipeline import follow, settle_libraries

    settle_libraries()
    from unstilted.train.distributed import together

    with together():
        if is_follower():
            follow()
        else:
            command(words)


DESCRIPTION = "Make a chat model talk like a thoughtful person, and prove what that gained and what it cost."


def _stage_command(name: str, base: Recipe, words: list[str]) -> Callable[..., None]:
    def stage(run: Positional[Path], /, settings: Settings = base) -> None:
        from unstilted.pipeline import run_stage

        _require_first(str(run), words)
        run_stage(name, settings, run)

    stage.__doc__ = f"""Do the stage `{name}` of a run folder again, with the folder's own recipe.

    Args:
        run: The run folder.
        settings: The recipe's settings.
    """
    return stage


def tally(
    run: Positional[File] = "",
    /,
    votes: File = "",
    json: File = "",
    arm: str = "",
    confidence: float = 0.95,
) -> None:
    """Tell what the votes say and how sure that is: of a run folder, or of anybody's votes in a file.

    Args:
        run: The run folder; its votes are counted and `tally.json` is written into it.
        votes: A CSV or JSONL file with the columns rater, item, left, right, winner (left, right, tie, both_bad); see docs/votes.md.
        json: Where to write all results.
        arm: Whose share is told; left out: tuned, or the first by name.
        confidence: Of all intervals.
    """
    from rich.console import Console

    from unstilted.tally import TallySettings, tally_file, tally_run
    from unstilted.tally.table import print_tally

    if not 0.5 < confidence < 1:
        raise UserError(f"--confidence is {confidence:g}.", where="command line", do="It lies between 0.5 and 1, as 0.95.")
    if bool(run) == bool(votes):
        raise UserError("one source of votes is needed.", where="command line", do="Name a run folder, or a file with --votes.")
    settings = TallySettings(confidence=confidence, arm=arm)
    out = Path(json) if json else None
    result = tally_run(Path(run), out, settings) if run else tally_file(Path(votes), out, settings)
    print_tally(result, Console(highlight=False, emoji=False))


def _plan_command(is_asked: bool) -> Callable[..., None]:
    """Its settings need SciPy, which would slow every other command's start."""
    if not is_asked:
        return _plan_unasked
    from unstilted.plan import PlanSettings, make_plan, print_plan, with_pilot
    from unstilted.stats.votes import read_votes

    def plan(pilot: File = "", arm: str = "", settings: Annotated[PlanSettings, arg(name="")] = PlanSettings()) -> None:  # noqa: B008
        from rich.console import Console

        known = with_pilot(settings, read_votes(Path(pilot)), arm) if pilot else settings
        print_plan(make_plan(known), Console(highlight=False, emoji=False))

    plan.__doc__ = f"""{_plan_unasked.__doc__}

    Args:
        pilot: A file of votes (see docs/votes.md) that tells the share, the ties and how much raters and items differ.
        arm: Whose share; left out: tuned, or the first by name.
        settings: What the vote shall show.
    """
    return plan


def _plan_unasked() -> None:
    """Tell how many raters, items and votes a wanted interval or power takes, by simulation."""


def _base_recipe(words: list[str]) -> Recipe:
    """The recipe whose settings the options override: the file named behind `run`, or the one kept in a run folder."""
    if len(words) < 2 or words[1].startswith("-"):
        return Recipe()
    if words[0] == "run":
        return load_recipe(find_recipe(words[1]))
    if words[0] in STAGE_COMMANDS:
        if not (Path(words[1]) / "recipe.toml").is_file():
            raise UserError("this is no run folder.", where=words[1], do="`unstilted run --out FOLDER` makes one.")
        return load_recipe(Path(words[1]) / "recipe.toml")
    return Recipe()


def _require_first(place: str, words: list[str]) -> None:
    """Raise UserError when a recipe or run folder stands behind an option, where `_base_recipe` didn't read its settings."""
    if place and words[1].startswith("-"):
        raise UserError(
            f"'{place}' stands behind an option.", where="command line", do=f"Write `unstilted {words[0]} {place}`, then options."
        )


def _print_result(out: Path) -> None:
    from unstilted.records import Measures

    measures = Measures.model_validate_json((out / "measures.json").read_text(encoding="utf-8"))
    print(f"{measures.changed}\n{measures.gate.text}\n{measures.cost}\n{out / 'report.html'}")


def _refuse(text: str) -> int:
    print(f"unstilted{f', process {rank()}' if is_follower() else ''}: {text}", file=sys.stderr)
    return 1
