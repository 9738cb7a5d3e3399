"""How a number, an interval or a fact is written for a reader; what is absent is said in words, never as NaN or None."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unstilted.records import Estimate

NOT_MEASURED = "not measured"
MINUS = "\N{MINUS SIGN}"
NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"
MAX_LISTED = 20
"""Longest list of facts written out; the rest is counted."""


@dataclass(frozen=True)
class Shown:
    """An estimate in words. `interval` is empty where nothing was measured."""

    mean: str
    interval: str = ""

    @property
    def text(self) -> str:
        return f"{self.mean} ({self.interval})" if self.interval else self.mean


@dataclass(frozen=True)
class ShownChange(Shown):
    """A difference in words. `direction` is up, down, or none where nothing was measured; not a verdict on good or bad."""

    direction: str = "none"
    is_clear: bool = False
    """The interval leaves 0 out."""

    @property
    def arrow(self) -> str:
        return {"up": "↑", "down": "↓", "none": ""}[self.direction]


def decimal(value: float, n_decimals: int, *, signed: bool = False) -> str:
    """A number with a true minus sign, thousands commas and no negative zero."""
    digits = f"{abs(value):,.{n_decimals}f}"
    if not any(digit in digits for digit in "123456789"):
        return digits
    return (MINUS if value < 0 else "+" if signed else "") + digits


def quantity(value: float, unit: str, *, signed: bool = False) -> str:
    """A value of a measure in its unit, without the unit's name except for '%'."""
    match unit:
        case "share" | "answers alike":
            text = decimal(100 * value, 1, signed=signed)
            return text if signed else f"{text}{NARROW_SPACE}%"
        case "words":
            return decimal(value, 1, signed=signed)
        case _:
            return decimal(value, 2, signed=signed)


def unit_name(unit: str) -> str:
    """The unit as said under a measure's title; empty for shares, whose '%' says it, and for bare numbers."""
    return unit if unit in ("words", "per 100 words") else ""


def shown(estimate: Estimate | None, unit: str) -> Shown:
    """A mean and its interval; 'not measured' for an absent one."""
    if estimate is None:
        return Shown(NOT_MEASURED)
    return Shown(quantity(estimate.mean, unit), f"{_bare(estimate.low, unit)} to {quantity(estimate.high, unit)}")


def shown_change(estimate: Estimate | None, unit: str) -> ShownChange:
    """A signed difference from base; shares in percentage points."""
    if estimate is None:
        return ShownChange(NOT_MEASURED)
    points = f"{NARROW_SPACE}points" if unit in ("share", "answers alike") else ""
    return ShownChange(
        mean=quantity(estimate.mean, unit, signed=True) + points,
        interval=f"{quantity(estimate.low, unit, signed=True)} to {quantity(estimate.high, unit, signed=True)}",
        direction="up" if estimate.mean > 0 else "down" if estimate.mean < 0 else "none",
        is_clear=estimate.low > 0 or estimate.high < 0,
    )


def duration(seconds: float | None) -> str:
    """Seconds as '48 s', '12 min 05 s' or '2 h 03 min'."""
    if seconds is None:
        return NOT_MEASURED
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def fact(value: object) -> str:
    """Any value of a manifest in words: nested lists and tables are flattened, long lists are cut and counted."""
    match value:
        case None | "":
            return NOT_MEASURED
        case bool():
            return "yes" if value else "no"
        case int():
            return decimal(value, 0)
        case float():
            return f"{value:g}".replace("-", MINUS) if math.isfinite(value) else NOT_MEASURED
        case Mapping():
            return "; ".join(f"{words(str(key))}: {fact(item)}" for key, item in value.items()) or "none"
        case Sequence() if not isinstance(value, str):
            listed = [fact(item) for item in value[:MAX_LISTED]]
            rest = [f"and {len(value) - MAX_LISTED} more"] if len(value) > MAX_LISTED else []
            return ", ".join(listed + rest) or "none"
        case _:
            return str(value)


def words(name: str) -> str:
    """A field's name as words: 'n_pairs' becomes 'pairs'."""
    return name.removeprefix("n_").replace("_", " ")


def _bare(value: float, unit: str) -> str:
    return quantity(value, unit).removesuffix(f"{NARROW_SPACE}%")
