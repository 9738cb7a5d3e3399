"""The study file: what is asked, of whom, about which answers, and by which rules fixed beforehand."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from unstilted.errors import UserError
from unstilted.recipe import Table

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]
KNOWN_CRITERIA = ("thoughtful", "helpful", "correct", "warm")
MODEL_NAMES = (
    "SmolLM2",
    "SmolLM",
    "Hugging Face",
    "HuggingFace",
    "ChatGPT",
    "GPT-3.5",
    "GPT-4o",
    "GPT-4",
    "GPT-5",
    "OpenAI",
    "Anthropic",
    "Meta AI",
    "Qwen",
    "DeepSeek",
    "Mistral AI",
    "Alibaba Cloud",
)
"""Unambiguous names only: Llama, Claude and Gemini are also an animal, a person and a star sign."""


class Arm(Table):
    """One source of replies."""

    name: Name
    """What the arm is called in results; raters never see it."""
    run: str = ""
    """Another run folder to take replies from, relative to the study file; empty is the run that is voted on."""
    arm: Literal["", "base", "prompted", "tuned"] = ""
    """Which of that run's arms; empty takes the one called `name`."""
    file: str = ""
    """A JSONL file of replies written by people, rows with `id` or `prompt` and `text`, instead of a run's."""


class Criterion(Table):
    """One question asked about every pair of replies."""

    name: Name
    """`thoughtful`, `helpful`, `correct` and `warm` come with a question in every language of the site."""
    question: str = ""
    """The question in your own words; a criterion of another name needs one."""

    @model_validator(mode="after")
    def _has_a_question(self) -> "Criterion":
        if not self.question and self.name not in KNOWN_CRITERIA:
            raise ValueError(f"criterion '{self.name}' has no question")
        if self.name == "blinding":
            raise ValueError("'blinding' is the name of the closing question; choose another")
        return self


class Qualification(Table):
    """What a rater does before the first vote that counts."""

    n_training: Annotated[int, Field(ge=0, le=20)] = 3
    """Pairs with a known answer, with feedback after each."""
    n_items: Annotated[int, Field(ge=0, le=20)] = 4
    """Pairs with a known answer, without feedback."""
    min_correct: Annotated[int, Field(ge=0, le=20)] = 3
    """A rater with fewer right answers is thanked and does not vote."""


class Checks(Table):
    """How careless raters are told, by rules that cannot see which arm they prefer."""

    n_attention: Annotated[int, Field(ge=0, le=20)] = 2
    """Pairs with an obvious answer, hidden among a rater's others."""
    n_repeats: Annotated[int, Field(ge=0, le=20)] = 2
    """Pairs shown a second time with the sides exchanged."""
    n_blinding: Annotated[int, Field(ge=0, le=20)] = 0
    """Pairs shown again at the end with the question which reply comes from the tuned model."""
    max_attention_failures: Annotated[int, Field(ge=0)] = 0
    """More wrong answers to attention checks exclude a rater."""
    min_median_seconds: Annotated[float, Field(ge=0)] = 2.0
    """A rater whose median time on a pair is shorter is excluded."""
    max_one_side: Annotated[float, Field(gt=0.5, le=1)] = 0.95
    """A rater who chose one side in more than this share of at least 15 votes is excluded; arms change sides, so none is meant."""
    min_consistency: Annotated[float, Field(ge=0, le=1)] = 0.0
    """A rater who agreed with themselves in less than this share of at least 3 repeats is excluded; 0 excludes nobody."""


class Study(Table):
    """A whole study. Freezing it writes the pre-registration."""

    title: str = "Which reply sounds more like a thoughtful person?"
    """Heading of the first page."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Which items are taken, in which blocks, follows from it."""
    language: Annotated[str, Field(pattern=r"^[a-z]{2,3}$")] = "en"
    """Language of prompts and replies."""
    arms: Annotated[tuple[Arm, ...], Field(min_length=2, strict=False)] = (Arm(name="base"), Arm(name="prompted"), Arm(name="tuned"))
    """Whose replies are compared."""
    against: str = "tuned"
    """Only pairs with this arm are shown; empty shows every pair of arms."""
    criteria: Annotated[tuple[Criterion, ...], Field(min_length=1, max_length=6, strict=False)] = (Criterion(name="thoughtful"),)
    """What is asked; the first is the primary one."""
    ties: bool = True
    """Whether "about the same" may be answered."""
    both_bad: bool = True
    """Whether "both bad" may be answered."""
    n_items: Annotated[int, Field(ge=0)] = 50
    """Prompts in the study, chosen by the seed; 0 takes all."""
    votes_per_item: Annotated[int, Field(ge=2)] = 20
    """Votes per prompt, over all pairs of arms; a multiple of 2 x the number of pairs, so that sides balance exactly."""
    votes_per_rater: Annotated[int, Field(ge=1, le=500)] = 25
    """Votes a rater is asked for, checks and repeats not counted."""
    access: Literal["open", "panel", "both"] = "open"
    """`open`: whoever has the link; `panel`: invitation links only; open raters are always a stratum of their own."""
    strata: Annotated[tuple[Name, ...], Field(min_length=1, strict=False)] = ("panel",)
    """Groups that invitations are made for."""
    stopping: Literal["votes", "sequential"] = "votes"
    """`votes` ends with the last item's votes; `sequential` may be closed earlier, judged only by the anytime-valid interval."""
    consent: str = ""
    """What raters agree to, in Markdown; empty takes the site's own text in the rater's language."""
    contact: str = ""
    """Whom raters can write to; shown with the consent."""
    background: bool = True
    """Whether a page asks, optionally, for age group, how often the rater uses chat models, and how well they know the language."""
    scrub: Annotated[tuple[str, ...], Field(strict=False)] = MODEL_NAMES
    """Names replaced by `[name]` in all replies; "I am an AI" stays."""
    normalise: Annotated[tuple[Literal["emoji", "markdown"], ...], Field(strict=False)] = ()
    """`emoji` and `markdown` take these out of all arms alike."""
    gold: str = ""
    """A JSONL file of pairs with known answers instead of the shipped English set."""
    qualification: Qualification = Qualification()
    checks: Checks = Checks()

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs of arms that are compared, in the order of `arms`."""
        names = [arm.name for arm in self.arms]
        every = [(first, second) for index, first in enumerate(names) for second in names[index + 1 :]]
        return tuple(pair for pair in every if not self.against or self.against in pair)

    @model_validator(mode="after")
    def _fits_together(self) -> "Study":
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError("two arms have the same name")
        if self.against and self.against not in names:
            raise ValueError(f"'against' is '{self.against}', which is no arm")
        if self.votes_per_item % (2 * len(self.pairs)):
            raise ValueError(
                f"votes_per_item is {self.votes_per_item}, no multiple of {2 * len(self.pairs)} "
                f"(2 sides x {len(self.pairs)} pairs of arms), so sides could not balance"
            )
        if self.n_items and self.votes_per_rater > self.n_items:
            raise ValueError(f"votes_per_rater is {self.votes_per_rater} with {self.n_items} items, but nobody sees an item twice")
        if self.qualification.min_correct > self.qualification.n_items:
            raise ValueError("qualification.min_correct is more than qualification.n_items")
        if self.checks.n_repeats + self.checks.n_blinding > self.votes_per_rater:
            raise ValueError("there are more repeats than votes to repeat")
        if len({criterion.name for criterion in self.criteria}) < len(self.criteria):
            raise ValueError("two criteria have the same name")
        return self


def load_study(path: Path) -> Study:
    """Read a study file; raises UserError naming file and setting for anything that is unknown, out of range or at odds."""
    if not path.is_file():
        raise UserError("there is no such study file.", where=str(path), do="Check the path, or leave --study out for the default study.")
    try:
        return study_from(tomllib.loads(path.read_text(encoding="utf-8-sig")), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"this is not UTF-8 text ({error.reason}).", where=str(path), do="Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"this is not TOML: {error}.", where=str(path), do="Mend that line.") from None


def study_from(values: dict[str, Any], where: str = "study") -> Study:
    """A study from parsed TOML or JSON."""
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            raise UserError(f"'{setting}' is not a setting.", where=where, do="docs/running_a_vote.md lists them.") from None
        if not setting:
            raise UserError(f"{reason}.", where=where, do="Change one of the two.") from None
        raise UserError(f"'{setting}' is {first['input']!r}: {reason.lower()}.", where=where, do="Change the value.") from None
