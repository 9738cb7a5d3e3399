"""What the report is made of: the run folder's files, read once and joined by prompt."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from unstilted.errors import UserError
from unstilted.files import sha256
from unstilted.recipe import Recipe
from unstilted.records import Arm, Measures, Response, Score, TrainPoint, parse_row, read_jsonl
from unstilted.rundir import RunDir, StageEntry
from unstilted.tally.records import Tally
from unstilted.vote.freezing import Registration, registrations
from unstilted.vote.machines import JUDGES, JudgeSummary, read_judges


@dataclass(frozen=True)
class Answer:
    """One arm's answer with its scores."""

    response: Response
    scores: dict[str, float]

    def score(self, name: str) -> float | None:
        """A score, or None when it wasn't measured for this answer."""
        return self.scores.get(name)

    @property
    def is_cut_off(self) -> bool:
        return self.response.finish_reason == "length"


@dataclass(frozen=True)
class Answered:
    """A prompt with the answers that arms gave to it."""

    id: str
    prompt: str
    category: str
    arms: dict[Arm, Answer] = field(default_factory=dict)


@dataclass(frozen=True)
class Contents:
    """Everything that the report, the card and the picture show."""

    recipe: Recipe
    measures: Measures
    answered: tuple[Answered, ...]
    points: tuple[TrainPoint, ...]
    stages: dict[str, StageEntry]
    files: dict[str, str]
    """Files that the report was made from -> sha256."""
    tally: Tally | None = None
    """None until votes were tallied."""
    judges: tuple[JudgeSummary, ...] = ()
    registration: Registration | None = None
    """Of the vote's study, its newest version."""

    def fact(self, stage: str, name: str) -> object:
        """A fact of a finished stage, or None when it isn't there."""
        entry = self.stages.get(stage)
        return None if entry is None else entry.facts.get(name)

    @cached_property
    def model(self) -> str | None:
        """Name of the base model where it is known."""
        named = self.fact("train", "model")
        if isinstance(named, str) and named:
            return named
        return self.recipe.model.source if self.recipe.model.source != "embedded" else None

    @property
    def finished(self) -> str:
        """Day on which the last stage before the report ended, as YYYY-MM-DD; empty when unknown."""
        return max((entry.finished for name, entry in self.stages.items() if name != "report"), default="")[:10]


def read_contents(recipe: Recipe, run_dir: RunDir) -> Contents:
    """Read the run folder.

    Raises UserError when the files of `respond` or `measure` are missing, or a row is no record; training curves may be absent.
    """
    measures = run_dir.require("measures.json", "measure")
    scores = run_dir.require("scores.jsonl", "measure")
    responses = run_dir.require("responses.jsonl", "respond")
    train = run_dir.file("train.jsonl")
    tally, registered = run_dir.file("tally.json"), run_dir.file("vote/preregistration.json")
    files = (measures, scores, responses, train, tally, run_dir.file(JUDGES), registered)
    return Contents(
        recipe=recipe,
        measures=_read_measures(measures),
        answered=tuple(_join(read_jsonl(responses, Response), read_jsonl(scores, Score))),
        points=tuple(read_jsonl(train, TrainPoint)) if train.exists() else (),
        stages={name: entry for name, entry in run_dir.manifest().items() if name != "report"},
        files={file.name: sha256(file) for file in files if file.exists()},
        tally=_read_tally(tally) if tally.exists() else None,
        judges=tuple(read_judges(run_dir.path)),
        registration=registrations(run_dir.path)[-1] if registered.exists() else None,
    )


def _read_tally(path: Path) -> Tally:
    try:
        return Tally.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UserError(f"'{field}': {first['msg'].lower()}.", where=str(path), do="Run `unstilted tally` again.") from None


def _read_measures(path: Path) -> Measures:
    try:
        return parse_row(json.loads(path.read_text(encoding="utf-8")), Measures, str(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"this is not JSON ({error.msg}).", where=f"{path} line {error.lineno}", do="Run `unstilted measure` again."
        ) from None


def _join(responses: list[Response], scores: list[Score]) -> list[Answered]:
    values = {(score.id, score.arm): score.values for score in scores}
    answered: dict[str, Answered] = {}
    for response in responses:
        row = answered.setdefault(response.id, Answered(response.id, response.prompt, response.category))
        row.arms[response.arm] = Answer(response, values.get((response.id, response.arm), {}))
    return list(answered.values())
