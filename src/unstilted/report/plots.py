"""The report's plots as inline SVG, drawn by pure functions; colours are the page's CSS variables, so light and dark both work."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from unstilted.records import Estimate
from unstilted.report.lettering import text_width, wrap
from unstilted.report.wording import MINUS

TEXT_SIZE = 12.0
"""Pixels at the width for which a plot is drawn; `.plot text` in the style sheet says the same."""


@dataclass(frozen=True)
class Scale:
    """A linear map from values to positions."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Mark:
    """A mean with its interval on the voice axis. `css` is the class that colours it."""

    label: str
    estimate: Estimate
    css: str


@dataclass(frozen=True)
class ShareMark:
    """A share between 0 and 1 on an axis; without low and high there is no interval."""

    label: str
    value: str
    share: float
    low: float | None
    high: float | None
    css: str


@dataclass(frozen=True)
class Line:
    """A curve with its name written at its end."""

    label: str
    points: tuple[tuple[float, float], ...]
    css: str
    has_dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A small plot of lines over optimizer steps."""

    key: str
    """Unique on the page; names the plot's title for screen readers."""
    title: str
    caption: str
    """One sentence on how to read it."""
    lines: tuple[Line, ...]
    width: float = 400.0
    height: float = 200.0


def nice_ticks(low: float, high: float, n: int = 5) -> tuple[float, ...]:
    """About `n` round values (1, 2 or 5 times a power of ten apart) that span low to high, both ends included.

    A range of zero width is widened first. Raises ValueError for values that aren't finite or are in the wrong order.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"no axis spans {low} to {high}")
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / max(1, n - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(index * step, 12) for index in range(first, last + 1))


def tick_text(value: float) -> str:
    """A tick's value as short as it can be, with a true minus sign."""
    return f"{value:.10g}".replace("-", MINUS)


def voice_axis(marks: Sequence[Mark], width: float, key: str) -> Markup:
    """Dot and interval for each mark on the axis whose 0 is the starter's formal side and whose 1 its human-like side."""
    ticks = _voice_ticks(marks)
    scale = Scale(ticks[0], ticks[-1], 16, width - 16)
    top, row_height = 44.0, 48.0
    bottom = top + row_height * len(marks) + 8
    parts = [_band(scale, top - 8, bottom), *(_grid_line(scale(tick), top - 8, bottom) for tick in ticks)]
    parts += [_end_mark(scale, 0, "formal side", top, bottom), _end_mark(scale, 1, "human-like side", top, bottom)]
    parts += [_mark(mark, scale, top + row_height * index, width) for index, mark in enumerate(marks)]
    parts += [_text(scale(tick), bottom + 18, tick_text(tick), "middle", "tick") for tick in ticks]
    spoken = "; ".join(
        f"{mark.label} {mark.estimate.mean:.2f}, interval {mark.estimate.low:.2f} to {mark.estimate.high:.2f}" for mark in marks
    )
    title = "Voice of the answers, from formal (0) to human-like (1)"
    return _svg(key, title, spoken or "Not measured.", width, bottom + 26, parts)


def share_axis(marks: Sequence[ShareMark], width: float, key: str, title: str, label: str = "") -> Markup:
    """Dot and interval for each mark between 0 and 100 %, with a line at one half; `label` is written into the picture."""
    scale = Scale(0, 1, 20, width - 20)
    lines = wrap(label, width - 8, TEXT_SIZE)
    top, row_height = 26.0 + 16 * len(lines), 48.0
    bottom = top + row_height * len(marks) + 4
    parts = [_text(0, 12 + 16 * index, line, "start", "warning") for index, line in enumerate(lines)]
    parts += [_grid_line(scale(tick), top - 4, bottom) for tick in (0, 0.25, 0.75, 1)]
    parts += [Markup('<path class="end" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>').format(x=scale(0.5), top=top - 4, bottom=bottom)]
    parts += [_text(scale(0.5), top - 10, "no preference", "middle", "tick")]
    parts += [_share_mark(mark, scale, top + row_height * index, width) for index, mark in enumerate(marks)]
    parts += [_text(scale(tick), bottom + 18, f"{100 * tick:g} %", "middle", "tick") for tick in (0, 0.25, 0.5, 0.75, 1)]
    return _svg(key, title, f"{label}. {_spoken_shares(marks)}" if label else _spoken_shares(marks), width, bottom + 26, parts)


def line_chart(chart: Chart) -> Markup:
    """A small line plot with round ticks and each line named at its end."""
    points = [point for line in chart.lines for point in line.points]
    ys = nice_ticks(min(y for _, y in points), max(y for _, y in points), 4)
    right = 12 + max(text_width(line.label, TEXT_SIZE) for line in chart.lines)
    left = 10 + max(text_width(tick_text(tick), TEXT_SIZE) for tick in ys)
    x = Scale(0, max(max(step for step, _ in points), 1), left, chart.width - right)
    y = Scale(ys[0], ys[-1], chart.height - 28, 12)
    parts = [_level(left, chart.width - right, y(tick), is_zero=tick == 0) for tick in ys]
    parts += [_text(left - 8, y(tick) + 4, tick_text(tick), "end", "tick") for tick in ys]
    parts += [_text(x(tick), chart.height - 8, tick_text(tick), "middle", "tick") for tick in _step_ticks(x.high)]
    parts += [_curve(line, x, y) for line in chart.lines]
    labels = apart([y(line.points[-1][1]) for line in chart.lines], 15)
    parts += [_text(x(line.points[-1][0]) + 8, at + 4, line.label, "start", line.css) for line, at in zip(chart.lines, labels, strict=True)]
    return _svg(chart.key, chart.title, _spoken(chart), chart.width, chart.height, parts)


def apart(places: Sequence[float], gap: float) -> list[float]:
    """The same places in the same order, no two closer than `gap`; a clash of two is spread around its middle."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for before, after in itertools.pairwise(order):
        overlap = gap - (moved[after] - moved[before])
        if overlap > 0:
            moved[before] -= overlap / 2
            moved[after] += overlap / 2
    for before, after in itertools.pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    return moved


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and those up to `window` - 1 before it."""
    return [sum(part) / len(part) for part in (values[max(0, end - window) : end] for end in range(1, len(values) + 1))]


def _voice_ticks(marks: Sequence[Mark]) -> tuple[float, ...]:
    low = min([0.0, *(mark.estimate.low for mark in marks)])
    high = max([1.2, *(mark.estimate.high for mark in marks)])
    return nice_ticks(low - 0.1, high, 8)


def _step_ticks(last: float) -> tuple[float, ...]:
    return tuple(tick for tick in nice_ticks(0, last, 5) if tick <= last and tick == int(tick))


def _spoken(chart: Chart) -> str:
    return "; ".join(f"{line.label} from {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in chart.lines) + "."


def _svg(key: str, title: str, description: str, width: float, height: float, parts: Sequence[Markup]) -> Markup:
    return Markup(
        '<svg class="plot" role="img" aria-labelledby="{key}-title {key}-desc" viewBox="0 0 {width:g} {height:g}" '
        'width="{width:g}" height="{height:g}" xmlns="http://www.w3.org/2000/svg">'
        '<title id="{key}-title">{title}</title><desc id="{key}-desc">{description}</desc>{parts}</svg>'
    ).format(key=key, title=title, description=description, width=width, height=height, parts=Markup("").join(parts))


def _band(scale: Scale, top: float, bottom: float) -> Markup:
    left, right = scale(0.9), scale(1.1)
    return Markup('<rect class="band" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(left, top, right - left, bottom - top)


def _grid_line(x: float, top: float, bottom: float) -> Markup:
    return Markup('<path class="grid" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>').format(x=x, top=top, bottom=bottom)


def _end_mark(scale: Scale, value: float, label: str, top: float, bottom: float) -> Markup:
    line = Markup('<path class="end" d="M{x:.1f} {top:.1f}V{bottom:.1f}"/>').format(x=scale(value), top=top - 8, bottom=bottom)
    half = text_width(label, TEXT_SIZE) / 2
    x = min(max(scale(value), half), scale.end + 16 - half)
    return line + _text(x, top - 30, "starter's", "middle", "tick") + _text(x, top - 15, label, "middle", "tick")


def _mark(mark: Mark, scale: Scale, top: float, width: float) -> Markup:
    estimate, y = mark.estimate, top + 34
    label = f"{mark.label}  {tick_text(round(estimate.mean, 2))}"
    half = text_width(label, TEXT_SIZE + 2) / 2
    x = min(max(scale(estimate.mean), half), width - half)
    interval = Markup('<path class="interval {css}" d="M{low:.1f} {y}H{high:.1f}"/>').format(
        css=mark.css, low=scale(estimate.low), high=scale(estimate.high), y=y
    )
    dot = Markup('<circle class="dot {css}" cx="{x:.1f}" cy="{y}" r="5"/>').format(css=mark.css, x=scale(estimate.mean), y=y)
    return interval + dot + _text(x, y - 13, label, "middle", f"name {mark.css}")


def _share_mark(mark: ShareMark, scale: Scale, top: float, width: float) -> Markup:
    y, label = top + 34, mark.label
    while text_width(f"{label}  {mark.value}", TEXT_SIZE + 2) > width and len(label) > 1:
        label = label[:-2].rstrip() + "…"
    label = f"{label}  {mark.value}"
    half = text_width(label, TEXT_SIZE + 2) / 2
    x = min(max(scale(mark.share), half), width - half)
    drawn = Markup("")
    if mark.low is not None and mark.high is not None:
        drawn = Markup('<path class="interval {css}" d="M{low:.1f} {y}H{high:.1f}"/>').format(
            css=mark.css, low=scale(mark.low), high=scale(mark.high), y=y
        )
    dot = Markup('<circle class="dot {css}" cx="{x:.1f}" cy="{y}" r="5"/>').format(css=mark.css, x=scale(mark.share), y=y)
    return drawn + dot + _text(x, y - 13, label, "middle", f"name {mark.css}")


def _spoken_shares(marks: Sequence[ShareMark]) -> str:
    told = []
    for mark in marks:
        interval = "no interval"
        if mark.low is not None and mark.high is not None:
            interval = f"interval {100 * mark.low:.1f} to {100 * mark.high:.1f} %"
        told.append(f"{mark.label} {mark.value}, {interval}")
    return "; ".join(told) + "."


def _level(left: float, right: float, y: float, *, is_zero: bool) -> Markup:
    return Markup('<path class="{css}" d="M{left:.1f} {y:.1f}H{right:.1f}"/>').format(
        css="end" if is_zero else "grid", left=left, right=right, y=y
    )


def _curve(line: Line, x: Scale, y: Scale) -> Markup:
    places = [(x(step), y(value)) for step, value in line.points]
    path = "L".join(f"{left:.1f} {top:.1f}" for left, top in places)
    drawn = Markup('<path class="line {}" d="M{}"/>').format(line.css, path)
    if not line.has_dots:
        return drawn
    dots = Markup("").join(Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3"/>').format(*place) for place in places)
    return drawn + Markup('<g class="dot {}">{}</g>').format(line.css, dots)


def _text(x: float, y: float, text: str, anchor: str, css: str) -> Markup:
    return Markup('<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}">{text}</text>').format(
        x=x, y=y, anchor=anchor, css=css, text=text
    )
