"""An automatic judge: a model is asked the raters' questions about the raters' items, each pair with the sides both ways.

Its votes stand in `judge.votes.jsonl`, never among people's. Every answer is kept as it came in `judge.answers.jsonl` before it is read,
so a killed judge goes on where it was, and other rules of reading need no new answers.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from unstilted.engines import Engine, Request, Sampling
from unstilted.errors import UserError
from unstilted.files import write_text
from unstilted.lm.chat import ChatTokens
from unstilted.progress import bar, say
from unstilted.recipe import ModelTable, Recipe
from unstilted.records import Message, Record
from unstilted.rundir import open_run
from unstilted.style import words as words_of
from unstilted.vote.freezing import FrozenStudy
from unstilted.vote.items import Item
from unstilted.vote.languages import DEFAULT, languages
from unstilted.vote.machines import JUDGE_VOTES, JUDGES, JudgeSummary, machine_votes, read_judges, study_of
from unstilted.vote.study import Criterion

ANSWERS = "judge.answers.jsonl"
MAX_NEW_TOKENS = 8
"""Room for one word and its punctuation; a judge that reasons aloud can't be read."""
HALF_READ = "the judge's answer with the sides exchanged is no verdict"
"""In `excluded`: nobody knows whether such a vote hangs on the sides."""

Verdict = Literal["left", "right", "tie", "unparsable"]


@dataclass(frozen=True)
class JudgeSettings:
    """Which model judges what, and how."""

    criteria: tuple[str, ...] = ()
    """Names of criteria; empty: all of the study."""
    model: str = ""
    """As `model.source` in a recipe; empty: the run's own base model."""
    engine: Literal["auto", "embedded", "transformers"] = "auto"
    temperature: float = 0.0
    seed: int = 0
    """Of sampling; both orders of a pair get the same."""


@dataclass(frozen=True)
class Judge:
    """A model ready to be asked."""

    name: str
    """Whom the votes are by: model and engine."""
    identity: str
    """Changes with everything that its answers depend on, besides the question."""
    is_own_arm: bool
    chat: ChatTokens
    engine: Callable[[int], Engine]
    """Given the longest question and answer in tokens; called only when there is something to ask."""


@dataclass(frozen=True)
class Asked:
    """One question: a pair of replies in one order, under one criterion."""

    criterion: str
    item: Item
    left: str
    right: str
    seed: int
    request: Request


class Answer(Record):
    """A line of `judge.answers.jsonl`: what a judge said, unread."""

    key: str
    judge: str
    criterion: str
    item: str
    left: str
    right: str
    seed: int
    text: str


def judge_run(run: Path, settings: JudgeSettings, recipe: Recipe) -> list[JudgeSummary]:
    """Ask a model of the recipe's, or another one, about every item of a run's study; returns how it did on each criterion.

    Raises UserError for a criterion that the study doesn't have, an engine that can't run the model, and a study that can't be done.
    """
    with open_run(run):
        frozen = study_of(run)
        criteria = _criteria(frozen, settings.criteria)
        return ask(run, frozen, criteria, open_judge(settings, recipe), settings)


def open_judge(settings: JudgeSettings, recipe: Recipe) -> Judge:
    """The model as a judge; its weights are loaded at the first question."""
    from unstilted.models.load import load_tokenizer
    from unstilted.models.resolve import resolve_model
    from unstilted.respond import engine_name

    table = ModelTable(source=settings.model) if settings.model else recipe.model
    model, respond = resolve_model(table, say), recipe.respond.model_copy(update={"engine": settings.engine})
    name = engine_name(respond, model)

    def engine(n_context: int) -> Engine:
        if name == "transformers" or model.gguf is None:
            from unstilted.engines.transformers import TransformersEngine

            return TransformersEngine(model, None, 1.0, n_parallel=respond.n_parallel)
        from unstilted.engines.embedded import EmbeddedEngine

        return EmbeddedEngine(model.gguf, None, n_parallel=respond.n_parallel, n_context=n_context)

    library = version("xllamacpp" if name == "embedded" else "transformers")
    own = resolve_model(recipe.model, say).fingerprint if settings.model else model.fingerprint
    identity = f"{name} {library} {model.fingerprint}"
    return Judge(f"{model.name} ({name})", identity, model.fingerprint == own, ChatTokens(load_tokenizer(model), model.name), engine)


def ask(run: Path, frozen: FrozenStudy, criteria: Sequence[Criterion], judge: Judge, settings: JudgeSettings) -> list[JudgeSummary]:
    """Ask what wasn't answered yet, then write the votes and how the judge did; other judges' and criteria's results stay."""
    asked = [question for criterion in criteria for question in _questions(frozen, criterion, judge, settings)]
    answers = Answers(run / ANSWERS)
    left = [question for question in asked if question.request.key not in answers.rows]
    if left:
        engine = judge.engine(max(len(question.request.tokens) for question in left) + MAX_NEW_TOKENS + 8)
        by_key = {question.request.key: question for question in left}
        with bar("answers") as progress:
            task = progress.add_task("judging", total=len(left))
            sampling = Sampling(settings.temperature, 1.0, MAX_NEW_TOKENS)
            for done in engine.generate([question.request for question in left], sampling):
                answers.add(_answer(by_key[done.key], judge, done.text))
                progress.advance(task)
    verdicts = {question.request.key: read_verdict(answers.rows[question.request.key].text, frozen.study.ties) for question in asked}
    votes = list(_votes(asked, verdicts, judge))
    summaries = [_summary(criterion.name, asked, verdicts, judge) for criterion in criteria]
    _write(run, votes, summaries)
    return summaries


def read_verdict(text: str, has_ties: bool = True) -> Verdict:
    """What an answer says: one of the words offered and nothing else but its punctuation; everything else is unparsable."""
    found = re.fullmatch(r"[\s\"'*`(\[]*(left|right|tie)[\s\"'*`)\].!]*", text, flags=re.I | re.A)
    if found is None or (found[1].lower() == "tie" and not has_ties):
        return "unparsable"
    verdict: Verdict = "left" if found[1].lower() == "left" else "right" if found[1].lower() == "right" else "tie"
    return verdict


class Answers:
    """Answers kept as they come; a torn last line, as a killed process leaves it, is cut off and asked again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Answer] = {}
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            for line in content[:whole].splitlines():
                with suppress(ValidationError):  # a damaged line costs one answer, which is asked for again
                    answer = Answer.model_validate_json(line)
                    self.rows[answer.key] = answer
            if whole < len(content):
                os.truncate(path, whole)

    def add(self, answer: Answer) -> None:
        self.rows[answer.key] = answer
        with self.path.open("a", encoding="utf-8") as file:
            file.write(answer.model_dump_json() + "\n")


def _criteria(frozen: FrozenStudy, names: Sequence[str]) -> list[Criterion]:
    known = {criterion.name: criterion for criterion in frozen.study.criteria}
    for name in names:
        if name not in known:
            raise UserError(f"the study has no criterion '{name}'.", where="--criterion", do=f"It has {', '.join(known)}.")
    return [known[name] for name in names or known]


def _questions(frozen: FrozenStudy, criterion: Criterion, judge: Judge, settings: JudgeSettings) -> Iterator[Asked]:
    for item in frozen.items.values():
        for first, second in frozen.study.pairs:
            digest = hashlib.sha256("\0".join([str(settings.seed), criterion.name, item.id, first, second]).encode()).digest()
            seed = int.from_bytes(digest[:4]) >> 1
            for left, right in ((first, second), (second, first)):
                message = Message(role="user", content=question_text(criterion, item, left, right, frozen.study.ties))
                tokens = judge.chat.prompt([message])
                key = hashlib.sha256(json.dumps([judge.identity, settings.temperature, MAX_NEW_TOKENS, seed, tokens]).encode()).hexdigest()
                yield Asked(criterion.name, item, left, right, seed, Request(f"{key[:16]}-{left}-{right}", tokens, seed))


def question_text(criterion: Criterion, item: Item, left: str, right: str, has_ties: bool) -> str:
    """What the judge reads: the raters' question about the replies as raters see them. In one user message, which every model takes."""
    question = criterion.question or languages()[DEFAULT](f"question_{criterion.name}")
    offered = "left, right or tie" if has_ties else "left or right"
    return (
        f"Two people replied to the same message.\n\nMessage:\n{item.prompt}\n\nReply on the left:\n{item.replies[left]}\n\n"
        f"Reply on the right:\n{item.replies[right]}\n\n{question}\nAnswer with exactly one word: {offered}."
    )


def _answer(question: Asked, judge: Judge, text: str) -> Answer:
    return Answer(
        key=question.request.key,
        judge=judge.name,
        criterion=question.criterion,
        item=question.item.id,
        left=question.left,
        right=question.right,
        seed=question.seed,
        text=text,
    )


def _units(asked: Sequence[Asked]) -> Iterator[tuple[Asked, Asked]]:
    """The two orders of each pair; `_questions` gives them one after the other."""
    return zip(asked[::2], asked[1::2], strict=True)


def _votes(asked: Sequence[Asked], verdicts: dict[str, Verdict], judge: Judge) -> Iterator[dict[str, object]]:
    """Every answer that is a verdict, in the form of people's votes."""
    for order, questions in enumerate(_units(asked)):
        said = [verdicts[question.request.key] for question in questions]
        for place, (question, verdict) in enumerate(zip(questions, said, strict=True)):
            if verdict != "unparsable":
                yield {
                    "rater": judge.name,
                    "item": question.item.id,
                    "left": question.left,
                    "right": question.right,
                    "winner": verdict,
                    "order": 2 * order + place + 1,
                    "criterion": question.criterion,
                    "stratum": "",
                    "domain": question.item.domain,
                    "left_words": len(words_of(question.item.replies[question.left])),
                    "right_words": len(words_of(question.item.replies[question.right])),
                    "excluded": HALF_READ if "unparsable" in said else "",
                    "kind": "judge",
                }


def _summary(criterion: str, asked: Sequence[Asked], verdicts: dict[str, Verdict], judge: Judge) -> JudgeSummary:
    said = Counter((verdicts[one.request.key], verdicts[other.request.key]) for one, other in _units(asked) if one.criterion == criterion)
    named = said["left", "right"] + said["right", "left"]
    unparsable = sum(count for pair, count in said.items() if "unparsable" in pair)
    counts = {
        "n_units": said.total(),
        "n_named": named,
        "n_ties": said["tie", "tie"],
        "n_unparsable": unparsable,
        "n_inconsistent": said.total() - named - said["tie", "tie"] - unparsable,
        "n_always_left": said["left", "left"],
        "n_always_right": said["right", "right"],
    }
    found = JudgeSummary(judge=judge.name, criterion=criterion, is_own_arm=judge.is_own_arm, words="", **counts)
    return found.model_copy(update={"words": summary_words(found)})


def summary_words(found: JudgeSummary) -> str:
    """How the judge did, for people; what it is worth comes with the numbers."""

    def of(number: int) -> str:
        return f"{number:,} ({100 * number / max(found.n_units, 1):.0f} %)"

    told = (
        f"No human took part. {found.judge} was asked about {found.n_units:,} pairs of replies, each with the sides both ways. It named the"
        f" same reply both times in {of(found.n_named)} and called {of(found.n_ties)} a tie. In {of(found.n_inconsistent)} its verdict"
        f" changed with the sides ({found.n_always_left:,} times it said left both ways, {found.n_always_right:,} times right), and"
        f" {of(found.n_unparsable)} had an answer that is no verdict; both count for nobody."
    )
    if 2 * (found.n_named + found.n_ties) <= found.n_units:
        told += " A coin keeps its verdict in half of the pairs; this judge does no better, so its votes mean nothing."
    if found.is_own_arm:
        told += " It is the model whose replies it judges, and may prefer what it would say itself."
    return told


def _write(run: Path, votes: Sequence[dict[str, object]], summaries: Sequence[JudgeSummary]) -> None:
    done = {(found.judge, found.criterion) for found in summaries}
    kept = [vote for vote in machine_votes(run) if vote["kind"] == "judge" and (vote["rater"], vote["criterion"]) not in done]
    write_text(run / JUDGE_VOTES, "".join(json.dumps(vote, ensure_ascii=False) + "\n" for vote in [*kept, *votes]))
    others = [found for found in read_judges(run) if (found.judge, found.criterion) not in done]
    write_text(run / JUDGES, TypeAdapter(list[JudgeSummary]).dump_json([*others, *summaries], indent=1).decode() + "\n")
