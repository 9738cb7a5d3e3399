"""What the report is made of: the run folder's files, read once and joined by prompt."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from unstilted.errors import UserError
from unstilted.files import sha256
from unstilted.recipe import Recipe
from unstilted.records import Arm, Measures, Response, Score, TrainPoint, parse_row, read_jsonl
from unstilted.rundir import RunDir, StageEntry


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
    files = (measures, scores, responses, train)
    return Contents(
        recipe=recipe,
        measures=_read_measures(measures),
        answered=tuple(_join(read_jsonl(responses, Response), read_jsonl(scores, Score))),
        points=tuple(read_jsonl(train, TrainPoint)) if train.exists() else (),
        stages={name: entry for name, entry in run_dir.manifest().items() if name != "report"},
        files={file.name: sha256(file) for file in files if file.exists()},
    )


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
