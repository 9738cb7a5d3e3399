"""`before_after.svg`: one prompt, base's and tuned's answer side by side, for a README on a light or a dark page."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from unstilted.errors import UserError
from unstilted.records import Arm
from unstilted.report.contents import Answer, Answered, Contents
from unstilted.report.examples import VOICE, most_changed
from unstilted.report.lettering import clip, one_line, printable, text_width, wrap
from unstilted.report.plots import Scale
from unstilted.report.wording import NOT_MEASURED, decimal

WIDTH, PADDING, GAP = 880.0, 32.0, 24.0
CARD_WIDTH = (WIDTH - 2 * PADDING - GAP) / 2
INSET = 22.0
SIZE, LINE_HEIGHT = 15.0, 23.0
MAX_LINES = 14
"""Longest answer in lines; the first example whose two answers fit is taken, otherwise the first is clipped."""
AXIS = (-0.4, 1.4)
"""Voice values that the small axis spans; a dot beyond sits at its end, its number says where it is."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', sans-serif"
INK, MUTED, RULE, PAPER, CARD = "#1e1d1b", "#625f59", "#dcd7ce", "#fcfbf9", "#ffffff"
COLOURS: dict[Arm, str] = {"base": "#6a6761", "tuned": "#3446c2"}
NAMES: dict[Arm, str] = {"base": "Before", "tuned": "After"}


@dataclass(frozen=True)
class Lettered:
    """An answer broken into lines."""

    arm: Arm
    lines: list[str]
    voice: float | None
    is_cut_off: bool


def draw_before_after(contents: Contents) -> str:
    """The picture as SVG text; says 'not measured' when no prompt has an answer of both arms that may be shown."""
    rows = [row for row in _candidates(contents) if _can_be_shown(row)]
    if not rows:
        return _nothing()
    row = next((row for row in rows if _fits(row)), rows[0])
    prompt = clip(wrap(one_line(row.prompt), WIDTH - 2 * PADDING, 20), 3)
    answers = [_lettered(arm, row.arms[arm]) for arm in NAMES]
    return _draw(prompt, answers)


def _candidates(contents: Contents) -> list[Answered]:
    wanted = contents.recipe.report.picture
    if not wanted:
        return most_changed(contents.answered, len(contents.answered))
    rows = [row for row in contents.answered if row.id == wanted]
    if not rows:
        raise UserError(f"no prompt has the id '{wanted}'.", where="report.picture", do="Take one from responses.jsonl.")
    return rows


def _can_be_shown(row: Answered) -> bool:
    return all(arm in row.arms and row.arms[arm].response.text.strip() for arm in NAMES)


def _fits(row: Answered) -> bool:
    return all(len(_lines(row.arms[arm])) <= MAX_LINES for arm in NAMES)


def _lines(answer: Answer) -> list[str]:
    return wrap(printable(answer.response.text), CARD_WIDTH - 2 * INSET, SIZE)


def _lettered(arm: Arm, answer: Answer) -> Lettered:
    return Lettered(arm, clip(_lines(answer), MAX_LINES), answer.score(VOICE), answer.is_cut_off)


def _draw(prompt: list[str], answers: Sequence[Lettered]) -> str:
    top = PADDING + 34 + 27 * len(prompt)
    text_height = LINE_HEIGHT * max(len(answer.lines) for answer in answers)
    card_height = 48 + text_height + 76
    parts = [_text(PADDING, PADDING + 12, "Asked", 13, MUTED)]
    parts += [_text(PADDING, PADDING + 40 + 27 * index, line, 20, INK, weight=600) for index, line in enumerate(prompt)]
    for index, answer in enumerate(answers):
        parts.append(_card(answer, PADDING + index * (CARD_WIDTH + GAP), top, card_height))
    return _svg("One prompt answered before and after tuning", _spoken(prompt, answers), top + card_height + PADDING, parts)


def _card(answer: Lettered, left: float, top: float, height: float) -> Markup:
    colour = COLOURS[answer.arm]
    box = Markup(
        '<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="8" fill="{card}" stroke="{rule}"/>'
        '<rect x="{bar:g}" y="{bar_y:g}" width="36" height="3" rx="1.5" fill="{colour}"/>'
    ).format(x=left, y=top, w=CARD_WIDTH, h=height, card=CARD, rule=RULE, bar=left + INSET, bar_y=top, colour=colour)
    name = f"{NAMES[answer.arm]} · {answer.arm} model" + (" · cut off" if answer.is_cut_off else "")
    parts = [box, _text(left + INSET, top + 32, name, 13, colour, weight=600)]
    parts += [_text(left + INSET, top + 62 + LINE_HEIGHT * index, line, SIZE, INK) for index, line in enumerate(answer.lines)]
    parts.append(_axis(answer, left + INSET, top + height - 40))
    return Markup("").join(parts)


def _axis(answer: Lettered, left: float, y: float) -> Markup:
    right = left + CARD_WIDTH - 2 * INSET
    start, end = left + text_width("formal", 12) + 10, right - text_width("human-like", 12) - 10
    ends = _text(left, y + 4, "formal", 12, MUTED) + _text(right, y + 4, "human-like", 12, MUTED, anchor="end")
    rule = Markup('<path d="M{:.1f} {y:.1f}H{:.1f}" stroke="{}" stroke-width="2" stroke-linecap="round"/>').format(start, end, RULE, y=y)
    if answer.voice is None:
        return ends + rule + _text((start + end) / 2, y - 10, f"voice {NOT_MEASURED}", 12, MUTED, anchor="middle")
    scale = Scale(*AXIS, start, end)
    marks = Markup("").join(_mark(scale(value), y) for value in (0, 1))
    x = scale(min(max(answer.voice, AXIS[0]), AXIS[1]))
    dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="6" fill="{}"/>').format(x, y, COLOURS[answer.arm])
    return ends + rule + marks + dot + _text(x, y + 24, decimal(answer.voice, 2), 13, COLOURS[answer.arm], anchor="middle", weight=600)


def _mark(x: float, y: float) -> Markup:
    return Markup('<path d="M{:.1f} {:.1f}v10" stroke="{}" stroke-width="1"/>').format(x, y - 5, MUTED)


def _spoken(prompt: Sequence[str], answers: Sequence[Lettered]) -> str:
    said = [f"{NAMES[answer.arm]}: {' '.join(answer.lines)}" for answer in answers]
    return " ".join([f"Asked: {' '.join(prompt)}", *said])


def _nothing() -> str:
    parts = [_text(WIDTH / 2, 66, f"Before and after: {NOT_MEASURED}", 16, MUTED, anchor="middle")]
    return _svg("Before and after tuning", f"Before and after: {NOT_MEASURED}.", 120, parts)


def _svg(title: str, description: str, height: float, parts: Sequence[Markup]) -> str:
    return Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="title desc" viewBox="0 0 {width:g} {height:g}" '
        'width="{width:g}" height="{height:g}" font-family="{font}">\n<title id="title">{title}</title>\n'
        '<desc id="desc">{description}</desc>\n'
        '<rect x=".5" y=".5" width="{inner_width:g}" height="{inner_height:g}" rx="12" fill="{paper}" stroke="{rule}"/>\n{parts}\n</svg>\n'
    ).format(
        width=WIDTH,
        height=height,
        font=FONT,
        title=title,
        description=description,
        inner_width=WIDTH - 1,
        inner_height=height - 1,
        paper=PAPER,
        rule=RULE,
        parts=Markup("\n").join(parts),
    )


def _text(x: float, y: float, text: str, size: float, colour: str, *, anchor: str = "start", weight: int = 400) -> Markup:
    return Markup(
        '<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}">{text}</text>'
    ).format(x=x, y=y, size=size, colour=colour, anchor=anchor, weight=weight, text=text)
