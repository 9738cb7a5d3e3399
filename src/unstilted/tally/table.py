"""A tally as a page for the terminal: the answer first, then how sure it is, then everything else with its meaning."""

from collections.abc import Iterator
from typing import Literal

from rich.console import Console, ConsoleRenderable, Group
from rich.padding import Padding
from rich.panel import Panel as Frame
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from unstilted.stats.agreement import COEFFICIENTS, Agreed
from unstilted.stats.clusters import Share
from unstilted.tally.records import Agreement, Breakdown, Choice, Panel, Question, Ranking, Tally
from unstilted.tally.words import MAX_TOLD, count, percent, span

WIDTH = 100
GAUGE, SMALL_GAUGE = 41, 17
"""Characters of a gauge from 0 to 100 %; odd, so that one half has its own."""
MAX_RANKED = 25
SURE = 0.05


def print_tally(tally: Tally, console: Console) -> None:
    """Print a tally; pass a console on stdout."""
    width = min(console.width, WIDTH)
    console.print()
    for part in _page(tally):
        console.print(part, width=width)


def _page(tally: Tally) -> Iterator[ConsoleRenderable]:
    yield Frame(Text(tally.headline, style="bold"), title=tally.source, title_align="left", border_style="cyan", padding=(1, 2))
    for panel in tally.panels:
        yield from _panel(panel, is_only=len(tally.panels) == 1 and panel.kind == "human")
    if tally.calibration:
        yield _title("Judges beside people")
        for found in tally.calibration:
            about = ", ".join(part for part in (found.criterion, found.stratum) if part)
            yield _note(f"{found.judge}{f' ({about})' if about else ''}: {found.words}")
    yield Text()


def _panel(panel: Panel, is_only: bool) -> Iterator[ConsoleRenderable]:
    if not is_only:
        yield Text()
        yield Rule(panel.label, style="yellow" if panel.kind != "human" else "cyan")
    for question in panel.questions:
        yield from _question(question, "" if panel.kind == "human" else f" · {panel.kind}: no human took part")
    if panel.kind != "judge":
        yield _title("How steady raters are")
        yield _note(panel.words["steadiness"])
    elif panel.n_inconsistent:
        yield _note(f"{count(panel.n_inconsistent, 'verdict')} changed with the sides; they are inconsistent and count for no arm.")
    if panel.blinding:
        yield _title("Blinding")
        for found in panel.blinding:
            yield _note(f"{found.arm} and {found.other}: {found.words}")
    if panel.exclusions:
        yield _title("Left out")
        for left_out in panel.exclusions:
            yield _note(f"{left_out.reason}: {count(left_out.n_votes, 'vote')} by {count(left_out.n_raters, 'rater')}")


def _question(question: Question, label: str) -> Iterator[ConsoleRenderable]:
    asked = question.criterion or "all votes"
    yield Text()
    by = ", ".join([count(question.n_votes, "vote"), count(question.n_raters, "rater"), count(question.n_items, "item")])
    yield Rule(f"{asked}: {by}{label}", align="left")
    if len(question.choices) > MAX_TOLD:
        yield _title(f"Pairs{label}")
        yield _shares("pair", [(f"{each.arm} over {each.other}", each) for each in question.choices])
    else:
        for choice in question.choices:
            yield from _choice(choice, question, label)
    if question.ranking:
        yield _title("Ranking")
        if question.ranking.arms:
            yield _ranking(question.ranking)
        yield _note(question.words["ranking"])
    for breakdown in question.breakdowns:
        yield _title(f"By {breakdown.column}")
        yield _breakdown(breakdown)
    if question.skipped_columns:
        yield _note(f"Not broken down, too many values: {', '.join(question.skipped_columns)}.")
    if question.left_share:
        yield _title("Sides")
        yield _note(question.words["left_share"])
    if question.with_excluded:
        yield _title("With excluded votes")
        yield _note(question.words["with_excluded"])
    yield _title("Agreement")
    if question.agreement:
        yield _agreement(question.agreement)
        yield _note(f"{question.words['percent']} {question.words['alpha']} {question.words['categories']} {question.words['intervals']}")
    else:
        yield _note("No two raters voted on the same item and arms, so agreement is not known.")


def _choice(choice: Choice, question: Question, label: str) -> Iterator[ConsoleRenderable]:
    pair = f"{choice.arm} over {choice.other}"
    yield _title(f"{choice.arm} against {choice.other}{label}")
    if choice.share:
        yield Padding(_gauge_line(choice.share), (0, 0, 0, 2))
    counts = (
        f"{choice.arm} {choice.n_chosen:,} · {choice.other} {choice.n_other:,} · ties {choice.n_tie:,} · both bad {choice.n_both_bad:,}"
    )
    yield Padding(Text(counts, style="dim"), (0, 0, 0, 2))
    for name in (f"share {pair}", f"ties {choice.arm} and {choice.other}", f"controlled {pair}", f"anytime {pair}"):
        if name in question.words:
            yield _note(question.words[name])


def _gauge_line(share: Share) -> Text:
    line = Text.assemble((f"{percent(share.share):>7}  ", "bold"), gauge(share, GAUGE), ("  ", ""))
    if share.low is None or share.high is None:
        return line.append("no interval", style="yellow")
    return line.append(span(share.low, share.high))


def gauge(share: Share, n_cells: int) -> Text:
    """The share and its interval between 0 and 100 %, with a mark at one half; n_cells: odd."""
    cells = ["·"] * n_cells
    cells[n_cells // 2] = "┊"
    if share.low is not None and share.high is not None:
        for at in range(round(share.low * (n_cells - 1)), round(share.high * (n_cells - 1)) + 1):
            cells[at] = "━"
    cells[round(share.share * (n_cells - 1))] = "●"
    line = Text()
    for cell in cells:
        line.append(cell, style="cyan" if cell in "━●" else "dim")
    return line


def _breakdown(breakdown: Breakdown) -> ConsoleRenderable:
    is_one_pair = len({(choice.arm, choice.other) for choice in breakdown.choices}) == 1
    names = [choice.group or "(empty)" for choice in breakdown.choices]
    pairs = ["" if is_one_pair else f": {choice.arm} over {choice.other}" for choice in breakdown.choices]
    return _shares(breakdown.column, [(name + pair, each) for name, pair, each in zip(names, pairs, breakdown.choices, strict=True)])


def _shares(column: str, choices: list[tuple[str, Choice]]) -> ConsoleRenderable:
    table = _table(column, "share", "", "interval", "won / tie", "sure")
    for label, choice in choices:
        share = choice.share
        votes = f"{choice.n_chosen + choice.n_other:,} / {choice.n_tie + choice.n_both_bad:,}"
        if share is None:
            table.add_row(label, "", "", "no votes with a winner", votes, "")
        elif share.low is None or share.high is None:
            table.add_row(label, percent(share.share), gauge(share, SMALL_GAUGE), share.reason.partition(":")[0], votes, "")
        else:
            sure = "yes" if choice.p_adjusted is not None and choice.p_adjusted < SURE else "no"
            table.add_row(label, percent(share.share), gauge(share, SMALL_GAUGE), span(share.low, share.high), votes, sure)
    legend = f"sure: differs from one half even after allowing for the number of rows (Holm, {100 * SURE:g} %)"
    return Group(table, Padding(Text(legend, style="dim"), (0, 0, 0, 2)))


def _ranking(ranking: Ranking) -> ConsoleRenderable:
    table = _table("rank", "arm", "strength", "interval")
    for place, ranked in enumerate(ranking.arms[:MAX_RANKED], start=1):
        ranks = str(place)
        if ranked.best_rank is not None and ranked.worst_rank != ranked.best_rank:
            ranks = f"{ranked.best_rank} to {ranked.worst_rank}"
        interval = "" if ranked.low is None or ranked.high is None else f"{ranked.low:+.2f} to {ranked.high:+.2f}"
        table.add_row(ranks, ranked.arm, f"{ranked.strength:+.2f}", interval)
    if len(ranking.arms) > MAX_RANKED:
        table.add_row("", f"... and {len(ranking.arms) - MAX_RANKED} more, see the JSON file", "", "")
    return table


def _agreement(agreement: Agreement) -> ConsoleRenderable:
    table = _table("measure", "value", "interval")
    rows = zip(("percent", "Krippendorff's alpha", "Fleiss' kappa", "Gwet's AC1"), COEFFICIENTS, strict=True)
    for name, coefficient in rows:
        value: Agreed = getattr(agreement, coefficient)
        table.add_row(name, _value(value.value, name), _agreed_interval(value, name))
    table.add_row("alpha, tie halfway", f"{agreement.alpha_ordinal:.3f}", "")
    return table


def _value(value: float, name: str) -> str:
    return percent(value) if name == "percent" else f"{value:.3f}"


def _agreed_interval(agreed: Agreed, name: str) -> str:
    if agreed.low is None or agreed.high is None:
        return agreed.reason
    return span(agreed.low, agreed.high) if name == "percent" else f"{agreed.low:.3f} to {agreed.high:.3f}"


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", show_edge=False)
    for place, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if column in ("share", "strength", "value", "rank", "won / tie") else "left"
        width = 14 if place == 0 and column != "rank" else None
        table.add_column(column, justify=justify, no_wrap=place > 0 and column != "arm", overflow="fold", min_width=width)
    return table


def _title(text: str) -> ConsoleRenderable:
    return Padding(Text(text, style="bold"), (1, 0, 0, 0))


def _note(text: str) -> ConsoleRenderable:
    return Padding(Text(text), (0, 0, 0, 2))
