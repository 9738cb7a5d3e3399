"""Where a run's results come from: settings, versions, machine, durations and hashes of each stage, as rows of text."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from unstilted.recipe import Table
from unstilted.report.contents import Contents
from unstilted.report.wording import NOT_MEASURED, duration, fact, words
from unstilted.rundir import StageEntry

HASH_LENGTH = 16
"""Hexadecimal digits shown of a sha256; the manifest has all 64."""
MAX_DROPPED = 100
"""Rows left out that are listed; the rest is counted."""
UNTIMED = ("model", "report")
"""`model` is a table of settings without a stage, and this report isn't finished while it is written."""


@dataclass(frozen=True)
class Fact:
    """A name, its value in words, and what it means where the recipe says so."""

    name: str
    value: str
    meaning: str = ""


@dataclass(frozen=True)
class StageCard:
    """All that is known of one stage."""

    name: str
    about: str
    duration: str
    settings: tuple[Fact, ...]
    facts: tuple[Fact, ...]
    dropped: tuple[Fact, ...]
    """Rows of the pairs file that were left out: line and reason."""
    inputs: tuple[Fact, ...]
    outputs: tuple[Fact, ...]
    surroundings: tuple[Fact, ...]
    """End, git revision, machine and versions."""


def stage_cards(contents: Contents) -> list[StageCard]:
    """A card for each table of the recipe and each further stage of the manifest, in the order of the work."""
    tables = [name for name, table in contents.recipe if isinstance(table, Table)]
    cards = [_card(name, contents) for name in dict.fromkeys([*tables, *contents.stages])]
    return [replace(card, inputs=_hashes(contents.files)) if card.name == "report" else card for card in cards]


def run_facts(contents: Contents) -> list[Fact]:
    """What holds for the run as a whole."""
    return [
        Fact("Base model", fact(contents.model)),
        Fact("Licence of the weights", fact(contents.fact("train", "licence"))),
        Fact("Weights that answered", fact(contents.fact("respond", "weights"))),
        Fact("Engine", fact(contents.fact("respond", "engine"))),
        Fact("Pairs", pairs_text(contents)),
        Fact("Parameters trained", fact(contents.fact("train", "n_parameters_trained"))),
        Fact("Training ended", _ending(contents)),
        Fact("Peak memory of training", _gigabytes(contents.fact("train", "peak_memory_gb"))),
        Fact("Seed", str(contents.recipe.seed)),
        Fact("Machine", _joined(entry.machine for entry in contents.stages.values())),
        Fact("unstilted", _joined(entry.versions.get("unstilted", "") for entry in contents.stages.values())),
        Fact("Time in all stages", duration(sum(entry.duration_s for entry in contents.stages.values()) if contents.stages else None)),
    ]


def pairs_text(contents: Contents) -> str:
    """How many pairs trained and watched, and where they came from."""
    n_pairs, n_held_out = contents.fact("pairs", "n_pairs"), contents.fact("pairs", "n_held_out")
    source = contents.fact("pairs", "source") or contents.recipe.pairs.source
    return f"{fact(n_pairs)} pairs to learn from, {fact(n_held_out)} held out, from {fact(source)}"


def settings_of(contents: Contents, table_name: str) -> tuple[Fact, ...]:
    """Settings of a table as the stages used them, or as the recipe has them where no stage is in the manifest."""
    table = getattr(contents.recipe, table_name, None)
    if not isinstance(table, Table):
        return ()
    entries = [*filter(None, [contents.stages.get(table_name)]), *contents.stages.values()]
    used: dict[str, object] = next(
        (entry.settings[table_name] for entry in entries if isinstance(entry.settings.get(table_name), dict)), {}
    )
    fields = type(table).model_fields
    return tuple(Fact(name, _plain(used.get(name, value)), _meaning(fields[name].description)) for name, value in table)


def _card(name: str, contents: Contents) -> StageCard:
    entry = contents.stages.get(name)
    table = getattr(contents.recipe, name, None)
    facts = {} if entry is None else entry.facts
    return StageCard(
        name=name,
        about=" ".join((type(table).__doc__ or "").split()) if isinstance(table, Table) else "",
        duration="" if name in UNTIMED else duration(None if entry is None else entry.duration_s),
        settings=settings_of(contents, name),
        facts=tuple(Fact(words(key), fact(value)) for key, value in facts.items() if key != "dropped" or not _dropped(value)),
        dropped=_dropped(facts.get("dropped")),
        inputs=_hashes({} if entry is None else entry.inputs),
        outputs=_hashes({} if entry is None else entry.outputs),
        surroundings=_surroundings(entry),
    )


def _meaning(description: str | None) -> str:
    return " ".join((description or "").replace("`", "").split())


def _plain(value: object) -> str:
    """A setting nearly as the recipe writes it."""
    match value:
        case bool():
            return str(value).lower()
        case list() | tuple():
            return ", ".join(_plain(item) for item in value)
        case "":
            return '""'
        case _:
            return str(value)


def _dropped(value: object) -> tuple[Fact, ...]:
    rows = value if isinstance(value, list) else []
    shown = [Fact(f"line {fact(row.get('line'))}", fact(row.get("reason"))) for row in rows if isinstance(row, dict)]
    rest = [Fact("", f"and {len(shown) - MAX_DROPPED} more, in the manifest")] if len(shown) > MAX_DROPPED else []
    return tuple(shown[:MAX_DROPPED] + rest)


def _surroundings(entry: StageEntry | None) -> tuple[Fact, ...]:
    if entry is None:
        return ()
    ended = (Fact("finished", fact(entry.finished)), Fact("git revision", fact(entry.git_revision)), Fact("machine", fact(entry.machine)))
    return ended + tuple(Fact(name, version) for name, version in sorted(entry.versions.items()))


def _hashes(files: dict[str, str]) -> tuple[Fact, ...]:
    return tuple(Fact(name, digest[:HASH_LENGTH]) for name, digest in files.items())


def _ending(contents: Contents) -> str:
    reason, n_steps = contents.fact("train", "stopped"), contents.fact("train", "n_steps")
    if n_steps is None and contents.points:
        n_steps = contents.points[-1].step
    return NOT_MEASURED if reason is None and n_steps is None else f"after {fact(n_steps)} steps: {fact(reason)}"


def _gigabytes(value: object) -> str:
    text = fact(value)
    return text if text == NOT_MEASURED else f"{text} GB"


def _joined(values: Iterable[str]) -> str:
    """Different values in the order of their first appearance."""
    return "; ".join(dict.fromkeys(value for value in values if value)) or NOT_MEASURED
