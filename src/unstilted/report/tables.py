"""Rows of the measured table, shared by the page and the model card."""

from dataclasses import dataclass

from unstilted.records import GateVerdict, Measure, Measures
from unstilted.report.wording import NOT_MEASURED, Shown, ShownChange, shown, shown_change, unit_name

COLUMNS = (("base", "Base"), ("prompted", "Prompted base"), ("tuned", "Tuned"), ("chosen", "Human-like side"))
"""Keys of `Measure.arms` and their headings."""


@dataclass(frozen=True)
class Cell:
    """One arm's value in a row."""

    arm: str
    heading: str
    value: Shown


@dataclass(frozen=True)
class Row:
    """A measure over all arms."""

    title: str
    explanation: str
    unit: str
    cells: tuple[Cell, ...]
    change: ShownChange
    """Tuned minus base."""


@dataclass(frozen=True)
class Verdict:
    """The three lines that matter, without the headings that their sentences begin with."""

    changed: str
    outcome: GateVerdict
    gate: str
    cost: str


def verdict(measures: Measures) -> Verdict:
    """What changed, the honesty gate, and what it cost; the reader's page has the headings."""
    gate = _without(measures.gate.text, f"Honesty gate {measures.gate.verdict}: ")
    return Verdict(_without(measures.changed, "What changed: "), measures.gate.verdict, gate, _without(measures.cost, "What it cost: "))


def measured_rows(measures: Measures) -> list[Row]:
    """One row a measure, in the order of `measures.json`."""
    return [_row(measure) for measure in measures.measures]


def _row(measure: Measure) -> Row:
    return Row(
        title=measure.title,
        explanation=measure.explanation,
        unit=unit_name(measure.unit),
        cells=tuple(Cell(arm, heading, shown(measure.arms.get(arm), measure.unit)) for arm, heading in COLUMNS),
        change=shown_change(measure.change.get("tuned"), measure.unit),
    )


def _without(sentence: str, heading: str) -> str:
    rest = sentence.removeprefix(heading)
    return rest[:1].upper() + rest[1:] or NOT_MEASURED
