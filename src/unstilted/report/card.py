"""`README.md` of the run folder: a model card in the Hugging Face Hub's format, every fact from the run's files."""

import json
import re
from typing import Any

from unstilted.report.contents import Contents
from unstilted.report.lettering import one_line
from unstilted.report.page import environment
from unstilted.report.provenance import pairs_text, settings_of
from unstilted.report.tables import COLUMNS, measured_rows, verdict
from unstilted.report.vote import shown_vote
from unstilted.report.wording import fact

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
MARKDOWN = re.compile(r"([\\`*_\[\]#|~<>&$])")


def render_card(contents: Contents) -> str:
    """The card as Markdown with YAML front matter."""
    return environment().get_template("card.md.jinja").render(**_values(contents)).rstrip() + "\n"


def yaml_string(text: str) -> str:
    """Any text as a one-line double-quoted YAML scalar."""
    return json.dumps(one_line(text), ensure_ascii=False)


def markdown(text: str) -> str:
    """Any text as one line of Markdown that shows it unchanged: no markup, no HTML, no table cell ended early."""
    return MARKDOWN.sub(r"\\\1", one_line(text)).replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


def hub_id(contents: Contents) -> str | None:
    """The base model's id on the Hub, or None for a folder or an unknown model."""
    return contents.model if contents.model is not None and HUB_ID.fullmatch(contents.model) else None


def licence_id(licence: object) -> str:
    """The licence as the Hub writes it; 'unknown' when it isn't there, 'other' when it is a sentence."""
    if not isinstance(licence, str) or not licence.strip():
        return "unknown"
    lower = licence.strip().lower()
    return lower if LICENCE_ID.fullmatch(lower) else "other"


def _values(contents: Contents) -> dict[str, Any]:
    model = hub_id(contents)
    return {
        "recipe": contents.recipe,
        "measures": contents.measures,
        "verdict": verdict(contents.measures),
        "yaml_title": yaml_string(contents.recipe.report.title),
        "title": markdown(contents.recipe.report.title),
        "base_model": model,
        "licence": licence_id(contents.fact("train", "licence")),
        "licence_name": yaml_string(fact(contents.fact("train", "licence"))),
        "model": markdown(fact(contents.model)),
        "model_code": json.dumps(one_line(model or contents.model or "the base model"), ensure_ascii=False),
        "columns": [heading for _, heading in COLUMNS],
        "rows": measured_rows(contents.measures),
        "vote": shown_vote(contents),
        "facts": {name: markdown(fact(contents.fact(stage, name))) for stage, name in _FACTS},
        "licence_words": markdown(fact(contents.fact("train", "licence"))),
        "pairs": markdown(pairs_text(contents)),
        "train": settings_of(contents, "train"),
        "md": markdown,
    }


_FACTS = (("train", "stopped"), ("train", "n_steps"), ("train", "n_parameters_trained"), ("respond", "weights"), ("respond", "engine"))
