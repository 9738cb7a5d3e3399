"""The whole way: which stages there are, what each reads and writes, and how a run walks them."""

import hashlib
import os
import time
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from unstilted.errors import UserError
from unstilted.files import sha256, write_text
from unstilted.progress import say
from unstilted.recipe import Recipe, load_recipe, recipe_toml
from unstilted.rundir import RunDir, StageEntry, StageWork, open_run


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline. The module of its name has `run(recipe, run_dir) -> facts`."""

    name: str
    tables: tuple[str, ...]
    """Recipe tables that it depends on, besides the seed."""
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    may_read: tuple[str, ...] = ()
    """What it reads where it is there."""
    shows_manifest: bool = False
    """Whether it prints what the manifest says of the other stages, and so is done again when that changes."""
    sources: tuple[str, ...] = ()
    """`module:function`s that take the recipe and give fingerprints of what the stage reads from outside the run folder."""

    def fingerprints(self, recipe: Recipe) -> dict[str, str]:
        """What the stage reads from outside, by name; raises UserError when something isn't there or can't be used."""
        found: dict[str, str] = {}
        for source in self.sources:
            module, _, function = source.partition(":")
            found |= getattr(import_module(f"unstilted.{module}"), function)(recipe)
        return found

    def run(self, recipe: Recipe, run_dir: RunDir) -> dict[str, Any]:
        """Do the work; the module is imported only now, since some of them take seconds."""
        facts: dict[str, Any] = import_module(f"unstilted.{self.name}").run(recipe, run_dir)
        return facts


STAGES = (
    Stage("pairs", ("pairs",), (), ("pairs.jsonl", "held_out.jsonl", "dropped.jsonl"), sources=("pairs:sources",)),
    Stage("train", ("model", "train"), ("pairs.jsonl", "held_out.jsonl"), ("adapter", "train.jsonl"), sources=("models.resolve:sources",)),
    Stage("respond", ("model", "respond"), ("adapter",), ("responses.jsonl",), sources=("models.resolve:sources", "respond:sources")),
    Stage("measure", ("measure",), ("responses.jsonl",), ("measures.json", "scores.jsonl")),
    Stage(
        "report",
        ("report",),
        ("measures.json", "scores.jsonl", "responses.jsonl", "train.jsonl", "pairs.jsonl"),
        ("report.html", "README.md", "before_after.svg"),
        may_read=("tally.json", "judges.json", "vote/preregistration.json"),
        shows_manifest=True,
    ),
)


def stage_named(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def run_pipeline(recipe: Recipe, path: Path, redo: str = "") -> dict[str, StageEntry]:
    """Do every stage that isn't done yet, in order, and return the manifest.

    redo: a stage to do again with all behind it although nothing changed. Everything a user can get wrong in the recipe's sources is
    checked before the first download. A killed run goes on where it was.
    """
    if redo and redo not in {stage.name for stage in STAGES}:
        raise UserError(f"'{redo}' is no stage.", where="--redo", do=f"Stages: {', '.join(stage.name for stage in STAGES)}.")
    settle_libraries()
    with open_run(path) as run_dir:
        check(recipe)
        write_text(run_dir.file("recipe.toml"), recipe_toml(recipe))
        must = False
        for stage in STAGES:
            must = must or stage.name == redo
            _do(stage, recipe, run_dir, must=must)
        return run_dir.manifest()


def run_stage(name: str, recipe: Recipe, path: Path) -> StageEntry:
    """Do one stage of a run folder, whether or not it is done already; the folder's recipe takes over that stage's tables only."""
    settle_libraries()
    stage = stage_named(name)
    with open_run(path) as run_dir:
        _do(stage, recipe, run_dir, must=True)
        kept = load_recipe(run_dir.file("recipe.toml")) if run_dir.file("recipe.toml").exists() else recipe
        changed = {table: getattr(recipe, table) for table in ("seed", *stage.tables)}
        write_text(run_dir.file("recipe.toml"), recipe_toml(kept.model_copy(update=changed)))
        return run_dir.manifest()[name]


def follow() -> None:
    """What the other processes of a launcher do while the main one does its stages: help it with training, and nothing else."""
    settle_libraries()
    import_module("unstilted.train").follow()


def plan(recipe: Recipe) -> str:
    """What training with this recipe would do and need, in words; fetches no weights and writes nothing."""
    settle_libraries()
    from unstilted import pairs
    from unstilted.pairs.source import locate
    from unstilted.train.plan import make_plan

    is_here = locate(recipe.pairs.source).kind != "hub"
    return str(make_plan(recipe, pairs.check(recipe).training if is_here else None))


def check(recipe: Recipe) -> None:
    """Look at everything outside the run folder that the recipe names, the model last since it may have to be fetched.

    Raises UserError before any long work.
    """
    from unstilted import pairs, respond, train
    from unstilted.models.resolve import resolve_model

    train.check(recipe)
    pairs.check(recipe)
    respond.sources(recipe)
    respond.engine_name(recipe.respond, resolve_model(recipe.model), recipe.train)


def _do(stage: Stage, recipe: Recipe, run_dir: RunDir, *, must: bool) -> None:
    """Do a stage unless it is done, and say which."""
    work = StageWork(
        name=stage.name,
        settings={"seed": recipe.seed} | {name: getattr(recipe, name).model_dump(mode="json") for name in stage.tables},
        reads=stage.reads,
        writes=stage.writes,
        sources=stage.fingerprints(recipe) | _found(stage, run_dir) | (_others(stage, run_dir) if stage.shows_manifest else {}),
        work=lambda: stage.run(recipe, run_dir),
    )
    if not must and run_dir.is_done(work):
        say(f"{stage.name:<8} unchanged")
        return
    start = time.monotonic()
    say(f"{stage.name:<8} ...")
    run_dir.do(work)
    say(f"{stage.name:<8} done in {time.monotonic() - start:.0f} s")


def _found(stage: Stage, run_dir: RunDir) -> dict[str, str]:
    return {name: sha256(run_dir.file(name)) for name in stage.may_read if run_dir.file(name).exists()}


def _others(stage: Stage, run_dir: RunDir) -> dict[str, str]:
    """The manifest's entries of all other stages as one fingerprint."""
    entries = [entry.model_dump_json() for name, entry in run_dir.manifest().items() if name != stage.name]
    return {"manifest": hashlib.sha256("\n".join(entries).encode()).hexdigest()}


def settle_libraries() -> None:
    """Do what must come before torch, transformers and llama.cpp are imported."""
    # Spinning threads collapse as soon as anything else wants the cores; a value that the user set is kept.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # peft 0.21 asks transformers 5.24 by an old name; nothing that a user could change.
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
