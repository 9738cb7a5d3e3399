"""What is voted on: prompts with ready replies, scrubbed, normalised, frozen and hashed before the first vote."""

import re
from collections.abc import Iterable, Mapping
from importlib.resources import as_file, files
from pathlib import Path
from random import Random
from typing import Literal

from pydantic import Field

from unstilted.errors import UserError
from unstilted.records import Record, Response, Text, parse_row, read_json_rows, read_jsonl
from unstilted.style import EMOJI
from unstilted.vote.study import Arm, Study

Winner = Literal["left", "right", "tie", "both_bad"]


class Item(Record):
    """One prompt with the reply of every arm, as shown."""

    id: str
    prompt: Text
    domain: str = ""
    replies: dict[str, Text]


class GoldItem(Record):
    """A pair with a known answer: for training, qualification or an attention check."""

    id: str
    role: Literal["training", "qualification", "attention"]
    prompt: Text
    left: Text
    right: Text
    accept: tuple[Winner, ...] = Field(min_length=1, strict=False)
    """The right answers; the first is the one named in feedback."""
    reason: Text = ""
    """Why, for the feedback in training."""


class HumanReply(Record):
    """A row of a human-written arm's file; either `id` or `prompt` says what it answers."""

    id: str = ""
    prompt: Text = ""
    text: Text


class Frozen(Record):
    """Items as taken for a study, and what was left out."""

    items: tuple[Item, ...]
    n_identical: int
    """Prompts left out because two compared arms gave the same reply, which nobody needs to judge."""
    n_incomplete: int
    """Prompts left out because an arm has no reply."""


def take_items(study: Study, run: Path, study_folder: Path) -> Frozen:
    """The study's items from the replies of its arms.

    Raises UserError when an arm has no replies or fewer complete prompts are left than the study asks for.
    """
    replies = {arm.name: _replies(arm, run, study_folder) for arm in study.arms}
    prompts = {row.id: row for row in read_jsonl(_responses(run), Response)}
    complete = [prompt for prompt in prompts if all(_find(found, prompts[prompt]) is not None for found in replies.values())]
    items, n_identical = [], 0
    for prompt in complete:
        row = prompts[prompt]
        shown = {arm: clean(_find(found, row) or "", study) for arm, found in replies.items()}
        if any(shown[first] == shown[second] for first, second in study.pairs):
            n_identical += 1
            continue
        items.append(Item(id=prompt, prompt=row.prompt, domain=row.category, replies=shown))
    if len(items) < max(1, study.n_items):
        raise UserError(
            f"only {len(items)} prompts have a different reply from every arm, but n_items is {study.n_items}.",
            where="study.n_items",
            do="Ask for fewer items, or answer more prompts with `unstilted respond`.",
        )
    if study.n_items:
        kept = set(Random(f"{study.seed}/items").sample([item.id for item in items], study.n_items))
        items = [item for item in items if item.id in kept]
    if study.votes_per_rater > len(items):
        raise UserError(
            f"votes_per_rater is {study.votes_per_rater} with {len(items)} items, but nobody sees an item twice.",
            where="study.votes_per_rater",
            do="Ask for fewer votes of each rater.",
        )
    return Frozen(items=tuple(items), n_identical=n_identical, n_incomplete=len(prompts) - len(complete))


def read_gold(study: Study, study_folder: Path) -> list[GoldItem]:
    """The pairs with known answers that the study can use; raises UserError when it asks for more than there are."""
    if study.gold:
        rows = read_jsonl(study_folder / study.gold, GoldItem)
    else:
        with as_file(files("unstilted.vote") / "data" / "gold.jsonl") as shipped:
            rows = read_jsonl(shipped, GoldItem)
    usable = [row for row in rows if (study.ties or row.accept[0] != "tie") and (study.both_bad or row.accept[0] != "both_bad")]
    for role, wanted in _gold_wanted(study).items():
        n_found = sum(row.role == role for row in usable)
        if n_found < wanted:
            raise UserError(
                f"the study asks for {wanted} gold items for '{role}', but there are {n_found}.",
                where=study.gold or "the shipped gold items",
                do="Ask for fewer, or write more into a file and name it in `gold`.",
            )
    return usable


def _gold_wanted(study: Study) -> dict[str, int]:
    return {
        "training": study.qualification.n_training,
        "qualification": study.qualification.n_items,
        "attention": study.checks.n_attention,
    }


def clean(text: str, study: Study) -> str:
    """A reply as it is shown: model names replaced, and what the study normalises taken out; the same for every arm."""
    text = scrub(text, study.scrub)
    if "emoji" in study.normalise:
        text = re.sub(r" {2,}", " ", EMOJI.sub("", text).replace("\ufe0f", "").replace("\u200d", ""))
    if "markdown" in study.normalise:
        text = without_markdown(text)
    return text.strip()


def scrub(text: str, names: Iterable[str]) -> str:
    """The text with whole names, in any case, replaced by `[name]`; everything else stays, also "I am an AI"."""
    known = sorted((name for name in names if name.strip()), key=len, reverse=True)
    if not known:
        return text
    pattern = "|".join(re.escape(name) for name in known)
    return re.sub(rf"(?<!\w)(?:{pattern})(?:[- ]?\d[\w.]*(?:[- ]Instruct)?)?(?!\w)", "[name]", text, flags=re.I)


def without_markdown(text: str) -> str:
    """The words without the signs of Markdown: emphasis, headings, list bullets, quotes, rules, code fences."""
    text = re.sub(r"^[ \t]*(?:```|~~~).*$\n?", "", text, flags=re.M)
    text = re.sub(r"^[ \t]*(?:[-*_][ \t]*){3,}$\n?", "", text, flags=re.M)
    text = re.sub(r"^[ \t]*(?:#{1,6}|>|[-*+])[ \t]+", "", text, flags=re.M)
    text = re.sub(r"(?<![\w*])(\*{1,3})(?=\S)(.+?)(?<=\S)\1(?![\w*])", r"\2", text)
    text = re.sub(r"(?<![\w_])(_{1,3})(?=\S)(.+?)(?<=\S)\1(?![\w_])", r"\2", text)
    return re.sub(r"`([^`\n]+)`", r"\1", text)


def _responses(run: Path) -> Path:
    file = run / "responses.jsonl"
    if not file.is_file():
        raise UserError("'responses.jsonl' is missing.", where=str(run), do=f"Run `unstilted respond {run}` first.")
    return file


def _replies(arm: Arm, run: Path, study_folder: Path) -> dict[str, str]:
    """Replies by prompt id; those of a human-written file may be by the prompt's text."""
    if arm.file:
        return _human_replies(study_folder / arm.file)
    source = _responses(study_folder / arm.run if arm.run else run)
    wanted = arm.arm or arm.name
    found = {row.id: row.text for row in read_jsonl(source, Response) if row.arm == wanted}
    if not found:
        raise UserError(f"no reply is of the arm '{wanted}'.", where=str(source), do="Name one of base, prompted, tuned.")
    return found


def _human_replies(file: Path) -> dict[str, str]:
    found = {}
    for line, raw in read_json_rows(file):
        row = parse_row(raw, HumanReply, f"{file} line {line}")
        if not (row.id or row.prompt):
            raise UserError("this row has neither 'id' nor 'prompt'.", where=f"{file} line {line}", do="Say which prompt it answers.")
        found[row.id or row.prompt] = row.text
    return found


def _find(replies: Mapping[str, str], row: Response) -> str | None:
    return replies.get(row.id, replies.get(row.prompt))
