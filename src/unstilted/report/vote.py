"""The vote in the report: what people chose, how sure that is, and, clearly apart, what machines said in their place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from unstilted.report.contents import Contents
from unstilted.report.lettering import one_line, printable
from unstilted.report.plots import ShareMark, share_axis
from unstilted.report.provenance import HASH_LENGTH, Fact
from unstilted.report.wording import NARROW_SPACE, decimal
from unstilted.stats.agreement import Agreed
from unstilted.stats.clusters import Share
from unstilted.stats.sequential import Anytime
from unstilted.tally.records import Agreement, Choice, Panel, Question
from unstilted.tally.words import LABELS, count, percent, span
from unstilted.vote.freezing import Registration
from unstilted.vote.languages import DEFAULT, languages

NOT_ASKED = "People were not asked yet."
ARMS = ("base", "prompted", "tuned")
"""Arms that have a colour of their own."""
AGREED = (("percent", "Two raters agree"), ("alpha", "Krippendorff's alpha"), ("ac1", "Gwet's AC1"), ("fleiss", "Fleiss' kappa"))


@dataclass(frozen=True)
class ShownChoice:
    """A row of a table of shares."""

    pair: str
    share: str
    interval: str
    votes: str
    ties: str
    with_excluded: str
    """The share when excluded votes count too; empty where there are none."""


@dataclass(frozen=True)
class ShownTable:
    """Shares with what they are about; `label` says who voted where it was no person."""

    caption: str
    label: str
    rows: tuple[ShownChoice, ...]

    @property
    def has_excluded(self) -> bool:
        return any(row.with_excluded for row in self.rows)


@dataclass(frozen=True)
class ShownQuestion:
    """Everything about one criterion."""

    name: str
    question: str
    about: str
    plots: tuple[Markup, ...]
    """For wide and for narrow screens; empty where no vote named a winner."""
    caption: str
    table: ShownTable
    meaning: tuple[Fact, ...]
    """What the main numbers mean; empty for machines, whose numbers mean little."""
    more: tuple[Fact, ...]
    agreement: tuple[Fact, ...]
    breakdowns: tuple[ShownTable, ...]


@dataclass(frozen=True)
class ShownPanel:
    """All votes of one kind of rater."""

    kind: str
    label: str
    """Empty for people."""
    notes: tuple[str, ...]
    questions: tuple[ShownQuestion, ...]
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class ShownVote:
    """The section. `headline` is people's or says that they weren't asked; nothing of a machine's is ever in it."""

    headline: tuple[str, ...]
    people: ShownPanel | None
    machines: tuple[ShownPanel, ...]
    calibration: tuple[Fact, ...]


def shown_vote(contents: Contents) -> ShownVote:
    """What the page and the card show of the vote."""
    tally = contents.tally
    panels = [panel for panel in tally.panels if panel.questions or panel.exclusions] if tally else []
    people = next((panel for panel in panels if panel.kind == "human"), None)
    machines = [_panel(panel, contents) for panel in panels if panel.kind != "human"]
    if contents.judges and not any(panel.kind == "judge" for panel in machines):  # asked, and nothing of what it said could be read
        machines.insert(0, ShownPanel("judge", LABELS["judge"], _judges(contents), (), ()))
    return ShownVote(
        headline=_headline(contents, people),
        people=_panel(people, contents) if people else None,
        machines=tuple(machines),
        calibration=tuple(
            Fact(_plain(", ".join(part for part in (found.judge, found.criterion, found.stratum) if part)), _plain(found.words))
            for found in (tally.calibration if tally else ())
        ),
    )


def _headline(contents: Contents, people: Panel | None) -> tuple[str, ...]:
    if people is None or contents.tally is None:
        return (NOT_ASKED,)
    if not _is_sequential(contents.registration):
        names = _criteria(contents.registration)
        lines = contents.tally.headline.splitlines()
        return tuple(_plain(line) for line in sorted(lines, key=lambda line: [f"({name})" not in line for name in names]))
    told = [f"{each.words[key]} ({each.criterion})" for each in people.questions for key in each.words if key.startswith("anytime ")]
    return tuple(_plain(line) for line in told) or ("Too few raters so far for an interval that may be looked at before the end.",)


def _is_sequential(registration: Registration | None) -> bool:
    return registration is not None and registration.study.get("stopping") == "sequential"


def _panel(panel: Panel, contents: Contents) -> ShownPanel:
    label = "" if panel.kind == "human" else LABELS[panel.kind]
    names = _criteria(contents.registration)
    questions = sorted(panel.questions, key=lambda each: names.index(each.criterion) if each.criterion in names else len(names))
    return ShownPanel(
        kind=panel.kind,
        label=label,
        notes=_judges(contents) if panel.kind == "judge" else (),
        questions=tuple(_question(question, panel, contents, label) for question in questions),
        facts=tuple(_panel_facts(panel, contents)),
    )


def _judges(contents: Contents) -> tuple[str, ...]:
    return tuple(_plain(f"{judge.criterion}: {judge.words}") for judge in contents.judges)


def _criteria(registration: Registration | None) -> list[str]:
    """The study's criteria in its order, the primary one first."""
    return [str(each.get("name")) for each in registration.study.get("criteria", ())] if registration else []


def _panel_facts(panel: Panel, contents: Contents) -> Iterator[Fact]:
    if panel.kind != "judge":
        yield Fact("Steadiness", panel.words["steadiness"])
    for blinding in panel.blinding:
        yield Fact(f"Blinding, {_plain(blinding.arm)} and {_plain(blinding.other)}", _plain(blinding.words))
    for left_out in panel.exclusions:
        yield Fact("Left out", f"{count(left_out.n_votes, 'vote')} by {count(left_out.n_raters, 'rater')}: {_plain(left_out.reason)}")
    if panel.kind != "judge" and not panel.exclusions:
        yield Fact("Left out", "nothing")
    registration = contents.registration
    if panel.kind == "human" and registration is not None:
        stopping = "after all votes that were planned"
        if _is_sequential(registration):
            stopping = "may be closed early, so it is judged only by the interval that holds at every look"
        yield Fact("Stopping rule", stopping)
        changes = "unchanged since" if registration.version == 1 else f"version {registration.version}, each kept"
        frozen = f"frozen {registration.frozen} as {registration.hash[:HASH_LENGTH]}, {changes}"
        yield Fact("Pre-registration", frozen, "Questions, items, assignment and rules of exclusion were fixed before the first vote.")


def _question(question: Question, panel: Panel, contents: Contents, label: str) -> ShownQuestion:
    is_sequential = panel.kind == "human" and _is_sequential(contents.registration)
    intervals: list[Share | Anytime | None] = [each.share for each in question.choices]
    if is_sequential:
        anytime = {(each.arm, each.other): each.result for each in question.anytime}
        intervals = [anytime.get((each.arm, each.other)) for each in question.choices]
    name = question.criterion or "all votes"
    confidence = 100 * (contents.tally.settings.confidence if contents.tally else 0)
    about = (
        count(question.n_votes, "vote"),
        count(question.n_raters, "rater" if label == "" else "voter"),
        count(question.n_items, "item"),
    )
    caption = f"Dot: share of the votes with a winner. Bar: its {confidence:g}{NARROW_SPACE}% interval for other raters and other items."
    if is_sequential:
        caption = f"Dot: a mean rater's share. Bar: its {confidence:g}{NARROW_SPACE}% interval, which holds at every look."
    if panel.kind == "judge":
        caption = "Dot: share of the pairs that the judge decided alike with the sides both ways. One judge gives no interval for others."
    facts = list(_facts(question, panel.kind))
    return ShownQuestion(
        name=_plain(name),
        question=_plain(_asked(question.criterion, contents.registration)),
        about=", ".join(about),
        plots=tuple(_plots(question.choices, intervals, f"vote-{panel.kind}-{_key(name)}", f"{name}: who was chosen", label)),
        caption=f"{label}. {caption}" if label else caption,
        table=ShownTable(f"Choices, {_plain(name)}", label, tuple(_rows(question.choices, intervals, question.with_excluded))),
        meaning=tuple(fact for fact in facts if fact.name.startswith("Meaning")),
        more=tuple(fact for fact in facts if not fact.name.startswith("Meaning")),
        agreement=tuple(_agreement(question.agreement, question.words)) if question.agreement and panel.kind != "judge" else (),
        breakdowns=tuple(
            ShownTable(f"By {_plain(each.column)}", label, tuple(_rows(each.choices, [choice.share for choice in each.choices], ())))
            for each in question.breakdowns
            if panel.kind != "judge"
        ),
    )


def _asked(criterion: str, registration: Registration | None) -> str:
    """The question in the words that raters read."""
    for each in registration.study.get("criteria", ()) if registration else ():
        if each.get("name") == criterion and each.get("question"):
            return str(each["question"])
    english = languages()[DEFAULT]
    return english(f"question_{criterion}") if english.has(f"question_{criterion}") else ""


def _plots(choices: Sequence[Choice], intervals: Sequence[Share | Anytime | None], key: str, title: str, label: str) -> Iterator[Markup]:
    marks = []
    for choice, interval in zip(choices, intervals, strict=True):
        if interval is not None:
            share, low, high = _numbers(interval)
            css = choice.arm if choice.arm in ARMS and not label else "machine" if label else "tuned"
            marks.append(ShareMark(f"{_plain(choice.arm)} over {_plain(choice.other)}", percent(share), share, low, high, css))
    if marks:
        yield share_axis(marks, 980, f"{key}-wide", _plain(title), label)
        yield share_axis(marks, 340, f"{key}-narrow", _plain(title), label)


def _rows(choices: Sequence[Choice], intervals: Sequence[Share | Anytime | None], with_excluded: Sequence[Choice]) -> Iterator[ShownChoice]:
    whole = {(choice.arm, choice.other): choice.share for choice in with_excluded}
    for choice, interval in zip(choices, intervals, strict=True):
        share, low, high = _numbers(interval) if interval else (None, None, None)
        also = whole.get((choice.arm, choice.other))
        group = f"{_plain(choice.group)}: " if choice.group else ""
        yield ShownChoice(
            pair=f"{group}{_plain(choice.arm)} over {_plain(choice.other)}",
            share="no winner named" if share is None else percent(share),
            interval=span(low, high) if low is not None and high is not None else "no interval" if interval else "",
            votes=f"{decimal(choice.n_chosen, 0)} to {decimal(choice.n_other, 0)}",
            ties=f"{decimal(choice.n_tie, 0)} / {decimal(choice.n_both_bad, 0)}",
            with_excluded=percent(also.share) if also else "",
        )


def _numbers(interval: Share | Anytime) -> tuple[float, float | None, float | None]:
    return (interval.mean if isinstance(interval, Anytime) else interval.share), interval.low, interval.high


def _facts(question: Question, kind: str) -> Iterator[Fact]:
    """What the table can't say, in the words of the tally."""
    names = {"share": "Meaning", "ties": "Ties", "controlled": "Equal length", "anytime": "Stopping early"}
    for key, text in question.words.items():
        name, _, pair = key.partition(" ")
        if name in names and pair and not (kind != "human" and name == "share") and not (kind == "judge" and name != "ties"):
            yield Fact(f"{names[name]}, {_plain(pair)}", _bare(text, kind))
    if question.left_share:
        yield Fact("Sides", _bare(question.words["left_share"], kind))
    if question.with_excluded:
        yield Fact("With excluded votes", _bare(question.words["with_excluded"], kind))
    if kind == "human" and question.agreement is None:
        yield Fact("Agreement", "No two raters voted on the same item and arms, so agreement is not known.")


def _bare(text: str, kind: str) -> str:
    """The tally's words without the label in front, which stands over the whole block and in its tables and pictures."""
    return _plain(text.removeprefix(f"({LABELS[kind]}.) "))


def _agreement(agreement: Agreement, words: dict[str, str]) -> Iterator[Fact]:
    for key, name in AGREED:
        agreed: Agreed = getattr(agreement, key)
        if key == "percent":
            value, interval = percent(agreed.value), "" if agreed.low is None or agreed.high is None else span(agreed.low, agreed.high)
        else:
            value = decimal(agreed.value, 2)
            interval = "" if agreed.low is None or agreed.high is None else f"{decimal(agreed.low, 2)} to {decimal(agreed.high, 2)}"
        text = words[key]
        if text.startswith("("):
            text = text.partition(".) ")[2]
        yield Fact(name, f"{value} ({interval or agreed.reason})", _plain(text))


def _plain(text: str) -> str:
    return one_line(printable(text))


def _key(name: str) -> str:
    """The name as an id that HTML takes, different for different names."""
    return "".join(char if char.isascii() and char.isalnum() else f"_{ord(char):x}" for char in name)
