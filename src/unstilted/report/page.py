"""`report.html`: one page that needs nothing but itself."""

import functools
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from unstilted.recipe import recipe_toml
from unstilted.records import ARMS, Arm
from unstilted.report.contents import Answer, Answered, Contents
from unstilted.report.curves import training_charts
from unstilted.report.examples import MOST_CHANGED_RULE, VOICE, WORST_RULE, most_changed, worst
from unstilted.report.lettering import printable
from unstilted.report.plots import Mark, line_chart, voice_axis
from unstilted.report.provenance import run_facts, stage_cards
from unstilted.report.tables import COLUMNS, measured_rows, verdict
from unstilted.report.vote import shown_vote
from unstilted.report.wording import NOT_MEASURED, decimal, fact

N_WORST = 5
MAX_CHARS = 1500
"""Longest text shown; what is cut is said, and whole in `responses.jsonl`."""
ARM_NAMES: dict[Arm, str] = {"base": "Base", "prompted": "Prompted base", "tuned": "Tuned"}


@dataclass(frozen=True)
class ShownAnswer:
    """An answer as one of the columns."""

    arm: str
    name: str
    text: str
    note: str


@dataclass(frozen=True)
class Example:
    """A prompt with a column for each arm, or with the tuned answer alone and why it is bad."""

    prompt: str
    category: str
    answers: tuple[ShownAnswer, ...]
    reasons: tuple[str, ...] = ()


def render_page(contents: Contents) -> str:
    """The whole page as HTML text."""
    template = environment().get_template("report.html.jinja")
    return template.render(**_values(contents)) + "\n"


@functools.cache
def environment() -> Environment:
    """Templates of this package; everything put into HTML is escaped, Markdown escapes by its own filter."""
    return Environment(
        loader=PackageLoader("unstilted.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _values(contents: Contents) -> dict[str, Any]:
    measures = contents.measures
    charts = training_charts(contents.points, contents.recipe.train.loss)
    return {
        "title": printable(contents.recipe.report.title),
        "lead": _lead(contents),
        "verdict": verdict(measures),
        "measures": measures,
        "confidence": f"{decimal(100 * measures.confidence, 1).removesuffix('.0')} %",
        "voice": _voice_plots(contents),
        "columns": [heading for _, heading in COLUMNS],
        "rows": measured_rows(measures),
        "vote": shown_vote(contents),
        "charts": [(chart, line_chart(chart)) for chart in charts],
        "ending": fact(contents.fact("train", "stopped")),
        "warnings": _warnings(contents),
        "changed": [_example(row) for row in most_changed(contents.answered, contents.recipe.report.n_examples)],
        "changed_rule": MOST_CHANGED_RULE,
        "worst": [
            Example(_cut(bad.answered.prompt), bad.answered.category, (_shown("tuned", bad.answer),), bad.reasons)
            for bad in worst(contents.answered, N_WORST)
        ],
        "worst_rule": WORST_RULE,
        "n_tuned": sum("tuned" in row.arms for row in contents.answered),
        "run_facts": run_facts(contents),
        "stages": stage_cards(contents),
        "recipe": recipe_toml(contents.recipe),
        "not_measured": NOT_MEASURED,
    }


def _warnings(contents: Contents) -> list[str]:
    warnings = contents.fact("train", "warnings")
    return [printable(str(text)) for text in warnings] if isinstance(warnings, list) else []


def _lead(contents: Contents) -> str:
    parts = [contents.model or "base model not named", f"{contents.measures.n_prompts} prompts answered by three arms", contents.finished]
    return " · ".join(part for part in parts if part)


def _voice_plots(contents: Contents) -> list[Markup]:
    """The same plot for wide and for narrow screens; empty when voice wasn't measured."""
    marks = [mark for arm in ARMS if (mark := _mark(contents, arm)) is not None]
    return [voice_axis(marks, 980, "voice-wide"), voice_axis(marks, 340, "voice-narrow")] if marks else []


def _mark(contents: Contents, arm: Arm) -> Mark | None:
    measure = next((measure for measure in contents.measures.measures if measure.name == VOICE), None)
    estimate = None if measure is None else measure.arms.get(arm)
    return Mark(ARM_NAMES[arm], estimate, arm) if estimate is not None else None


def _example(row: Answered) -> Example:
    return Example(_cut(row.prompt), row.category, tuple(_shown(arm, row.arms.get(arm)) for arm in ARMS))


def _shown(arm: Arm, answer: Answer | None) -> ShownAnswer:
    if answer is None:
        return ShownAnswer(arm, ARM_NAMES[arm], "", NOT_MEASURED)
    voice = answer.score(VOICE)
    note = f"voice {NOT_MEASURED if voice is None else decimal(voice, 2)} · {len(answer.response.text.split())} words"
    return ShownAnswer(arm, ARM_NAMES[arm], _cut(answer.response.text), note + (" · cut off" if answer.is_cut_off else ""))


def _cut(text: str) -> str:
    text = printable(text).strip()
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS].rstrip()} … [{len(text) - MAX_CHARS} characters more]"
