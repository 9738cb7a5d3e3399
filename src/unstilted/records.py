"""The typed rows that stages exchange, and the JSONL files that hold them.

Conversations are lists of messages as in TRL's conversational preference format, so `pairs.jsonl` loads there unchanged.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from unstilted.errors import UserError
from unstilted.files import write_text

Arm = Literal["base", "prompted", "tuned"]
ARMS: tuple[Arm, ...] = ("base", "prompted", "tuned")
"""base: the untouched model; prompted: the same model asked for the style by a system prompt; tuned: base + adapter."""


class Record(BaseModel):
    """A row of a JSONL file; unknown fields are refused so that no misspelled one is lost in silence."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _require_whole_characters(text: str) -> str:
    """JSON can spell half of a surrogate pair (a cut emoji), which neither UTF-8 files nor tokenizers take."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the text holds half of a character (a lone surrogate)")
    return text


Text = Annotated[str, AfterValidator(_require_whole_characters)]


class Message(Record):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class Prompt(Record):
    """A conversation that waits for an answer: its last message is the user's."""

    id: Text
    prompt: tuple[Message, ...] = Field(min_length=1, strict=False)
    category: Text = ""
    topic: Text = ""

    @property
    def text(self) -> str:
        """The user's last words."""
        return self.prompt[-1].content


class Pair(Prompt):
    """A prompt with a preferred (human-like) and a dispreferred (formal) answer, each one assistant message."""

    chosen: tuple[Message, ...] = Field(min_length=1, max_length=1, strict=False)
    rejected: tuple[Message, ...] = Field(min_length=1, max_length=1, strict=False)
    source: str = ""
    """Where the row came from: file or dataset and line."""

    @property
    def chosen_text(self) -> str:
        return self.chosen[0].content

    @property
    def rejected_text(self) -> str:
        return self.rejected[0].content


class Response(Record):
    """What one arm answered to one prompt."""

    id: str
    """The prompt's id."""
    arm: Arm
    prompt: str
    category: str = ""
    text: str
    n_tokens: int
    finish_reason: Literal["stop", "length"]
    seed: int


class HeldOut(Record):
    """Means over the held-out pairs; log-probabilities in nats, summed over a response's tokens."""

    loss: float
    margin: float
    """beta * (chosen - rejected log-ratio): Rafailov et al. 2023, the argument of the sigmoid in eq. 7."""
    accuracy: float
    """Share of pairs with a positive margin."""
    chosen_logp_change: float
    """Tuned minus base; below 0 the model finds the chosen answers less likely than before."""
    rejected_logp_change: float
    loss_margin: float | None = None
    """The argument of the loss, by which `train.stop_margin` goes; absent for `ipo`, which holds it at a target."""
    kl: float | None = None
    """KL(tuned || base) in nats a token, over the tokens of a few pairs' responses; absent where base can't run beside tuned."""


class TrainPoint(Record):
    """A line of `train.jsonl`: one optimizer step, with the held-out figures where they were taken."""

    step: int
    n_steps: int
    n_pairs: int
    """Pairs trained on so far."""
    loss: float
    margin: float
    learning_rate: float
    gradient_norm: float
    held_out: HeldOut | None = None


class Score(Record):
    """Every per-answer measure of one response; `id` and `arm` are the response's."""

    id: str
    arm: Arm
    values: dict[str, float]


class Estimate(Record):
    """A mean over prompts with its interval."""

    mean: float
    low: float
    high: float


class Measure(Record):
    """One thing counted in the answers of each arm."""

    name: str
    title: str
    """A few words for the table's row."""
    explanation: str
    """One sentence: what it counts and which way is good."""
    unit: Literal["", "share", "words", "per 100 words", "answers alike"]
    arms: dict[str, Estimate]
    """By arm, and `chosen` and `rejected` for the starter set's two sides, where they can be measured."""
    change: dict[str, Estimate]
    """Paired difference from base over the same prompts, for `prompted` and `tuned`."""


GateVerdict = Literal["passed", "failed", "cannot tell"]


class Gate(Record):
    """The verdict on honesty."""

    verdict: GateVerdict
    text: str


class Measures(Record):
    """The content of `measures.json`."""

    n_prompts: int
    confidence: float
    measures: list[Measure]
    gate: Gate
    changed: str
    """What changed, in one plain sentence."""
    cost: str
    """What it cost, in one plain sentence."""

    def by_name(self, name: str) -> Measure:
        return next(measure for measure in self.measures if measure.name == name)


R = TypeVar("R", bound=Record)


def read_jsonl(path: Path, record: type[R]) -> list[R]:
    """All rows of a JSONL file as records.

    Raises UserError naming file and line for text that is no JSON, a missing or an unknown field, or a wrong type.
    """
    return [parse_row(row, record, f"{path} line {line}") for line, row in read_json_rows(path)]


def read_json_rows(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, parsed JSON) for each line that isn't blank; the first line is 1."""
    if not path.is_file():
        raise UserError("there is no such file.", where=str(path), do="Check the path.")
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, parse_json(line, f"{path} line {number}")
        except UnicodeDecodeError as error:
            raise UserError(f"this is not UTF-8 text ({error.reason}).", where=str(path), do="Save it as UTF-8.") from None


def parse_json(line: str, where: str) -> object:
    """One line's JSON value; raises UserError for anything else, also for numbers and nesting that Python refuses."""
    try:
        value: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(
            f"this is not JSON ({reason}): {line.strip()[:60]}", where=where, do="Each line must hold one JSON object."
        ) from None
    return value


def parse_row(row: object, record: type[R], where: str) -> R:
    """One parsed JSON value as a record; raises UserError with the first thing that is wrong."""
    try:
        return record.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        what = f"'{field}': {first['msg'].lower()}." if field else "this is not a JSON object."
        raise UserError(what, where=where, do=f"A {record.__name__} needs: {_fields(record)}.") from None


def write_jsonl(path: Path, rows: Iterable[Record]) -> None:
    """Write rows so that the file is either whole or absent."""
    write_text(path, "".join(row.model_dump_json(exclude_none=True) + "\n" for row in rows))


def _fields(record: type[Record]) -> str:
    return ", ".join(name for name, field in record.model_fields.items() if field.is_required())
